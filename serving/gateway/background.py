"""Responses that are made while nobody waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import orjson
from starlette.types import Message

from serving.gateway.caller import Caller
from serving.gateway.dispatch import Destination, Dispatcher
from serving.gateway.response_store import ResponseStore
from serving.protocol.errors import ApiError
from serving.protocol.openai_responses import ResponseTranslation
from serving.protocol.requests import ChatCompletionRequest
from serving.protocol.sse import ClientDisconnected

_log = logging.getLogger(__name__)

# Any process may cancel or delete a response: how often the one that makes it looks.
_LOOK_SECONDS = 0.5
_RETRY_SECONDS = 5.0


class BackgroundResponses:
    """Makes responses that are in the store as ``in_progress``, and puts there what became of them."""

    def __init__(self, store: ResponseStore, dispatcher: Dispatcher) -> None:
        self.store = store
        self._dispatcher = dispatcher
        self._unwanted: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None

    def begin(
        self,
        asker: Caller,
        destination: Destination,
        asked: ChatCompletionRequest,
        translation: ResponseTranslation,
    ) -> None:
        """Make a response that has been stored, whether or not its asker stays.

        It ends early once it is cancelled or deleted.
        """
        unwanted = self._unwanted[translation.response["id"]] = asyncio.Event()
        if self._looking is None or self._looking.done():
            self._looking = self._keep(self._look())

        async def hang_up() -> Message:
            await unwanted.wait()
            return {"type": "http.disconnect"}

        caller = replace(asker, receive=hang_up)
        self._keep(self._make(caller, destination, asked, translation))

    async def settled(self) -> None:
        """Wait until all that was begun has ended and is stored."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _make(
        self,
        caller: Caller,
        destination: Destination,
        asked: ChatCompletionRequest,
        translation: ResponseTranslation,
    ) -> None:
        try:
            answer = await self._dispatcher.forward(caller, destination, asked, translation)
            if answer.status_code != 200:
                translation.fail(orjson.loads(answer.body))
        except ApiError as error:
            translation.fail(error.body)
        except ClientDisconnected:
            return
        except Exception:
            # Whoever polls for it must learn of the end of it.
            _log.exception("%s: a response could not be made", caller.request_id)
            translation.fail(ApiError(500, "Something failed inside rigserve.").body)
        finally:
            del self._unwanted[translation.response["id"]]
        await self._settle(translation)

    async def _settle(self, translation: ResponseTranslation) -> None:
        while True:
            try:
                await self.store.settle(translation.response)
                return
            except ApiError:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _look(self) -> None:
        """End what is no longer wanted, as long as there is something that could be."""
        while self._unwanted:
            await asyncio.sleep(_LOOK_SECONDS)
            known = set(self._unwanted)
            try:
                wanted = await self.store.in_progress()
            except ApiError:
                continue
            for response_id in (known - wanted) & self._unwanted.keys():
                self._unwanted[response_id].set()

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
