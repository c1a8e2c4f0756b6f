"""The servers under comparison: the same model file, threads, slots and context for all."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp

from loadtest.benchmarks.engine.peers import Peers
from loadtest.benchmarks.processes import free_port, running
from loadtest.benchmarks.streams import Reply, Stream

MODEL = "model"
RIGSERVE, LLAMA_SERVER, EXAMPLE = "rigserve", "llama-server", "example-server"
# Told to do what rigserve's launcher has its engine do; out of the box it maps the weights, in small pages.
LLAMA_SERVER_TUNED = "llama-server in huge pages"
# rigserve's default for the prompt tokens of a step, and llama-server's for both kinds of batch.
STEP_TOKENS = 512
LOGICAL_BATCH_TOKENS = 2048
# What rigserve's launcher sets for an engine (serving/engines/llama_cpp.py).
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_WARM_UP_TOKENS = 8
_TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass(frozen=True, slots=True)
class Rig:
    """What all servers have in common. ``context_length`` is that of one slot, in tokens."""

    model_path: Path
    peers: Peers
    threads: int
    slots: int = 16
    context_length: int = 2048
    eos_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, stopped except while it is measured: what idles must not cost the others."""

    name: str
    root_url: str
    process_group: int
    # Fields that make a generation run to its limit.
    endless: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Let the server run; connections are new ones, as a stopped server drops no old ones."""
        os.killpg(self.process_group, signal.SIGCONT)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session:
                yield session
        finally:
            os.killpg(self.process_group, signal.SIGSTOP)

    def chat(self, messages: Sequence[dict[str, str]], **fields: Any) -> Stream:
        """A greedy chat completion."""
        return self._stream("chat/completions", {"messages": messages, **fields})

    def complete(self, prompt: Sequence[int], **fields: Any) -> Stream:
        """A greedy completion of exactly these tokens."""
        return self._stream("completions", {"prompt": prompt, **fields})

    def _stream(self, path: str, fields: dict[str, Any]) -> Stream:
        return Stream(f"{self.root_url}/v1/{path}", {"model": MODEL, "temperature": 0, **fields})

    async def tokenize(self, session: aiohttp.ClientSession, text: str) -> list[int]:
        """rigserve's only: the text's tokens, without a beginning-of-text token."""
        body = {"model": MODEL, "prompt": text, "add_special_tokens": False}
        async with session.post(f"{self.root_url}/tokenize", json=body) as answer:
            answer.raise_for_status()
            tokens: list[int] = (await answer.json())["tokens"]
            return tokens

    async def statistics(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """What rigserve's engine has counted about itself; of others, nothing."""
        async with session.get(f"{self.root_url}/internal/load") as answer:
            counts: dict[str, Any] = await answer.json() if answer.status == 200 else {}
            return counts


def require_full(reply: Reply, tokens: int) -> Reply:
    """The reply, if it ran to its limit; raises ``RuntimeError`` otherwise."""
    counted = reply.usage.get("completion_tokens", tokens)
    if reply.finish_reason != "length" or counted != tokens:
        raise RuntimeError(
            f"a stream ended with {reply.finish_reason!r} after {counted} of {tokens} tokens; "
            "see --eos-tokens"
        )
    return reply


def in_turns(running: Sequence[Server], rounds: int) -> Iterator[tuple[int, Server]]:
    """Every server once in each round, with the round's number.

    Who comes first may find a cooler processor, so all do in turn.
    """
    for number in range(rounds):
        first = number % len(running)
        for server in (*running[first:], *running[:first]):
            print(f"  round {number + 1} of {rounds}: {server.name}", file=sys.stderr, flush=True)
            yield number, server


@contextmanager
def servers(rig: Rig, names: Sequence[str]) -> Iterator[list[Server]]:
    """The named servers, started, warm and stopped, in this order."""
    starters = {
        RIGSERVE: rigserve,
        LLAMA_SERVER: _llama_server,
        LLAMA_SERVER_TUNED: _llama_server_tuned,
        EXAMPLE: _example_server,
    }
    with ExitStack() as stack:
        started = [stack.enter_context(starters[name](rig)) for name in names]
        warm(started)
        yield started


def warm(running: Sequence[Server]) -> None:
    """Have each answer something, which takes longer the first time; afterwards they are stopped."""

    async def answer(server: Server) -> None:
        async with server.awake() as session:
            greeting = [{"role": "user", "content": "Good morning!"}]
            await server.chat(greeting, max_tokens=_WARM_UP_TOKENS).run(session)

    for server in running:
        os.killpg(server.process_group, signal.SIGSTOP)
    for server in running:
        asyncio.run(answer(server))


@contextmanager
def rigserve(rig: Rig, *options: str, name: str = RIGSERVE) -> Iterator[Server]:
    """The engine bare, without the gateway; ``options`` go on its command line."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = {"model-path": rig.model_path, "served-name": MODEL, "port": port,
             "context-length": rig.context_length, "max-sequences": rig.slots,
             "max-batch-tokens": STEP_TOKENS, "threads": rig.threads}  # fmt: skip
    command = [sys.executable, "-m", "serving.llamacpp", *_words(flags), *options]
    with running(command, f"{url}/health", _HUGE_PAGES) as group:
        yield Server(name, url, group)


def _llama_server_tuned(rig: Rig) -> AbstractContextManager[Server]:
    return _llama_server(
        rig, "--load-mode", "none", name=LLAMA_SERVER_TUNED, environment=_HUGE_PAGES
    )


@contextmanager
def _llama_server(
    rig: Rig,
    *options: str,
    name: str = LLAMA_SERVER,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Server]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = {"model": rig.model_path, "alias": MODEL, "port": port, "parallel": rig.slots,
             "ctx-size": rig.context_length * rig.slots, "threads": rig.threads,
             "batch-size": LOGICAL_BATCH_TOKENS, "ubatch-size": STEP_TOKENS}  # fmt: skip
    command = [str(rig.peers.program(LLAMA_SERVER)), *_words(flags), *options]
    with running(command, f"{url}/health", {**rig.peers.environment, **environment}) as group:
        yield Server(name, url, group)


@contextmanager
def _example_server(rig: Rig) -> Iterator[Server]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = {
        "server": {"port": port},
        "model": {
            "path": str(rig.model_path), "alias": MODEL, "threads": rig.threads,
            "threads_batch": rig.threads, "n_seq_max": rig.slots,
            "n_ctx": rig.context_length * rig.slots, "n_batch": STEP_TOKENS,
            "n_ubatch": STEP_TOKENS, "kv_unified": False, "store_logits": False,
        },
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        command = [sys.executable, str(rig.peers.example_server), "-C", str(path)]
        with running(command, f"{url}/healthz") as group:
            # It knows no ignore_eos.
            bias = {str(token): -100 for token in rig.eos_tokens}
            yield Server(EXAMPLE, url, group, endless={"logit_bias": bias})


def _words(flags: dict[str, Any]) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
