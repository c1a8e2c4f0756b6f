"""Sends the requests of one process, and keeps their records until they are fetched."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import gevent
from gevent.event import Event

from loadtest.arrivals import arrival_times
from loadtest.client import Client, Reply
from loadtest.records import RequestRecord
from loadtest.scenario import Traffic
from loadtest.stages import Stage, stage_at
from loadtest.texts import Gauge
from loadtest.traces import TraceRequest
from loadtest.workload import Conversation, Request, Workload, gauge_key

_AFTER_ERROR_SECONDS = 1.0  # a server that refuses is not hammered


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a process must know to send its share. ``epoch`` is the bench's beginning, in Unix time."""

    url: str
    model: str
    traffic: tuple[Traffic, ...]
    gauges: dict[str, Gauge]
    ignore_eos: bool
    seed: int
    epoch: float
    workers: int
    trace: tuple[TraceRequest, ...] = ()
    speed: float = 1.0

    def as_message(self) -> dict[str, Any]:
        """For another process."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "traffic": [traffic.model_dump(mode="json") for traffic in self.traffic],
            "gauges": {name: asdict(gauge) for name, gauge in self.gauges.items()},
            "trace": [asdict(request) for request in self.trace],
        }

    @staticmethod
    def from_message(message: dict[str, Any]) -> Setup:
        """The other end of :meth:`as_message`."""
        return Setup(
            **{name: message[name] for name in _PLAIN},
            traffic=tuple(Traffic.model_validate(traffic) for traffic in message["traffic"]),
            gauges={name: Gauge(**gauge) for name, gauge in message["gauges"].items()},
            trace=tuple(
                TraceRequest(**request | {"blocks": tuple(request["blocks"])})
                for request in message["trace"]
            ),
        )


_PLAIN = ("url", "model", "ignore_eos", "seed", "epoch", "workers", "speed")


def clock_since(epoch: float) -> Callable[[], float]:
    """A clock of seconds since a moment of Unix time, as even as the monotonic one."""
    offset = time.time() - time.perf_counter() - epoch
    return lambda: time.perf_counter() + offset


@dataclass
class Station:
    """One process's part of the load: its users' conversations, its share of the arrivals.

    ``on_record`` is called with each record that is complete.
    """

    setup: Setup
    worker: int
    api_key: str | None
    on_record: Callable[[RequestRecord], None]
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup = self.setup
        self.clock = clock_since(setup.epoch)
        self.workload = Workload(
            setup.traffic, setup.model, setup.gauges, setup.seed, ignore_eos=setup.ignore_eos
        )
        self._numbers = itertools.count(self.worker, setup.workers)
        self._conversations = itertools.count(self.worker, setup.workers)
        self._users = itertools.count(self.worker, setup.workers)
        self._in_flight: dict[int, RequestRecord] = {}
        self._idle: dict[str | None, list[Client]] = {}
        self._finished: list[RequestRecord] = []
        self._changed = Event()

    def program(self, stages: Sequence[Stage]) -> None:
        """What to send, from the first stage on."""
        self.stages = list(stages)
        self._changed.set()
        self._changed = Event()

    @property
    def stage(self) -> Stage | None:
        """What is on now."""
        return stage_at(self.stages, self.clock())

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return len(self._in_flight)

    def take_finished(self) -> list[RequestRecord]:
        """The records since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def new_user(self) -> int:
        """The number of the next user of this process; no two in all processes are alike."""
        return next(self._users)

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of the load that is on."""
        stage = self.stage
        left = 0.05 if stage is None else max(self.stages[-1].end - self.clock(), 0.0)
        self._changed.wait(min(seconds, left))

    def converse(
        self, traffic: Traffic, user: int, leaving: Callable[[], bool], due_at: float | None = None
    ) -> None:
        """Hold one conversation, to its end or the load's; the first request was due at ``due_at``."""
        conversation = self.workload.conversation(traffic, next(self._conversations))
        client = self._client(traffic)
        failed = False
        while not (conversation.over or failed or leaving()):
            stage = self.stage
            if stage is None:
                break
            record = self._ask(client, conversation, conversation.next(), user, stage, due_at)
            failed = record.error is not None
            if failed and due_at is None:
                self.pause(_AFTER_ERROR_SECONDS)
            pause = conversation.think_seconds()
            if pause and not failed and (due_at is None or not conversation.over):
                self.pause(pause)
            if due_at is not None:
                due_at = record.ended_at + pause
        self._idle[traffic.api_key_env].append(client)

    def _ask(
        self,
        client: Client,
        conversation: Conversation,
        request: Request,
        user: int,
        stage: Stage,
        due_at: float | None,
    ) -> RequestRecord:
        record, reply = self.send(
            client, conversation.traffic, request, user=user, stage=stage.index, due_at=due_at
        )
        if record.error is None:
            conversation.answered(reply)
        return record

    def send(
        self,
        client: Client,
        traffic: Traffic,
        request: Request,
        *,
        user: int,
        stage: int = 0,
        due_at: float | None = None,
        warmup: bool = False,
    ) -> tuple[RequestRecord, Reply]:
        """Send one request, read its answer to the end, and keep its record."""
        record = RequestRecord(
            number=next(self._numbers),
            user=user,
            warmup=warmup,
            started_at=self.clock() if due_at is None else due_at,
            wanted_prompt_tokens=request.prompt_tokens,
            tenant=traffic.tenant,
            service_tier="flex" if request.body.get("service_tier") == "flex" else "default",
            turn=request.turn,
            stage=stage,
            worker=self.worker,
        )
        self._in_flight[record.number] = record
        reply = client.stream(request.path, request.body, record, self.clock)
        if self._in_flight.pop(record.number, None) is None:
            return record, reply  # given up and counted already
        plain = request.turn == 0 and not traffic.system_prompt_tokens and not traffic.tools
        if plain and record.prompt_tokens is not None:
            self.setup.gauges[gauge_key(traffic)].learn(request.words, record.prompt_tokens)
        if due_at is None:
            record.started_at = record.sent_at
        self._finished.append(record)
        self.on_record(record)
        return record, reply

    def dispatch(self, stage: Stage) -> None:
        """Send this process's share of the requests that are due in a stage; returns when all are sent."""
        rng = random.Random(f"{self.setup.seed}/arrivals of {stage.index}")
        due: Iterator[tuple[float, TraceRequest | None]]
        if stage.requests_per_second is None:
            due = ((request.at_seconds / self.setup.speed, request) for request in self.setup.trace)
        else:
            moments = arrival_times(
                stage.arrivals, stage.requests_per_second, stage.burstiness, rng
            )
            due = ((at, None) for at in moments)
        for number, (at, request) in enumerate(due):
            traffic = self.workload.traffic_of_arrival(rng)
            if number % self.setup.workers != self.worker:
                continue
            due_at = stage.begin + at
            if self._is_over(stage, due_at):
                return
            gevent.sleep(max(due_at - self.clock(), 0.0))
            if self._is_over(stage, due_at):
                return
            if request is None:
                gevent.spawn(self.converse, traffic, number, lambda: False, due_at)
            else:
                gevent.spawn(self._replay, request, number, stage, due_at)

    def _is_over(self, stage: Stage, moment: float) -> bool:
        """Whether a moment lies beyond a stage's end, which may have been cut short, however late it is now."""
        return stage.index >= len(self.stages) or moment >= self.stages[stage.index].end

    def _replay(self, request: TraceRequest, number: int, stage: Stage, due_at: float) -> None:
        traffic, ask = self.workload.replayed(request, number)
        client = self._client(traffic)
        self.send(client, traffic, ask, user=number, stage=stage.index, due_at=due_at)
        self._idle[traffic.api_key_env].append(client)

    def abandon(self) -> None:
        """Count the requests that are still open as errors, once and for all."""
        for record in map(replace, self._in_flight.values()):
            record.ended_at = self.clock()
            record.error, record.error_message = "abandoned", "not finished when the bench ended"
            self._finished.append(record)
        self._in_flight.clear()

    def _client(self, traffic: Traffic) -> Client:
        idle = self._idle.setdefault(traffic.api_key_env, [])
        if idle:
            return idle.pop()
        key = self.api_key
        if traffic.api_key_env is not None:
            key = os.environ.get(traffic.api_key_env)
        return Client(self.setup.url, key)
