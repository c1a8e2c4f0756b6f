"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad it is: a problem keeps rigserve, or a part of it, from working; a warning costs speed or safety."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNCHECKED = "unchecked"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``mend`` is what to do about it; of what was not checked, how to have it checked."""

    check: str
    status: Status
    says: str
    mend: str = ""


def ok(check: str, says: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Status.OK, says)


def warning(check: str, says: str, mend: str) -> Finding:
    """It works, but slower or less safely than it could."""
    return Finding(check, Status.WARNING, says, mend)


def problem(check: str, says: str, mend: str) -> Finding:
    """Something does not work."""
    return Finding(check, Status.PROBLEM, says, mend)


def unchecked(check: str, says: str, mend: str = "") -> Finding:
    """Nobody knows."""
    return Finding(check, Status.UNCHECKED, says, mend)
