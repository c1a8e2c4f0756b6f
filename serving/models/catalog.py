"""Popular open-weight models: what their makers publish of them, and the architecture that follows from it.

The data are in ``catalog.yaml``: each model's ``config.json`` is cut down to what decides its shape, and
read by the reader of local folders (:mod:`serving.models.hf_config`).
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

    ``parameters_published`` and ``active_parameters_published`` are its maker's words (of the text part);
    exact counts are the architecture's. ``released`` is a month, such as ``2025-04``. ``sources`` are
    addresses. ``base`` names another entry whose architecture it has.
    """

    name: str
    repo: str
    architecture: Architecture
    license: str
    good_for: tuple[Use, ...]
    released: str
    parameters_published: float
    active_parameters_published: float | None
    sources: tuple[str, ...]


@cache
def catalog_models() -> tuple[CatalogModel, ...]:
    """All models of the catalog."""
    text = files("serving.models").joinpath("catalog.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.load(text, Loader=yaml.CSafeLoader)
    return tuple(
        CatalogModel(
            name=name,
            repo=entry["repo"],
            architecture=architecture_of(document["configs"][entry["config"]]),
            license=entry["license"],
            good_for=tuple(entry["good_for"]),
            released=entry["released"],
            parameters_published=entry["parameters"],
            active_parameters_published=entry.get("active_parameters"),
            sources=tuple(entry["sources"]),
        )
        for name, entry in document["models"].items()
    )


def find_model(name: str) -> CatalogModel | None:
    """The model of a name or a repository, whatever the case; None if the catalog does not have it."""
    wanted = name.casefold()
    return next(
        (
            model
            for model in catalog_models()
            if wanted in (model.name.casefold(), model.repo.casefold())
        ),
        None,
    )
