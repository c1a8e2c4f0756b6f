"""What must be true of every answer, and of a server after thousands of them."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.fuzz.corpus import KINDS
from tests.processes import RigServer, wait_for

# A request that takes longer hangs. The machine may be busy, and eight others be in its way.
DEADLINE_SECONDS = 60.0
METERED = frozenset(kind.path for kind in KINDS if kind.is_metered)
# Errors about the request as a whole; all other 400s are about a field.
_OF_NO_FIELD = frozenset(("invalid_json", "request_too_complex", "invalid_form"))
# How a stream may end.
_LAST_EVENTS = (
    b"data: [DONE]",
    b'"response.completed"',
    b'"response.incomplete"',
    b'"message_stop"',
)


def check_answer(
    method: str, path: str, status: int, headers: Mapping[str, str], body: bytes
) -> None:
    """Raises ``AssertionError`` for an answer that no request may get."""
    assert status < 500 or status in (503, 507), f"a {status}"
    if status < 400:
        if headers.get("content-type", "").startswith("text/event-stream"):
            assert any(event in body[-20_000:] for event in _LAST_EVENTS), "an unfinished stream"
        return
    if method == "HEAD":
        return
    assert headers.get("content-type") == "application/json", "an error that is no JSON"
    answer = json.loads(body)
    if answer["error"].get("code") == "invalid_http":
        return  # for any path, and without an id: it became no request
    if path.startswith("/v1/messages"):
        assert answer["type"] == "error"
        assert set(answer["error"]) == {"type", "message"}
        return
    error = answer["error"]
    assert "x-request-id" in headers, "no request id"
    assert set(answer) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 4000, "an endless message"
    if status == 400 and error["code"] not in _OF_NO_FIELD:
        assert error["param"] is not None, "an error without the field at fault"
    if status == 503:
        assert "retry-after" in headers


@dataclass(slots=True)
class Tally:
    """What clients saw: requests by status, and whole answers by endpoint, which are in the ledger."""

    statuses: Counter[int] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    in_background: int = 0

    @property
    def requests(self) -> int:
        """How many there were."""
        return self.statuses.total()

    def add(
        self, method: str, path: str, status: int, headers: Mapping[str, str], body: bytes
    ) -> None:
        """Count an answer, which :func:`check_answer` must like."""
        check_answer(method, path, status, headers, body)
        self.statuses[status] += 1
        endpoint = path.partition("?")[0]
        if method == "POST" and status == 200 and endpoint in METERED:
            if endpoint == "/v1/responses" and b'"background":true' in body:
                self.in_background += 1
            else:
                self.whole[endpoint] += 1

    def agrees_with(self, ledger: Counter[str]) -> bool:
        """Whether the ledger has these answers, and no others but those made in the background that came off."""
        more = ledger - self.whole
        return (
            not self.whole - ledger and more.total() == more["/v1/responses"] <= self.in_background
        )


def resident_mib(rig: RigServer) -> dict[str, float]:
    """Main memory of the gateway and of its engines, by what they are."""
    gateway = psutil.Process(rig.process.pid)
    memory = {"gateway": gateway.memory_info().rss / 2**20}
    for child in gateway.children(recursive=True):
        words = child.cmdline()
        if "serving.llamacpp" in words and "--served-name" in words and "guard" not in words[3:4]:
            name = words[words.index("--served-name") + 1]
            mib = child.memory_info().rss / 2**20
            memory[name] = max(mib, memory.get(name, 0.0))
    return memory


def wait_until_idle(rig: RigServer) -> None:
    """Fails unless all that was asked for is given back: requests, slots, and those that wait."""
    for name in (
        "rigserve_requests_in_flight",
        "rigserve_sequences_running",
        "rigserve_requests_queued",
        "rigserve_admission_waiting",
    ):
        wait_for(lambda name=name: rig.total(name) == 0, f"{name} is 0", 60)  # type: ignore[misc]


def ledger_counts(rig: RigServer) -> Counter[str]:
    """Whole answers that the ledger has, by endpoint."""
    with sqlite3.connect(rig.ledger_path) as connection:
        rows: list[Any] = connection.execute(
            "SELECT endpoint, count(*) FROM usage WHERE status = 200 GROUP BY endpoint"
        ).fetchall()
    return Counter(dict(rows))
