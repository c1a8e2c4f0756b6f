"""What load is on when, and which of it is measured."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.scenario import Closed, Open, Replay, Scenario, Steps, Sweep


@dataclass(frozen=True, slots=True)
class Stage:
    """One load for one time, in seconds since the bench began.

    Either ``users`` keep asking, or so many ``requests_per_second`` arrive, or, with neither, a trace is
    replayed. What begins within the window is measured: ``warm_up`` and ``cool_down`` are the shares of the
    stage at its two ends that are left out. Its last requests are finished under falling load, so the
    load stays on while those that are measured run: that is the cool-down.
    """

    index: int
    begin: float
    end: float
    users: int | None = None
    requests_per_second: float | None = None
    arrivals: str = "poisson"
    burstiness: float = 1.0
    warm_up: float = 0.1
    cool_down: float = 0.1

    @property
    def window(self) -> tuple[float, float]:
        """From when to when it is measured."""
        length = self.end - self.begin
        return self.begin + self.warm_up * length, self.end - self.cool_down * length

    @property
    def load(self) -> float:
        """Users, or requests per second; 0 of a replay."""
        return float(self.users or self.requests_per_second or 0)

    @property
    def label(self) -> str:
        """As a person would say it."""
        if self.users is not None:
            return f"{self.users} user{'s' if self.users != 1 else ''}"
        if self.requests_per_second is not None:
            return f"{self.requests_per_second:g} requests/s"
        return "replay"

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def fixed_stages(scenario: Scenario, begin: float, trace_seconds: float) -> list[Stage]:
    """All stages of a load that does not depend on what is measured; those of a sweep come one by one."""
    load, shares = scenario.load, (scenario.warm_up, scenario.cool_down)
    match load:
        case Closed():
            return [_stage(0, begin, scenario.duration, shares, users=load.users)]
        case Open():
            rate = load.requests_per_second
            stage = _stage(0, begin, scenario.duration, shares, requests_per_second=rate)
            return [_with_arrivals(stage, load.arrivals, load.burstiness)]
        case Replay():
            return [_stage(0, begin, trace_seconds, shares)]
        case Steps():
            stages: list[Stage] = []
            for step in load.steps:
                stages.append(
                    _stage(
                        len(stages),
                        stages[-1].end if stages else begin,
                        step.duration or scenario.duration,
                        shares,
                        users=step.users,
                        requests_per_second=step.requests_per_second,
                    )
                )
            return stages
        case Sweep():
            raise TypeError("a sweep chooses each stage by what the one before it showed")


def sweep_stage(
    scenario: Scenario, sweep: Sweep, index: int, begin: float, load: float, seconds: float
) -> Stage:
    """One stage of a sweep."""
    shares = (scenario.warm_up, scenario.cool_down)
    if sweep.over == "users":
        return _stage(index, begin, seconds, shares, users=round(load))
    return _stage(index, begin, seconds, shares, requests_per_second=load)


def _stage(
    index: int,
    begin: float,
    seconds: float,
    shares: tuple[float, float],
    users: int | None = None,
    requests_per_second: float | None = None,
) -> Stage:
    return Stage(
        index, begin, begin + seconds, users, requests_per_second,
        warm_up=shares[0], cool_down=shares[1],
    )  # fmt: skip


def _with_arrivals(stage: Stage, arrivals: str, burstiness: float) -> Stage:
    fields = stage.as_json() | {"arrivals": arrivals, "burstiness": burstiness}
    return Stage(**fields)


def stage_at(stages: Sequence[Stage], moment: float) -> Stage | None:
    """The stage that is on at a moment; ``stages`` are in order."""
    position = bisect.bisect_right([stage.begin for stage in stages], moment) - 1
    if position < 0 or moment >= stages[position].end:
        return None
    return stages[position]
