"""rigserve's own llama.cpp engine, as a process."""

from __future__ import annotations

import sys
from pathlib import Path

from serving.config import ModelConfig
from serving.engines.launch import Launch
from serving.hardware.cpu import physical_cores
from serving.models.requantize import prepare
from serving.models.sources import resolve


class LlamaCppLauncher:
    """Launches ``python -m serving.llamacpp``."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir

    def prepare(self, model: ModelConfig) -> Path:
        """The GGUF file to serve: found or downloaded, and requantized if the config asks for it."""
        return prepare(resolve(model.source), model.quantization, self._cache_dir)

    def launch(self, model: ModelConfig, weights: Path, port: int, api_key: str) -> Launch:
        """The engine's command line."""
        flags = {
            "--model-path": weights,
            "--served-name": model.name,
            "--port": port,
            "--context-length": model.context_length,
            "--max-sequences": model.max_sequences,
            "--max-queue": model.max_queue,
            "--max-batch-tokens": model.max_batch_tokens,
            "--threads": model.threads or physical_cores(),
            "--gpu-layers": model.gpu_layers,
        }
        arguments = [str(word) for flag in flags.items() for word in flag]
        for adapter in model.adapters:
            arguments += ["--adapter", f"{adapter.name}={adapter.path}:{adapter.scale}"]
        return Launch(
            command=[sys.executable, "-m", "serving.llamacpp", *arguments],
            environment={"RIGSERVE_ENGINE_KEY": api_key},
        )
