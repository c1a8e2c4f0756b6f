"""Locust's part: users that come and go, in this process or in many, and what the processes tell each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import gevent
from locust import LoadTestShape, User, constant, task
from locust.env import Environment
from locust.rpc import Message
from locust.runners import MasterRunner, Runner, WorkerRunner

from loadtest.records import RequestRecord
from loadtest.stages import Stage, stage_at
from loadtest.station import Setup, Station
from loadtest.watch import Watch, WatchSample

_REPORT_SECONDS = 0.25
_IDLE_SECONDS = 0.05
# Requests in flight at the end of the time are finished and counted, if they take no longer than this.
GRACE_SECONDS = 300.0
_SETUP, _PROGRAM, _ABANDON, _REPORT = (
    "bench_setup",
    "bench_program",
    "bench_abandon",
    "bench_report",
)


class Post:
    """A process's station, once it has been set up, and its reports to the one that collects."""

    def __init__(self, environment: Environment, api_key: str | None) -> None:
        self.environment = environment
        self.api_key = api_key
        self.station: Station | None = None
        self._watch: Watch | None = None
        self._reported_samples = 0

    def set_up(self, setup: Setup, worker: int) -> Station:
        """Get ready to send."""
        self.station = Station(setup, worker, self.api_key, self._show)
        self._watch = Watch(worker, self.station.clock)
        gevent.spawn(self._watch.run, gevent.sleep)
        gevent.spawn(self._report_regularly)
        return self.station

    def report(self) -> None:
        """Send what has come since the last report."""
        if self.station is None or self._watch is None:
            return
        samples = self._watch.samples[self._reported_samples :]
        self._reported_samples += len(samples)
        as_of = self.station.clock()
        in_flight = self.station.in_flight
        assert self.environment.runner is not None
        self.environment.runner.send_message(
            _REPORT,
            {
                "worker": self.station.worker,
                "as_of": as_of,
                "in_flight": in_flight,
                "records": [record.as_dict() for record in self.station.take_finished()],
                "samples": [asdict(sample) for sample in samples],
            },
        )

    def _report_regularly(self) -> None:
        while True:
            gevent.sleep(_REPORT_SECONDS)
            self.report()

    def _show(self, record: RequestRecord) -> None:
        """Have Locust count it, for its web UI."""
        self.environment.events.request.fire(
            request_type=record.tenant,
            name="end to end",
            response_time=record.end_to_end_seconds * 1e3,
            response_length=record.completion_tokens or 0,
            exception=RuntimeError(record.error_message) if record.error else None,
            context={},
        )
        if record.ttft_seconds is not None:
            self.environment.events.request.fire(
                request_type=record.tenant,
                name="time to first token",
                response_time=record.ttft_seconds * 1e3,
                response_length=0,
                exception=None,
                context={},
            )


def user_class(post: Post) -> type[User]:
    """The one kind of Locust user: what it does depends on the stage that is on."""

    class LoadUser(User):
        """Holds conversations while users are wanted; one of a process sends what arrives by itself."""

        wait_time = constant(0)
        leaving = False

        def on_start(self) -> None:
            assert post.station is not None
            self.number = post.station.new_user()
            self.traffic = post.station.workload.traffic_of_user(self.number)
            self.done_stage = -1

        def stop(self, force: bool = False) -> bool:
            """Between two requests, not in the middle of one."""
            self.leaving = True
            return bool(super().stop(force))

        @task
        def take_part(self) -> None:
            station = post.station
            assert station is not None
            stage = station.stage
            if stage is None:
                gevent.sleep(_IDLE_SECONDS)
            elif stage.users is not None:
                station.converse(self.traffic, self.number, lambda: self.leaving)
            elif self.number == station.worker and self.done_stage < stage.index:
                self.done_stage = stage.index
                station.dispatch(stage)
            else:
                gevent.sleep(_IDLE_SECONDS)

    return LoadUser


class Collector:
    """Takes the reports of all processes in."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.samples: list[WatchSample] = []
        self._in_flight: dict[int, tuple[float, int]] = {}

    def take(self, message: dict[str, Any]) -> None:
        """One report."""
        self.records.extend(RequestRecord(**record) for record in message["records"])
        self.samples.extend(WatchSample(**sample) for sample in message["samples"])
        self._in_flight[message["worker"]] = (message["as_of"], message["in_flight"])

    @property
    def in_flight(self) -> int:
        """Requests open in all processes, as last heard."""
        return sum(count for _, count in self._in_flight.values())

    def idle_since(self, moment: float, workers: int) -> bool:
        """Whether all processes have said, after that moment, that nothing is open."""
        told = [count for as_of, count in self._in_flight.values() if as_of > moment]
        return len(told) >= workers and not any(told)


class Crowd:
    """All the processes that send, seen from the one that decides."""

    def __init__(
        self, api_key: str | None, master_at: tuple[str, int] | None, workers: int
    ) -> None:
        """``master_at`` is where workers are to come; None: this process sends by itself.

        ``lost`` may be set to what counts the workers that are known to be dead.
        """
        self.workers = workers
        self.lost: Callable[[], int] = lambda: 0
        self.collector = Collector()
        self.stages: list[Stage] = []
        self._users_wanted: int | None = None
        self.environment = Environment(stop_timeout=GRACE_SECONDS, reset_stats=False)
        self._post = Post(self.environment, api_key)
        self.environment.user_classes = [user_class(self._post)]
        if master_at is None:
            self.runner: Runner = self.environment.create_local_runner()
            _obey(self.runner, self._post)
        else:
            self.runner = self.environment.create_master_runner(*master_at)
        # Who they are, once the work has been shared out.
        self._members: frozenset[str] | None = None
        if isinstance(self.runner, MasterRunner):
            self._turn_away_latecomers(self.runner)
        self.runner.register_message(
            _REPORT, lambda environment, msg, **_: self.collector.take(msg.data)
        )

    def idle_since(self, moment: float) -> bool:
        """Whether all processes that are left have said, after that moment, that nothing is open."""
        return self.collector.idle_since(moment, self.workers - self.lost())

    @property
    def connected(self) -> int:
        """Worker processes that are there."""
        if not isinstance(self.runner, MasterRunner):
            return 1
        return int(self.runner.worker_count)

    def _turn_away_latecomers(self, runner: MasterRunner) -> None:
        """Locust would give them users, but the numbers of users and requests are those of the others."""
        handle = runner.handle_message

        def handle_message(client_id: str, msg: Message) -> None:
            if self._members is None or client_id in self._members:
                handle(client_id, msg)
            elif msg.type == "client_ready":
                runner.server.send_to_client(Message("ack", None, client_id))
            elif msg.type == "heartbeat":
                # Now it is up, and ends whole.
                runner.server.send_to_client(Message("quit", None, client_id))

        runner.handle_message = handle_message  # type: ignore[method-assign]

    def set_up(self, setup: Setup) -> None:
        """Tell all processes what they must know."""
        if isinstance(self.runner, MasterRunner):
            self._members = frozenset(self.runner.clients)
        self.runner.send_message(_SETUP, setup.as_message())

    def program(self, stages: Sequence[Stage]) -> None:
        """Tell all processes what to send and when."""
        self.stages = list(stages)
        self.runner.send_message(_PROGRAM, {"stages": [stage.as_json() for stage in stages]})

    def start(self, users: int) -> None:
        """Have Locust bring so many users, once."""
        self.runner.start(users, spawn_rate=max(users, 1))

    def follow_stages(self, clock: Callable[[], float]) -> None:
        """Have Locust bring as many users as the stages say, as these change."""
        self.environment.shape_class = _shape(self, clock)
        self.runner.start_shape()

    def abandon(self) -> None:
        """Do not wait for what is in flight."""
        self.runner.send_message(_ABANDON, {})

    def quit(self) -> None:
        """Send all users and workers home. Nothing may be in flight."""
        self.environment.stop_timeout = 1
        self.runner.quit()


def _shape(crowd: Crowd, clock: Callable[[], float]) -> LoadTestShape:
    class StagesShape(LoadTestShape):
        """As many users as the stage wants that is on, or was last; of arrivals, one for each process."""

        def tick(self) -> tuple[int, float]:
            now = clock()
            stage = stage_at(crowd.stages, now) or crowd.stages[-1]
            users = crowd.workers if stage.users is None else stage.users
            # So many a second come or go; the greatest change there can be takes one.
            most = max(one.users or 0 for one in crowd.stages)
            return users, float(max(users, most, 1))

    shape: LoadTestShape = StagesShape()  # type: ignore[no-untyped-call]
    return shape


def _obey(runner: Any, post: Post) -> None:
    """Do what :class:`Crowd` says."""

    def set_up(environment: Environment, msg: Any, **_: object) -> None:
        post.set_up(Setup.from_message(msg.data), max(runner.worker_index, 0))

    def program(environment: Environment, msg: Any, **_: object) -> None:
        if post.station is not None:
            post.station.program([Stage(**stage) for stage in msg.data["stages"]])

    def abandon(environment: Environment, msg: Any, **_: object) -> None:
        if post.station is not None:
            post.station.abandon()
            post.report()

    runner.register_message(_SETUP, set_up)
    runner.register_message(_PROGRAM, program)
    runner.register_message(_ABANDON, abandon)


def work_for(host: str, port: int, api_key: str | None, gone: Callable[[], bool]) -> bool:
    """Be a worker of the bench at that address until it ends, or ``gone`` says that nobody wants it.

    Tells whether there was work to do.
    """
    environment = Environment(stop_timeout=GRACE_SECONDS)
    post = Post(environment, api_key)
    environment.user_classes = [user_class(post)]
    runner: WorkerRunner = environment.create_worker_runner(host, port)
    _obey(runner, post)
    while len(runner.greenlet) and not gone():
        gevent.sleep(_IDLE_SECONDS)
    return post.station is not None


def quiet_logs() -> None:
    """Locust's own words are of no use here, but for its errors."""
    logging.getLogger("locust").setLevel(logging.ERROR)
