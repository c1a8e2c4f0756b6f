"""Files and batches as the official OpenAI SDK sees them, with the embedded model."""

from __future__ import annotations

import http.client
import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import yaml

from tests.processes import Program, RigServer, wait_for, write_config

MODEL = "smollm2-135m"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def rig(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, minilm_path: Path
) -> Iterator[RigServer]:
    """A model whose answers can be long enough to be interrupted, and one that embeds."""
    folder = tmp_path_factory.mktemp("rig")
    filters = {"stripped": ["metadata"]}
    path = write_config(folder, cache_dir, context_length=4096, max_sequences=4, filters=filters)
    config = yaml.safe_load(path.read_text())
    config["models"].append({"name": "minilm", "source": str(minilm_path), "threads": 1})
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def line(name: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say hello."}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "ignore_eos": True, **fields}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def line_for(url: str, name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


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
    purposes: tuple[Any, ...] = ("assistants", "evals", "fine-tune", "user_data", "vision", "fun")
    for purpose in purposes:
        with pytest.raises(openai.BadRequestError) as refused:
            files.create(file=b"x", purpose=purpose)
        assert refused.value.param == "purpose"
        is_known = purpose != "fun"
        assert refused.value.code == ("unsupported_parameter" if is_known else "invalid_value")
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
    for field, value in (("endpoint", "/v1/moderations"), ("completion_window", "1h")):
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
    left = content(rig, batch.error_file_id)
    assert [each["custom_id"] for each in left] == [f"l{n}" for n in range(8)]
    assert {each["error"]["code"] for each in left} == {"batch_cancelled"}
    wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "the engine is let go")


def test_each_endpoint_has_its_answers_and_its_usage(rig: RigServer) -> None:
    url = "/v1/completions"
    fields: dict[str, Any] = {"model": MODEL, "prompt": "The sea", "max_tokens": 4}
    batch = begin(
        rig,
        [line_for(url, name, **fields, ignore_eos=True) for name in "ab"],
        endpoint=url,
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    batch = ended(rig, batch.id)
    answers = [each["response"]["body"] for each in content(rig, batch.output_file_id)]
    assert [each["object"] for each in answers] == ["text_completion"] * 2
    assert batch.usage.output_tokens == 8
    told = sum(each["usage"]["prompt_tokens"] for each in answers)
    assert batch.usage.input_tokens == told > 0
    assert batch.usage.total_tokens == told + 8
    kept = rig.client.files.retrieve(batch.output_file_id)
    assert kept.expires_at == kept.created_at + 7200

    url = "/v1/embeddings"
    batch = begin(rig, [line_for(url, "e", model="minilm", input="The sea")], endpoint=url)
    batch = ended(rig, batch.id)
    [answer] = content(rig, batch.output_file_id)
    assert len(answer["response"]["body"]["data"][0]["embedding"]) == 384
    assert (batch.usage.input_tokens > 0, batch.usage.output_tokens) == (True, 0)
    assert rig.client.files.retrieve(batch.output_file_id).expires_at is None


def test_responses_in_a_batch_are_stored_and_continued(rig: RigServer) -> None:
    first = rig.client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=4)
    url = "/v1/responses"
    fields: dict[str, Any] = {"model": MODEL, "input": "And again.", "max_output_tokens": 4}
    lines = [
        line_for(url, "go on", **fields, previous_response_id=first.id),
        line_for(url, "forget", **fields, store=False),
        line_for(url, "alone", **fields, background=True),
        line_for(url, "lost", **fields, previous_response_id="resp_none"),
    ]
    batch = ended(rig, begin(rig, lines, endpoint=url).id)
    answers = {each["custom_id"]: each["response"] for each in content(rig, batch.output_file_id)}
    assert set(answers) == {"go on", "forget"}
    stored = answers["go on"]["body"]
    assert stored["previous_response_id"] == first.id
    assert rig.client.responses.retrieve(stored["id"]).to_dict() == stored
    with pytest.raises(openai.NotFoundError):
        rig.client.responses.retrieve(answers["forget"]["body"]["id"])
    told = [each["body"]["usage"] for each in answers.values()]
    assert batch.usage.input_tokens == sum(usage["input_tokens"] for usage in told)
    assert batch.usage.output_tokens == sum(usage["output_tokens"] for usage in told)
    refused = {each["custom_id"]: each["response"] for each in content(rig, batch.error_file_id)}
    params = {name: each["body"]["error"]["param"] for name, each in refused.items()}
    assert params == {"alone": "background", "lost": "previous_response_id"}


def test_a_line_tells_what_its_headers_would(rig: RigServer) -> None:
    batch = ended(rig, begin(rig, [line("a", metadata={"b": "c"})]).id)
    [answer] = content(rig, batch.output_file_id)
    headers = answer["response"]["headers"]
    assert headers["x-rigserve-ignored"] == "metadata"
    assert float(headers["x-rigserve-cost-usd"]) > 0


def test_an_engine_that_dies_costs_no_line(rig: RigServer) -> None:
    names = [f"l{number}" for number in range(10)]
    batch = begin(rig, [line(name, max_tokens=40) for name in names])
    wait_for(lambda: done(rig, batch.id) >= 2, "some lines are done")
    for engine in rig.engines():
        engine.kill()
    batch = ended(rig, batch.id)
    assert [each["custom_id"] for each in content(rig, batch.output_file_id)] == names
    assert batch.error_file_id is None


def test_stopped_in_order_and_taken_over(tmp_path: Path, cache_dir: Path) -> None:
    """Two servers share a folder: what one of them leaves when it is stopped, the other goes on with."""
    paths = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        path = write_config(folder, cache_dir, context_length=1024, max_sequences=2)
        config = yaml.safe_load(path.read_text())
        config["storage"]["data_dir"] = str(tmp_path / "data")
        path.write_text(yaml.safe_dump(config))
        paths.append(path)
    names = [f"l{number}" for number in range(12)]
    with RigServer(paths[0]) as first:
        first.wait_until_ready()
        with RigServer(paths[1]) as second:
            second.wait_until_ready()
            # Created at the one, run by the other.
            batch = begin(second, [line(name, max_tokens=40) for name in names])
            wait_for(lambda: done(second, batch.id) >= 3, "some lines are done")
            assert second.total("rigserve_requests_total") == 0
            assert first.stop() == 0
            before = results(tmp_path)
            assert 3 <= len(before) < len(names)
            batch = ended(second, batch.id)
            output = content(second, batch.output_file_id)
            assert [each["custom_id"] for each in output] == names
            assert before.items() <= {each["custom_id"]: each["id"] for each in output}.items()
            # Those that the first was at when it was told to stop were finished, not lost.
            served = second.series("rigserve_requests_total")
            lines = sum(number for labels, number in served.items() if CHAT in labels)
            assert lines == len(names) - len(before)


class SmallDisk(RigServer):
    """A server whose data folder is a file system of 3 MB."""

    def __init__(self, config_path: Path) -> None:
        super().__init__(config_path)
        folder = self.config["storage"]["data_dir"]
        script = f'mount -t tmpfs -o size=3m tmpfs {folder} && exec "$@"'
        command = [sys.executable, "-m", "serving", "serve", str(config_path)]
        own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
        Program.__init__(self, [*own, *command], self.base_url, {})


def test_a_full_disk_is_told_and_costs_nothing(tmp_path: Path, cache_dir: Path) -> None:
    probe = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "x", "/mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip(
            "NOT TESTED: this system does not let its users mount a small disk (unshare --mount)"
        )
    (tmp_path / "data").mkdir()
    with SmallDisk(write_config(tmp_path, cache_dir, context_length=1024, max_sequences=2)) as rig:
        rig.wait_until_ready()
        address = f"{rig.base_url}/v1/files"

        def put(size_bytes: int) -> requests.Response:
            files = {"file": ("a.jsonl", b"x" * size_bytes)}
            return requests.post(address, data={"purpose": "batch"}, files=files, timeout=30)

        assert put(8_000_000).status_code == 507
        assert put(8_000_000).json()["error"]["code"] == "storage_full"
        batch = begin(rig, [line("a"), line("b")])
        assert ended(rig, batch.id).status == "completed"
        sizes = [4**power * 256 for power in range(6, -1, -1)]
        while sizes:
            if put(sizes[0]).status_code == 507:
                del sizes[0]
        # Nothing fits any more: what is asked for is refused, what is there can be read.
        assert len(content(rig, ended(rig, batch.id).output_file_id)) == 2
        answer = rig.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
        assert answer.choices
        # The largest first: a small one may not make enough room for the note that it is gone.
        files = sorted(rig.client.files.list(purpose="batch"), key=lambda file: -file.bytes)
        for file in files:
            if file.id != batch.input_file_id:
                rig.client.files.delete(file.id)
        assert ended(rig, begin(rig, [line("d")]).id).status == "completed"
        assert "Traceback" not in rig.output
        assert rig.stop() == 0


def test_stopped_killed_expired_and_not_run_twice(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir, context_length=1024, max_sequences=2)
    names = [f"l{number}" for number in range(14)]
    with RigServer(path) as server:
        server.wait_until_ready()
        batch = begin(server, [line(name, max_tokens=40) for name in names])
        wait_for(lambda: done(server, batch.id) >= 2, "some lines are done")
        assert server.stop(signal.SIGTERM) == 0
    stopped = results(tmp_path)
    assert 2 <= len(stopped) < len(names)
    with closing(sqlite3.connect(server.ledger_path)) as ledger:
        # What was under way when it was told to stop is finished, paid and kept.
        written = ledger.execute("SELECT status, service_tier FROM usage").fetchall()
        assert written == [(200, "batch")] * len(stopped)
    with RigServer(path) as server:
        server.wait_until_ready()
        wait_for(lambda: done(server, batch.id) >= len(stopped) + 2, "more lines are done")
        server.stop(signal.SIGKILL)
    before = results(tmp_path)
    assert len(stopped) + 2 <= len(before) < len(names)
    assert stopped.items() <= before.items()
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
