"""Leads a crowd through the stages of a scenario."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from gevent.event import Event

from loadtest.crowd import GRACE_SECONDS, Crowd
from loadtest.knee import KneeSearch
from loadtest.measures import marked, summarize
from loadtest.scenario import Scenario, Sweep
from loadtest.stages import Stage, fixed_stages, sweep_stage

# Until all processes have heard of a stage, and users are there.
_HEAD_START_SECONDS = 0.3
# Locust looks once a second how many users are wanted; those of a greater load before must be gone.
_CHANGE_SECONDS = 1.0
_LOOK_SECONDS = 0.2
# A stage of a sweep that measures fewer is repeated, up to so many times as long.
_FEWEST_REQUESTS = 6
_LONGEST = 2


@dataclass(frozen=True, slots=True)
class Orders:
    """What comes from the person who watches: ``end`` early, or ``abandon`` what is in flight, too."""

    end: Event
    abandon: Event


class Conductor:
    """Runs one scenario once. ``show`` is called again and again with what is on and why we wait."""

    def __init__(
        self,
        crowd: Crowd,
        scenario: Scenario,
        clock: Callable[[], float],
        orders: Orders,
        show: Callable[[Stage, str], None],
    ) -> None:
        self.stages: list[Stage] = []
        self.knee: float | None = None
        self._crowd = crowd
        self._scenario = scenario
        self._clock = clock
        self._orders = orders
        self._show = show

    def run(self, trace_seconds: float) -> None:
        """All stages; ``stages`` and ``knee`` then say what they were."""
        load = self._scenario.load
        if isinstance(load, Sweep):
            self._sweep(load)
        else:
            self._play(fixed_stages(self._scenario, self._begin(), trace_seconds))

    def run_until_ended(self, users: int) -> None:
        """One stage for as long as nobody ends it, with as many users as the web UI says."""
        self.stages = [Stage(0, self._begin(), float("inf"), users)]
        self._crowd.program(self.stages)
        self._crowd.start(users)
        self._wait_for(self.stages[0])
        self._drain(self.stages[0])

    def _sweep(self, sweep: Sweep) -> None:
        search = KneeSearch(sweep)
        seconds = self._scenario.duration
        longest = seconds * _LONGEST
        load = search.next_load()
        while load is not None:
            begin, index = self._begin(), len(self.stages)
            self._play([sweep_stage(self._scenario, sweep, index, begin, load, seconds)])
            stage = self.stages[-1]
            records = [
                record for record in marked(self._crowd.collector.records, self.stages)
                if record.stage == stage.index
            ]  # fmt: skip
            summary = summarize(records, stage.window, self._scenario.slo)
            requests = max(summary.totals.requests, 1)
            throughput = summary.completion_tokens_per_second or summary.requests_per_second
            if self._orders.end.is_set():
                return
            if summary.totals.requests < _FEWEST_REQUESTS and seconds < longest:
                seconds *= 2  # nothing can be concluded from so few: once more, and longer
                continue
            search.saw(stage.load, throughput, summary.totals.errors / requests)
            load = search.next_load()
        self.knee = search.knee

    def _begin(self) -> float:
        change = _CHANGE_SECONDS if self.stages else 0.0
        return self._clock() + change + _HEAD_START_SECONDS

    def _play(self, stages: list[Stage]) -> None:
        """Stages that follow each other without a pause, and the end of what they began."""
        first = not self.stages
        self.stages += stages
        self._crowd.program(self.stages)
        if first:
            self._crowd.follow_stages(self._clock)
        for stage in stages:
            self._wait_for(stage)
            if self._orders.end.is_set():
                break
        self._drain(self.stages[-1])

    def _wait_for(self, stage: Stage) -> None:
        while (left := stage.end - self._clock()) > 0:
            self._show(stage, "load")
            if self._orders.end.wait(min(left, _LOOK_SECONDS)):
                self._cut_short()
                return

    def _cut_short(self) -> None:
        """The stage that is on ends now; those after it never were."""
        now = self._clock()
        self.stages = [
            replace(stage, end=min(stage.end, now)) for stage in self.stages if stage.begin < now
        ]
        self._crowd.program(self.stages)

    def _drain(self, stage: Stage) -> None:
        """Wait until what was sent is answered, and all records have come."""
        ended = max(min(stage.end, self._clock()), stage.begin)
        deadline = time.monotonic() + GRACE_SECONDS
        while not self._crowd.idle_since(ended):
            self._show(stage, "finishing")
            if time.monotonic() > deadline or self._orders.abandon.is_set():
                self._crowd.abandon()
                deadline = float("inf")
                asked = self._clock()
                self._wait_until_idle(asked)
                return
            self._orders.abandon.wait(_LOOK_SECONDS / 4)

    def _wait_until_idle(self, asked: float) -> None:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if self._crowd.idle_since(asked):
                return
            time.sleep(_LOOK_SECONDS / 4)
