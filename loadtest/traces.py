"""Recorded traces of real services: Azure's LLM inference, BurstGPT's and Mooncake's formats."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from loadtest.scenario import ScenarioError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A request of a trace. ``at_seconds`` counts from the first one.

    ``blocks`` are Mooncake's: equal numbers stand for equal stretches of 512 tokens of prompt.
    """

    at_seconds: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path, most: int | None = None) -> list[TraceRequest]:
    """All requests in the order of their moments, or the first ``most``; the format shows in the first line.

    Requests that the trace says had no output, failures of the service it was recorded at, are left out.
    Raises :class:`ScenarioError`, which names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = enumerate(file, start=1)
            requests = list(_read(path, lines))
    except OSError as error:
        raise ScenarioError(f"load.trace: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"load.trace: {path} is not UTF-8 text") from error
    requests = sorted(
        (
            request
            for request in requests
            if request.prompt_tokens > 0 and request.output_tokens > 0
        ),
        key=lambda request: request.at_seconds,
    )[:most]
    if not requests:
        raise ScenarioError(f"load.trace: {path} holds no requests")
    begin = requests[0].at_seconds
    return [replace(request, at_seconds=request.at_seconds - begin) for request in requests]


def _read(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[TraceRequest]:
    number, first = next(lines, (0, ""))
    parse: Callable[[str], TraceRequest]
    if first.lstrip().startswith("{"):
        parse = _mooncake
        yield _parsed(parse, first, path, number)
    else:
        header = [name.strip() for name in next(csv.reader([first]), [])]
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(header):
            parse = _by_column(header, "TIMESTAMP", "ContextTokens", "GeneratedTokens", _moment)
        elif {"Timestamp", "Request tokens", "Response tokens"} <= set(header):
            parse = _by_column(header, "Timestamp", "Request tokens", "Response tokens", float)
        else:
            raise ScenarioError(
                f"load.trace: {path}:1: neither Azure's columns (TIMESTAMP,ContextTokens,GeneratedTokens), "
                "nor BurstGPT's (Timestamp,Model,Request tokens,Response tokens,...), nor Mooncake's JSON lines"
            )
    for number, line in lines:
        if line.strip():
            yield _parsed(parse, line, path, number)


def _parsed(
    parse: Callable[[str], TraceRequest], line: str, path: Path, number: int
) -> TraceRequest:
    try:
        return parse(line)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ScenarioError(f"load.trace: {path}:{number}: {error!r}") from error


def _mooncake(line: str) -> TraceRequest:
    entry = json.loads(line)
    return TraceRequest(
        at_seconds=entry["timestamp"] / 1e3,
        prompt_tokens=int(entry["input_length"]),
        output_tokens=int(entry["output_length"]),
        blocks=tuple(entry.get("hash_ids", ())),
    )


def _by_column(
    header: list[str], at: str, prompt: str, output: str, moment: Callable[[str], float]
) -> Callable[[str], TraceRequest]:
    places = [header.index(name) for name in (at, prompt, output)]

    def parse(line: str) -> TraceRequest:
        row = next(csv.reader([line]))
        when, prompt_tokens, output_tokens = (row[place] for place in places)
        return TraceRequest(moment(when), int(prompt_tokens), int(output_tokens))

    return parse


def _moment(text: str) -> float:
    """Seconds of Azure's timestamps, which have seven digits of a second or a time zone."""
    head, dot, fraction = text.strip().partition(".")
    digits, plus, zone = fraction.partition("+")
    whole = datetime.fromisoformat(f"{head}+{zone}" if plus else f"{head}+00:00").timestamp()
    return whole + (float(f"0.{digits}") if dot else 0.0)
