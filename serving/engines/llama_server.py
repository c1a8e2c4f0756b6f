"""llama.cpp's own server, a program that the operator has installed, as a process."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from serving.config import LlamaServerModel
from serving.config.load import LLAMA_SERVER
from serving.engines.footprint import of_gguf
from serving.engines.gguf_files import files_of
from serving.engines.launch import Files, Footprint, Launch, environment_of
from serving.hardware.cpu import physical_cores
from serving.models.sources import ModelError

_LIST_DEVICES_SECONDS = 30.0
# llama.cpp's enum llama_pooling_type.
_RANK = 4
# More than any model has; "all" is a word that older ones do not know.
_ALL_LAYERS = 999

_Mend = str
# What it prints when it cannot start, and what to do; the groups and the model's keys are put in.
_FAILURES: tuple[tuple[re.Pattern[str], _Mend], ...] = tuple(
    (re.compile(pattern), mend)
    for pattern, mend in (
        (
            r"error: invalid argument: (\S+)",
            "it does not know the argument {0}; correct extra_args, or have a newer llama-server (binary)",
        ),
        (
            r"error while handling argument \"([^\"]+)\": (.*)",
            "it does not take what follows the argument {0} ({1}); correct extra_args",
        ),
        (
            r"expected value for argument",
            "the last of its arguments has no value; correct extra_args",
        ),
        (
            r"couldn't bind HTTP server socket|couldn't bind to server socket",
            "another program has its port; set another, or leave port out for a free one",
        ),
        (
            r"error while loading shared libraries: ([^:]+)",
            "{0} is missing, which it is linked with; install it, or name another binary",
        ),
        (
            r"unknown model architecture: '([^']*)'",
            "it does not know models of the kind {0!r}; have a newer llama-server (binary)",
        ),
        (
            r"(?i)out of memory|failed to allocate|unable to allocate|cudaMalloc failed|std::bad_alloc"
            r"|ErrorOutOfDeviceMemory",
            "there is not enough memory; lower context_length (now {model.context_length}), max_sequences "
            "(now {model.max_sequences}) or gpu_layers (now {model.gpu_layers}), or choose a smaller quantization",
        ),
        (
            r"(?i)failed to (?:load|apply|initialize|create) lora adapter",
            "an adapter is none of this model's, or is damaged; correct adapters",
        ),
        (
            r"failed to load model from|invalid magic|failed to read magic|not within the file bounds|is corrupted or incomplete"
            r"|failed to read tensor|unexpectedly reached end of file|wrong number of tensors",
            "the model's file is damaged or no GGUF file; fetch it again (source)",
        ),
        (
            r"(?:failed to load|error loading) (?:multimodal )?(?:model|projector|mmproj)",
            "it cannot load the model's files; the lines below say why (source, projector)",
        ),
    )
)


class LlamaServerLauncher:
    """Launches ``llama-server``."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        # Whether it can use NVIDIA's cards, by the program's file.
        self._with_cuda: dict[Path, bool] = {}

    def prepare(self, model: LlamaServerModel) -> Files:
        """The files to serve, as :class:`LlamaCppLauncher` does; the program must be there, too."""
        binary = _binary_of(model)
        if binary not in self._with_cuda:
            self._with_cuda[binary] = _has_cuda(binary)
        return files_of(model, self._cache_dir)

    @property
    def uses_gpus(self) -> bool:
        """Whether one of the programs that were asked for was built with CUDA."""
        return any(self._with_cuda.values())

    def differ(self, old: LlamaServerModel, new: LlamaServerModel) -> bool:
        """Whether files, devices or the command line differ."""

        def identity(model: LlamaServerModel) -> tuple[object, ...]:
            files = (
                *(model.binary, model.source, model.sha256, model.quantization),
                *(model.projector, model.projector_sha256),
                # It takes them at its start only; how strongly one counts is said with each request.
                *((each.name, each.path, each.sha256) for each in model.adapters),
            )
            return files, model.devices, _arguments(model, Files(Path()), model.port or 0, None)

        return identity(old) != identity(new)

    def footprint(self, model: LlamaServerModel, files: Files, *, on_gpu: bool) -> Footprint:
        """From the headers of its files; raises :class:`ModelError`."""
        try:
            return of_gguf(model, files, on_gpu=on_gpu)
        except OSError as error:
            raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error

    def launch(
        self,
        model: LlamaServerModel,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        """The program's command line; its key is in its environment, where other users do not see it."""
        return Launch(
            command=[str(_binary_of(model)), *_arguments(model, files, port, gpus)],
            environment={"LLAMA_API_KEY": api_key, **environment_of(gpus)},
            # Its /health asks for no key, and answers while the model is stuck.
            health_path="/metrics",
            explain=functools.partial(explain, model),
        )


def explain(model: LlamaServerModel, lines: Sequence[str]) -> str:
    """What the last lines of a llama-server that did not start mean, and the mend; empty if that is not known."""
    for pattern, mend in _FAILURES:
        for line in lines:
            if found := pattern.search(line):
                return mend.format(*found.groups(), model=model)
    return ""


def _arguments(
    model: LlamaServerModel, files: Files, port: int, gpus: tuple[str, ...] | None
) -> list[str]:
    rows = max(model.max_batch_tokens, model.max_sequences)
    if files.pooling is not None:
        # A text that becomes one vector is computed in one step.
        rows = max(rows, model.context_length)
    layers = _ALL_LAYERS if model.gpu_layers < 0 else model.gpu_layers
    flags: dict[str, object] = {
        "--model": files.model,
        "--alias": model.name,
        "--host": "127.0.0.1",
        "--port": port,
        "--parallel": model.max_sequences,
        "--ctx-size": model.kv_cells,
        "--batch-size": rows,
        "--ubatch-size": rows,
        "--threads": model.threads or physical_cores(),
        "--n-gpu-layers": 0 if gpus == () else layers,
        "--cache-type-k": model.kv_type.lower(),
        "--cache-type-v": model.kv_type.lower(),
        "--flash-attn": "auto" if model.flash_attention else "off",
        "--cache-ram": model.prefix_cache_mib,
        # What requests leave open is as OpenAI has it, and not as llama-server likes it.
        "--temp": 1,
        "--top-k": 0,
        "--top-p": 1,
        "--min-p": 0,
        # Penalties are for all of the text, not for its last words.
        "--repeat-last-n": model.context_length,
    }
    if files.projector is not None:
        flags["--mmproj"] = files.projector
    arguments = [str(word) for flag in flags.items() for word in flag]
    # An answer is whole or at its limit; a last message of the assistant's is one, and no beginning.
    arguments += ["--no-context-shift", "--no-prefill-assistant", "--metrics", "--no-webui"]
    if files.pooling is not None:
        arguments.append("--rerank" if files.pooling == _RANK else "--embeddings")
    for adapter in files.adapters.values():
        # Each request says which it wants; by itself none counts.
        arguments += ["--lora", str(adapter.path)]
    if files.adapters:
        arguments.append("--lora-init-without-apply")
    return [*arguments, *model.extra_args]


def _binary_of(model: LlamaServerModel) -> Path:
    """The program's file; raises :class:`ModelError` if it is not there any more."""
    found = model.binary or shutil.which(LLAMA_SERVER)
    if found is None or not Path(found).is_file():
        where = f"at {found}" if found else "on PATH"
        raise ModelError(f"there is no {LLAMA_SERVER} {where}; install llama.cpp, or set binary")
    return Path(found)


def _has_cuda(binary: Path) -> bool:
    try:
        listed = subprocess.run(
            [binary, "--list-devices"],
            capture_output=True,
            text=True,
            timeout=_LIST_DEVICES_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"{binary} cannot be run: {error}; name another file (binary)") from error
    return "CUDA" in listed.stdout
