"""What happens to a user's mistake: one line, exit code 2, no traceback."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator

CONTROL = dict.fromkeys([*range(32), *range(127, 160)], " ")  # characters that move a terminal's cursor


class UserError(Exception):
    """A mistake of the user: one line naming the key or file, the value and the remedy; exit code 2.

    No ValueError, as tyro would take those for its own. What a file or a person gave may hold line breaks and
    control characters; here they become blanks.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.translate(CONTROL).split()))


# keys as services give them out, passwords in addresses, private keys; and long values of names that say so
SECRETS = re.compile(
    r"\b(?:(?:hf_|gh[pousr]_|AKIA)[A-Za-z0-9]{16,}|(?:github_pat_|glpat-|sk-|xox[a-z]-|AIza|eyJ)[\w.-]{16,})"
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*"
    r"|(?P<name>(?i:token|secret|password|passwd|api_?key|access_?key)[\"']?\s*[=:]\s*[\"']?)"
    r"(?=\S*\d)[\w+/=-]{16,}"
)


def masked(text: str) -> str:
    """Text in which everything that looks like a token, a password or a key is ***."""
    return SECRETS.sub(lambda found: f"{found['name'] or ''}***", text)


def check_at_least(key: str, value: float, minimum: float) -> None:
    if not minimum <= value < 2**53:  # whole numbers beyond are none to JSON and YAML
        below = " and below 2**53" if value >= 2**53 else ""
        raise UserError(f"{key} = {value} must be a finite number of at least {minimum}{below}")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and exit code 2, and Ctrl-C into one and 130.

    A reader like `head` may leave early.
    """
    importing = signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # as topogpt/__init__.py has set it
    if importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if importing:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on the command line."""
    with user_errors():
        main(sys.argv[1:])


def silence(*streams: int) -> None:
    """Let what is written to these descriptors vanish: nobody is there any more to read it."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
