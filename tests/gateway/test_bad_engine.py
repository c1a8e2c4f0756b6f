"""What a client sees of an engine that answers garbage: a 502, or what there is of a stream; never a 500."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.gateway.bad_engine import GARBAGE, HANGS_UP
from tests.processes import Program, RigServer, wait_for, write_config

MODEL = "smollm2-135m"


class BadRig(RigServer):
    """A server whose engine answers garbage."""

    def __init__(self, config_path: Path) -> None:
        super().__init__(config_path)
        command = [sys.executable, "-m", "tests.gateway.bad_engine", "serve", str(config_path)]
        Program.__init__(self, command, self.base_url, {})


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[BadRig]:
    with BadRig(write_config(tmp_path_factory.mktemp("rig"), cache_dir)) as server:
        server.wait_until_ready()
        yield server


def ask(rig: BadRig, path: str, said: str, *, stream: bool = False) -> requests.Response:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": said}],
        "max_tokens": 4,
        "stream": stream,
    }
    return requests.post(rig.base_url + path, json=body, timeout=30)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", ["page", "list", "error page", "nothing"])
def test_garbage_is_a_bad_gateway(rig: BadRig, path: str, said: str, stream: bool) -> None:
    answer = ask(rig, path, said, stream=stream)
    assert answer.status_code == 502
    assert "makes no sense" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("said", "path"), [("odd usage", "/v1/messages"), ("odd timings", "/v1/messages")]
)
def test_no_choices_cannot_be_translated(rig: BadRig, said: str, path: str) -> None:
    assert ask(rig, path, said).status_code == 502


@pytest.mark.parametrize("said", ["odd usage", "odd timings"])
def test_usage_that_is_none_is_estimated(rig: BadRig, said: str) -> None:
    answer = ask(rig, "/v1/chat/completions", said)
    assert answer.status_code == 200
    assert answer.headers["x-rigserve-cost-basis"] == "estimated"


def test_a_connection_that_is_dropped_before_the_answer_is_made_anew(
    rig: BadRig, tmp_path: Path
) -> None:
    answer = ask(rig, "/v1/chat/completions", HANGS_UP + str(tmp_path / "once"))
    assert (tmp_path / "once").exists()
    assert answer.status_code == 200


def test_a_stream_that_makes_no_sense_ends(rig: BadRig) -> None:
    plain = ask(rig, "/v1/chat/completions", "odd stream", stream=True).text
    assert plain.startswith(GARBAGE["odd stream"][2].partition("\n\n")[0])
    assert plain.endswith("data: [DONE]\n\n")
    for said in ("odd stream", "odd beginning"):
        translated = ask(rig, "/v1/messages", said, stream=True).text
        assert "event: error" in translated
        assert "makes no sense" in translated
    # The second began as a 200, and the engine failed over it.
    wait_for(lambda: failed_streams(rig) == 1, "it is counted as a failure")


def failed_streams(rig: BadRig) -> float:
    return sum(
        count
        for labels, count in rig.series("rigserve_requests_total").items()
        if 'status="500"' in labels and "/v1/messages" in labels
    )


def test_what_uses_no_tokens_is_checked_too(rig: BadRig) -> None:
    said = {"model": MODEL, "prompt": "The sea"}
    assert requests.post(f"{rig.base_url}/tokenize", json=said, timeout=30).status_code == 502
    # An object, but not one that counts tokens.
    chat: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "odd usage"}]}
    url = f"{rig.base_url}/v1/messages/count_tokens"
    assert requests.post(url, json=chat, timeout=30).status_code == 502


def test_all_of_it_is_counted(rig: BadRig) -> None:
    """After all of the above."""
    wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "all requests have ended")
    counts = rig.series("rigserve_requests_total")
    assert not [labels for labels in counts if 'status="499"' in labels]
    failed = sum(count for labels, count in counts.items() if 'status="500"' in labels)
    assert failed == failed_streams(rig) <= 1
