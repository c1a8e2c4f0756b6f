"""How much of the processors other programs take, while something of ours is measured."""

from __future__ import annotations

import os
from pathlib import Path

from serving.hardware.memory import family_of

_PROC = Path("/proc")
# Of the first line of /proc/stat, after its name: what is idle (proc_stat(5)), and guests', which users' count in.
_IDLE, _COUNTED = (3, 4), 8
_USER, _SYSTEM = 13, 14


class Others:
    """Counts from its making on; what this process, and ``pid`` with all below it, take is ours."""

    def __init__(self, pid: int, proc: Path = _PROC) -> None:
        self._pid, self._proc = pid, proc
        self._busy, self._all = self._total()
        self._ours = self._of_ours()

    def share(self) -> float | None:
        """The share of all processors' time that others took, and what a hypervisor kept; None where nobody tells."""
        busy, total = self._total()
        if total <= self._all:
            return None
        others = busy - self._busy - (self._of_ours() - self._ours)
        return max(0.0, others / (total - self._all))

    def _total(self) -> tuple[int, int]:
        """Ticks that processors were busy, and all ticks."""
        try:
            line = (self._proc / "stat").read_text().partition("\n")[0]
        except OSError:
            return 0, 0
        ticks = [int(each) for each in line.split()[1:]][:_COUNTED]
        return sum(ticks) - sum(ticks[place] for place in _IDLE), sum(ticks)

    def _of_ours(self) -> int:
        return sum(self._ticks(pid) for pid in family_of(self._pid, self._proc) | {os.getpid()})

    def _ticks(self, pid: int) -> int:
        try:
            stat = (self._proc / str(pid) / "stat").read_text()
        except OSError:
            return 0
        # The name in parentheses may hold anything; the field after it is the third.
        fields = stat.rpartition(")")[2].split()
        return int(fields[_USER - 2]) + int(fields[_SYSTEM - 2])
