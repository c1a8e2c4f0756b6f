"""Stored responses survive what processes do, and nobody waits for one whose process is gone."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from serving.database import DatabaseError
from serving.gateway.response_store import ResponseStore, StoredResponse
from serving.protocol.errors import ApiError

Result = TypeVar("Result")

# Stores responses, one of them unfinished, and is killed.
VICTIM = """
import asyncio, os, sys
from pathlib import Path
from serving.gateway.response_store import ResponseStore
from tests.unit.test_response_store import response
async def main():
    store = ResponseStore(Path(sys.argv[1]))
    for number in range(50):
        await store.add(response(f"{sys.argv[2]}-{number}"))
    await store.add(response(sys.argv[2], status="in_progress"))
    os._exit(9)
asyncio.run(main())
"""

# Finds the disk full, then has room again.
FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from serving.gateway.response_store import ResponseStore
from serving.protocol.errors import ApiError
from tests.unit.test_response_store import response
async def main():
    store = ResponseStore(Path(sys.argv[1]))
    await store.add(response("before"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))
    try:
        await store.add(response("during", filling="x" * 200_000))
        sys.exit("the disk was not full")
    except ApiError as error:
        assert (error.status, error.code) == (503, "storage_unavailable"), error
    assert await store.get("before") is not None
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await store.add(response("after"))
    store.close()
asyncio.run(main())
"""


def response(
    response_id: str, status: str = "completed", previous: str | None = None, **fields: Any
) -> StoredResponse:
    body = {
        "id": response_id,
        "status": status,
        "created_at": int(time.time()),
        "previous_response_id": previous,
        "error": None,
        **fields,
    }
    return StoredResponse(body, [{"id": f"msg_{response_id}", "text": "a \u0000 \u2028 é"}])


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


def program(source: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "responses.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[ResponseStore]:
    with closing(ResponseStore(path)) as opened:
        yield opened


def test_what_is_added_is_there_and_what_is_deleted_is_not(store: ResponseStore) -> None:
    kept = response("a")
    run(store.add(kept))
    assert run(store.get("a")) == kept.body
    assert run(store.chain("a")) == [kept]
    assert run(store.delete("a"))
    assert not run(store.delete("a"))
    assert run(store.get("a")) is None
    assert run(store.chain("a")) == []


def test_a_chain_goes_back_as_far_as_it_can(store: ResponseStore) -> None:
    chain = [response("a"), response("b", previous="a"), response("c", previous="b")]
    for each in chain:
        run(store.add(each))
    assert run(store.chain("c")) == chain
    assert run(store.chain("b")) == chain[:2]
    run(store.delete("a"))
    assert run(store.chain("c")) == chain[1:]


def test_output_items_are_found_as_long_as_their_response_is_there(store: ResponseStore) -> None:
    items = [{"id": f"msg_{number}", "text": "x"} for number in range(3)]
    run(store.add(response("a", output=items[:2])))
    run(store.add(response("b", status="in_progress", output=[])))
    assert run(store.output_items(["msg_1", "msg_2", "msg_9"])) == {"msg_1": items[1]}
    run(store.settle(response("b", output=items[2:]).body))
    assert run(store.output_items(["msg_0", "msg_2"])) == {"msg_0": items[0], "msg_2": items[2]}
    run(store.delete("a"))
    assert run(store.output_items(["msg_0", "msg_1", "msg_2"])) == {"msg_2": items[2]}
    # Nothing is left of those that are gone.
    with closing(sqlite3.connect(store._path)) as connection:
        assert connection.execute("SELECT id FROM output_items").fetchall() == [("msg_2",)]


def test_an_end_is_final(store: ResponseStore) -> None:
    for name in ("a", "b", "c"):
        run(store.add(response(name, status="in_progress")))
    assert run(store.in_progress()) == {"a", "b", "c"}
    assert run(store.settle(response("a").body))
    run(store.cancel("b"))
    run(store.delete("c"))
    assert run(store.in_progress()) == set()
    for name in ("a", "b", "c"):
        assert not run(store.settle(response(name, status="failed").body))
        run(store.cancel(name))
    states = [(run(store.get(name)) or {}).get("status") for name in ("a", "b", "c")]
    assert states == ["completed", "cancelled", None]


def test_deleted_words_are_nowhere_in_the_files(path: Path) -> None:
    with closing(ResponseStore(path)) as store:
        for number in range(20):
            run(store.add(response(str(number), words="unmistakable" * 50)))
    assert b"unmistakable" in path.read_bytes()
    with closing(ResponseStore(path)) as store:
        for number in range(20):
            run(store.delete(str(number)))
    for file in path.parent.iterdir():
        assert b"unmistakable" not in file.read_bytes()


def test_old_responses_go(store: ResponseStore) -> None:
    day_seconds = 24 * 3600
    for name, days in (("old", 31), ("young", 29)):
        run(store.add(response(name, created_at=int(time.time()) - days * day_seconds)))
    run(store.add(response("new")))
    assert run(store.get("old")) is None
    assert run(store.get("young")) is not None


def test_what_a_killed_process_worked_on_has_failed(path: Path, store: ResponseStore) -> None:
    run(store.add(response("ours", status="in_progress")))
    victims = [program(VICTIM, path, name) for name in ("one", "two")]
    for victim in victims:
        assert victim.wait(30) == 9, victim.communicate()[1]
    for name in ("one", "two"):
        for number in range(50):
            assert run(store.get(f"{name}-{number}")) is not None
        [found] = run(store.chain(name))
        assert found.body["status"] == "failed"
        assert "stopped" in found.body["error"]["message"]
    with closing(ResponseStore(path)) as other:
        found_alive = run(other.get("ours"))
        assert found_alive is not None
        assert found_alive["status"] == "in_progress"
        # Whoever cancels it, the one that makes it learns of it.
        run(other.cancel("ours"))
    assert run(store.in_progress()) == set()
    assert len(list(path.parent.glob("*.lock"))) == 1


def test_a_new_process_tidies_up_after_those_that_were_killed(path: Path) -> None:
    for name in ("one", "two"):
        program(VICTIM, path, name).wait(30)
    with closing(ResponseStore(path)), closing(ResponseStore(path)):
        assert len(list(path.parent.glob("*.lock"))) == 2
        with closing(sqlite3.connect(path)) as connection:
            query = "SELECT id FROM responses WHERE status = 'failed' ORDER BY id"
            assert connection.execute(query).fetchall() == [("one",), ("two",)]
    assert not list(path.parent.glob("*.lock"))


def test_a_full_disk_is_an_error_and_does_no_harm(path: Path) -> None:
    filler = program(FULL_DISK, path)
    _, errors = filler.communicate(timeout=30)
    assert filler.returncode == 0, errors
    with closing(ResponseStore(path)) as store:
        assert run(store.get("during")) is None
        assert run(store.get("after")) is not None


def test_a_locked_database_is_an_error(path: Path, store: ResponseStore) -> None:
    run(store.add(response("a")))
    store._connection.execute("PRAGMA busy_timeout=50")
    with closing(sqlite3.connect(path, isolation_level=None)) as squatter:
        squatter.execute("BEGIN IMMEDIATE")
        with pytest.raises(ApiError) as caught:
            run(store.add(response("b")))
        assert caught.value.status == 503
        assert run(store.get("a")) is not None
        squatter.execute("ROLLBACK")
    run(store.add(response("b")))


def test_files_that_cannot_be_used_are_clear_errors(tmp_path: Path) -> None:
    newer = tmp_path / "newer.sqlite"
    ResponseStore(newer).close()
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(DatabaseError, match="newer rigserve"):
        ResponseStore(newer)
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"no database at all, but long enough to be looked at " * 100)
    with pytest.raises(DatabaseError, match="move the file away"):
        ResponseStore(broken)
    with pytest.raises(DatabaseError, match=r"storage\.data_dir"):
        ResponseStore(broken / "responses.sqlite")


def test_only_its_owner_can_read_it(path: Path, store: ResponseStore) -> None:
    run(store.add(response("a")))
    for file in path.parent.glob("responses.sqlite*"):
        if not file.name.endswith(".lock"):
            assert file.stat().st_mode & 0o077 == 0, file
