"""How engines of each kind are spoken to. What their models are asked beyond that, ``dialects`` refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import orjson

from serving.config import ModelConfig
from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.engine_call import EngineCall
from serving.gateway.llama_server import load as llama_server_load
from serving.gateway.llama_server.call import LlamaServerCall
from serving.gateway.llama_server.request import written as written_for_llama_server
from serving.gateway.vllm import load as vllm_load
from serving.gateway.vllm.call import VllmCall
from serving.gateway.vllm.request import written as written_for_vllm
from serving.protocol.requests import ModelRequest


class _MakesCall(Protocol):
    def __call__(
        self,
        session: aiohttp.ClientSession,
        engine: Engine,
        endpoint: Endpoint,
        body: ModelRequest,
        sent: bytes,
        headers: Mapping[str, str],
    ) -> EngineCall:
        """A request on its way; ``headers`` tell engines of ours whose it is, and what it belongs to."""


@dataclass(frozen=True, slots=True)
class Wire:
    """The words of one kind of engine.

    ``written`` is the body that it gets; ``read_load`` makes of what it says at ``load_path`` the counts of
    :mod:`serving.metrics`. One that does not tell how long requests wait for a slot of its ``has_queue`` false:
    it is given no more than it has slots for.
    """

    written: Callable[[Any, ModelRequest], bytes]
    call: _MakesCall
    load_path: str
    read_load: Callable[[bytes], dict[str, Any]]
    has_queue: bool


def written(_model: object, asked: ModelRequest) -> bytes:
    """A request as it is: for engines of ours, and other servers."""
    # Pydantic writes what it has read, also numbers that other JSON libraries refuse.
    return asked.model_dump_json(exclude_none=True, by_alias=True).encode()


_WIRES: Mapping[str, Wire] = {
    "llama_cpp": Wire(written, EngineCall, "/internal/load", orjson.loads, has_queue=True),
    "llama_server": Wire(
        written_for_llama_server,
        LlamaServerCall,
        llama_server_load.LOAD_PATH,
        llama_server_load.load_of,
        has_queue=False,
    ),
    "vllm": Wire(
        written_for_vllm, VllmCall, vllm_load.LOAD_PATH, vllm_load.load_of, has_queue=True
    ),
}


def wire_of(model: ModelConfig) -> Wire:
    """How the engine of a model is spoken to."""
    return _WIRES[model.engine]
