"""rigserve's own llama.cpp engine, as a process."""

from __future__ import annotations

import sys
from pathlib import Path

from serving.config import ModelConfig
from serving.engines.launch import Files, Launch
from serving.hardware.cpu import physical_cores
from serving.models.requantize import prepare
from serving.models.sources import resolve


class LlamaCppLauncher:
    """Launches ``python -m serving.llamacpp``."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir

    def prepare(self, model: ModelConfig) -> Files:
        """The GGUF files to serve: found or downloaded, and requantized if the config asks for it."""
        return Files(
            prepare(resolve(model.source), model.quantization, self._cache_dir),
            projector=None if model.projector is None else resolve(model.projector),
            draft_model=None if model.draft_model is None else resolve(model.draft_model),
        )

    def launch(self, model: ModelConfig, files: Files, port: int, api_key: str) -> Launch:
        """The engine's command line."""
        flags: dict[str, object] = {
            "--model-path": files.model,
            "--served-name": model.name,
            "--port": port,
            "--context-length": model.context_length,
            "--max-sequences": model.max_sequences,
            "--max-queue": model.max_queue,
            "--max-batch-tokens": model.max_batch_tokens,
            "--threads": model.threads or physical_cores(),
            "--gpu-layers": model.gpu_layers,
            "--prefix-cache-mib": model.prefix_cache_mib,
            "--speculation": model.speculation,
            "--step-timeout-seconds": model.step_timeout_seconds,
        }
        optional = {
            "--kv-tokens": model.kv_tokens,
            "--projector-path": files.projector,
            "--draft-model-path": files.draft_model,
        }
        flags |= {flag: value for flag, value in optional.items() if value is not None}
        arguments = [str(word) for flag in flags.items() for word in flag]
        for adapter in model.adapters:
            arguments += ["--adapter", f"{adapter.name}={adapter.path}:{adapter.scale}"]
        return Launch(
            command=[sys.executable, "-m", "serving.llamacpp", *arguments],
            environment={"RIGSERVE_ENGINE_KEY": api_key},
        )
