"""``python -m tools.memory_check``: the planner's memory model beside what llama.cpp says of itself.

Real architectures, in files that hold no weights (``tools/gguf_skeleton.py``); nothing is downloaded, and memory is
not taken. Writes Markdown to standard output; ends with status 1 if a bound that docs/planning.md states is broken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving.models.architecture import Architecture
from serving.models.catalog import find_model
from serving.planner.compute_buffer import compute_bytes
from serving.planner.memory import MIB, Parts, memory_of
from serving.planner.quantization import types_of
from serving.planner.settings import Settings
from serving.planner.weights import predicted
from tools.gguf_skeleton import write_skeleton

MODELS = (
    "smollm2-135m-instruct", "smollm2-1.7b-instruct", "smollm3-3b", "llama-3.2-1b-instruct",
    "llama-3.1-8b-instruct", "llama-3.3-70b-instruct", "llama-4-scout-17b-16e-instruct",
    "mistral-7b-instruct-v0.3", "mistral-nemo-instruct-2407", "mistral-small-3.2-24b-instruct-2506",
    "mixtral-8x7b-instruct-v0.1", "qwen2.5-0.5b-instruct", "qwen2.5-7b-instruct", "qwen2.5-32b-instruct",
    "qwen3-0.6b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b", "qwen3-next-80b-a3b-instruct",
    "qwen3.5-27b", "qwen3.5-35b-a3b", "gemma-2-9b-it", "gemma-3-4b-it", "gemma-3-27b-it", "gemma-4-31b-it", "gemma-4-26b-a4b-it", "phi-4",
    "phi-3.5-mini-instruct", "phi-4-mini-instruct", "deepseek-v2-lite-chat", "deepseek-v3", "glm-4-9b-0414",
    "glm-4.5-air", "gpt-oss-20b", "gpt-oss-120b", "olmo-2-1124-7b-instruct", "granite-3.3-8b-instruct",
    "lfm2-1.2b", "nvidia-nemotron-3-nano-30b-a3b-bf16", "minimax-m2.5", "seed-oss-36b-instruct",
)  # fmt: skip
SETTINGS = {
    "8k x 1": Settings(8192),
    "32k x 4": Settings(32768, 4),
    "4k x 16": Settings(4096, 16),
    "32k x 4, windows cut": Settings(32768, 4, has_full_windows=False),
    "16k pool of 16, Q8_0": Settings(
        2048, 16, pool_tokens=16384, key_type="Q8_0", value_type="Q8_0"
    ),
    "4k x 8, 64 a step": Settings(4096, 8, batch_tokens=64),
    "4k x 8, no flash attention": Settings(4096, 8, batch_tokens=256, has_flash_attention=False),
}
MIXTURES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "IQ4_NL",
            "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")  # fmt: skip
# The bounds: shares of what llama.cpp says.
_EXACT, _COMPUTE = 0.01, 0.15


@dataclass(frozen=True, slots=True)
class Case:
    """One model with one set of settings: what llama.cpp says, and what was predicted, in bytes.

    ``compute_bytes`` is that part of ``predicted.compute`` that llama.cpp speaks of.
    """

    model: str
    settings: str
    said: dict[str, float]
    predicted: Parts
    compute_bytes: int

    @property
    def ratios(self) -> dict[str, float]:
        """Predicted by said, of each part and of the sum; what is in the sum beyond them is the process's own."""
        return {
            "weights": self.predicted.weights / self.said["weights"],
            "cache": self.predicted.cache / self.said["cache"],
            "compute": self.compute_bytes / self.said["compute"],
            "sum": self.predicted.total / sum(self.said.values()),
        }

    @property
    def is_within_bounds(self) -> bool:
        """Whether weights and cache are exact, results near, and the sum is not below."""
        ratios = self.ratios
        return (
            abs(ratios["weights"] - 1) <= _EXACT
            and abs(ratios["cache"] - 1) <= _EXACT
            and abs(ratios["compute"] - 1) <= _COMPUTE
            and ratios["sum"] >= 1
        )


def check(name: str, folder: Path, labels: Sequence[str] = tuple(SETTINGS)) -> list[Case]:
    """One model with some of the settings."""
    architecture = _architecture(name)
    mixture = "MXFP4_MOE" if architecture.family == "gpt-oss" else "Q4_K_M"
    path = write_skeleton(folder / "model.gguf", architecture, mixture)
    weights = predicted(architecture, mixture)
    said = llama_cpp_says("memory", path, [asdict(SETTINGS[label]) for label in labels])
    return [
        Case(
            name,
            label,
            each,
            memory_of(architecture, weights, SETTINGS[label]).host,
            compute_bytes(architecture, SETTINGS[label]),
        )
        for label, each in zip(labels, said, strict=True)
    ]


def wrong_types(
    name: str, folder: Path, mixtures: Sequence[str] = MIXTURES
) -> list[tuple[int, int]]:
    """For each mixture: how many tensors llama.cpp would give another type than predicted, and how many there are."""
    architecture = _architecture(name)
    path = write_skeleton(folder / "model.gguf", architecture, "BF16")
    counts = []
    for mixture, chosen in zip(
        mixtures, llama_cpp_says("types", path, list(mixtures)), strict=True
    ):
        ours = types_of(architecture, mixture)
        wrong = [tensor for tensor, kind in chosen.items() if ours.get(_ours(tensor), kind) != kind]
        counts.append((len(wrong), len(chosen)))
    return counts


def _ours(tensor: str) -> str:
    return "output_norm.weight" if tensor == "token_embd_norm.weight" else tensor


def _architecture(name: str) -> Architecture:
    model = find_model(name)
    assert model is not None, name
    return model.architecture


def llama_cpp_says(what: str, path: Path, questions: Sequence[Any]) -> list[Any]:
    """The answers of ``tools.llama_report``; raises RuntimeError with its last words."""
    ran = subprocess.run(
        [sys.executable, "-m", "tools.llama_report", what, path],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"{path}: {ran.stdout[-300:]}{ran.stderr[-300:]}")
    answers: list[Any] = json.loads(ran.stdout)
    return answers


def main(models: Sequence[str]) -> int:
    """Check the models (all of the list without any), print the tables; returns the exit status."""
    names = models or MODELS
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for name in names for case in check(name, Path(folder))]
        counts = {name: wrong_types(name, Path(folder)) for name in names}
    _print_summary(cases, counts)
    print("\n| model | settings | weights MiB | | cache MiB | | compute MiB | | sum MiB | |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for case in cases:
        _print_case(case)
    return 0 if all(case.is_within_bounds for case in cases) else 1


def _print_summary(cases: Sequence[Case], counts: dict[str, list[tuple[int, int]]]) -> None:
    print(f"{len(cases)} cases: {len(counts)} models, {len(SETTINGS)} settings each.\n")
    print("| predicted / said by llama.cpp | lowest | highest |\n|---|--:|--:|")
    for part in ("weights", "cache", "compute", "sum"):
        ratios = [case.ratios[part] for case in cases]
        print(f"| {part} | {min(ratios):.4f} | {max(ratios):.4f} |")
    outside = [case for case in cases if not case.is_within_bounds]
    print(f"\nOutside of the bounds: {len(outside)}.")
    wrong = sum(count for rows in counts.values() for count, _ in rows)
    tensors = sum(count for rows in counts.values() for _, count in rows)
    print(
        f"\nTypes of tensors in {len(MIXTURES)} mixtures ({', '.join(MIXTURES)}), as `llama-quantize --dry-run` "
        f"chooses them: {wrong} of {tensors:,} predicted wrong."
    )


def _print_case(case: Case) -> None:
    ratios, said = case.ratios, case.said
    cells = [
        f"{said[part] / MIB:,.1f} | {ratios[part]:.3f}" for part in ("weights", "cache", "compute")
    ]
    total = sum(said.values()) / MIB
    print(
        f"| {case.model} | {case.settings} | {' | '.join(cells)} | {total:,.1f} | {ratios['sum']:.3f} |"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
