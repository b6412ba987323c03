"""python -m evals.NAME: Ctrl-C ends it without a traceback while it still imports, as topogpt/__init__.py says."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
