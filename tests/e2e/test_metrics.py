"""What the operator sees of the engines at /metrics, beside what clients were told."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai.types.chat import ChatCompletion
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import RigServer, wait_for, write_config

MODEL = "smollm2-135m"
# Longer than the shortest prefix that the engine reuses.
SYSTEM = "You answer questions about the sea, its tides, its storms and its animals. " * 4
COUNTING = ", ".join(["one", "two", "three", "four", "five"] * 8)


class Scrape:
    """One answer of /metrics, read by Prometheus' own parser."""

    def __init__(self, rig: RigServer) -> None:
        families = list(text_string_to_metric_families(rig.get("/metrics").text))
        assert len({family.name for family in families}) == len(families)
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }
        self.totals = {
            (sample.name, *sorted(sample.labels.items()))
            for family in families
            if family.type in ("counter", "histogram")
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples[name, *sorted({"model": MODEL, **labels}.items())]

    def has_model(self, name: str, model: str) -> bool:
        return any(key[0] == name and ("model", model) in key[1:] for key in self.samples)


def ask(
    rig: RigServer, question: str, model: str = MODEL, max_tokens: int = 12, **fields: Any
) -> ChatCompletion:
    """An answer of exactly ``max_tokens``."""
    answer: ChatCompletion = rig.client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
        **fields,
    )
    return answer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """Two engines of one slot each, of which the second drafts."""
    folder = tmp_path_factory.mktemp("pair")
    path = write_config(folder, cache_dir, max_sequences=1, speculation="none")
    config = yaml.safe_load(path.read_text())
    second = {"name": "second", "aliases": [], "speculation": "prompt_lookup"}
    config["models"].append({**config["models"][0], **second})
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def test_the_engines_totals_are_what_clients_were_told(rig: RigServer) -> None:
    before = Scrape(rig)
    usages = [ask(rig, f"What lives {where}?").usage for where in ("on reefs", "in the deep")]
    after = Scrape(rig)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    prompt = cached = generated = 0
    for usage in usages:
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        prompt += usage.prompt_tokens
        cached += usage.prompt_tokens_details.cached_tokens or 0
        generated += usage.completion_tokens
    assert cached > 0
    assert grown("rigserve_prefix_hit_tokens_total") == cached
    assert grown("rigserve_engine_step_rows_sum", phase="prefill") == prompt - cached
    drafted = grown("rigserve_draft_tokens_total")
    rejected = drafted - grown("rigserve_accepted_draft_tokens_total")
    # The first token of each comes from its prompt's step.
    rows = generated - len(usages) + rejected
    assert grown("rigserve_engine_step_rows_sum", phase="decode") == rows
    steps = grown("rigserve_engine_step_rows_count", phase="decode")
    assert steps == rows - drafted
    assert grown("rigserve_engine_step_rows_count", phase="prefill") == len(usages)
    for part in ("build", "decode", "sample", "emit"):
        assert grown("rigserve_engine_step_seconds_total", part=part) > 0
    assert grown("rigserve_preemptions_total") == 0


def test_batches_are_counted_by_size_and_totals_never_fall(rig: RigServer) -> None:
    before = Scrape(rig)
    scrapes, done = [before], threading.Event()

    def scrape() -> None:
        while not done.wait(0.05):
            scrapes.append(Scrape(rig))

    watcher = threading.Thread(target=scrape)
    watcher.start()
    with ThreadPoolExecutor() as pool:
        questions = [f"What do sailors call wind number {n}?" for n in range(4)]
        list(pool.map(lambda question: ask(rig, question, max_tokens=40), questions))
    done.set()
    watcher.join()
    after = Scrape(rig)
    scrapes.append(after)

    def steps(le: str) -> float:
        name, labels = "rigserve_engine_step_rows_bucket", {"phase": "decode", "le": le}
        return after.value(name, **labels) - before.value(name, **labels)

    bounds = [*(str(2**n) for n in range(12)), "+Inf"]
    cumulative = [steps(bound) for bound in bounds]
    assert cumulative == sorted(cumulative)
    assert steps("+Inf") > 0
    # Together they took fewer steps than one by one.
    assert steps("+Inf") < 4 * 39
    assert steps("4") > steps("1")
    assert steps("2048") == steps("+Inf")
    assert len(scrapes) > 3
    for earlier, later in itertools.pairwise(scrapes):
        for key in earlier.totals:
            assert later.samples[key] >= earlier.samples[key], key
    assert max(s.value("rigserve_sequences_running") for s in scrapes) > 1
    assert max(s.value("rigserve_kv_cache_used_tokens") for s in scrapes) > 4 * len(SYSTEM.split())
    assert after.value("rigserve_sequences_running") == 0
    assert after.value("rigserve_kv_cache_total_tokens") == 8 * 512
    assert after.value("rigserve_prefix_cache_bytes") >= 0


def test_the_queue_by_class_preemptions_the_prefix_cache_and_drafts(pair: RigServer) -> None:
    assert Scrape(pair).value("rigserve_prefix_cache_bytes") == 0
    with ThreadPoolExecutor() as pool:
        batch = [
            pool.submit(ask, pair, f"Tell story {n}.", max_tokens=150, service_tier="flex")
            for n in range(3)
        ]
        # The engine has its next one at hand; those after it wait in the gateway.
        for queue in ("rigserve_requests_queued", "rigserve_admission_waiting"):
            wait_for(
                lambda name=queue: Scrape(pair).value(name, priority="batch") == 1,  # type: ignore[misc]
                f"one in {queue}",
            )
            assert Scrape(pair).value(queue, priority="interactive") == 0
        ask(pair, "What is a tide?")
        assert not all(future.done() for future in batch)
        for future in batch:
            future.result()
    after = Scrape(pair)
    assert after.value("rigserve_requests_queued", priority="batch") == 0
    assert after.value("rigserve_preemptions_total") == 1
    assert after.value("rigserve_prefix_cache_bytes") > 0
    assert after.value("rigserve_draft_tokens_total") == 0

    ask(pair, f"Go on counting like this: {COUNTING}", model="second", max_tokens=60)
    drafting = Scrape(pair)
    drafted = drafting.value("rigserve_draft_tokens_total", model="second")
    accepted = drafting.value("rigserve_accepted_draft_tokens_total", model="second")
    assert drafted >= accepted > 0
    assert drafting.value("rigserve_preemptions_total", model="second") == 0


def test_engines_that_do_not_answer_have_no_series_and_are_asked_together(pair: RigServer) -> None:
    """The last one with these engines: it kills them."""
    ask(pair, "What is a wave?", model="second")
    before = Scrape(pair)
    own = (
        "rigserve_sequences_running",
        "rigserve_prefix_cache_bytes",
        "rigserve_prefix_hit_tokens_total",
        "rigserve_engine_step_rows_bucket",
        "rigserve_engine_step_seconds_total",
    )
    assert all(before.has_model(name, model) for name in own for model in (MODEL, "second"))
    processes = pair.engines()
    assert len(processes) == 2
    for process in processes:
        process.suspend()
    try:
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            without = Scrape(pair)
            seconds.append(time.monotonic() - started)
    finally:
        for process in processes:
            process.resume()
    # Each has a second to answer, at the same time as the other.
    assert 1 <= min(seconds) < 2
    for model in (MODEL, "second"):
        assert not any(without.has_model(name, model) for name in own)
        assert without.value("rigserve_engine_ready", model=model) == 1
    wait_for(lambda: before.totals <= Scrape(pair).totals, "all series are back")
    again = Scrape(pair)
    for key in before.totals:
        assert again.samples[key] >= before.samples[key], key
    for process in processes:
        process.kill()
    wait_for(lambda: Scrape(pair).value("rigserve_engine_ready") == 0, "the death is noticed")
    gone = Scrape(pair)
    assert not any(gone.has_model(name, MODEL) for name in own)
    pair.wait_until_ready()
    # A counter may begin again.
    assert Scrape(pair).value("rigserve_engine_step_rows_count", phase="decode") == 0
