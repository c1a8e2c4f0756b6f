"""Scenarios: who sends what, how often, and for how long, as a YAML file says it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from loadtest.amounts import Amount, constant
from loadtest.section import Section
from serving.config.document import ConfigError, KeyPath, read_document

FOLDER = Path(__file__).parent / "scenarios"
DEFAULT = "steady"

# What a trace says of its requests. Their prompts are whole ones.
_TRACED = ("turns", "prompt_tokens", "output_tokens", "think_seconds", "system_prompt_tokens")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """``30s``, ``2m``, ``1h``, ``7d`` or plain seconds, in seconds; raises ``ValueError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a duration; write 30s, 2m, 1h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def _seconds(value: Any) -> Any:
    return parse_duration(value) if isinstance(value, str) else value


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]


# Each of these would be overwritten, or make something else of what is measured.
_INSTEAD = {
    "model": "; see --model",
    "max_tokens": "; write output_tokens",
    "tools": "; write tools: true",
    "ignore_eos": "; write it beside fields",
}
_OWN_FIELDS = {"messages", "prompt", "stream", "stream_options", "n", *_INSTEAD}


class Traffic(Section):
    """One kind of request: what it holds, and whose it is."""

    tenant: str = Field("default", min_length=1, description="Its name in the report.")
    weight: float = Field(1, gt=0, description="Its share of the users, or of the arrivals.")
    api_key_env: str | None = Field(
        None, description="Environment variable with this tenant's API key; unset: the bench's."
    )
    endpoint: Literal["chat", "completions"] = "chat"
    text: Literal["prose", "code"] = Field(
        "prose", description="Alice in Wonderland, or the source of Python's standard library."
    )
    system_prompt_tokens: int = Field(
        0, ge=0, description="A system prompt that all conversations of this tenant share."
    )
    tools: bool = Field(False, description="Offer tools; calls are answered with a made-up result.")
    turns: Amount = Field(
        constant(1), description="Requests of a conversation; each repeats what was said before."
    )
    prompt_tokens: Amount = Field(
        constant(78),
        description="New tokens a turn; of a first turn, those of the chat template, too.",
    )
    output_tokens: Amount = Field(constant(128), description="max_tokens of the request.")
    ignore_eos: bool = Field(
        True, description="Have all of output_tokens generated, where the server can."
    )
    think_seconds: Amount = Field(constant(0), description="Pause of a user before a next request.")
    fields: dict[str, Any] = Field(
        {"temperature": 0}, description="Further fields of each request's body."
    )

    @field_validator("fields")
    @classmethod
    def _leave_what_is_the_benchs(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _OWN_FIELDS & value.keys():
            raise ValueError(f"{name!r} is set by the bench itself{_INSTEAD.get(name, '')}")
        return value

    @model_validator(mode="after")
    def _fits_its_endpoint(self) -> Self:
        if self.endpoint == "completions" and (self.tools or self.system_prompt_tokens):
            raise ValueError("tools and system_prompt_tokens need endpoint: chat")
        if self.endpoint == "completions" and self.turns != constant(1):
            raise ValueError("turns need endpoint: chat; completions repeat nothing that was said")
        return self


class Closed(Section):
    """A fixed number of users; each waits for its answer, thinks, and asks again."""

    kind: Literal["closed"]
    users: int = Field(8, ge=1)


class Open(Section):
    """Requests that come whether or not earlier ones are answered; latency counts from when they were due."""

    kind: Literal["open"]
    requests_per_second: float = Field(gt=0)
    arrivals: Literal["constant", "poisson", "gamma"] = "poisson"
    burstiness: float = Field(
        1.0, gt=0, description="Shape of the gamma: 1 is Poisson, less comes in bursts."
    )

    @model_validator(mode="after")
    def _burstiness_is_used(self) -> Self:
        if self.burstiness != 1.0 and self.arrivals != "gamma":
            raise ValueError("burstiness needs arrivals: gamma")
        return self


class Step(Section):
    """One step of a staircase."""

    users: int | None = Field(None, ge=1)
    requests_per_second: float | None = Field(None, gt=0)
    duration: Duration | None = Field(None, description="Unset: the scenario's.")


class Steps(Section):
    """A staircase: users, or arrivals, change without a pause. Each step is measured by itself."""

    kind: Literal["steps"]
    steps: tuple[Step, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        ways = {(s.users is not None, s.requests_per_second is not None) for s in self.steps}
        if ways not in ({(True, False)}, {(False, True)}):
            raise ValueError("give each step users, or each requests_per_second")
        return self


class Sweep(Section):
    """More and more load until it brings nothing, then between the last two: finds the knee.

    The knee is the least load that gives ``knee_share`` of the greatest throughput seen.
    """

    kind: Literal["sweep"]
    over: Literal["users", "requests_per_second"] = "users"
    start: float = Field(1, gt=0)
    most: float = Field(256, gt=0, description="Never more load than this.")
    max_stages: int = Field(10, ge=2, le=100)
    knee_share: float = Field(0.9, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _begins_within_its_bounds(self) -> Self:
        if self.start > self.most:
            raise ValueError(f"start ({self.start:g}) is above most ({self.most:g})")
        if self.over == "users" and (self.start % 1 or self.most % 1):
            raise ValueError("over: users needs whole numbers for start and most")
        return self


class Replay(Section):
    """A recorded trace: its moments and its lengths, with our text."""

    kind: Literal["replay"]
    trace: str = Field(description="A file of Azure's LLM traces, of BurstGPT, or of Mooncake.")
    speed: float = Field(1.0, gt=0, description="2: twice as fast as it was.")
    most_requests: int | None = Field(None, ge=1, description="Only the first so many.")


Load = Annotated[Closed | Open | Steps | Sweep | Replay, Field(discriminator="kind")]


class Slo(Section):
    """What an answer must keep to, to count for goodput; unset limits do not count."""

    ttft_ms: float | None = Field(None, gt=0)
    tpot_ms: float | None = Field(None, gt=0)
    end_to_end_ms: float | None = Field(None, gt=0)


class Scenario(Section):
    """The whole file."""

    description: str = ""
    traffic: tuple[Traffic, ...] = Field((Traffic(),), min_length=1, strict=False)
    load: Load = Closed(kind="closed")
    duration: Duration = Field(30.0, description="Of each stage, warm-up and cool-down included.")
    warm_up: float = Field(0.1, ge=0, lt=1, description="Share of a stage that is not measured.")
    cool_down: float = Field(
        0.1, ge=0, lt=1, description="The same, at its end; the load stays on."
    )
    slo: Slo = Slo()

    @model_validator(mode="after")
    def _something_is_measured(self) -> Self:
        if self.warm_up + self.cool_down >= 1:
            raise ValueError("warm_up and cool_down together leave nothing to measure")
        names = [traffic.tenant for traffic in self.traffic]
        if len(set(names)) < len(names):
            raise ValueError("the tenants of traffic must have different names")
        return self


def names() -> list[str]:
    """The scenarios that come with rigserve."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_scenario(name_or_path: str) -> tuple[str, Scenario]:
    """A scenario of ours by its name, or anybody's by its path; raises :class:`ConfigError`.

    A trace's relative path is taken from the file's folder.
    """
    known = names()
    file = FOLDER / f"{name_or_path}.yaml" if name_or_path in known else Path(name_or_path)
    if name_or_path not in known and not file.exists():
        near = difflib.get_close_matches(name_or_path, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ScenarioError(
            f"there is no scenario {name_or_path!r}{hint} Known: {', '.join(known)}; or a path to a YAML file"
        )
    document = read_document(file)
    load = document.values.get("load")
    if isinstance(load, dict) and isinstance(load.get("trace"), str):
        load["trace"] = str((file.parent / Path(load["trace"]).expanduser()).absolute())
    try:
        scenario = Scenario.model_validate(document.values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if detail["type"] == "too_short" and detail["input"]:
                continue  # pydantic counts only good items
            path = _path_in_file(detail["loc"], document.values)
            message = detail["msg"].removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                message = f"unknown key{_nearest(str(path[-1]))}"
            document.report(path, message)
        raise ConfigError(document.problems) from error
    if isinstance(scenario.load, Replay):
        for path in _of_the_trace(document.values):
            document.report(path, "a replay takes it from its trace; leave it out")
    if document.problems:
        raise ConfigError(document.problems)
    return file.stem, scenario


def _of_the_trace(values: Mapping[str, Any]) -> Iterator[KeyPath]:
    """What a replay's file says that its trace says, too."""
    if "duration" in values:
        yield ("duration",)
    for number, traffic in enumerate(values.get("traffic", ())):
        yield from (("traffic", number, name) for name in _TRACED if name in traffic)


class ScenarioError(ConfigError):
    """There is no such scenario."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)
        self.problems = ()


def _path_in_file(location: tuple[str | int, ...], values: Any) -> KeyPath:
    """Where in the file an error is: pydantic names the variants of unions, too, which are no keys."""
    path: list[str | int] = []
    for number, part in enumerate(location):
        last = number == len(location) - 1
        if isinstance(values, dict) and part == values.get("kind"):
            continue
        if isinstance(values, dict) and (part in values or last):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _nearest(word: str) -> str:
    close = difflib.get_close_matches(word, sorted(_all_keys(Scenario)), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _all_keys(section: Any) -> set[str]:
    """Every key that a file may use, at any depth."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        keys = set(section.model_fields)
        for field in section.model_fields.values():
            keys |= _all_keys(field.annotation)
        return keys
    return {key for part in get_args(section) for key in _all_keys(part)}
