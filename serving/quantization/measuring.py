"""Measures a GGUF file in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.hardware.cpu import physical_cores
from serving.models.sources import ModelError


@dataclass(frozen=True, slots=True)
class Measured:
    """What one file was seen to take and to do.

    ``buffers_bytes`` are llama.cpp's, for the weights, by kind; ``resident_bytes`` is what main memory of the
    process grew by when it loaded the file, vocabulary included. The divergence is from the reference, in nats a
    token; None for the reference itself. ``same_best_token`` is a share of the scored tokens.
    """

    bits_per_weight: float
    buffers_bytes: dict[str, int]
    resident_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    scored_tokens: int
    perplexity: float
    kl_divergence: float | None
    kl_standard_error: float | None
    same_best_token: float | None
    build: str


@dataclass(frozen=True, slots=True)
class Ruler:
    """What all files are measured with: the text, and where the reference's probabilities are kept meanwhile."""

    text_path: Path
    logprobs_path: Path

    def measure(
        self, path: Path, *, is_reference: bool, on_chunk: Callable[[int, int], None]
    ) -> Measured:
        """Measure a file against the reference, which comes first; ``on_chunk`` hears (done, all).

        Raises :class:`ModelError` if it cannot be loaded, or the disk is full.
        """
        flags = {
            "--model-path": path,
            "--text-path": self.text_path,
            "--logprobs-path": self.logprobs_path,
            "--threads": physical_cores(),
            "--gpu-layers": -1,
        }
        arguments = [str(word) for flag in flags.items() for word in flag]
        if is_reference:
            arguments.append("--is-reference")
        command = [sys.executable, "-m", "serving.llamacpp.measure", *arguments]
        told: dict[str, Any] = {}
        # The open pipe is the child's leash: it ends when this process does.
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                told = json.loads(line)
                if "chunks" in told:
                    on_chunk(*told["chunks"])
            last_words = process.stderr.read().strip().splitlines()[-3:]
        if process.returncode != 0:
            if process.returncode < 0:
                name = signal.Signals(-process.returncode).name
                last_words.append(f"the process was killed by {name}")
            raise ModelError(f"cannot measure {path.name}: {'; '.join(last_words)}")
        return Measured(**told)
