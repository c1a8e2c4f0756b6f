"""Where the engines of a server run, and what follows from that."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from serving.config import Config, ConfigError, PowerConfig, Problem, VllmModel
from serving.engines.fitting import Fitting
from serving.engines.launch import Launcher
from serving.engines.llama_cpp import LlamaCppLauncher
from serving.engines.llama_server import LlamaServerLauncher
from serving.engines.vllm.launcher import VllmLauncher
from serving.hardware.energy import EnergyMeter, open_meter
from serving.hardware.memory import host_usable_mib

_log = logging.getLogger(__name__)


class Site(Protocol):
    """Where engines run: this machine, or others."""

    @property
    def is_one_rig(self) -> bool:
        """Whether all engines share the hardware of one machine, whose cost is theirs together."""

    def launchers(self, config: Config) -> dict[str, Launcher[Any]]:
        """How engines of each kind are started, by the config's names of them."""

    def filled(self, config: Config) -> Config:
        """The config with numbers for what it leaves open; may download files. Raises ``ModelError``, ``ConfigError``."""

    def meter(self, power: PowerConfig) -> EnergyMeter:
        """What measures a rig's energy. Raises ``MeterError``."""


class ThisMachine:
    """Engines are processes of this machine."""

    is_one_rig = True

    def launchers(self, config: Config) -> dict[str, Launcher[Any]]:
        """As :meth:`Site.launchers`."""
        return launchers_of(config)

    def filled(self, config: Config) -> Config:
        """As :meth:`Site.filled`: as much as this machine has room for."""
        problems = [
            Problem(
                Path("config"),
                None,
                f"models[{index}].over_nodes",
                "this machine is no cluster; leave it out, or serve with `rigserve cluster serve`",
            )
            for index, model in enumerate(config.models)
            if isinstance(model, VllmModel) and model.over_nodes
        ]
        if problems:
            raise ConfigError(problems)
        filled = Fitting(config, launchers_of(config), host_usable_mib()).fill(fetch=True)
        for line in filled.lines:
            _log.info("%s", line)
        return filled.config

    def meter(self, power: PowerConfig) -> EnergyMeter:
        """As :meth:`Site.meter`: the best that this machine has."""
        return open_meter(power)


def launchers_of(config: Config) -> dict[str, Launcher[Any]]:
    """How engines of each kind are started on the machine where they are to run."""
    cache_dir, data_dir = Path(config.storage.cache_dir), Path(config.storage.data_dir)
    return {
        "llama_cpp": LlamaCppLauncher(cache_dir),
        "llama_server": LlamaServerLauncher(cache_dir),
        "vllm": VllmLauncher(cache_dir, data_dir),
    }
