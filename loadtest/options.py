"""What a bench is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from loadtest.amounts import constant
from loadtest.scenario import (
    Closed,
    Open,
    Replay,
    Scenario,
    ScenarioError,
    Steps,
    Sweep,
    parse_duration,
)
from serving.config import CostConfig

__all__ = ["BenchOptions", "Join", "overridden", "parse_duration"]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """A load test's settings; ``report.json`` repeats them all but the key.

    ``url`` ends in ``/v1``. ``model`` None is the first that the server lists, ``api_key`` None is
    ``$OPENAI_API_KEY``, ``out`` None a new folder named after the time. ``workers`` more processes of this
    machine send the load, 0: this one; ``remote_workers`` more join at ``bind`` (host, port). ``slo`` are
    conditions as of :func:`loadtest.gate.parse_objective`, ``baseline`` an earlier ``report.json``.
    ``prices_dir`` has commercial prices, if ``rigserve cost prices --update`` has fetched some.
    """

    url: str
    scenario_name: str
    scenario: Scenario
    cost: CostConfig
    model: str | None = None
    api_key: str | None = None
    out: Path | None = None
    web: bool = False
    seed: int = 0
    workers: int = 0
    remote_workers: int = 0
    bind: tuple[str, int] | None = None
    slo: tuple[str, ...] = ()
    baseline: Path | None = None
    prices_dir: Path | None = None

    def to_json(self) -> str:
        """For the process that runs the bench."""
        return _BENCH.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> BenchOptions:
        """The other end of :meth:`to_json`."""
        return _BENCH.validate_json(text)


@dataclass(frozen=True, slots=True)
class Join:
    """Be a worker of the bench that listens at ``host`` and ``port``."""

    host: str
    port: int
    api_key: str | None = None

    def to_json(self) -> str:
        """For the process that works."""
        return _JOIN.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> Join:
        """The other end of :meth:`to_json`."""
        return _JOIN.validate_json(text)


_BENCH = TypeAdapter(BenchOptions)
_JOIN = TypeAdapter(Join)


def overridden(
    scenario: Scenario,
    *,
    users: int | None = None,
    requests_per_second: float | None = None,
    duration_seconds: float | None = None,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
) -> Scenario:
    """A scenario with what the command line says instead; raises :class:`ScenarioError` where it cannot."""
    changes: dict[str, object] = {}
    if users is not None and requests_per_second is not None:
        raise ScenarioError("--users and --rate exclude each other: users wait, arrivals do not")
    if users is not None or requests_per_second is not None:
        if isinstance(scenario.load, Steps | Sweep | Replay):
            raise ScenarioError(
                f"--users and --rate do not go with a scenario whose load is of kind {scenario.load.kind!r}; "
                "change its file"
            )
        if users is not None:
            changes["load"] = Closed(kind="closed", users=users)
        elif isinstance(scenario.load, Open):
            changes["load"] = scenario.load.model_copy(
                update={"requests_per_second": requests_per_second}
            )
        else:
            assert requests_per_second is not None
            changes["load"] = Open(kind="open", requests_per_second=requests_per_second)
    if isinstance(scenario.load, Replay):
        for option, value in (
            ("--duration", duration_seconds),
            ("--prompt-tokens", prompt_tokens),
            ("--output-tokens", output_tokens),
        ):
            if value is not None:
                raise ScenarioError(f"{option} does not go with a replay: it is the trace's")
    if duration_seconds is not None:
        if isinstance(scenario.load, Steps) and any(step.duration for step in scenario.load.steps):
            raise ScenarioError(
                "--duration does not go with steps that have their own; change its file"
            )
        changes["duration"] = duration_seconds
    lengths = {
        name: constant(value)
        for name, value in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens))
        if value is not None
    }
    if lengths:
        changes["traffic"] = tuple(one.model_copy(update=lengths) for one in scenario.traffic)
    return scenario.model_copy(update=changes)
