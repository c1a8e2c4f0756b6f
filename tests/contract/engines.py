"""The engines that the contract is tested on; another one is another entry in ``ENGINES``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from loadtest.benchmarks.engine.peers import Peers
from tests.models import write_minilm_folder
from tests.processes import START_SECONDS, RigServer, write_config
from tests.vllm import MISSING, vllm_python

CHAT, EMBEDDING = "chat", "embedding"
CONTEXT_TOKENS = 1024
SLOTS = 8


# What every engine that computes with llama.cpp is asked to do here.
_OF_LLAMA_CPP = frozenset(
    {
        *("logprobs", "seed", "logit_bias", "penalties", "top_k", "min_p", "stop", "ignore_eos"),
        *("json_object", "json_schema", "completions", "token_prompts", "embeddings", "tokenize"),
    }
)
_OF_OURS = _OF_LLAMA_CPP | {
    *("n", "tools", "parallel_tools", "structured_outputs", "echo", "dimensions")
}


@dataclass(frozen=True)
class Program:
    """What an engine is started with that is not part of rigserve: where it is, None if nowhere, and the key that names it."""

    key: str
    find: Callable[[], Path | None]
    missing: str


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine, what configs say of its models, and what it can do of what not every engine can.

    ``capabilities`` are among ``probes.PROBES``; what an engine lacks, it must refuse by name. One that
    ``is_remote`` needs a server to be remote from: a rigserve with the engine llama_cpp. ``embedder`` writes
    the model that embeds into a folder where it is not a GGUF file. Who leaves a stream is told its tokens; one
    that ``times_who_leaves`` tells the times, too.
    """

    name: str
    engine: str
    capabilities: frozenset[str]
    model: Mapping[str, Any] = field(default_factory=dict)
    is_remote: bool = False
    program: Program | None = None
    embedder: Callable[[Path], Path] | None = None
    times_who_leaves: bool = True
    start_seconds: float = START_SECONDS

    def write_config(
        self, folder: Path, cache_dir: Path, embedding_file: Path, upstream: str | None = None
    ) -> Path:
        """A gateway's config with a model that chats and one that embeds. Skips where the engine is not installed."""
        model = {"engine": self.engine, **self.model}
        if self.program is not None:
            found = self.program.find()
            if found is None:
                pytest.skip(
                    f"NOT TESTED: {self.engine} is not installed here; {self.program.missing}"
                )
            model[self.program.key] = str(found)
        limits = {"context_length": CONTEXT_TOKENS, "max_sequences": SLOTS}
        chat = {"name": CHAT, "aliases": [], **limits, **model}
        path = write_config(folder, cache_dir, **chat)
        config = yaml.safe_load(path.read_text())
        if self.embedder is not None:
            embedding_file = self.embedder(folder / "embedder")
        of_files = {"source": str(embedding_file), "threads": 1}
        embedder = {"name": EMBEDDING, "context_length": 256, **of_files, **model}
        embedder.pop("chat_template", None)
        config["models"].append(embedder)
        if upstream is not None:
            for each in config["models"]:
                for name in ("source", "quantization", "threads"):
                    each.pop(name, None)
                each["base_url"] = f"{upstream}/v1"
        path.write_text(yaml.safe_dump(config))
        return path


def llama_server() -> Path | None:
    """llama.cpp's own server, if it is somewhere here."""
    named = os.environ.get("RIGSERVE_LLAMA_SERVER") or shutil.which("llama-server")
    built = Peers().program("llama-server")
    if named is None:
        return built if built.is_file() else None
    return Path(named)


_LLAMA_SERVER = Program(
    "binary",
    llama_server,
    "have it on PATH, name it in RIGSERVE_LLAMA_SERVER, or build it with: make bench-peers",
)
# The embedded model as vLLM serves it: a folder that is made of its file.
_OF_VLLM: Mapping[str, Any] = {
    "quantization": None,
    # Shapes of batches change what is computed least in this.
    "dtype": "float32",
    "chat_template": str(Path(__file__).parent / "hermes.jinja"),
    # Compiling the model would take longer than the tests.
    "extra_args": ["--enforce-eager"],
}
_LLAMA_CPP = EngineUnderTest("llama_cpp", "llama_cpp", _OF_OURS)
ENGINES = (
    _LLAMA_CPP,
    EngineUnderTest("llama_server", "llama_server", _OF_LLAMA_CPP, program=_LLAMA_SERVER),
    EngineUnderTest(
        "vllm",
        "vllm",
        _OF_OURS - {"dimensions"},
        _OF_VLLM,
        program=Program("environment", vllm_python, MISSING),
        embedder=write_minilm_folder,
        times_who_leaves=False,
        start_seconds=600,
    ),
    EngineUnderTest("remote_rigserve", "remote", _OF_OURS, {"dialect": "rigserve"}, is_remote=True),
    EngineUnderTest(
        "remote_openai",
        "remote",
        _OF_OURS - {"top_k", "min_p", "ignore_eos", "structured_outputs", "tokenize"},
        {"dialect": "openai"},
        is_remote=True,
    ),
)
UPSTREAM = _LLAMA_CPP


class ContractServer(RigServer):
    """A gateway with an engine under test."""

    def __init__(self, config_path: Path, engine: EngineUnderTest) -> None:
        super().__init__(config_path)
        self.engine = engine

    def post(self, path: str, **fields: Any) -> requests.Response:
        """A bare request."""
        return requests.post(self.base_url + path, json=fields, timeout=60)
