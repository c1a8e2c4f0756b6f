"""Given a server with API keys, what those with and without one get of it."""

from __future__ import annotations

import io
import json
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any, Final

import anthropic
import openai
import pytest
import requests
import yaml

from serving.cli import main
from serving.keys.store import KeyStore
from serving.protocol.keys import NewKey
from tests.lora_files import random_lora, write_lora
from tests.processes import RigServer, wait_for, write_config

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
MODEL = "smollm2-135m"
CHAT: Final = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": HELLO, "max_tokens": 2}


class KeyedRig(RigServer):
    """A server with an admin key, and its database of keys beside it."""

    def __enter__(self) -> KeyedRig:
        self.data_dir = Path(self.config["storage"]["data_dir"])
        self.store = KeyStore(self.data_dir)
        self.admin = self.new_key("root", is_admin=True)
        super().__enter__()
        self.wait_until_ready()
        return self

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self.store.close()

    def new_key(self, name: str, **fields: Any) -> str:
        """The secret of a new key, which the server knows when this returns, if it runs."""
        _, secret = self.store.create(NewKey(name=name, **fields))
        if hasattr(self, "process"):
            wait_for(lambda: self.status(secret) == 200, "the key is known")
        return secret

    def status(self, secret: str, path: str = "/v1/models") -> int:
        """What a GET with a key ends in."""
        return self.get(path, headers={"authorization": f"Bearer {secret}"}).status_code

    def chat(self, secret: str, **changes: Any) -> requests.Response:
        """Two tokens, unless ``changes`` say otherwise."""
        headers = {"authorization": f"Bearer {secret}"}
        return requests.post(self.base_url + CHAT, json=BODY | changes, headers=headers, timeout=60)

    def ledger_rows(self, name: str) -> list[tuple[str, int, int]]:
        """The tenant, status and completion tokens of each request with a key."""
        query = "SELECT tenant, status, completion_tokens FROM usage WHERE key_id = ?"
        with closing(sqlite3.connect(self.ledger_path)) as ledger:
            return ledger.execute(query, (self.store.get(name).id,)).fetchall()

    def sdk(self, secret: str, max_retries: int = 0) -> openai.OpenAI:
        """OpenAI's client."""
        return openai.OpenAI(
            base_url=f"{self.base_url}/v1", api_key=secret, max_retries=max_retries
        )

    def command(self, *words: str) -> Any:
        """What ``rigserve keys`` prints as JSON."""
        with redirect_stdout(io.StringIO()) as told:
            assert main(["keys", *words, "--config", str(self.config_path), "--json"]) == 0
        return json.loads(told.getvalue())


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[KeyedRig]:
    with KeyedRig(write_config(tmp_path_factory.mktemp("keys"), cache_dir)) as server:
        yield server


def test_without_a_good_key_there_is_401(rig: KeyedRig) -> None:
    for headers in ({}, {"authorization": "Bearer rs-wrong"}, {"x-api-key": "rs-wrong"}):
        for path in ("/v1/models", "/v1/files", "/admin/keys", "/nowhere"):
            answer = rig.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["x-request-id"].startswith("req-")
    with pytest.raises(openai.AuthenticationError):
        rig.sdk("rs-wrong").chat.completions.create(model=MODEL, messages=HELLO)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        anthropic.Anthropic(base_url=rig.base_url, api_key="rs-wrong").messages.create(
            model=MODEL, messages=HELLO, max_tokens=2
        )
    body: Any = refused.value.body
    assert body["error"]["type"] == "authentication_error"
    assert "rs-wrong" not in rig.output
    assert rig.series("rigserve_refusals_total")['{reason="invalid_api_key"}'] >= 13


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/openapi.json", "/metrics"])
def test_what_is_open_stays_open(rig: KeyedRig, path: str) -> None:
    assert rig.get(path).status_code == 200


def test_a_key_opens_it_by_either_header(rig: KeyedRig) -> None:
    secret = rig.new_key("either")
    for headers in ({"authorization": f"Bearer {secret}"}, {"x-api-key": secret}):
        answer = requests.post(rig.base_url + CHAT, json=BODY, headers=headers, timeout=60)
        assert answer.status_code == 200
    message = anthropic.Anthropic(base_url=rig.base_url, api_key=secret).messages.create(
        model=MODEL, messages=HELLO, max_tokens=2
    )
    assert message.usage.output_tokens == 2
    assert secret not in rig.output


def test_a_key_for_some_models_sees_no_others(rig: KeyedRig) -> None:
    secret = rig.new_key("narrow", models=["gpt-4o-mini"])
    client = rig.sdk(secret)
    assert [model.id for model in client.models.list()] == ["gpt-4o-mini"]
    assert rig.chat(secret, model="gpt-4o-mini").status_code == 200
    for name in (MODEL, "no-such-model"):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            client.chat.completions.create(model=name, messages=HELLO)
        assert refused.value.code == "model_not_allowed"
        assert "gpt-4o-mini" in refused.value.message
        assert rig.status(secret, f"/v1/models/{name}") == 403
    with pytest.raises(anthropic.PermissionDeniedError):
        anthropic.Anthropic(base_url=rig.base_url, api_key=secret).messages.create(
            model=MODEL, messages=HELLO, max_tokens=2
        )
    by_own_name = rig.new_key("by-own-name", models=[MODEL])
    for key, models in ((by_own_name, {MODEL: "ready"}), (secret, {}), (None, {})):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert rig.get("/ready", headers=headers).json() == {"ready": True, "models": models}
    assert rig.chat(by_own_name, model="gpt-4o-mini").status_code == 200


def test_a_key_for_an_adapter_has_that_and_neither_its_base_nor_its_siblings(
    tmp_path: Path, cache_dir: Path
) -> None:
    shapes = {f"blk.{layer}.attn_q.weight": (576, 576) for layer in range(0, 30, 3)}
    for seed, name in enumerate(("legal", "support")):
        write_lora(tmp_path / f"{name}.gguf", random_lora(shapes, seed=seed, rank=8))
    adapters = [{"name": name, "path": f"{name}.gguf"} for name in ("legal", "support")]
    with KeyedRig(write_config(tmp_path, cache_dir, adapters=adapters)) as rig:
        for allowed, others in (
            ("legal", (MODEL, "gpt-4o-mini", "support")),
            (MODEL, ("legal", "support")),
        ):
            secret = rig.new_key(f"for-{allowed}", models=[allowed])
            listed = {model.id for model in rig.sdk(secret).models.list()}
            assert listed == ({"legal"} if allowed == "legal" else {MODEL, "gpt-4o-mini"})
            answer = rig.chat(secret, model=allowed, max_tokens=8)
            assert answer.status_code == 200
            for name in others:
                refused = rig.chat(secret, model=name)
                assert refused.status_code == 403, name
                assert refused.json()["error"]["code"] == "model_not_allowed"
        wait_for(lambda: rig.ledger_rows(f"for-{MODEL}"), "the ledger has both", 5)
        with closing(sqlite3.connect(rig.ledger_path)) as ledger:
            used = ledger.execute("SELECT model, count(*) FROM usage GROUP BY model").fetchall()
        assert sorted(used) == [("legal", 1), (MODEL, 1)]


def test_the_command_line_changes_a_running_server(rig: KeyedRig) -> None:
    made = rig.command("create", "carol", "--tenant", "acme", "--weight", "2.5")
    old = made["secret"]
    wait_for(lambda: rig.status(old) == 200, "the new key works")
    new = rig.command("rotate", "carol", "--grace", "5s")["secret"]
    wait_for(lambda: rig.status(new) == 200, "the new secret works")
    assert rig.status(old) == 200
    wait_for(lambda: rig.status(old) == 401, "the old secret has ended")
    shown = rig.command("show", made["id"])
    assert (shown["tenant"], shown["weight"], shown["state"]) == ("acme", 2.5, "active")
    assert "secret" not in shown
    rig.command("revoke", "carol")
    wait_for(lambda: rig.status(new) == 401, "the key is revoked")
    [listed] = [key for key in rig.command("list") if key["name"] == "carol"]
    assert listed["state"] == "revoked"
    brief = rig.command("create", "brief", "--expires", "5s")["secret"]
    wait_for(lambda: rig.status(brief) == 200, "the brief key works")
    wait_for(lambda: rig.status(brief) == 401, "it has expired")
    for path in rig.data_dir.iterdir():
        if path.is_file():
            assert not any(word.encode() in path.read_bytes() for word in (old, new, brief))


def test_the_admin_api(rig: KeyedRig) -> None:
    headers = {"authorization": f"Bearer {rig.admin}"}

    def ask(method: str, path: str = "", **options: Any) -> requests.Response:
        url = f"{rig.base_url}/admin/keys{path}"
        return requests.request(method, url, headers=headers, timeout=30, **options)

    made = ask("POST", json={"name": "dora", "requests_per_minute": 5})
    assert made.status_code == 201
    key = made.json()
    assert rig.status(key["secret"]) == 200  # at once
    assert rig.status(key["secret"], "/admin/keys") == 403
    rotated = ask("POST", f"/{key['id']}/rotate", json={"grace_seconds": 60}).json()
    assert [rig.status(each["secret"]) for each in (key, rotated)] == [200, 200]
    shown = ask("GET", "/dora").json()
    assert shown["requests_per_minute"] == 5
    assert "secret" not in shown
    assert "dora" in [each["name"] for each in ask("GET").json()["data"]]
    assert ask("DELETE", "/dora").json()["state"] == "revoked"
    assert [rig.status(each["secret"]) for each in (key, rotated)] == [401, 401]
    for answer, status, code in (
        (ask("POST", json={"name": "root"}), 409, "name_taken"),
        (ask("POST", json={"name": "-"}), 400, "invalid_value"),
        (ask("POST", json={"name": "x", "colour": 1}), 400, "unknown_parameter"),
        (ask("POST", json={"name": "x", "budget_period": "day"}), 400, "invalid_value"),
        (ask("POST", json={"name": "x", "weight": -1}), 400, "invalid_value"),
        (ask("POST", data="{"), 400, "invalid_json"),
        (ask("GET", "/nobody"), 404, "not_found"),
        (ask("POST", "/dora/rotate", json={}), 409, "key_revoked"),
        (ask("PATCH", "/dora"), 405, "method_not_allowed"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    paths = rig.get("/openapi.json").json()["paths"]
    assert "requests_per_minute" in str(paths["/admin/keys"]["post"]["requestBody"])


def test_usage_is_the_tenants(rig: KeyedRig) -> None:
    secret = rig.new_key("metered", tenant="umbrella")
    usage = rig.chat(secret, max_tokens=5).json()["usage"]
    wait_for(lambda: rig.ledger_rows("metered"), "the ledger has it")
    assert rig.ledger_rows("metered") == [("umbrella", 200, usage["completion_tokens"])]
    told = rig.series("rigserve_tenant_tokens_total")
    assert told['{kind="prompt",tenant="umbrella"}'] == usage["prompt_tokens"]
    assert told['{kind="completion",tenant="umbrella"}'] == usage["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_limits_are_told_in_headers(rig: KeyedRig, stream: bool) -> None:
    secret = rig.new_key(f"told-{stream}", requests_per_minute=3, tokens_per_minute=5000)
    answer = rig.chat(secret, stream=stream)
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"
    assert answer.headers["x-ratelimit-limit-tokens"] == "5000"
    left = 5000 - int(answer.headers["x-ratelimit-remaining-tokens"])
    if stream:
        assert left > 200  # what is reserved
    else:
        assert left == answer.json()["usage"]["total_tokens"]
    assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    message = requests.post(
        rig.base_url + "/v1/messages", json=BODY, headers={"x-api-key": secret}, timeout=60
    )
    assert message.headers["anthropic-ratelimit-requests-remaining"] == "1"
    assert message.headers["anthropic-ratelimit-tokens-reset"].endswith("Z")


def test_sdks_understand_429(rig: KeyedRig) -> None:
    secret = rig.new_key("poor", budget_tokens=540, budget_period="day")
    client = rig.sdk(secret, max_retries=5)
    assert rig.chat(secret, max_tokens=10).status_code == 200
    began_at = time.monotonic()
    with pytest.raises(openai.RateLimitError) as spent:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=500)
    assert spent.value.code == "insufficient_quota"
    with pytest.raises(anthropic.RateLimitError):
        anthropic.Anthropic(base_url=rig.base_url, api_key=secret, max_retries=5).messages.create(
            model=MODEL, messages=HELLO, max_tokens=500
        )
    assert time.monotonic() - began_at < 5  # neither retries
    with pytest.raises(openai.BadRequestError) as large:
        client.chat.completions.create(model=MODEL, messages=HELLO, n=2)
    assert large.value.code == "request_exceeds_limit"
    alone = rig.new_key("alone", max_concurrent=1)
    with rig.sdk(alone).chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    ):
        refused = rig.chat(alone)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        # Retries until the stream has ended.
        rig.sdk(alone, max_retries=20).chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=2
        )


def test_a_client_that_hangs_up_gives_its_place_back(rig: KeyedRig) -> None:
    secret = rig.new_key("fickle", max_concurrent=1, tokens_per_minute=1000)
    headers = {"authorization": f"Bearer {secret}"}
    body = BODY | {"stream": True, "max_tokens": 400, "ignore_eos": True}
    with requests.post(
        rig.base_url + CHAT, json=body, headers=headers, stream=True, timeout=60
    ) as stream:
        next(stream.iter_lines())
        assert rig.chat(secret).status_code == 429
    # And the tokens that it left unused: 400 more would not have fitted beside them.
    wait_for(lambda: rig.chat(secret, max_tokens=400).status_code == 200, "its place is free", 10)


def test_limits_are_exact_across_50_requests_at_once(rig: KeyedRig) -> None:
    for name, limits in (
        ("by-count", {"requests_per_minute": 7}),
        ("by-budget", {"budget_tokens": 3000}),
        ("by-tokens", {"tokens_per_minute": 3000}),
    ):
        secret = rig.new_key(name, **limits)
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(rig.chat, [secret] * 50))
        good = [each.json()["usage"]["total_tokens"] for each in answers if each.ok]
        refused = [each for each in answers if each.status_code == 429]
        assert len(good) + len(refused) == 50
        assert all(1 <= int(each.headers["retry-after"]) <= 32 * 86400 for each in refused)
        if "requests_per_minute" in limits:
            assert len(good) == 7
        else:
            assert 0 < sum(good) <= 3000


def test_what_is_stored_is_its_tenants(rig: KeyedRig) -> None:
    mine = rig.sdk(rig.new_key("mine", tenant="one"))
    colleague = rig.sdk(rig.new_key("colleague", tenant="one"))
    other = rig.sdk(rig.new_key("other", tenant="two"))
    response = mine.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16)
    file = mine.files.create(file=("a.jsonl", batch_lines(1)), purpose="batch")
    batch = mine.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert colleague.responses.retrieve(response.id).id == response.id
    assert colleague.files.retrieve(file.id).id == file.id
    assert colleague.batches.retrieve(batch.id).id == batch.id
    reference: Any = {"type": "item_reference", "id": response.output[0].id}
    for refused, forbidden in (
        (openai.NotFoundError, lambda: other.responses.retrieve(response.id)),
        (openai.NotFoundError, lambda: other.responses.delete(response.id)),
        (openai.NotFoundError, lambda: other.responses.cancel(response.id)),
        (openai.NotFoundError, lambda: other.responses.input_items.list(response.id)),
        (openai.NotFoundError, lambda: other.files.retrieve(file.id)),
        (openai.NotFoundError, lambda: other.files.content(file.id)),
        (openai.NotFoundError, lambda: other.files.delete(file.id)),
        (openai.NotFoundError, lambda: other.batches.retrieve(batch.id)),
        (openai.NotFoundError, lambda: other.batches.cancel(batch.id)),
        (
            openai.BadRequestError,
            lambda: other.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            ),
        ),
        (
            openai.BadRequestError,
            lambda: other.responses.create(
                model=MODEL, input="More.", previous_response_id=response.id
            ),
        ),
        (
            openai.NotFoundError,
            lambda: other.responses.create(model=MODEL, input=[reference]),
        ),
    ):
        with pytest.raises(refused):
            forbidden()
    assert list(other.files.list()) == []
    assert list(other.batches.list()) == []
    assert mine.files.retrieve(file.id).id == file.id
    wait_for(lambda: mine.batches.retrieve(batch.id).status == "completed", "it ends", 30)
    output = mine.batches.retrieve(batch.id).output_file_id
    assert output is not None
    assert mine.files.content(output).text
    with pytest.raises(openai.NotFoundError):
        other.files.content(output)


def batch_lines(count: int, **body: Any) -> bytes:
    lines = [
        {"custom_id": str(at), "method": "POST", "url": CHAT, "body": BODY | body}
        for at in range(count)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def test_a_batch_whose_key_is_revoked_fails_what_is_left(rig: KeyedRig) -> None:
    client = rig.sdk(rig.new_key("batcher", tenant="three"))
    witness = rig.sdk(rig.new_key("witness", tenant="three"))
    data = batch_lines(40, max_tokens=30, ignore_eos=True)
    file = client.files.create(file=("a.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

    def completed() -> int:
        counts = witness.batches.retrieve(batch.id).request_counts
        return counts.completed if counts else 0

    wait_for(completed, "a line is done", 30)
    rig.store.revoke("batcher")
    wait_for(lambda: witness.batches.retrieve(batch.id).status == "completed", "it ends", 60)
    ended = witness.batches.retrieve(batch.id)
    assert ended.request_counts is not None
    assert ended.error_file_id is not None
    assert 0 < ended.request_counts.completed < 40
    failed = [
        json.loads(line)
        for line in witness.files.content(ended.error_file_id).text.split("\n")
        if line
    ]
    assert len(failed) + ended.request_counts.completed == 40
    # What was done is the tenant's in the ledger, and nothing else.
    expected = [("three", 200, 30)] * ended.request_counts.completed
    wait_for(lambda: rig.ledger_rows("batcher") == expected, "the ledger has them")
    for line in failed:
        assert line["response"]["status_code"] == 401
        assert line["response"]["body"]["error"]["code"] == "invalid_api_key"


def test_limits_survive_a_kill(tmp_path: Path, cache_dir: Path) -> None:
    with KeyedRig(write_config(tmp_path, cache_dir)) as rig:
        secret = rig.new_key("counted", requests_per_minute=3, budget_tokens=560)
        used = [rig.chat(secret).json()["usage"]["total_tokens"] for _ in range(2)]
        wait_for(lambda: len(rig.ledger_rows("counted")) == 2, "the ledger has them")
        began_at = time.monotonic()
        rig.stop(signal.SIGKILL)
        with RigServer(rig.config_path) as again:
            again.wait_until_ready()
            answer = requests.post(
                again.base_url + CHAT,
                json=BODY | {"max_tokens": 500},
                headers={"x-api-key": secret},
                timeout=60,
            )
            assert answer.json()["error"]["code"] == "insufficient_quota"
            assert f"{560 - sum(used)} are left" in answer.json()["error"]["message"]
            assert rig.chat(secret).status_code == 200
            refused = rig.chat(secret)
            assert time.monotonic() - began_at < 55, "the minute was over before it mattered"
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            wait_seconds = int(refused.headers["retry-after"])
            assert wait_seconds <= 60 - int(time.monotonic() - began_at)


def exposed(folder: Path, cache_dir: Path, **server: Any) -> RigServer:
    """A server on all addresses."""
    path = write_config(folder, cache_dir)
    config = yaml.safe_load(path.read_text())
    config["server"] |= {"host": "0.0.0.0", **server}  # noqa: S104
    path.write_text(yaml.safe_dump(config))
    return RigServer(path)


def test_strangers_are_let_in_on_purpose_only(tmp_path: Path, cache_dir: Path) -> None:
    with exposed(tmp_path, cache_dir) as rig:
        assert rig.process.wait(30) == 2
    assert "rigserve keys create" in rig.output
    assert "Traceback" not in rig.output
    with exposed(tmp_path, cache_dir, allow_remote=True) as rig:
        wait_for(lambda: rig.answers("/health"), "it listens")
        assert "there are no API keys: whoever reaches 0.0.0.0" in rig.output
        assert rig.get("/v1/models").status_code == 200
        # Without a key there is nobody who may make one: a page in a browser could.
        assert rig.get("/admin/keys").status_code == 403
        with closing(KeyStore(Path(rig.config["storage"]["data_dir"]))) as store:
            _, secret = store.create(NewKey(name="first"))
            wait_for(lambda: rig.get("/v1/models").status_code == 401, "the door closes")
            store.revoke("first")
        wait_for(
            lambda: rig.get("/v1/models", headers={"x-api-key": secret}).status_code == 401,
            "it stays closed",
            2,
        )
    with exposed(tmp_path, cache_dir, metrics_access="key") as rig:
        wait_for(lambda: rig.answers("/health"), "it listens: there were keys once")
        assert rig.get("/metrics").status_code == 401


def test_a_server_may_want_keys_before_there_are_any(tmp_path: Path, cache_dir: Path) -> None:
    with exposed(tmp_path, cache_dir, require_keys=True, metrics_access="open") as rig:
        wait_for(lambda: rig.answers("/metrics"), "it listens")
        assert rig.get("/v1/models").status_code == 401
