"""A Ray cluster as the place where engines run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving.cluster.environment import ray_environment
from serving.cluster.placing import Want
from serving.cluster.task import VARIABLE, Task
from serving.config import (
    Auto,
    Config,
    ConfigError,
    ModelConfig,
    PowerConfig,
    Problem,
    RemoteModel,
    VllmModel,
)
from serving.engines.launch import Files, Footprint, Launch, Launcher
from serving.engines.vllm.launcher import pulse_of
from serving.hardware.energy import ESTIMATED, EnergyMeter
from serving.hardware.wall import MeterError
from serving.site import launchers_of

# Python with Ray, on the gateway's machine; measured: 130 MiB.
_KEEPER_MIB = 150


class RayCluster:
    """Engines are on the nodes of a cluster; each takes the hardware that it has for itself."""

    is_one_rig = False

    def launchers(self, config: Config) -> dict[str, Launcher[Any]]:
        """As :meth:`serving.site.Site.launchers`."""
        return {
            kind: ClusterLauncher(launcher, config)
            for kind, launcher in launchers_of(config).items()
        }

    def filled(self, config: Config) -> Config:
        """The config itself; raises ``ConfigError`` for what only one machine could answer."""
        problems = [
            problem
            for index, model in enumerate(config.models)
            if not isinstance(model, RemoteModel)
            for problem in _problems(index, model)
        ]
        if problems:
            raise ConfigError(problems)
        return config

    def meter(self, power: PowerConfig) -> EnergyMeter:
        """The watts that the config says a node draws. Raises ``MeterError`` if it names a meter, which sees one machine."""
        if power.meter is not None:
            raise MeterError("it measures one machine, and a cluster has several; leave it out")
        return EnergyMeter(ESTIMATED, None, power)


def _problems(index: int, model: ModelConfig) -> Iterator[Problem]:
    for key in ("context_length", "max_sequences", "gpu_layers"):
        if isinstance(getattr(model, key, None), Auto):
            yield _problem(index, key, "auto is for one machine; in a cluster, give a number")
    if model.devices not in ((), ("cpu",)):
        yield _problem(index, "devices", "the cluster chooses cards; leave it out, or say cpu")


def _problem(index: int, key: str, message: str) -> Problem:
    return Problem(Path("config"), None, f"models[{index}].{key}", message)


class ClusterLauncher:
    """Launches keepers of engines that ``inner`` launches on their nodes."""

    uses_gpus = False

    def __init__(self, inner: Launcher[Any], config: Config) -> None:
        self._inner = inner
        self._config = config

    def prepare(self, model: ModelConfig) -> Files:
        """As it does: how much memory it takes is read from the model's files here, too."""
        return self._inner.prepare(model)

    def differ(self, old: ModelConfig, new: ModelConfig) -> bool:
        """Whether they need another engine; adapters are those that it started with."""
        return self._inner.differ(old, new) or old.adapters != new.adapters

    def footprint(self, model: ModelConfig, files: Files, *, on_gpu: bool) -> Footprint:
        """The keeper's memory on this machine."""
        self._want(model, files)  # what is wrong with the files shows before the launch
        return Footprint(_KEEPER_MIB)

    def launch(
        self,
        model: ModelConfig,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        """The keeper's command line; what it is to do is in its environment."""
        there = model.model_copy(
            update={"name": model.served_name, "load": "preload", "port": None}
        )
        task = Task(
            name=model.name,
            address=self._config.cluster.address,
            port=port,
            lock=str(Path(self._config.storage.data_dir) / "cluster.lock"),
            want=self._want(there, files),
            config=self._config.model_copy(update={"models": (there,)}),
        )
        return Launch(
            command=[sys.executable, "-m", "serving.cluster.keeper"],
            environment={
                VARIABLE: task.to_json(),
                "RIGSERVE_ENGINE_KEY": api_key,
                **ray_environment(),
            },
            health_path="/v1/models" if isinstance(model, VllmModel) else "/health",
            pulse=pulse_of(model) if isinstance(model, VllmModel) else None,
        )

    def _want(self, model: ModelConfig, files: Files) -> Want:
        on_cpu = self._inner.footprint(model, files, on_gpu=False)
        on_gpu = self._inner.footprint(model, files, on_gpu=True)
        want = Want(
            model=model.served_name,
            cpu_mib=on_cpu.host_mib,
            host_mib=on_gpu.host_mib,
            gpu_mib=on_gpu.gpu_mib,
            cpus=model.threads,
            may_use_gpus=not model.is_for_cpu,
        )
        if isinstance(model, VllmModel):
            # It has its cards for itself. Where they are on several nodes, it asks Ray for them.
            want = replace(want, cards=0 if model.over_nodes else model.cards)
        return want
