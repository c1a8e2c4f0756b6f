"""Given a server that refuses or fails, what the SDKs make of it by themselves: how often they really ask again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
import yaml

from serving.keys.store import KeyStore
from serving.protocol.keys import NewKey
from tests.gateway.bad_engine import BREAKS_OFF, DIES, GOES_DEAF, TAKES_ITS_TIME
from tests.gateway.test_bad_engine import MODEL, BadRig
from tests.processes import wait_for, write_config

RETRIES = 2
CHAT = "/v1/chat/completions"


class KeyedBadRig(BadRig):
    """A server that wants keys, and waits half a second for bodies; its engine does as it is told."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        path = write_config(folder, cache_dir)
        config = yaml.safe_load(path.read_text())
        config["server"] |= {"body_timeout_seconds": 0.5, "max_body_bytes": 10_000}
        path.write_text(yaml.safe_dump(config))
        super().__init__(path)
        self._folder = Path(config["storage"]["data_dir"])
        self.key = self.new_key("any")

    def new_key(self, name: str, **fields: Any) -> str:
        """The secret of a new key."""
        store = KeyStore(self._folder)
        _, secret = store.create(NewKey(name=name, **fields))
        store.close()
        return secret

    def knows(self, secret: str) -> bool:
        """Whether a key works by now."""
        headers = {"authorization": f"Bearer {secret}"}
        return self.get("/v1/models", headers=headers).status_code == 200


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[KeyedBadRig]:
    with KeyedBadRig(tmp_path_factory.mktemp("rig"), cache_dir) as server:
        server.wait_until_ready()
        yield server


class Counted:
    """OpenAI's and Anthropic's clients of a server, and the statuses of all that they were answered."""

    def __init__(
        self, rig: BadRig, key: str, *, retries: int = RETRIES, transport: Any = None
    ) -> None:
        self.statuses: list[int] = []
        http: Any = httpx2.Client(
            transport=transport,
            event_hooks={"response": [lambda answer: self.statuses.append(answer.status_code)]},
            timeout=30,
        )
        options: Any = {"api_key": key, "max_retries": retries, "http_client": http}
        self.openai = openai.OpenAI(base_url=f"{rig.base_url}/v1", **options)
        self.anthropic = anthropic.Anthropic(base_url=rig.base_url, **options)

    def chat(self, said: str = "fine", **fields: Any) -> Any:
        """Ask for a chat completion."""
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": said}], **fields}
        return self.openai.chat.completions.create(**asked)

    def message(self, said: str = "fine", **fields: Any) -> Any:
        """Ask for a message."""
        turns: Any = [{"role": "user", "content": said}]
        return self.anthropic.messages.create(
            **{"model": MODEL, "messages": turns, "max_tokens": 2, **fields}
        )


def test_what_can_never_succeed_is_asked_once(rig: KeyedBadRig) -> None:
    narrow = rig.new_key("narrow", models=["gpt-4o-mini"])
    wait_for(lambda: rig.knows(narrow), "the key is known", 5)
    other: Any = {"extra_headers": {"content-type": "text/plain"}}
    for status, kind, fields, key in (
        (400, openai.BadRequestError, {"temperature": 9}, rig.key),
        (401, openai.AuthenticationError, {}, "rs-wrong"),
        (403, openai.PermissionDeniedError, {}, narrow),
        (404, openai.NotFoundError, {"model": "nope"}, rig.key),
        (413, openai.APIStatusError, {"said": "x" * 20_000}, rig.key),
        (415, openai.APIStatusError, other, rig.key),
    ):
        clients = Counted(rig, key)
        with pytest.raises(kind) as refused:
            clients.chat(**fields)
        assert clients.statuses == [status]
        assert refused.value.request_id
        assert refused.value.message
    for status, refusal, fields, key in (
        (400, anthropic.BadRequestError, {"speed": "fast"}, rig.key),
        (401, anthropic.AuthenticationError, {}, "rs-wrong"),
        (403, anthropic.PermissionDeniedError, {}, narrow),
        (404, anthropic.NotFoundError, {"model": "nope"}, rig.key),
        (413, anthropic.RequestTooLargeError, {"said": "x" * 20_000}, rig.key),
    ):
        clients = Counted(rig, key)
        with pytest.raises(refusal) as told:
            clients.message(**fields)
        assert clients.statuses == [status]
        assert told.value.request_id


def test_405_is_asked_once(rig: KeyedBadRig) -> None:
    clients = Counted(rig, rig.key)
    with pytest.raises(openai.APIStatusError):
        clients.openai.post("/models", body={}, cast_to=object)
    assert clients.statuses == [405]


@pytest.mark.parametrize(("said", "status"), [("failure", 500), ("page", 502), ("error page", 502)])
def test_what_failed_here_is_asked_again_and_then_told(
    rig: KeyedBadRig, said: str, status: int
) -> None:
    clients = Counted(rig, rig.key)
    with pytest.raises(openai.InternalServerError) as failed:
        clients.chat(said)
    assert clients.statuses == [status] * (1 + RETRIES)
    assert failed.value.status_code == status
    with pytest.raises(anthropic.InternalServerError):
        clients.message(said)
    assert clients.statuses == [status] * 2 * (1 + RETRIES)


def test_an_engine_that_dies_is_waited_for(rig: KeyedBadRig, tmp_path: Path) -> None:
    for ask in ("chat", "message"):
        clients = Counted(rig, rig.key)
        began_at = time.monotonic()
        answer = getattr(clients, ask)(f"{DIES}{tmp_path / ask}")
        assert answer.id
        assert clients.statuses == [503, 200]
        assert time.monotonic() - began_at > 1.9, "Retry-After said 2"


def test_429_is_waited_for(rig: KeyedBadRig) -> None:
    secret = rig.new_key("alone", max_concurrent=1)
    wait_for(lambda: rig.knows(secret), "the key is known", 5)
    for ask in ("chat", "message"):
        first = threading.Thread(target=Counted(rig, secret).chat, args=(TAKES_ITS_TIME,))
        first.start()
        wait_for(lambda: rig.total("rigserve_requests_in_flight") == 1, "the first is under way")
        clients = Counted(rig, secret)
        assert getattr(clients, ask)().id
        assert clients.statuses[-1] == 200
        assert 1 <= clients.statuses.count(429) <= 2, "Retry-After said 1"
        first.join()


def test_a_limit_per_minute_says_when_to_come_again(rig: KeyedBadRig) -> None:
    secret = rig.new_key("seldom", requests_per_minute=1)
    wait_for(lambda: rig.knows(secret), "the key is known", 5)
    clients = Counted(rig, secret, retries=0)
    clients.chat()
    with pytest.raises(openai.RateLimitError) as refused:
        clients.chat()
    headers = refused.value.response.headers
    assert 50 < int(headers["retry-after"]) <= 60
    assert headers["x-ratelimit-limit-requests"] == "1"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert 50 < float(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    with pytest.raises(anthropic.RateLimitError) as told:
        clients.message()
    assert 50 < int(told.value.response.headers["retry-after"]) <= 60


class _SlowAtFirst(httpx2.HTTPTransport):
    """Sends the first body too slowly."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self._asked += 1
        if self._asked == 1:
            body = request.read()

            def slowly() -> Iterator[bytes]:
                yield body[:-1]
                time.sleep(2)
                yield body[-1:]

            request = httpx2.Request(
                request.method, request.url, headers=request.headers, content=slowly()
            )
        return super().handle_request(request)


def test_a_body_that_came_too_late_is_sent_again(rig: KeyedBadRig) -> None:
    clients = Counted(rig, rig.key, transport=_SlowAtFirst())
    assert clients.chat().choices[0].message.content == "A."
    assert clients.statuses == [408, 200]


def test_a_stream_that_breaks_off_is_not_begun_again(rig: KeyedBadRig) -> None:
    clients = Counted(rig, rig.key)
    with pytest.raises(openai.APIError, match="stopped while it worked"):
        list(clients.chat(BREAKS_OFF, stream=True))
    with pytest.raises(anthropic.APIStatusError, match="stopped while it worked"):
        list(clients.message(BREAKS_OFF, stream=True))
    assert clients.statuses == [200, 200]


def test_an_engine_that_takes_no_connection_is_a_504(rig: KeyedBadRig) -> None:
    """The last test: the engine hears nothing any more."""
    clients = Counted(rig, rig.key, retries=1)
    clients.chat(GOES_DEAF)
    with pytest.raises(openai.InternalServerError) as silent:
        clients.chat()
    assert clients.statuses == [200, 504, 504]
    assert silent.value.code == "engine_timeout"
    once = Counted(rig, rig.key, retries=0)
    with pytest.raises(anthropic.APIStatusError) as late:
        once.message()
    body: Any = late.value.body
    assert (late.value.status_code, body["error"]["type"]) == (504, "timeout_error")
