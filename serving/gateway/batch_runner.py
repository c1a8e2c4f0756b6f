"""Runs batches in the capacity that nobody else wants."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO

import orjson
from starlette.responses import Response
from starlette.types import Message

from serving.gateway.batch_store import BatchStore, Owner
from serving.gateway.caller import Caller
from serving.gateway.dispatch import Destination
from serving.gateway.file_store import FileStore, copying
from serving.gateway.filters import IGNORED_HEADER, ignored_header
from serving.gateway.identity import ANYBODY, Identity
from serving.gateway.intake import Asked, Gateway
from serving.gateway.responding import begin
from serving.gateway.routing import label_of, width_of
from serving.protocol.batches import (
    ENDPOINTS,
    UNFINISHED,
    Line,
    output_line,
    read_lines,
    unanswered_line,
)
from serving.protocol.errors import ApiError
from serving.protocol.openai_responses import ResponseRequest, own_name
from serving.protocol.responses import new_id
from serving.protocol.sse import ClientDisconnected

_log = logging.getLogger(__name__)

# Any process may create or cancel a batch: how often the one that runs them looks.
_LOOK_SECONDS = 0.5
_SWEEP_SECONDS = 60.0
_STORAGE_RETRY_SECONDS = 5.0
_SHORTEST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0
# 507: the disk is full; what an answer would be kept on may have room again.
_RETRIED_STATUSES = (429, 502, 503, 504, 507)
# A line over which the engine dies again and again is the reason for it.
_MAX_ENGINE_DEATHS = 5
_PAGE_LINES = 256
_OWN_HEADERS = "x-rigserve-"


class BatchRunner:
    """Runs the batches of a data folder, unless another process that lives does so.

    One batch of a tenant and a model runs at a time, the oldest first, with as many lines in flight as the model has
    slots. A line is done when its result is committed; one that was under way when the process died is
    computed again.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._store: BatchStore = gateway.batches
        self._files: FileStore = gateway.files
        self._jobs: dict[str, _Job] = {}
        self._stopping = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Begin nothing more; lines in flight may finish."""
        self._stopping.set()

    async def stopped(self) -> None:
        """Wait, after :meth:`stop`, until the results of all lines that finish are kept."""
        await self._task

    async def _run(self) -> None:
        swept_at = float("-inf")
        while not self._stopping.is_set():
            try:
                if time.monotonic() - swept_at > _SWEEP_SECONDS:
                    swept_at = time.monotonic()
                    await self._files.sweep()
                if await self._store.claim():
                    await self._tend()
            except ApiError:
                pass  # The store has logged it; the next look is the next try.
            await _wait(self._stopping, _LOOK_SECONDS)
        await asyncio.gather(*(job.task for job in self._jobs.values()))

    async def _tend(self) -> None:
        """Start what may start, and tell what runs that it shall not."""
        self._jobs = {name: job for name, job in self._jobs.items() if not job.task.done()}
        lanes = {job.lane for job in self._jobs.values()}
        for batch, owner in await self._store.unfinished():
            job = self._jobs.get(batch["id"])
            is_unwanted = batch["status"] == "cancelling" or time.time() >= batch["expires_at"]
            if job is not None:
                if is_unwanted:
                    job.unwanted.set()
                continue
            lane = (owner.tenant, self._model_of(batch))
            if lane not in lanes or is_unwanted:
                lanes.add(lane)
                self._jobs[batch["id"]] = _Job(self, batch, owner, lane)

    def _model_of(self, batch: dict[str, Any]) -> str:
        """The model that a batch is for; empty as long as its file has not been read."""
        if batch["model"] is None:
            return ""
        try:
            return label_of(self._gateway.router.find(batch["model"]))
        except ApiError:
            return str(batch["model"])

    async def work(self, job: _Job) -> None:
        """Take a batch as far as it goes now."""
        batch = job.batch
        try:
            if batch["status"] == "validating":
                await self._validate(job)
                return
            if batch["status"] == "in_progress":
                await self._run_lines(job)
                if self._stopping.is_set() and not job.unwanted.is_set():
                    return
            await self._finish(job)
        except ApiError:
            await _wait(self._stopping, _STORAGE_RETRY_SECONDS)
        except OSError as error:
            _log.error("%s: its files cannot be written: %s", batch["id"], error)
            await _wait(self._stopping, _STORAGE_RETRY_SECONDS)
        except Exception:
            _log.exception("%s: it cannot go on, and is tried again", batch["id"])
            await _wait(self._stopping, _LONGEST_RETRY_SECONDS)

    def _identity_of(self, owner: Owner) -> Identity:
        """For whom a batch runs; raises :class:`ApiError` (401) if its key is not good any more."""
        identity = ANYBODY
        if owner.key_id is not None:
            key = self._gateway.access.ring.active(owner.key_id)
            if key is None:
                raise ApiError(
                    401,
                    "The API key that made this batch is revoked or has expired.",
                    code="invalid_api_key",
                )
            identity = Identity.of(key)
        return replace(identity, priority="batch")

    async def _validate(self, job: _Job) -> None:
        batch = job.batch
        file = await self._files.open(batch["input_file_id"], job.owner.tenant)
        if file is None:
            lines, model = list[Line](), None
            errors = [_error("file_not_found", "The input file is gone.", "input_file_id")]
        else:
            with file:
                lines, model, errors = await asyncio.to_thread(read_lines, file, batch["endpoint"])
        if not errors:
            assert model is not None
            try:
                self._gateway.find(self._identity_of(job.owner), model)
            except ApiError as error:
                unknown = _error(error.code, error.message, "body.model")
                errors.append({**unknown, "line": lines[0].number})
        if errors:
            told = {"object": "list", "data": errors}
            await self._store.move(batch["id"], ("validating",), "failed", errors=told)
        else:
            assert model is not None
            await self._store.start(batch["id"], lines, model)

    async def _run_lines(self, job: _Job) -> None:
        with contextlib.suppress(ApiError):
            job.width = width_of(self._gateway.router.find(job.batch["model"]))
        workers = [self._take_lines(job) for _ in range(job.width)]
        # One that cannot go on, for a full disk, does not break off what engines do for the others.
        for outcome in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _take_lines(self, job: _Job) -> None:
        while not (self._stopping.is_set() or job.unwanted.is_set()):
            line = await job.next_line(self._store)
            if line is None:
                return
            await self._run_line(job, line)

    async def _run_line(self, job: _Job, line: Line) -> None:
        """Run a line until it has a result that is kept, or the batch shall not go on."""
        retry_seconds, deaths = _SHORTEST_RETRY_SECONDS, 0
        while not (job.unwanted.is_set() or self._stopping.is_set()):
            request_id = new_id("req")
            try:
                status, body, headers = await self._answer(job, line, request_id)
            except ClientDisconnected:
                return
            deaths += _code_of(body) == "engine_stopped"
            if status >= 500 and self._stopping.is_set():
                return
            if status not in _RETRIED_STATUSES or deaths == _MAX_ENGINE_DEATHS:
                line_id = new_id("batch_req")
                result = output_line(line_id, line.custom_id, request_id, status, body, headers)
                await self._keep(job, line, result, failed=status != 200)
                return
            await _wait(job.unwanted, retry_seconds, self._stopping)
            retry_seconds = min(2 * retry_seconds, _LONGEST_RETRY_SECONDS)

    async def _answer(
        self, job: _Job, line: Line, request_id: str
    ) -> tuple[int, Any, dict[str, str]]:
        """The status, the body, and rigserve's own headers of a line's answer."""
        fields: dict[str, Any] = orjson.loads(line.body)
        try:
            identity = self._identity_of(job.owner)
            caller = Caller(request_id, job.batch["endpoint"], identity, job.hang_up, is_batch=True)
            answer, ignored = await self._asked(caller, fields)
        except ApiError as error:
            return error.status, error.body, {}
        headers = {
            name: value for name, value in answer.headers.items() if name.startswith(_OWN_HEADERS)
        }
        if ignored:
            headers[IGNORED_HEADER] = ignored_header(ignored)
        return answer.status_code, orjson.loads(answer.body), headers

    async def _asked(self, caller: Caller, fields: dict[str, Any]) -> tuple[Response, list[str]]:
        """A line's answer, and what of the line does not count."""
        kind = ENDPOINTS[caller.endpoint]
        ignored: list[str] = []

        def admit(read: Callable[[dict[str, Any]], Asked]) -> tuple[Destination, Asked]:
            nonlocal ignored
            destination, asked, ignored = self._gateway.admit(
                caller.endpoint, caller.identity, fields, read
            )
            return destination, asked

        if kind is not ResponseRequest:
            return await self._gateway.dispatcher.forward(caller, *admit(kind.of)), ignored
        exchange = await begin(self._gateway.responses.store, caller.identity.tenant, fields, admit)
        if exchange.request.background:
            raise ApiError(
                400,
                "'background': all that is in a batch is made in the background.",
                param="background",
                code="invalid_value",
            )
        answer = await self._gateway.dispatcher.forward(
            caller, exchange.destination, exchange.chat, exchange.translation
        )
        if answer.status_code == 200:
            await exchange.keep()
        return answer, list(map(own_name, ignored))

    async def _keep(self, job: _Job, line: Line, result: dict[str, Any], *, failed: bool) -> None:
        while True:
            try:
                await self._store.settle(job.batch["id"], line.number, result, failed=failed)
                return
            except ApiError:
                # What the engine has done is not done again because of a full disk.
                if self._stopping.is_set():
                    return
                await _wait(self._stopping, _STORAGE_RETRY_SECONDS)

    async def _finish(self, job: _Job) -> None:
        """Write a batch's files and end it. Whoever is killed over this does it again, with one outcome."""
        batch_id, tenant = job.batch["id"], job.owner.tenant
        unfinished = bool(await self._store.pending(batch_id, 0, 1))
        if not unfinished:
            await self._store.move(batch_id, ("in_progress",), "finalizing")
        now = await self._store.get(batch_id, tenant)
        assert now is not None
        source = now["status"]
        if source == "cancelling":
            outcome = "cancelled"
        elif source == "finalizing":
            outcome = "completed"
        elif time.time() >= now["expires_at"]:
            outcome = "expired"
        else:
            return
        keep_seconds = await self._store.output_keep_seconds(batch_id)
        files: dict[str, str] = {}
        for kind in ("output", "error"):
            # A name that a second try finds again: it replaces what the first one left.
            file_id = f"file-{batch_id.removeprefix('batch_')}-{kind}"
            with tempfile.TemporaryFile() as spool:
                await self._spool(spool, batch_id, failed=kind == "error")
                if kind == "error" and outcome in UNFINISHED:
                    await self._spool_unfinished(spool, batch_id, outcome)
                if not spool.tell():
                    continue
                spool.seek(0)
                await self._files.add(
                    file_id,
                    copying(spool),
                    filename=f"{batch_id}_{kind}.jsonl",
                    purpose="batch_output",
                    keep_seconds=keep_seconds,
                    tenant=tenant,
                )
            files[f"{kind}_file_id"] = file_id
        await self._store.end(batch_id, source, outcome, **files)

    async def _spool(self, spool: BinaryIO, batch_id: str, *, failed: bool) -> None:
        after = 0
        while rows := await self._store.results(batch_id, after, _PAGE_LINES, failed=failed):
            after = rows[-1][0]
            await asyncio.to_thread(spool.writelines, [result + b"\n" for _, result in rows])

    async def _spool_unfinished(self, spool: BinaryIO, batch_id: str, outcome: str) -> None:
        after = 0
        code, message = UNFINISHED[outcome]
        while lines := await self._store.pending(batch_id, after, _PAGE_LINES):
            after = lines[-1].number
            told = (
                unanswered_line(new_id("batch_req"), line.custom_id, code, message)
                for line in lines
            )
            written = [orjson.dumps(each) + b"\n" for each in told]
            await asyncio.to_thread(spool.writelines, written)


class _Job:
    """A batch under way in this process."""

    def __init__(
        self, runner: BatchRunner, batch: dict[str, Any], owner: Owner, lane: tuple[str, str]
    ) -> None:
        self.batch = batch
        self.owner = owner
        self.lane = lane
        self.width = 1
        self.unwanted = asyncio.Event()
        self._lines = deque[Line]()
        self._last_number = 0
        self._reading = asyncio.Lock()
        if batch["status"] == "cancelling" or time.time() >= batch["expires_at"]:
            self.unwanted.set()
        self.task = asyncio.create_task(runner.work(self))

    async def hang_up(self) -> Message:
        """What a relay receives from the batch: it waits until the answer is no longer wanted."""
        await self.unwanted.wait()
        return {"type": "http.disconnect"}

    async def next_line(self, store: BatchStore) -> Line | None:
        """The next line to run; None when there is none left. Raises :class:`ApiError`."""
        async with self._reading:
            if not self._lines:
                page = await store.pending(self.batch["id"], self._last_number, _PAGE_LINES)
                self._lines.extend(page)
            if not self._lines:
                return None
            self._last_number = self._lines[-1].number
            return self._lines.popleft()


async def _wait(event: asyncio.Event, seconds: float, other: asyncio.Event | None = None) -> None:
    """Wait for an event, or for another, but not longer than that."""
    waits = [asyncio.create_task(each.wait()) for each in (event, other) if each is not None]
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _code_of(body: Any) -> object:
    error = body.get("error") if isinstance(body, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def _error(code: str | None, message: str, param: str) -> dict[str, Any]:
    return {"code": code, "line": None, "message": message, "param": param}
