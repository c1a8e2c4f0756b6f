"""Given a real server, thousands of requests that are wrong in some way do it no harm.

`make fuzz` sends more of them; RIGSERVE_FUZZ_REQUESTS says how many, RIGSERVE_FUZZ_SEED repeats the dice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import numpy as np
import pytest
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from yarl import URL

from tests.fuzz.audit import DEADLINE_SECONDS, Tally, ledger_counts, resident_mib, wait_until_idle
from tests.fuzz.corpus import BODILESS, CHAT_MODEL, EMBEDDING_MODEL, KINDS, RERANKER, Kind
from tests.fuzz.mutation import wrong_body, wrong_form, wrong_path
from tests.models import write_minilm
from tests.processes import RigServer, wait_for, write_config

REQUESTS = int(os.environ.get("RIGSERVE_FUZZ_REQUESTS", "4000"))
SEED = int(os.environ.get("RIGSERVE_FUZZ_SEED", "20261124"))

# How the requests are shared out among the tests below.
_WARM_UP = REQUESTS // 10
_MUTATED = REQUESTS * 3 // 4
_EXAMPLES = REQUESTS // 20
_CLIENTS = 8
# Memory may grow by this after the warm-up: allocators keep some, and the ledger and SQLite cache pages.
_GROWTH_MIB = 48 + REQUESTS / 1000

pytestmark = pytest.mark.timeout(max(600, REQUESTS // 10))


@pytest.fixture(scope="module")
def fuzzed(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, minilm_path: Path
) -> Iterator[RigServer]:
    """A server with a chat model whose answers are short, and an embedding model; ready."""
    path = write_config(
        tmp_path_factory.mktemp("fuzzed"),
        cache_dir,
        filters={"max_tokens_ceiling": 1},
        prefix_cache_mib=0,
    )
    config = yaml.safe_load(path.read_text())
    config["server"] |= {"max_body_bytes": 400_000, "body_timeout_seconds": 5}
    embedder = {"name": EMBEDDING_MODEL, "aliases": [], "source": str(minilm_path), "filters": {}}
    reranker = {"name": RERANKER, "source": str(path.with_name("reranker.gguf"))}
    write_minilm(path.with_name("reranker.gguf"), head=np.ones((1, 384), np.float32))
    plain = config["models"][0] | {"quantization": None}
    config["models"] += [plain | embedder, plain | embedder | reranker]
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def tally() -> Tally:
    """What all the tests saw."""
    return Tally()


class Sender:
    """Sends wrong requests, made of one seed, over one connection of several."""

    def __init__(self, rig: RigServer, tally: Tally, session: aiohttp.ClientSession) -> None:
        self._rig = rig
        self._tally = tally
        self._session = session
        self._ids: list[str] = [CHAT_MODEL]

    async def send(self, seed: int) -> None:
        """Send the request that ``seed`` makes; fails with the seed if its answer is wrong."""
        random = Random(seed)
        method, path, headers, body = self._request(random)
        url = self._rig.base_url + path
        try:
            async with self._session.request(
                method, URL(url, encoded=True), headers=headers, data=body
            ) as answer:
                content = await answer.read()
                self._tally.add(method, path, answer.status, answer.headers, content)
        except Exception as error:
            error.add_note(f"seed {seed}: {method} {path[:300]} {headers} {(body or b'')[:3000]!r}")
            raise
        if answer.status == 200 and b'"id":"' in content[:200] and method == "POST":
            told = content[:200].partition(b'"id":"')[2].partition(b'"')[0].decode()
            self._ids = [told, *self._ids[:20]]

    def _request(self, random: Random) -> tuple[str, str, dict[str, str], bytes | None]:
        json_type = {"content-type": "application/json"}
        match random.randrange(20):
            case 0 | 1 | 2:
                method, pattern = random.choice(BODILESS)
                if random.random() < 0.2:
                    method = random.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "X"))
                return method, wrong_path(random, pattern, self._ids), {}, None
            case 3:
                headers, body = wrong_form(random)
                return "POST", "/v1/files", headers, body
            case _:
                kind = random.choice(KINDS)
                return "POST", kind.path, json_type, wrong_body(random, kind)


def _send_all(rig: RigServer, tally: Tally, seeds: range) -> None:
    """Send what ``seeds`` make, over several connections at once."""

    async def client(sender: Sender, left: Iterator[int]) -> None:
        for seed in left:
            await sender.send(seed)

    async def all_clients() -> None:
        timeout = aiohttp.ClientTimeout(total=DEADLINE_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            sender, left = Sender(rig, tally, session), iter(seeds)
            async with asyncio.TaskGroup() as clients:
                for _ in range(_CLIENTS):
                    clients.create_task(client(sender, left))

    asyncio.run(all_clients())


@pytest.fixture(scope="module")
def warm_mib(fuzzed: RigServer, tally: Tally) -> dict[str, float]:
    """The server's memory after it has seen some requests of all kinds."""
    _send_all(fuzzed, tally, range(SEED, SEED + _WARM_UP))
    wait_until_idle(fuzzed)
    return resident_mib(fuzzed)


def test_mutated_requests(fuzzed: RigServer, tally: Tally, warm_mib: dict[str, float]) -> None:
    assert warm_mib
    first = SEED + _WARM_UP
    _send_all(fuzzed, tally, range(first, first + _MUTATED))
    wait_until_idle(fuzzed)
    # That there were some of each says that the requests are neither all wrong nor all right.
    assert tally.statuses[200] > tally.requests / 50, tally.statuses
    assert tally.statuses[400] > tally.requests / 5, tally.statuses


_ODD_TEXT = st.text(max_size=20)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _ODD_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_ODD_TEXT, inner, max_size=4),
    max_leaves=8,
)
_quick = settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """A connection that stays open."""
    with requests.Session() as each:
        yield each


def test_any_value_in_any_field(
    fuzzed: RigServer, tally: Tally, warm_mib: dict[str, float], session: requests.Session
) -> None:
    assert warm_mib

    @_quick
    @given(st.sampled_from(KINDS), st.data())
    def send(kind: Kind, data: st.DataObject) -> None:
        body = dict(data.draw(st.sampled_from(kind.bodies)))
        body[data.draw(st.sampled_from(sorted(kind.fields)))] = data.draw(_JSON)
        _post(fuzzed, tally, session, kind.path, json.dumps(body).encode())

    send()


def test_any_bytes(fuzzed: RigServer, tally: Tally, session: requests.Session) -> None:
    @_quick
    @given(st.sampled_from(KINDS), st.binary(max_size=60) | _JSON.map(json.dumps).map(str.encode))
    def send(kind: Kind, body: bytes) -> None:
        _post(fuzzed, tally, session, kind.path, body)

    send()


def _post(rig: RigServer, tally: Tally, session: requests.Session, path: str, body: bytes) -> None:
    answer = session.post(
        rig.base_url + path,
        data=body,
        headers={"content-type": "application/json"},
        timeout=DEADLINE_SECONDS,
    )
    tally.add("POST", path, answer.status_code, answer.headers, answer.content)


def test_what_the_openapi_document_allows_and_forbids(
    fuzzed: RigServer, tally: Tally, session: requests.Session
) -> None:
    """schemathesis makes requests of our own description: as it says, and against what it says."""
    schema = schemathesis.openapi.from_url(f"{fuzzed.base_url}/openapi.json")
    operations: list[Any] = [each.ok() for each in schema.get_all_operations()]  # type: ignore[union-attr]
    served = [each for each in operations if not each.path.startswith("/admin/")]
    assert len(served) > 20
    for operation in served:
        _fuzz_operation(operation, fuzzed, tally, session, -(-2 * _EXAMPLES // len(served)))


def _fuzz_operation(
    operation: Any, rig: RigServer, tally: Tally, session: requests.Session, count: int
) -> None:
    for mode in schemathesis.GenerationMode:
        try:
            cases = operation.as_strategy(generation_mode=mode)
        except Unsatisfiable:
            continue

        @settings(_quick, max_examples=-(-count // 2))
        @given(case=cases)
        def send(case: Any) -> None:
            answer = case.call(base_url=rig.base_url, session=session, timeout=DEADLINE_SECONDS)
            headers = {name: values[0] for name, values in answer.headers.items()}
            tally.add(case.method, case.path, answer.status_code, headers, answer.content)

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with it
            send()


def test_afterwards_nothing_is_left(
    fuzzed: RigServer, tally: Tally, warm_mib: dict[str, float]
) -> None:
    """After all of the above."""
    assert tally.requests >= REQUESTS
    wait_until_idle(fuzzed)
    assert "Traceback" not in fuzzed.output
    assert fuzzed.total("rigserve_engine_restarts_total") == 0
    # What clients were told was answered is in the ledger, neither more nor less of it.
    with contextlib.suppress(AssertionError):
        wait_for(lambda: tally.agrees_with(ledger_counts(fuzzed)), "the ledger agrees")
    assert tally.agrees_with(ledger_counts(fuzzed)), (tally, ledger_counts(fuzzed))
    grown_mib = {name: mib - warm_mib[name] for name, mib in resident_mib(fuzzed).items()}
    assert max(grown_mib.values()) < _GROWTH_MIB, grown_mib
    answer = fuzzed.client.chat.completions.create(
        model=CHAT_MODEL, messages=[{"role": "user", "content": "Still there?"}]
    )
    assert answer.choices[0].finish_reason == "length"
