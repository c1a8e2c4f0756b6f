"""A short closed loop, of threads instead of Locust's greenlets: each user asks so many times, one after the other.

For measurements of seconds, in the process that wants them; what it measures is computed as a bench's is.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from loadtest.amounts import constant
from loadtest.client import Client, ServerError
from loadtest.measures import Summary, marked, summarize
from loadtest.pricing import energy_by_source, traffic_of
from loadtest.records import RequestRecord
from loadtest.scenario import Slo, Traffic
from loadtest.stages import Stage
from loadtest.texts import Gauge, excerpt
from loadtest.workload import Workload, gauge_key, path_of
from serving.config import CostConfig
from serving.cost.traffic import Traffic as Priced

_FEW_WORDS, _MANY_WORDS, _WARM_UP_TOKENS = 10, 60, 8
# A request is metered moments after its stream ends.
_METERING_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Waves:
    """So many users, each of whom asks ``rounds`` times; all prompts and answers are of one length.

    The same ``seed`` makes the same prompts.
    """

    users: int
    rounds: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen of all requests, from the first one's beginning to the last one's end; ``traffic`` is to be priced."""

    summary: Summary
    traffic: Priced | None


def run_waves(url: str, model: str, waves: Waves, cost: CostConfig) -> Observed:
    """Warm a server up and load it; ``url`` ends in ``/v1``. Raises :class:`ServerError` if it cannot be used."""
    traffic = Traffic(
        prompt_tokens=constant(waves.prompt_tokens), output_tokens=constant(waves.output_tokens)
    )
    client = Client(url, None)
    gauge = _gauge(client, model, traffic)
    workload = Workload((traffic,), model, {gauge_key(traffic): gauge}, waves.seed, ignore_eos=True)
    before = energy_by_source(client)
    records = _loaded(url, workload, traffic, waves)
    time.sleep(_METERING_SECONDS)
    after = energy_by_source(client)
    client.close()
    stage = Stage(
        0, 0.0, max(record.ended_at for record in records), waves.users, warm_up=0.0, cool_down=0.0
    )
    window = (0.0, stage.end + 1e-6)
    summary = summarize(marked(records, [stage]), window, Slo())
    return Observed(summary, traffic_of(records, before, after, cost))


def _loaded(url: str, workload: Workload, traffic: Traffic, waves: Waves) -> list[RequestRecord]:
    """The records of all requests."""
    began = time.perf_counter()
    records: list[RequestRecord] = []

    def clock() -> float:
        return time.perf_counter() - began

    def user(number: int) -> None:
        client = Client(url, None)
        for turn in range(waves.rounds):
            asked = turn * waves.users + number
            request = workload.conversation(traffic, asked).next()
            record = RequestRecord(asked, number, warmup=False, started_at=clock())
            client.stream(request.path, request.body, record, clock)
            records.append(record)
            if record.error is not None:
                break
        client.close()

    # Daemons: who interrupts does not wait for answers.
    threads = [
        threading.Thread(target=user, args=(number,), daemon=True) for number in range(waves.users)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return records


def _gauge(client: Client, model: str, traffic: Traffic) -> Gauge:
    """How the server counts, and so warms it up."""
    gauge = Gauge.of(traffic.text)
    gauge.measure(client, model)
    few, many = (_counted(client, model, traffic, words) for words in (_FEW_WORDS, _MANY_WORDS))
    gauge.calibrate((_FEW_WORDS, few), (_MANY_WORDS, many))
    return gauge


def _counted(client: Client, model: str, traffic: Traffic, words: int) -> int:
    """The tokens of a prompt of so many words; raises :class:`ServerError`."""
    message = {"role": "user", "content": excerpt(traffic.text, 0, words).rstrip()}
    body = {"model": model, "messages": [message], "max_tokens": _WARM_UP_TOKENS, "temperature": 0}
    record = RequestRecord(0, 0, warmup=True, started_at=0.0)
    client.stream(path_of(traffic), body, record, time.perf_counter)
    if record.error is not None or record.prompt_tokens is None:
        raise ServerError(
            f"a first request failed ({record.error or 'no usage'}): {record.error_message or ''}"
        )
    return record.prompt_tokens
