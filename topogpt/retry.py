"""Trying again: the one loop for what a network, or a server, may do better a moment later."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

FIRST_WAIT_SECONDS = 2.0  # doubled after every try
LONGEST_WAIT_SECONDS = 60.0
LONGEST_ASKED_SECONDS = 300.0  # where the server says how long to wait (Retry-After)
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that may be others a moment later


def with_retries(
    what: str,
    call: Callable[[], Result],
    *,
    tries: int,
    may_pass: Callable[[Exception], bool],
    say: Callable[[str], object],
    in_words: Callable[[Exception], str] | None = None,
) -> Result:
    """Call until it works; the error that may not pass, or that of the last try, is raised as it is.

    Args:
        what: what is being done, for the line that is said before each further try.
        may_pass: whether trying again may help.
        in_words: an error as part of that line.
    """
    for attempt in range(1, tries + 1):
        try:
            return call()
        except Exception as error:
            if attempt == tries or not may_pass(error):
                raise
            wait = retry_after(error) or min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
            reason = in_words(error) if in_words else described(error)
            say(f"{what}: {reason[:200]}; try {attempt + 1} of {tries} in {wait:.0f} s")
        time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def status(error: Exception) -> int | None:
    """The HTTP status that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def retry_after(error: Exception) -> float | None:
    """Seconds that the server asks to wait, as far as we are willing to."""
    asked = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
    return min(float(asked), LONGEST_ASKED_SECONDS) if asked.isdigit() else None


def described(error: Exception) -> str:
    """An error in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
