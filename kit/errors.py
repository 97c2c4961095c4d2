"""Errors that name the thing, the value and what is allowed, and carry the documented errno."""

from __future__ import annotations

import difflib
import errno as _errno
import os
from collections.abc import Iterable

__all__ = ["DriverError", "Errno", "KitError", "ParameterError", "TraceFileError", "did_you_mean", "raise_for"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to `name`, or ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


class KitError(Exception):
    """Base of every error that the kit raises on purpose."""


class ParameterError(KitError, ValueError):
    """A parameter that cannot be used.

    Attributes
    ----------
    name : str
        The parameter.
    value : object
        What it was given.
    allowed : str
        What it may be, in words.
    """

    def __init__(self, name: str, value: object, allowed: str, hint: str = "") -> None:
        self.name, self.value, self.allowed = name, value, allowed
        super().__init__(f"{name} = {value!r}: allowed is {allowed}.{hint}")


class TraceFileError(ParameterError):
    """A recorded access trace that is missing, truncated or malformed."""


class DriverError(KitError, OSError):
    """A documented driver failure.

    Attributes
    ----------
    errno : int
        The documented errno, positive as in Python's `OSError`.
    status : str
        The driver's own status word, such as ``NV_ERR_NO_MEMORY``.
    step : str
        The documented function in which it arose.
    """

    def __init__(self, errno: int, status: str, step: str, detail: str = "") -> None:
        self.status, self.step = status, step
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{step}: {status} ({name}, {os.strerror(errno)})"
        OSError.__init__(self, errno, f"{text}: {detail}" if detail else text)


class Errno(int):
    """What a documented function returns when it fails: the negative errno, which remembers where it arose.

    Parameters
    ----------
    errno : int
        Positive, as in the `errno` module; the value of the object is its negative.
    step : str
        The documented function in which it arose.
    detail : str
        What was wrong, with the value.
    """

    step: str
    detail: str

    def __new__(cls, errno: int, step: str, detail: str = "") -> Errno:
        """Return the negative errno with its origin."""
        made = super().__new__(cls, -errno)
        made.step, made.detail = step, detail
        return made

    @property
    def name(self) -> str:
        """Its name, such as ``EFAULT``."""
        return _errno.errorcode.get(-self, str(-self))

    def __repr__(self) -> str:
        return f"-{self.name}"


def raise_for(result: int) -> int:
    """Return what a documented function returned, or raise `DriverError` when it is a failure."""
    if isinstance(result, Errno):
        raise DriverError(-result, result.name, result.step, result.detail)
    return result
