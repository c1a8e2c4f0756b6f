"""Files and batches as the official OpenAI SDK sees them, with the embedded model."""

from __future__ import annotations

import http.client
import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from tests.processes import RigServer, wait_for, write_config

MODEL = "smollm2-135m"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """A server whose answers can be long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("rig")
    with RigServer(write_config(folder, cache_dir, context_length=4096, max_sequences=4)) as server:
        server.wait_until_ready()
        yield server


def line(name: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say hello."}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "ignore_eos": True, **fields}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def upload(rig: RigServer, lines: list[dict[str, Any]]) -> Any:
    text = "\n".join(map(json.dumps, lines)).encode()
    return rig.client.files.create(file=("input.jsonl", text), purpose="batch")


def begin(rig: RigServer, lines: list[dict[str, Any]], **fields: Any) -> Any:
    asked: Any = {"endpoint": CHAT, "completion_window": "24h", **fields}
    return rig.client.batches.create(input_file_id=upload(rig, lines).id, **asked)


def ended(rig: RigServer, batch_id: str) -> Any:
    final = ("completed", "failed", "cancelled", "expired")
    wait_for(
        lambda: rig.client.batches.retrieve(batch_id).status in final, "the batch has ended", 60
    )
    return rig.client.batches.retrieve(batch_id)


def content(rig: RigServer, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in rig.client.files.content(file_id).text.splitlines()]


def done(rig: RigServer, batch_id: str) -> int:
    counts = rig.client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed


def test_a_batch_from_upload_to_output(rig: RigServer) -> None:
    lines = [line(f"l{number}") for number in range(6)]
    lines.insert(3, line("bad", temperature=-1))
    batch = begin(rig, lines, metadata={"job": "nightly"})
    assert batch.status == "validating"
    batch = ended(rig, batch.id)
    assert batch.status == "completed"
    assert batch.metadata == {"job": "nightly"}
    assert batch.request_counts.to_dict() == {"total": 7, "completed": 6, "failed": 1}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    output = content(rig, batch.output_file_id)
    assert [each["custom_id"] for each in output] == [f"l{number}" for number in range(6)]
    for each in output:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert each["response"]["body"]["usage"]["completion_tokens"] == 8
    (refused,) = content(rig, batch.error_file_id)
    assert refused["custom_id"] == "bad"
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"]["param"] == "temperature"
    assert batch.id in [each.id for each in rig.client.batches.list(limit=1)]
    with pytest.raises(openai.ConflictError):
        rig.client.batches.cancel(batch.id)


def test_files(rig: RigServer) -> None:
    files = rig.client.files
    first, second = upload(rig, [line("a")]), upload(rig, [line("b")])
    assert first.object == "file"
    assert first.filename == "input.jsonl"
    assert files.retrieve(first.id) == first
    assert next(iter(files.list(limit=1, order="asc", after=first.id))).id == second.id
    assert files.list(purpose="vision").data == []
    short: Any = {"anchor": "created_at", "seconds": 3600}
    kept = files.create(file=b"{}", purpose="batch", expires_after=short)
    assert kept.expires_at == kept.created_at + 3600
    assert files.content(kept.id).content == b"{}"
    assert files.delete(first.id).deleted
    for ask in (files.retrieve, files.content, files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        files.create(file=b"x", purpose="vision")
    assert refused.value.param == "purpose"
    address = f"{rig.base_url}/v1/files"
    assert requests.post(address, json={}, timeout=9).status_code == 415
    assert requests.post(address, files={"other": b"x"}, timeout=9).status_code == 400
    broken = {"content-type": "multipart/form-data"}
    assert requests.post(address, data=b"x", headers=broken, timeout=9).status_code == 400
    with closing(http.client.HTTPConnection(rig.base_url.removeprefix("http://"))) as connection:
        large = {"content-type": "multipart/form-data; boundary=x", "content-length": str(10**12)}
        connection.request("POST", "/v1/files", headers=large)
        assert connection.getresponse().status == 413


def test_a_wrong_file_fails_with_its_lines(rig: RigServer) -> None:
    batch = begin(rig, [line("a"), line("a"), line("b", stream=True), {"custom_id": "c"}])
    batch = ended(rig, batch.id)
    assert batch.status == "failed"
    assert [(each.line, each.code) for each in batch.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "unsupported_parameter"),
        (4, "invalid_method"),
    ]
    batch = ended(rig, begin(rig, [line("a", model="nobody")]).id)
    assert batch.errors.data[0].code == "model_not_found"
    for field, value in (("endpoint", "/v1/responses"), ("completion_window", "1h")):
        with pytest.raises(openai.BadRequestError) as refused:
            begin(rig, [line("a")], **{field: value})
        assert refused.value.param == field


def test_cancelled_keeps_what_is_done(rig: RigServer) -> None:
    batch = begin(rig, [line("quick"), *(line(f"l{n}", max_tokens=3000) for n in range(8))])
    wait_for(lambda: done(rig, batch.id) >= 1, "a line is done")
    assert rig.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(rig, batch.id)
    assert batch.status == "cancelled"
    assert [each["custom_id"] for each in content(rig, batch.output_file_id)] == ["quick"]
    wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "the engine is let go")


def test_killed_expired_and_not_run_twice(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir, context_length=1024, max_sequences=2)
    names = [f"l{number}" for number in range(12)]
    with RigServer(path) as server:
        server.wait_until_ready()
        batch = begin(server, [line(name, max_tokens=60) for name in names])
        wait_for(lambda: done(server, batch.id) >= 3, "some lines are done")
        server.stop(signal.SIGKILL)
    before = results(tmp_path)
    assert 3 <= len(before) < 12
    with RigServer(path) as server:
        server.wait_until_ready()
        output = content(server, ended(server, batch.id).output_file_id)
        assert [each["custom_id"] for each in output] == names
        ids = {each["custom_id"]: each["id"] for each in output}
        assert before.items() <= ids.items()
        late = begin(server, [line("a"), *(line(name, max_tokens=900) for name in names)])
        wait_for(lambda: done(server, late.id) >= 1, "a line is done")
        with closing(sqlite3.connect(tmp_path / "data/batches.sqlite", timeout=10)) as database:
            database.execute(
                "UPDATE batches SET body = json_set(body, '$.expires_at', 1) WHERE id = ?",
                (late.id,),
            )
            database.commit()
        # The runner asks the database; what it runs already ends, too.
        late = ended(server, late.id)
        assert late.status == "expired"
        answered = content(server, late.output_file_id)
        left = content(server, late.error_file_id)
        assert {each["error"]["code"] for each in left} == {"batch_expired"}
        told = sorted(each["custom_id"] for each in (*answered, *left))
        assert told == sorted(["a", *names])
        assert server.stop() == 0


def results(folder: Path) -> dict[str, str]:
    with closing(sqlite3.connect(folder / "data/batches.sqlite")) as database:
        rows = database.execute("SELECT custom_id, result FROM lines WHERE result IS NOT NULL")
        return {name: json.loads(result)["id"] for name, result in rows}
