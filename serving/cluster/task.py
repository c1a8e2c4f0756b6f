"""What a keeper is told: which engine to have run, and what it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import orjson

from serving.cluster.placing import Want
from serving.config import Config, ModelConfig

VARIABLE = "RIGSERVE_CLUSTER_TASK"


@dataclass(frozen=True, slots=True)
class Task:
    """A replica to be, named ``name``. ``config`` holds its one model and the folders of storage, the same on all nodes.

    Its keeper listens at ``port``, and finds it a place while it holds the file ``lock``.
    """

    name: str
    address: str
    port: int
    lock: str
    want: Want
    config: Config

    @property
    def model(self) -> ModelConfig:
        """The model to serve."""
        return self.config.local_models[0]

    def to_json(self) -> str:
        """For :data:`VARIABLE`."""
        told: dict[str, Any] = {
            "name": self.name,
            "address": self.address,
            "port": self.port,
            "lock": self.lock,
            "want": asdict(self.want),
            "config": self.config.model_dump(mode="json", include={"models", "storage"}),
        }
        return orjson.dumps(told).decode()

    @classmethod
    def from_json(cls, text: str) -> Task:
        """What :meth:`to_json` gave."""
        told = orjson.loads(text)
        told["want"] = Want(**told["want"])
        told["config"] = Config.model_validate_json(orjson.dumps(told["config"]))
        return cls(**told)
