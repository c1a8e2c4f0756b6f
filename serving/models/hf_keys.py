"""Reading a ``config.json`` of the Hugging Face Hub by its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.models.architecture import UnreadArchitecture


class Keys:
    """The keys of a ``config.json``: those of its text part before those around it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        self._config: dict[str, Any] = {**config, **(text if isinstance(text, Mapping) else {})}

    @property
    def model_type(self) -> str:
        """The family, in the words of the transformers library."""
        model_type = self._config.get("model_type")
        if not isinstance(model_type, str):
            raise UnreadArchitecture("its config.json has no model_type")
        return model_type

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of the keys that is there; the default without any, or :class:`UnreadArchitecture`."""
        found = self.optional(*names)
        if found is not None:
            return found
        if default is None:
            raise UnreadArchitecture(f"its config.json has no {' or '.join(names)}")
        return default

    def optional(self, *names: str) -> int | None:
        """The first of the keys that is there and not null."""
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UnreadArchitecture(f"{name} in its config.json is {value!r}, not a number")
            return value
        return None

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A key that is true or false; the default where it is missing or null."""
        value = self._config.get(name)
        return default if value is None else bool(value)

    def words(self, name: str) -> list[str] | None:
        """A list of words; None where it is missing or null."""
        value = self._config.get(name)
        return None if value is None else [str(word) for word in value]

    def numbers(self, name: str) -> list[int]:
        """A list of numbers; empty where it is missing or null."""
        return [int(number) for number in self._config.get(name) or []]

    def text(self, name: str) -> str | None:
        """A string; None where it is missing or something else."""
        value = self._config.get(name)
        return value if isinstance(value, str) else None
