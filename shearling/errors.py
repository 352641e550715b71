"""What a user can put right. The CLI prints these and exits with 2; everything else is our fault and exits with 1.

And how a run of several ends that isn't at fault itself.
"""

import errno
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from math import isfinite
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # what the system calls it


class UserError(ValueError):
    """A mistake that the user can mend: what it concerns, what was found, what was expected, what to change."""

    def __init__(self, what: str, *, found: object, expected: object, change: str):
        self.what, self.found, self.expected, self.change = what, found, expected, change
        super().__init__(f"{what}: found {found}; expected {expected}; {change}")

    def __reduce__(self) -> tuple[Any, ...]:  # out of worker processes; an exception's own forgets keywords
        said = {"found": str(self.found), "expected": str(self.expected), "change": self.change}
        return partial(UserError, **said), (self.what,)


class UserErrors(UserError):
    """Several mistakes at once, so that nobody mends them one run at a time."""

    def __init__(self, errors: Sequence[UserError]):
        self.errors = tuple(errors)
        ValueError.__init__(self, "\n".join(str(error) for error in errors))

    def __reduce__(self) -> tuple[Any, ...]:
        return UserErrors, (self.errors,)


class Stopped(BaseException):
    """A run that was asked to stop by a signal, has saved what it is at and can go on."""

    def __init__(self, signal: int, said: str):
        self.signal = signal
        super().__init__(said)


class OnAnotherRank(RuntimeError):
    """Something went wrong there, and is said there."""

    def __init__(self) -> None:
        super().__init__("another rank could not do its part: see what it said")


def raise_all(errors: Sequence[UserError]) -> None:
    """Raises what has been collected, if anything: one error as itself, several together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors(errors)


def nearest(word: str, known: Sequence[str]) -> str:
    """The known words that come closest to `word`, as a hint to end a sentence with."""
    close = closest(word, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"


def closest(word: str, known: Sequence[str]) -> str | None:
    """The known word that comes closest to `word`, if one comes close."""
    return next(iter(get_close_matches(word, known, n=1, cutoff=0.5)), None)


def check_ranges(options: object, ranges: Mapping[str, tuple[float, float | None]]) -> None:
    """Raises ValueError, which a recipe's reader turns into a UserError, for the first option outside its range.

    A range includes its ends; None is no upper end, and an option that is None is left open.
    """
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not (isfinite(value) and low <= value and (high is None or value <= high)):
            raise ValueError(f"{name} from {low:g}" + (f" to {high:g}" if high is not None else ""))
