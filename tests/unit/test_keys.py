"""Keys are found by their secrets as long as they are good, and databases of earlier versions go on."""

from __future__ import annotations

import json
import shlex
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serving.cli import main
from serving.config import LlamaCppModel
from serving.cost.ledger import Ledger, read_requests_of_keys, read_traffic, read_usage_of_keys
from serving.database import open_database
from serving.gateway.access import is_loopback, may_use
from serving.gateway.identity import Identity
from serving.gateway.token_bound import token_bound
from serving.keys.key import hash_of
from serving.keys.ring import KeyRing
from serving.keys.store import KeyStore, keys_path
from serving.protocol.embeddings import EmbeddingRequest, RerankRequest
from serving.protocol.errors import ApiError
from serving.protocol.keys import NewKey
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    ModelRequest,
    validated,
)
from tests.processes import wait_for
from tests.unit.test_ledger import RECORD


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with closing(KeyStore(tmp_path)) as opened:
        yield opened


@pytest.fixture
def ring(tmp_path: Path, store: KeyStore) -> Iterator[KeyRing]:
    with closing(KeyRing(tmp_path)) as opened:
        yield opened


def test_a_secret_is_random_and_kept_as_a_hash(tmp_path: Path, store: KeyStore) -> None:
    made = [store.create(NewKey(name=f"k{number}")) for number in range(20)]
    secrets = {secret for _, secret in made}
    assert len(secrets) == 20
    assert all(secret.startswith("rs-") and len(secret) == 46 for secret in secrets)
    with closing(sqlite3.connect(keys_path(tmp_path))) as database:
        kept = {row[0] for row in database.execute("SELECT hash FROM secrets")}
    assert kept == set(map(hash_of, secrets))
    assert keys_path(tmp_path).stat().st_mode & 0o077 == 0


def test_only_good_keys_are_found(ring: KeyRing, store: KeyStore) -> None:
    assert not ring.in_use
    key, secret = store.create(NewKey(name="a"))
    _, brief = store.create(NewKey(name="b", expires_in_seconds=4))
    ring.refresh()
    found = ring.find(secret)
    assert found is not None
    assert found.id == key.id
    for wrong in ("", "rs-", secret[:-1], secret + "x", secret.lower(), "\xff", key.id):
        assert ring.find(wrong) is None
    assert ring.find(brief) is not None
    wait_for(lambda: ring.find(brief) is None, "it expires")
    _, second = store.rotate("a", 60)
    _, third = store.rotate("a", 0)
    ring.refresh()
    assert [ring.find(each) is not None for each in (secret, second, third)] == [False, False, True]
    store.revoke("a")
    ring.refresh()
    assert ring.find(third) is None
    assert ring.in_use


def test_changes_arrive_by_themselves_and_uses_are_written(tmp_path: Path, store: KeyStore) -> None:
    with closing(KeyRing(tmp_path)) as ring:
        _, secret = store.create(NewKey(name="a"))
        wait_for(lambda: ring.find(secret), "the ring looks")
    used_at = store.get("a").last_used_at
    assert used_at is not None
    assert abs(time.time() - used_at) < 5


def test_commands_reach_a_server_whose_keys_nobody_else_has_open(tmp_path: Path) -> None:
    """A server has the keys open twice, and each command, a process that ends, is the only other one."""
    (tmp_path / "m.gguf").touch()
    config = tmp_path / "rig.yaml"
    config.write_text("models: [{name: m, source: m.gguf}]\nstorage: {data_dir: .}\n")

    def command(*words: str) -> Any:
        line = [sys.executable, "-m", "serving", "keys", *words, "--json", "--config", str(config)]
        done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(done.stdout)

    with closing(KeyRing(tmp_path)) as keys, closing(KeyStore(tmp_path)) as admin_api:

        def is_gone(secret: str) -> bool:
            return keys.find(secret) is None

        for name in ("one", "two"):
            secret = command("create", name)["secret"]
            wait_for(partial(keys.find, secret), "the new key is known", 3)
            new = command("rotate", name)["secret"]
            wait_for(partial(keys.find, new), "the new secret is known", 3)
            assert keys.find(secret) is None
            command("revoke", name)
            wait_for(partial(is_gone, new), "it is revoked", 3)
        assert [key.state(0) for key in admin_api.all()] == ["revoked", "revoked"]


def test_the_commands_of_the_guide_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "keys.md").read_text()
    commands = [line for line in guide.splitlines() if line.startswith("rigserve keys ")]
    assert len(commands) == 9
    (tmp_path / "m.gguf").touch()
    config = tmp_path / "rig.yaml"
    config.write_text(
        "models: [{name: smollm2-135m, source: m.gguf}]\nstorage: {data_dir: data}\n"
        "routes: [{name: chat, targets: [{model: smollm2-135m}]}]\n"
    )
    told = {}
    for command in commands:
        words = shlex.split(command)[1:]
        assert main([*words, "--config", str(config)]) == 0, command
        told[words[1]] = capsys.readouterr().out
    assert main(["keys", "list", "--json", "--config", str(config)]) == 0
    keys = {key["name"]: key for key in json.loads(capsys.readouterr().out)}
    assert list(keys) == ["alice", "ops", "ci", "shop", "intern"]
    assert keys["alice"]["state"] == "revoked"
    assert (keys["ci"]["tenant"], keys["ci"]["weight"]) == ("research", 2.0)
    assert keys["shop"]["models"] == ["smollm2-135m"]
    assert (keys["intern"]["budget_usd"], keys["intern"]["budget_period"]) == (5.0, "day")
    assert "rs-" in told["rotate"]
    assert "rs-" not in told["list"] + told["show"] + told["revoke"]
    models = "smolm2, chat, smollm2-135m"
    assert main(["keys", "create", "typo", "--models", models, "--config", str(config)]) == 0
    assert capsys.readouterr().err == f"note: {config} serves no smolm2\n"
    for wrong in (
        ["show", "nobody"],
        ["create", "ops"],
        ["create", "a/b"],
        ["create", "a", "--budget-usd", "-1"],
    ):
        assert main(["keys", *wrong, "--config", str(config)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert wrong != ["create", "a/b"] or "letters, digits" in error


def test_a_tenants_weight_is_one(store: KeyStore) -> None:
    store.create(NewKey(name="a", tenant="t", weight=2.0))
    store.create(NewKey(name="b", tenant="t"))
    assert [(key.weight, key.priority) for key in store.all()] == [(2.0, "interactive")] * 2
    store.create(NewKey(name="c", tenant="t", priority="batch", weight=3.0))
    assert {(key.weight, key.priority) for key in store.all()} == {(3.0, "batch")}


def test_names_are_free_again_after_the_key(store: KeyStore) -> None:
    first, _ = store.create(NewKey(name="a"))
    with pytest.raises(ApiError) as taken:
        store.create(NewKey(name="a"))
    assert taken.value.status == 409
    store.revoke("a")
    second, _ = store.create(NewKey(name="a"))
    assert store.get("a").id == second.id
    assert store.get(first.id).revoked_at == store.revoke(first.id).revoked_at


def test_many_threads_make_keys_at_once(tmp_path: Path, store: KeyStore) -> None:
    with closing(KeyStore(tmp_path)) as other:
        threads = [
            threading.Thread(target=each.create, args=(NewKey(name=f"{at}-{number}"),))
            for at, each in enumerate((store, other))
            for number in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(store.all()) == 40


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""}, {"name": "-"}, {"name": "a\n"}, {"name": "x" * 65}, {"name": "a/b"},
        {"name": "a", "tenant": "-"}, {"name": "a", "weight": 0}, {"name": "a", "weight": float("nan")},
        {"name": "a", "models": []}, {"name": "a", "models": [""]}, {"name": "a", "requests_per_minute": 0},
        {"name": "a", "budget_usd": float("inf")}, {"name": "a", "budget_tokens": 10**30},
        {"name": "a", "budget_period": "day"}, {"name": "a", "expires_in_seconds": True},
        {"name": "a", "priority": "urgent"}, {"name": "a", "is_admin": 1},
    ],
)  # fmt: skip
def test_bad_keys_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        validated(NewKey, fields)
    assert refused.value.status == 400


def test_what_a_key_may_use() -> None:
    anything, some = Identity(key_id="k"), Identity(key_id="k", models=("base", "tuned"))
    assert may_use(anything, "x", None)
    assert may_use(some, "alias", "base")
    assert may_use(some, "tuned", "tuned")
    assert not may_use(some, "other-adapter", "other-adapter")
    assert not may_use(some, "unknown", None)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("localhost", True), ("0.0.0.0", False), ("::", False), ("192.168.1.5", False),  # noqa: S104
        ("::ffff:8.8.8.8", False), ("localhost.evil.example", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def bound(kind: type[ModelRequest], **fields: Any) -> int:
    asked = kind.of({"model": "m", **fields})
    model = LlamaCppModel(name="m", source="x.gguf", context_length=2000)
    return token_bound(model, asked, asked.model_dump_json(exclude_none=True).encode())


def test_the_bound_is_above_what_can_be_used() -> None:
    chat: Any = [{"role": "user", "content": "x" * 100}]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    assert bound(ChatCompletionRequest, messages=chat) == 2000
    assert 100 + 50 < bound(ChatCompletionRequest, messages=chat, max_tokens=50) < 600
    one, four = (bound(ChatCompletionRequest, messages=chat, max_tokens=50, n=n) for n in (1, 4))
    assert 150 <= four - one < 160
    assert bound(ChatCompletionRequest, messages=chat, n=4) >= 6000
    pictured = [{"role": "user", "content": [image]}]
    assert bound(ChatCompletionRequest, messages=pictured, max_tokens=1) == 2000
    assert bound(CompletionRequest, prompt=[[1] * 300, [2] * 300], max_tokens=10) >= 620
    assert bound(CompletionRequest, prompt="x" * 9000) == 2000
    assert bound(EmbeddingRequest, input=["x" * 10, "y" * 20]) >= 30
    documents = ["d" * 10] * 50
    assert bound(RerankRequest, query="q" * 100, documents=documents) >= 50 * 110


NEWER = (
    *("key_id", "tenant", "api_usd", "route", "served_as"),
    *("base_model", "service_tier", "idle_joules"),
)
OLD_COLUMNS = ", ".join(
    f"{name} NOT NULL" for name in RECORD.__dataclass_fields__ if name not in NEWER
)


def test_a_ledger_of_the_first_format_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    create = (f"CREATE TABLE usage (id INTEGER PRIMARY KEY, {OLD_COLUMNS})",)
    with closing(open_database(path, version=1, create=create)) as old:
        values = [getattr(RECORD, name.split()[0]) for name in OLD_COLUMNS.split(", ")]
        marks = ", ".join("?" for _ in values)
        old.execute(f"INSERT INTO usage VALUES (1, {marks})", values)  # noqa: S608
    assert read_traffic(path).requests == 1
    for _ in range(2):
        with closing(Ledger(path)) as ledger:
            ledger.append(replace(RECORD, key_id="k", tenant="t", started_at=2000.0))
    assert read_traffic(path).requests == 3
    [summed] = read_usage_of_keys(path, 0.0)
    assert (summed.key_id, summed.tokens) == ("k", 30)
    assert summed.usd == pytest.approx(2 * RECORD.usd)
    assert [each.tokens for each in read_requests_of_keys(path, 0.0)] == [15, 15]
    assert read_requests_of_keys(path, 2000.1) == []


def test_an_upgrade_happens_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    open_database(path, version=1, create=("CREATE TABLE a (x)",)).close()
    bad = {1: ("ALTER TABLE a ADD COLUMN y", "ALTER TABLE nowhere ADD COLUMN y")}
    with pytest.raises(Exception, match="nowhere"):
        open_database(path, version=2, create=(), upgrades=bad)
    good = {1: ("ALTER TABLE a ADD COLUMN y",), 2: ("ALTER TABLE a ADD COLUMN z",)}
    with closing(open_database(path, version=3, create=(), upgrades=good)) as upgraded:
        upgraded.execute("INSERT INTO a VALUES (1, 2, 3)")
