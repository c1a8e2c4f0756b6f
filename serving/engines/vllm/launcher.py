"""vLLM's server as a process, from the environment that was installed, another, or a container image."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import filelock

from serving.config import AdapterConfig, VllmModel
from serving.engines.adapters import adapter_file
from serving.engines.launch import AdapterFile, Files, Footprint, Launch
from serving.engines.standstill import Pulse
from serving.engines.vllm import adapters, command, containers
from serving.engines.vllm.environment import INSIDE, Environments
from serving.engines.vllm.failures import explain
from serving.folders import make_private
from serving.hardware.memory import MIB, gpus, host_total_mib
from serving.models.checksums import verify
from serving.models.huggingface import HUB, Description, describe, is_gguf, resolve_folder
from serving.models.sources import ModelError, resolve

_log = logging.getLogger(__name__)

# Python, torch and vLLM in the processes of a server, the engine and each worker; measured: 2.2 GiB on a CPU.
_PROCESSES_MIB = 2600
# What CUDA, graphs and activations take on each card beside weights and KV cache.
_CARD_MIB = 2048
_PROBE_SECONDS = 120.0
_HAS_CUDA = "rigserve: built for CUDA"
_CONVERT_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class _Python:
    """An interpreter with vLLM, and whether it is one for NVIDIA's cards."""

    path: Path
    has_cuda: bool


class VllmLauncher:
    """Launches ``python -m vllm.entrypoints.openai.api_server``."""

    def __init__(self, cache_dir: Path, data_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._environments = Environments(data_dir)
        # Of named environments, what they are; asking one takes seconds.
        self._named: dict[str, _Python] = {}
        self._images: set[str] = set()

    def prepare(self, model: VllmModel) -> Files:
        """The folder to serve: found or downloaded, or made of a GGUF file. vLLM and the adapters must be there, too."""
        python = None if model.image is not None else self._python(model)
        if model.image is not None:
            _require_runtime(model)
            self._images.add(model.image)
        if model.sleep and python is not None and not python.has_cuda:
            raise ModelError("this vLLM is built for CPUs, where it cannot sleep; leave sleep out")
        loras = {each.name: self._adapter(each) for each in model.adapters}
        served = self._served(model, python)
        for each in model.adapters:
            adapters.check_fit(each, served)
        return Files(served, adapters=loras)

    def _served(self, model: VllmModel, python: _Python | None) -> Path:
        if not is_gguf(model.source):
            folder = resolve_folder(model.source)
            verify(folder, model.sha256, self._cache_dir, "sha256")
            return folder
        file = resolve(model.source)
        verify(file, model.sha256, self._cache_dir, "sha256")
        if model.quantization == "gguf":
            return file
        if python is None:
            raise ModelError(
                "a GGUF file is made into a folder with an environment's Python, and image has none; name a folder "
                "(source), or set quantization: gguf"
            )
        return _converted(file, python.path, self._cache_dir)

    def _adapter(self, adapter: AdapterConfig) -> AdapterFile:
        file = adapter_file(
            adapter, self._cache_dir, lambda _: adapters.folder_of(adapter, self._cache_dir)
        )
        # It is in the folder.
        return replace(file, scale=1.0)

    @property
    def uses_gpus(self) -> bool:
        """Whether the vLLM in use, or one that was named, is built for NVIDIA's cards."""
        current = self._environments.current
        return (
            bool(self._images)
            or (current is not None and current.build == "cuda")
            or any(python.has_cuda for python in self._named.values())
        )

    def differ(self, old: VllmModel, new: VllmModel) -> bool:
        """Whether files, environments, devices or the command line differ. Adapters come and go while it runs."""

        def identity(model: VllmModel) -> object:
            # All that is for the gateway or the supervisor.
            return model.model_copy(
                update=dict.fromkeys(("aliases", "adapters", "filters", "lenient", *_OF_OTHERS))
            )

        return identity(old) != identity(new)

    def footprint(self, model: VllmModel, files: Files, *, on_gpu: bool) -> Footprint:
        """From the model's config and the size of its weights; raises :class:`ModelError`."""
        description = _description(files)
        kv_bytes = command.kv_cache_bytes(model, description)
        lora_bytes = command.lora_bytes(model, description, on_gpu=on_gpu)
        weights_mib = -(-(description.weights_bytes + lora_bytes) // MIB)
        asleep_mib = _PROCESSES_MIB * model.cards + weights_mib if model.sleep else 0
        if model.memory_mib is not None:
            found = Footprint(
                *(_PROCESSES_MIB, model.memory_mib), asleep_mib=asleep_mib, source="configured"
            )
            return (
                found
                if on_gpu
                else replace(found, host_mib=_PROCESSES_MIB + model.memory_mib, gpu_mib=0)
            )
        fraction = command.fraction_of(model, on_gpu=on_gpu)
        if on_gpu:
            if kv_bytes is None:
                cards = sorted((card.total_mib for card in gpus()), reverse=True)[: model.cards]
                taken_mib = int(fraction * sum(cards))
            else:
                taken_mib = weights_mib + -(-kv_bytes // MIB) + model.cards * _CARD_MIB
            host_mib = _PROCESSES_MIB * model.cards
            # Those of a container are none of this machine's processes that could be measured.
            growth_mib = host_mib if model.image is not None else 0
            return Footprint(host_mib, taken_mib, growth_mib, asleep_mib)
        if kv_bytes is None:
            return Footprint(_PROCESSES_MIB + int(fraction * host_total_mib()))
        # The KV cache is there from the start, but pages of it count once they are written to.
        kv_mib = -(-kv_bytes // MIB)
        return Footprint(_PROCESSES_MIB + weights_mib + kv_mib, growth_mib=kv_mib)

    def launch(
        self,
        model: VllmModel,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        """Its command line; its key is in its environment, where other users do not see it."""
        python = None if model.image is not None else self._python(model)
        on_gpu = gpus != () and not model.is_for_cpu
        on_gpu = on_gpu and (python is None or python.has_cuda)
        loras = {adapters.called(name, each): each.path for name, each in files.adapters.items()}
        words = command.arguments(
            *(model, files.model, _description(files), loras),
            rank=adapters.rank_of(model),
            port=port if python else containers.PORT,
            host="127.0.0.1" if python else "0.0.0.0",  # noqa: S104 - published on loopback only
            on_gpu=on_gpu,
        )
        environment = command.environment(model, api_key, gpus, on_gpu=on_gpu)
        room = adapters.room_of(model, on_gpu=on_gpu)
        if python is not None:
            line = [str(python.path), "-m", command.MODULE, *words]
        else:
            # Cards are given to a container by its runtime.
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            # It sees the folders that it was started with.
            room = replace(room, fits=lambda _: False)
            paths = [files.model, *loras.values()]
            paths += [Path(model.chat_template)] if model.chat_template else []
            draft = model.speculation.model if model.speculation else None
            paths += [Path(draft)] if draft and not draft.startswith(HUB) else []
            line = containers.command(
                *(model, words, environment, paths), port=port, gpus=gpus if on_gpu else ()
            )
        return Launch(
            command=line,
            environment=environment,
            # Its /health would answer for a server whose key is another.
            health_path="/v1/models",
            explain=functools.partial(explain, model),
            adapter_room=room,
            pulse=pulse_of(model),
        )

    def _python(self, model: VllmModel) -> _Python:
        if model.environment is None:
            current = self._environments.require()
            return _Python(current.python, current.build == "cuda")
        if model.environment not in self._named:
            self._named[model.environment] = _looked_at(Path(model.environment))
        return self._named[model.environment]


def pulse_of(model: VllmModel) -> Pulse:
    """How a vLLM shows that it computes: its API is another process than its engine, and answers while that is stuck."""
    trial = {"model": model.served_name, "prompt": "a", "max_tokens": 1}
    return Pulse("/metrics", _counts, ("/v1/completions", trial))


def _counts(exposition: bytes) -> bytes:
    """Its own series, those of its KV cache among them, which grows with each piece of a prompt."""
    return b"\n".join(line for line in exposition.splitlines() if line.startswith(b"vllm:"))


# Keys of a model that its process does not know of.
_OF_OTHERS = (
    *("max_queue", "queue_timeout_seconds", "step_timeout_seconds", "start_timeout_seconds"),
    *("load", "pinned", "ttl_seconds", "group", "swap_priority", "memory_mib"),
    *("replicas", "max_replicas"),
)


def _description(files: Files) -> Description:
    if files.model.is_dir():
        return describe(files.model)
    return Description("", "", files.model.stat().st_size, None)


def _looked_at(python: Path) -> _Python:
    """What a named interpreter has; raises :class:`ModelError` if that is no vLLM."""
    # Imports may print lines of their own.
    code = f"import torch, vllm; print('{_HAS_CUDA}' if torch.version.cuda else '')"
    try:
        asked = subprocess.run(
            [python, "-c", code],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"{python} cannot be run: {error}; name another (environment)") from error
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ModelError(f"{python} has no vLLM that works: {last}; name another (environment)")
    return _Python(python, _HAS_CUDA in asked.stdout.splitlines())


def _require_runtime(model: VllmModel) -> None:
    if shutil.which(model.container_runtime) is None:
        raise ModelError(
            f"there is no {model.container_runtime} on PATH; install it, or set container_runtime"
        )


def _converted(file: Path, python: Path, cache_dir: Path) -> Path:
    """The folder made of a GGUF file: once, as long as its path, size and time stay the same. Raises :class:`ModelError`."""
    make_private(cache_dir)
    stat = file.stat()
    identity = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = cache_dir / f"{file.stem}-{digest}-{_CONVERT_DTYPE}"
    if target.is_dir():
        return target
    with filelock.FileLock(cache_dir / ".lock"):
        if not target.is_dir():
            _convert(file, python, target)
    return target


def _convert(file: Path, python: Path, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _log.info("making a Hugging Face folder of %s (once; kept in %s)", file.name, target.parent)
    started = time.monotonic()
    script = INSIDE / "gguf_to_folder.py"
    made = subprocess.run(
        [python, script, file, partial, _CONVERT_DTYPE],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if made.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        last = "; ".join(made.stderr.strip().splitlines()[-2:])
        raise ModelError(
            f"cannot make a Hugging Face folder of {file}: {last}; name the model's own folder or repository (source)"
        )
    partial.rename(target)
    _log.info("made %s in %.1f s", target.name, time.monotonic() - started)
