"""A model that another server has: where it is, the key to it, and whether it works."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import aiohttp

from serving.config import RemoteModel
from serving.engines.breaker import Breaker, BreakerState
from serving.engines.engine import Endpoint, EngineState

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
# How often a server is asked that answers nothing else meanwhile.
_PROBE_INTERVAL_SECONDS = 30.0
_PROBE_TIMEOUT_SECONDS = 5.0
_KEY_REFUSED = (401, 403)

_numbers = itertools.count(1)


class Remote:
    """A model of another server. It has no process: its breaker knows from probes and calls whether it works."""

    def __init__(self, model: RemoteModel) -> None:
        self.id = f"{model.name}@{next(_numbers)}"
        self.model = model
        self.breaker = Breaker(model.name)
        # Always there to be asked; whether it works is for the breaker to say.
        self.endpoint = Endpoint(model.base_url, "")
        self.probed_at = time.monotonic()

    @property
    def state(self) -> EngineState:
        """As that of an engine which takes requests."""
        return EngineState.READY

    @property
    def is_available(self) -> bool:
        """Whether a request would be sent to it now."""
        return self.breaker.lets_through

    @property
    def authorization(self) -> dict[str, str]:
        """The header with its API key, if it has one. The key is read anew: it may have been changed."""
        key = _key_of(self.model)
        return {"authorization": f"Bearer {key}"} if key else {}

    @property
    def name_there(self) -> str:
        """What the model is called there."""
        return self.model.model or self.model.name

    def url(self, path: str) -> str:
        """Where it takes what this server takes at ``path``."""
        if path.startswith("/v1/"):
            return self.model.base_url + path.removeprefix("/v1")
        return self.model.base_url.removesuffix("/v1") + path

    async def probe(self, session: aiohttp.ClientSession) -> None:
        """Ask whether it is there and knows the key; the breaker learns of it."""
        self.probed_at = time.monotonic()
        try:
            async with session.get(
                self.url("/v1/models"),
                headers=self.authorization,
                timeout=aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_SECONDS),
                allow_redirects=False,
            ) as answer:
                # Not all have such a list: a 404 is a sign of life, too.
                works = answer.status < 500 and answer.status not in _KEY_REFUSED
                reason = f"it answers {answer.status}"
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            works, reason = False, str(error) or type(error).__name__
        if not works:
            _log.warning(
                "%s: a probe of %s failed: %s", self.model.name, self.model.base_url, reason
            )
        self.breaker.probed(works=works)


async def watch(remotes: Callable[[], Iterable[Remote]], session: aiohttp.ClientSession) -> None:
    """Probe what has failed when its time has come, and all now and then, until cancelled."""
    probes: dict[str, asyncio.Task[None]] = {}
    async with asyncio.TaskGroup() as group:
        while True:
            # One that takes its time keeps none of the others waiting.
            probes = {id: probe for id, probe in probes.items() if not probe.done()}
            for remote in remotes():
                if remote.id not in probes and _is_due(remote):
                    probes[remote.id] = group.create_task(remote.probe(session))
            await asyncio.sleep(_LOOK_SECONDS)


def _is_due(remote: Remote) -> bool:
    if remote.breaker.state is BreakerState.CLOSED:
        return time.monotonic() - remote.probed_at > _PROBE_INTERVAL_SECONDS
    return remote.breaker.seconds_until_probe == 0


def _key_of(model: RemoteModel) -> str:
    """The key; empty if there is none that can be sent."""
    try:
        key = _text_of_key(model).strip()
    except (OSError, UnicodeDecodeError) as error:
        _log.error("%s: its API key cannot be read: %s", model.name, error)
        return ""
    if not key.isprintable():
        _log.error("%s: its API key is no key: it has line breaks in it", model.name)
        return ""
    return key


def _text_of_key(model: RemoteModel) -> str:
    if model.api_key_env is not None:
        return os.environ.get(model.api_key_env, "")
    if model.api_key_file is None:
        return ""
    return Path(model.api_key_file).read_text(encoding="utf-8")
