"""Popular open-weight models: what their makers publish of them, and the architecture that follows from it.

The data are in ``catalog.yaml``. Each model's ``config.json`` is there, cut down to what decides its shape,
and is read as one of a local folder is (:mod:`serving.models.hf_config`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from serving.models.architecture import Architecture
from serving.models.hf_config import architecture_of

Use = Literal["chat", "code", "embedding"]


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A published model.

    ``parameters_published`` and ``active_parameters_published`` are its maker's words, given at ``source``;
    with ``counts_vision`` they count an image encoder that ``architecture`` does not have. ``released`` is a
    month, such as ``2025-04``.
    """

    name: str
    repo: str
    architecture: Architecture
    license: str
    good_for: tuple[Use, ...]
    released: str
    parameters_published: float
    active_parameters_published: float | None
    counts_vision: bool
    source: str

    @property
    def config_source(self) -> str:
        """Where the figures of its architecture are published."""
        return f"https://huggingface.co/{self.repo}/blob/main/config.json"


@cache
def catalog_models() -> tuple[CatalogModel, ...]:
    """All models of the catalog."""
    text = files("serving.models").joinpath("catalog.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.load(text, Loader=yaml.CSafeLoader)
    return tuple(
        CatalogModel(
            name=name,
            repo=entry["repo"],
            architecture=architecture_of(entry["config"]),
            license=entry["license"],
            good_for=tuple(entry["good_for"]),
            released=entry["released"],
            parameters_published=entry["parameters"],
            active_parameters_published=entry.get("active_parameters"),
            counts_vision=entry.get("counts_vision", False),
            source=entry["source"],
        )
        for name, entry in entries.items()
    )


def find_model(name: str) -> CatalogModel | None:
    """The model of a name or a repository, whatever the case; None if the catalog does not have it."""
    wanted = name.casefold()
    return next(
        (each for each in catalog_models() if wanted in (each.name, each.repo.casefold())), None
    )
