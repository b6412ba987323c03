"""What happens to a user's mistake: one line, exit code 2, no traceback."""

import contextlib
import os
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


def check_at_least(key: str, value: float, minimum: float) -> None:
    if not minimum <= value < 2**53:  # whole numbers beyond are none to JSON and YAML
        below = " and below 2**53" if value >= 2**53 else ""
        raise UserError(f"{key} = {value} must be a finite number of at least {minimum}{below}")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and exit code 2; a reader like `head` may leave early."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on the command line."""
    with user_errors():
        main(sys.argv[1:])
