"""rigserve's own llama.cpp engine, as a process."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

from serving.config import LlamaCppModel
from serving.engines.footprint import of_gguf
from serving.engines.gguf_files import files_of
from serving.engines.launch import AdapterRoom, Files, Footprint, Launch, environment_of
from serving.hardware.cpu import physical_cores
from serving.models.sources import ModelError


class LlamaCppLauncher:
    """Launches ``python -m serving.llamacpp``."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir

    def prepare(self, model: LlamaCppModel) -> Files:
        """The GGUF files to serve: found or downloaded, checked, requantized if the config asks for it."""
        return files_of(model, self._cache_dir)

    @functools.cached_property
    def uses_gpus(self) -> bool:
        """Whether llama.cpp was built with CUDA here."""
        package = importlib.util.find_spec("llama_cpp")  # finds it without importing it
        folders = (package.submodule_search_locations if package else None) or []
        return any(any(Path(folder).glob("lib/*ggml-cuda*")) for folder in folders)

    def differ(self, old: LlamaCppModel, new: LlamaCppModel) -> bool:
        """Whether files, devices or the command line differ. Adapters come and go while it runs."""

        def identity(model: LlamaCppModel) -> tuple[object, ...]:
            files = (
                *(model.source, model.sha256, model.quantization),
                *(model.projector, model.projector_sha256),
                *(model.draft_model, model.draft_model_sha256),
            )
            launch = self.launch(model, Files(Path()), model.port or 0, "", None)
            return files, model.devices, launch.command

        return identity(old) != identity(new)

    def footprint(self, model: LlamaCppModel, files: Files, *, on_gpu: bool) -> Footprint:
        """From the headers of its files; raises :class:`ModelError`."""
        try:
            return of_gguf(model, files, on_gpu=on_gpu)
        except OSError as error:
            raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error

    def launch(
        self,
        model: LlamaCppModel,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        """The engine's command line, and the cards it sees."""
        flags: dict[str, object] = {
            "--model-path": files.model,
            "--served-name": model.served_name,
            "--port": port,
            "--context-length": model.context_length,
            "--max-sequences": model.max_sequences,
            # The gateway bounds the queue. What it sends ahead finds room here, in either class.
            "--max-queue": model.max_queue + 4 * model.max_sequences,
            "--max-batch-tokens": model.max_batch_tokens,
            "--threads": model.threads or physical_cores(),
            "--gpu-layers": 0 if gpus == () else model.gpu_layers,
            "--prefix-cache-mib": model.prefix_cache_mib,
            "--kv-type": model.kv_type,
            "--flash-attention": "on" if model.flash_attention else "off",
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
        for name, adapter in files.adapters.items():
            arguments += ["--adapter", f"{name}={adapter.path}:{adapter.scale}"]
        return Launch(
            command=[sys.executable, "-m", "serving.llamacpp", *arguments],
            environment={"RIGSERVE_ENGINE_KEY": api_key, **environment_of(gpus)},
            adapter_room=AdapterRoom(),
        )
