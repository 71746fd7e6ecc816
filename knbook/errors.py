"""The two errors that the press raises on purpose, and the context that turns the refusals of other calls into one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UsageError(Exception):
    """A request that cannot be carried out as it was made: a wrong name, value, folder or file."""

    exit_code = 2


class RunError(Exception):
    """A run that was asked for correctly and failed: a notebook, a sweep or the build of the book."""

    exit_code = 1


@contextlib.contextmanager
def refused(where: str = "") -> Iterator[None]:
    """Raise UsageError in place of ValueError and TypeError, which calls that check what a user gave raise."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}{error}") from error
