"""What is planned for: a model of the catalog, in whatever quantization, or one that a file holds, as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.models.architecture import Architecture
from serving.models.catalog import CatalogModel
from serving.models.description import ModelDescription
from serving.models.requantize import type_name
from serving.planner.memory import NO_EXTRAS, Extras
from serving.planner.weights import ModelWeights, of_files, predicted

# Those to try: of those close in size the better ones.
_MIXTURES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
# Published in this form, and in no finer one.
_AS_TRAINED = {"gpt-oss": ("MXFP4_MOE",)}


@dataclass(slots=True)
class Subject:
    """A model; ``known_weights`` are those of its files, else they are predicted for ``mixtures``.

    ``source`` is where its file is, as a config says it; None if that is for the user to say.
    """

    name: str
    architecture: Architecture
    mixtures: tuple[str, ...]
    source: str | None = None
    # Its repository on the Hub, with weights in 16 bits.
    repo: str | None = None
    extras: Extras = NO_EXTRAS
    known_weights: ModelWeights | None = None
    _predicted: dict[str, ModelWeights] = field(default_factory=dict)

    def weights(self, mixture: str) -> ModelWeights:
        """Its weights in one of its mixtures."""
        if self.known_weights is not None:
            return self.known_weights
        if mixture not in self._predicted:
            self._predicted[mixture] = predicted(self.architecture, mixture)
        return self._predicted[mixture]


def of_catalog(model: CatalogModel) -> Subject:
    """A model of the catalog."""
    architecture = model.architecture
    mixtures: tuple[str, ...] = _AS_TRAINED.get(architecture.family, _MIXTURES)
    if architecture.is_encoder:
        mixtures = ("F16", "Q8_0")
    return Subject(model.name, architecture, mixtures, repo=model.repo)


def of_description(description: ModelDescription) -> Subject:
    """A model as its files have it: GGUF files as they are, others in all quantizations that can be made of them."""
    architecture = description.architecture
    if not description.gguf:
        return Subject(description.source, architecture, _MIXTURES)
    return Subject(
        description.source,
        architecture,
        (type_name(description.gguf[0].header.file_type) or "as in the file",),
        source=description.source,
        known_weights=of_files(
            ((part.header, part.size_bytes) for part in description.gguf), len(architecture.layers)
        ),
    )
