"""What batches rest on: the reading of their files, and stores that lose and repeat nothing."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from serving.gateway.batch_store import BatchStore
from serving.gateway.file_store import FileStore
from serving.protocol.batches import BatchRequest, Line, begun, read_lines
from serving.protocol.errors import ApiError

CHAT = "/v1/chat/completions"
REQUEST = BatchRequest(input_file_id="file-1", endpoint=CHAT, completion_window="24h")


def line(**changes: Any) -> bytes:
    fields = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m"}}
    return json.dumps(fields | changes).encode()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"{", "invalid_json"),
        (b"[" * 50_000, "invalid_json"),
        (b'{"custom_id": "\\ud800"}', "invalid_json"),
        (b'{"custom_id": NaN}', "invalid_json"),
        (line(custom_id=None), "invalid_custom_id"),
        (line(custom_id=""), "invalid_custom_id"),
        (line(method="GET"), "invalid_method"),
        (line(url="/v1/embeddings"), "invalid_url"),
        (line(body=[]), "invalid_body"),
        (line(body={}), "missing_model"),
        (line(body={"model": "m", "seed": 10**30}), "invalid_body"),
        (line(body={"model": "m", "stream": True}), "unsupported_parameter"),
        (line(mood="good"), "unknown_parameter"),
        (line(), "duplicate_custom_id"),
        (line(custom_id="b", body={"model": "other"}), "mismatched_model"),
    ],
)
def test_what_is_wrong_with_a_line_is_told(text: bytes, code: str) -> None:
    read, model, errors = read_lines([line(), b"\n", text], CHAT)
    assert [each.custom_id for each in read] == ["a"]
    assert model == "m"
    assert [(error["code"], error["line"]) for error in errors] == [(code, 3)]


def test_an_empty_file_is_an_error() -> None:
    assert read_lines([b"\n"], CHAT)[2][0]["code"] == "empty_file"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BatchStore]:
    with closing(BatchStore(tmp_path)) as opened:
        yield opened


def test_a_line_has_one_result_and_ends_with_its_batch(store: BatchStore) -> None:
    async def scenario() -> None:
        await store.add(begun("batch_1", REQUEST, 1), None)
        await store.start("batch_1", [Line(1, "a", b"{}"), Line(2, "b", b"{}")], "m")
        assert await store.settle("batch_1", 1, {"id": "first"}, failed=False)
        assert not await store.settle("batch_1", 1, {"id": "second"}, failed=True)
        assert await store.results("batch_1", 0, 9, failed=False) == [(1, b'{"id":"first"}')]
        assert [each.number for each in await store.pending("batch_1", 0, 9)] == [2]
        assert await store.move("batch_1", ("in_progress",), "cancelling")
        assert not await store.move("batch_1", ("in_progress",), "finalizing")
        assert await store.end("batch_1", "cancelling", "cancelled")
        batch = await store.get("batch_1")
        assert batch is not None
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 0}
        assert await store.pending("batch_1", 0, 9) == []
        assert await store.unfinished() == []

    asyncio.run(scenario())


def test_one_process_runs_the_batches(store: BatchStore, tmp_path: Path) -> None:
    async def scenario() -> None:
        with closing(BatchStore(tmp_path)) as other:
            assert await store.claim()
            assert await store.claim()
            assert not await other.claim()
            store._running.release()
            assert await other.claim()

    asyncio.run(scenario())


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario() -> None:
        with closing(FileStore(tmp_path)) as files:
            with pytest.raises(ApiError) as refused:
                await files.add("file-1", fill, filename="a", purpose="batch", keep_seconds=None)
            assert refused.value.status == 507
            assert await files.get("file-1") is None
            assert list((tmp_path / "files").iterdir()) == []

    asyncio.run(scenario())


def test_expired_files_are_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        with closing(FileStore(tmp_path)) as files:
            for name, keep_seconds in (("file-1", -1), ("file-2", 60)):
                await files.add(
                    name,
                    lambda file: file.write(b"x"),
                    filename="a",
                    purpose="batch",
                    keep_seconds=keep_seconds,
                )
            assert await files.open("file-1") is None
            await files.sweep()
            assert [path.name for path in (tmp_path / "files").iterdir()] == ["file-2"]

    asyncio.run(scenario())
