"""The engines that the contract is tested on; another one is another entry in ``ENGINES``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.processes import RigServer, write_config

CHAT, EMBEDDING = "chat", "embedding"
CONTEXT_TOKENS = 1024
SLOTS = 8


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine, what configs say of its models, and what it can do of what not every engine can.

    ``capabilities`` are among ``probes.PROBES``; what an engine lacks, it must refuse by name.
    """

    name: str
    capabilities: frozenset[str]
    chat_model: Mapping[str, Any] = field(default_factory=dict)
    embedding_model: Mapping[str, Any] = field(default_factory=dict)

    def write_config(self, folder: Path, cache_dir: Path, embedding_file: Path) -> Path:
        """A gateway's config with a model that chats and one that embeds."""
        chat = {
            "name": CHAT,
            "engine": self.name,
            "aliases": [],
            "context_length": CONTEXT_TOKENS,
            "max_sequences": SLOTS,
            **self.chat_model,
        }
        path = write_config(folder, cache_dir, **chat)
        config = yaml.safe_load(path.read_text())
        embedder = {
            "name": EMBEDDING,
            "engine": self.name,
            "source": str(embedding_file),
            "context_length": 256,
            "threads": 1,
            **self.embedding_model,
        }
        config["models"].append(embedder)
        path.write_text(yaml.safe_dump(config))
        return path


ENGINES = (
    EngineUnderTest(
        "llama_cpp",
        frozenset(
            {
                *("logprobs", "n", "seed", "logit_bias", "penalties", "top_k", "min_p", "stop"),
                *("tools", "parallel_tools", "json_object", "json_schema", "structured_outputs"),
                *("completions", "echo", "token_prompts", "embeddings", "dimensions", "tokenize"),
            }
        ),
    ),
)


class ContractServer(RigServer):
    """A gateway with an engine under test."""

    def __init__(self, config_path: Path, engine: EngineUnderTest) -> None:
        super().__init__(config_path)
        self.engine = engine

    def post(self, path: str, **fields: Any) -> requests.Response:
        """A bare request."""
        return requests.post(self.base_url + path, json=fields, timeout=60)
