"""Replicas of a model: each is a model of its own to those who run engines."""

from __future__ import annotations

from collections.abc import Iterator

from serving.config.schema import AnyModel, Config, RemoteModel


def with_replicas(config: Config) -> Config:
    """The config with as many models as there may be engines, named ``NAME#1``, ``NAME#2`` and so on."""
    models = tuple(each for model in config.models for each in _replicas(model))
    return config.model_copy(update={"models": models})


def _replicas(model: AnyModel) -> Iterator[AnyModel]:
    if isinstance(model, RemoteModel) or model.most_replicas == 1:
        yield model
        return
    for number in range(1, model.most_replicas + 1):
        yield model.replica(number)
