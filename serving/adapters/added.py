"""What was added, and how it goes together with what the config says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.config import AdapterConfig, AnyModel, Config, RemoteModel
from serving.models.checksums import verify
from serving.models.sources import ModelError


@dataclass(frozen=True, slots=True)
class AddedAdapter:
    """An adapter of the model with that name; ``adapter.sha256`` is what it was when it was added."""

    model: str
    adapter: AdapterConfig
    added_at: float

    @property
    def name(self) -> str:
        """What clients ask for."""
        return self.adapter.name

    def fault(self, cache_dir: Path) -> str | None:
        """Why it cannot be served as it was added; None if it can."""
        path = Path(self.adapter.path)
        if not path.exists():
            return f"there is no {path} any more"
        try:
            verify(path, self.adapter.sha256, cache_dir, "what was added")
        except ModelError as error:
            return str(error)
        return None


def with_added(config: Config, added: Iterable[AddedAdapter]) -> tuple[Config, dict[str, str]]:
    """The config with the adapters that were added beside its own; and by name those left out, each with the reason.

    What the config says counts: a name that it has is its own.
    """
    taken = set(_names(config))
    models = {model.name: model for model in config.models}
    left_out: dict[str, str] = {}
    for each in added:
        model = models.get(each.model)
        if each.name in taken:
            left_out[each.name] = "the config has the name for something else"
        elif model is None or isinstance(model, RemoteModel):
            left_out[each.name] = f"the config has no model '{each.model}' with an engine here"
        else:
            taken.add(each.name)
            adapters = (*model.adapters, each.adapter)
            models[model.name] = model.model_copy(update={"adapters": adapters})
    return config.model_copy(update={"models": tuple(models.values())}), left_out


def _names(config: Config) -> Iterator[str]:
    model: AnyModel
    for model in config.models:
        yield from (model.name, *model.aliases, *(each.name for each in model.adapters))
    yield from (route.name for route in config.routes)
