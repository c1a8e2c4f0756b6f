"""The cost of a bench's traffic: from the server's own meters where it has some, else estimated."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.client import Client, ServerError
from loadtest.records import RequestRecord
from serving.config import CostConfig
from serving.cost.traffic import Traffic, of_request

_ENERGY = re.compile(
    r'^rigserve_(idle_)?energy_joules_total\{.*source="(\w+)".*\} (\S+)$', re.MULTILINE
)
_REQUESTS = re.compile(r"^rigserve_requests_total\{.*\} (\S+)$", re.MULTILINE)
_BUSY = {"prefill_busy_seconds", "decode_busy_seconds"}


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """Joules charged to requests so far, by who measured them, and those of them drawn without work, too.

    ``requests`` are all that the server has answered so far, anybody's.
    """

    joules: dict[str, float]
    idle_joules: dict[str, float]
    requests: int = 0


def energy_by_source(client: Client) -> EnergyReading | None:
    """What the server's meters say now; None if the server has no such metric."""
    try:
        text = client.get("/metrics", below_base=False).decode("utf-8", errors="replace")
    except ServerError:
        return None
    if "rigserve_energy_joules" not in text:
        return None
    requests = sum(float(count) for count in _REQUESTS.findall(text))
    reading = EnergyReading({}, {}, round(requests))
    for idle, source, value in _ENERGY.findall(text):
        joules = reading.idle_joules if idle else reading.joules
        joules[source] = joules.get(source, 0.0) + float(value)
    return reading


def energy_notes(before: EnergyReading | None, after: EnergyReading | None, sent: int) -> list[str]:
    """What a reader must know of the energy of so many requests; the server's meter tells that of everybody's."""
    if before is None or after is None:
        return []
    others = after.requests - before.requests - sent
    if others <= 0:
        return []
    return [
        f"The server answered {others} requests of others meanwhile: the energy, and what it costs, is "
        "that of theirs, too. Run the bench while nobody else uses the server."
    ]


def traffic_of(
    records: Sequence[RequestRecord],
    energy_before: EnergyReading | None,
    energy_after: EnergyReading | None,
    cost: CostConfig,
) -> Traffic | None:
    """The measured requests as traffic to be priced; None without successes or without token counts.

    Busy seconds are the engine's if it sends them. Otherwise the time during which at least one request
    was open is taken for them, split by how long the requests waited for their first tokens and for the rest:
    an upper bound, labelled ``estimated``. Energy is the difference of the server's meter, or else (no
    meter, or one that stood still) the configured watts over the busy seconds.
    """
    good = [record for record in records if record.error is None and not record.warmup]
    if not good or any(r.prompt_tokens is None or r.completion_tokens is None for r in good):
        return None
    # Other servers have timings, too, of other things.
    timings = [r.timings for r in good if r.timings and r.timings.keys() >= _BUSY]
    if len(timings) == len(good):
        prefill = sum(each["prefill_busy_seconds"] for each in timings)
        decode = sum(each["decode_busy_seconds"] for each in timings)
        timing_source = "engine"
    else:
        prefill, decode = _observed_busy_seconds(good)
        timing_source = "estimated"
    used: dict[str, float] = {}
    idle_joules = 0.0
    if energy_before is not None and energy_after is not None:
        used = _grown(energy_before.joules, energy_after.joules)
        idle_joules = sum(_grown(energy_before.idle_joules, energy_after.idle_joules).values())
    if used:
        joules = sum(used.values())
        energy_source = next(iter(used)) if len(used) == 1 else "mixed"
    else:
        joules = (prefill + decode) * cost.power.load_watts
        idle_joules = (prefill + decode) * cost.power.idle_watts
        energy_source = "estimated"
    begin = min(r.started_at for r in good)
    end = max(r.ended_at for r in good)
    # Prices change with the hour: moments of the bench as those of the clock, which it has just left.
    began_unix = time.time() - end
    return Traffic(
        requests=len(good),
        prompt_tokens=sum(r.prompt_tokens or 0 for r in good),
        cached_tokens=sum(r.cached_tokens or 0 for r in good),
        completion_tokens=sum(r.completion_tokens or 0 for r in good),
        prefill_busy_seconds=prefill,
        decode_busy_seconds=decode,
        energy_joules=joules,
        idle_joules=idle_joules,
        energy_source=energy_source,
        timing_source=timing_source,
        elapsed_seconds=end - begin,
        groups=tuple(
            of_request(
                began_unix + r.started_at,
                r.service_tier,
                r.prompt_tokens or 0,
                r.cached_tokens or 0,
                r.completion_tokens or 0,
            )
            for r in good
        ),
    )


def _grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What counters gained, without those that stood still."""
    gains = {source: joules - before.get(source, 0.0) for source, joules in after.items()}
    return {source: gain for source, gain in gains.items() if gain > 0}


def _observed_busy_seconds(good: Sequence[RequestRecord]) -> tuple[float, float]:
    busy, covered_until = 0.0, float("-inf")
    for record in sorted(good, key=lambda r: r.started_at):
        busy += max(record.ended_at - max(record.started_at, covered_until), 0.0)
        covered_until = max(covered_until, record.ended_at)
    first_tokens = sum(record.ttft_seconds or 0.0 for record in good)
    whole = sum(record.end_to_end_seconds for record in good)
    prefill = busy * first_tokens / whole if whole else 0.0
    return prefill, busy - prefill
