"""What happens to a user's mistake: one line, exit code 2, no traceback."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator


class UserError(Exception):
    """A mistake of the user: one line naming the key or file, the value and the remedy; exit code 2.

    No ValueError, as tyro would take those for its own.
    """


def check_at_least(key: str, value: float, minimum: float) -> None:
    if not (math.isfinite(value) and value >= minimum):
        raise UserError(f"{key} = {value} must be a finite number of at least {minimum}")


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
