"""What the supervisor needs to know to run an engine, and who says so for each kind of engine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from serving.config import AdapterConfig, EngineModel
from serving.engines.standstill import Pulse

Model = TypeVar("Model", bound=EngineModel, contravariant=True)

# Has glibc ask for huge pages (2 MiB) for large blocks, such as weights on a CPU: a decode step reads them all,
# and finds them sooner (docs/results/engine.md). What the operator has set counts.
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA adapter as its engine reads it, and how strongly it counts; ``digest`` is the SHA-256 of what it was made of."""

    path: Path
    scale: float
    digest: str


@dataclass(frozen=True, slots=True)
class Files:
    """What a model is served from; ``pooling`` is how an embedding model makes one vector of many, as llama.cpp counts.

    ``adapters`` are by their names, in the config's order.
    """

    model: Path
    projector: Path | None = None
    draft_model: Path | None = None
    pooling: int | None = None
    adapters: Mapping[str, AdapterFile] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one engine in MiB, in main memory and on GPUs; ``source`` says how it is known.

    ``growth_mib`` of the main memory is taken only as time goes by, and may not be there when it is measured. One that
    can sleep then takes ``asleep_mib`` of the main memory; others have none of it.
    """

    host_mib: int
    gpu_mib: int = 0
    growth_mib: int = 0
    asleep_mib: int = 0
    source: Literal["estimated", "measured", "configured"] = "estimated"

    def corrected(self, host_mib: int, gpu_mib: int | None) -> Footprint:
        """This, with what the engine was measured to use; ``gpu_mib`` None keeps what is said of GPUs.

        What can still grow is added as long as the estimate has room for it. Memory an operator set stays.
        """
        if self.source == "configured":
            return self
        if gpu_mib is None:
            gpu_mib = self.gpu_mib
        if self.source == "measured":
            # What it once needed it may need again.
            most_host_mib, most_gpu_mib = max(host_mib, self.host_mib), max(gpu_mib, self.gpu_mib)
            return replace(self, host_mib=most_host_mib, gpu_mib=most_gpu_mib)
        grown_mib = max(host_mib, min(self.host_mib, host_mib + self.growth_mib))
        return replace(self, host_mib=grown_mib, gpu_mib=gpu_mib, source="measured")


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """How an engine takes LoRA adapters while it runs, by vLLM's calls: see :mod:`serving.engines.adapters`.

    It has ``most`` at a time, those that leave included (None: any number), and of those such as ``fits``. ``called`` is
    what it is to call one. Of the same name, one takes the other's place there, and requests finish with what they
    began with; of another name, both are loaded until none needs the first.
    """

    most: int | None = None
    fits: Callable[[AdapterConfig], bool] = lambda _: True
    called: Callable[[str, AdapterFile], str] = lambda name, _: name


@dataclass(frozen=True, slots=True)
class Launch:
    """One engine process to be: its command line, and environment variables beside the inherited ones.

    ``health_path`` answers 200 to who has its key while it works. ``explain`` says what the last lines of one
    that did not start mean, and the mend; nothing if it does not know. One without ``adapter_room`` has those adapters
    that it started with, for good. One that also answers while it is stuck has a ``pulse``.
    """

    command: list[str]
    environment: dict[str, str]
    health_path: str = "/health"
    explain: Callable[[Sequence[str]], str] = lambda _: ""
    adapter_room: AdapterRoom | None = None
    pulse: Pulse | None = None


class Launcher(Protocol[Model]):
    """How engines of one kind are started."""

    def prepare(self, model: Model) -> Files:
        """Fetch and convert the model's files; may take long. Raises ``ModelError``."""

    @property
    def uses_gpus(self) -> bool:
        """Whether its engines, as they are installed here, can use NVIDIA's cards."""

    def differ(self, old: Model, new: Model) -> bool:
        """Whether two configs of a model make different engines. Where adapters come and go, they make no difference."""

    def footprint(self, model: Model, files: Files, *, on_gpu: bool) -> Footprint:
        """An upper estimate of an engine's memory; ``on_gpu`` if it has any. Raises ``ModelError``."""

    def launch(
        self,
        model: Model,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        """The process that serves ``files`` on a loopback port to holders of ``api_key``.

        It sees no other cards than ``gpus`` (UUIDs), where that is not None.
        """


def environment_of(gpus: tuple[str, ...] | None) -> dict[str, str]:
    """What engines have in their environment, whatever their kind; they see no other cards than ``gpus``."""
    cards = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    return {_TUNABLES: os.environ.get(_TUNABLES, _HUGE_PAGES), **cards}


def free_port() -> int:
    """A loopback TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
