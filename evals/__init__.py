"""python -m evals.NAME: while it imports, Ctrl-C ends it at once and without a traceback."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
