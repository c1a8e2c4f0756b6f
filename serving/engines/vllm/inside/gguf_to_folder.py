"""Runs with the Python of vLLM's environment: makes a GGUF file into a Hugging Face folder.

``python gguf_to_folder.py FILE.gguf FOLDER DTYPE``. Weights are dequantized into DTYPE; the tokenizer and the chat
template are the file's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main(source: Path, folder: Path, dtype: str) -> None:
    """Write the folder, which must not be there yet."""
    import torch
    import transformers

    place: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **place)
    if hasattr(transformers, "GgufConfig"):
        # Newer ones leave the weights packed unless they are told not to.
        place["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=getattr(torch, dtype), **place
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
