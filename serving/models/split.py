"""Models in several GGUF files, named as llama.cpp's ``gguf-split`` does."""

from __future__ import annotations

import re

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def split_names(name: str) -> list[str]:
    """The names of all parts of a split file, from the name of one; else just its own."""
    found = _SPLIT.search(name)
    if found is None:
        return [name]
    return [
        f"{name[: found.start()]}-{part:05}-of-{found[2]}.gguf"
        for part in range(1, int(found[2]) + 1)
    ]
