"""``python -m serving.llamacpp.measure``: the memory of one GGUF file, its speed, and how well it foretells a text.

A process of its own: what its memory grows by is the file's alone. Prints a line of JSON after each chunk
of the text, ``{"chunks": [DONE, ALL]}``, and at the end one with all figures. It ends with its parent.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.llamacpp.runtime import Context, Model, RuntimeFault, pooling_of

# As llama.cpp's llama-perplexity does it (tools/perplexity/perplexity.cpp): the text in chunks of 512 tokens that
# know nothing of each other; of each the second half is scored, which has the first before it.
CHUNK_TOKENS = 512
_FIRST_SCORED = CHUNK_TOKENS // 2
_SCORED_ROWS = range(_FIRST_SCORED, CHUNK_TOKENS - 1)
# 2,040 scored tokens; the reference's probabilities are kept in a file, 0.4 GB of it with 49,152 tokens.
_MOST_CHUNKS = 8

_SPEED_ROUNDS, _DECODED_TOKENS = 3, 32

LogProbs = NDArray[np.float64]


def log_softmax(logits: NDArray[np.float32]) -> LogProbs:
    """Log-probabilities of all tokens, in double precision."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - math.log(np.exp(shifted).sum()))


def chunks_of(tokens: list[int], bos_tokens: list[int]) -> list[list[int]]:
    """The text's whole chunks, at most so many. Where the model wants a BOS token, it stands in each first place."""
    count = min(len(tokens) // CHUNK_TOKENS, _MOST_CHUNKS)
    starts = range(0, count * CHUNK_TOKENS, CHUNK_TOKENS)
    return [bos_tokens + tokens[at + len(bos_tokens) : at + CHUNK_TOKENS] for at in starts]


@dataclasses.dataclass(slots=True)
class Score:
    """Sums over the scored tokens: what the model gave them, and how far it is from the reference."""

    negative_log_likelihoods: list[float] = dataclasses.field(default_factory=list)
    divergences: list[float] = dataclasses.field(default_factory=list)
    same_best_tokens: int = 0

    def add(self, logprobs: LogProbs, token: int, reference: LogProbs | None) -> None:
        """Count one place of the text: ``token`` is what stands there. The reference itself has none beside it."""
        self.negative_log_likelihoods.append(-float(logprobs[token]))
        if reference is not None:
            self.divergences.append(float(np.sum(np.exp(reference) * (reference - logprobs))))
            self.same_best_tokens += int(reference.argmax() == logprobs.argmax())

    def told(self) -> dict[str, float | int | None]:
        """Perplexity, and the mean Kullback-Leibler divergence from the reference in nats, with its standard error."""
        count = len(self.negative_log_likelihoods)
        told: dict[str, float | int | None] = {
            "scored_tokens": count,
            "perplexity": math.exp(statistics.fmean(self.negative_log_likelihoods)),
            "kl_divergence": None,
            "kl_standard_error": None,
            "same_best_token": None,
        }
        if self.divergences:
            told["kl_divergence"] = statistics.fmean(self.divergences)
            told["kl_standard_error"] = statistics.stdev(self.divergences) / math.sqrt(count)
            told["same_best_token"] = self.same_best_tokens / count
        return told


def main() -> int:
    """Measure one file; 1 if it cannot be loaded, or its figures not be written."""
    parser = argparse.ArgumentParser(prog="python -m serving.llamacpp.measure")
    parser.add_argument("--model-path", type=Path, required=True, help="GGUF file")
    parser.add_argument("--text-path", type=Path, required=True, help="the text to foretell")
    parser.add_argument("--logprobs-path", type=Path, required=True, help="the reference's")
    parser.add_argument("--is-reference", action="store_true", help="write them, not compare")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--gpu-layers", type=int, required=True)
    args = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        print(json.dumps(_measure(args)), flush=True)
    except (RuntimeFault, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    resident_before_bytes = _resident_bytes()
    with closing(Model(args.model_path, args.gpu_layers)) as model:
        told: dict[str, Any] = {
            "bits_per_weight": model.bits_per_weight,
            "buffers_bytes": model.buffers_bytes,
            "resident_bytes": _resident_bytes() - resident_before_bytes,
            "build": model.build,
        }
        if pooling_of(model) is not None:
            raise RuntimeFault(
                f"{args.model_path.name} does not generate text; it has no perplexity"
            )
        text = args.text_path.read_text(encoding="utf-8")
        tokens = model.tokenize(text, add_special=True, parse_special=False)
        chunks = chunks_of(tokens, model.bos_tokens)
        if not chunks:
            raise RuntimeFault(
                f"{args.text_path} has {len(tokens)} tokens; {CHUNK_TOKENS} are needed at least"
            )
        context = Context(
            model,
            slots=1,
            context_length=CHUNK_TOKENS + _DECODED_TOKENS,
            batch_tokens=CHUNK_TOKENS,
            threads=args.threads,
        )
        with closing(context):
            told |= _speed(context, chunks[0])
            told |= _quality(context, chunks, model.vocab_size, args)
    return told


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _speed(context: Context, chunk: list[int]) -> dict[str, float]:
    """Medians of some rounds, after one that does not count: a chunk at once, then token after token behind it."""
    prefill_seconds, decode_seconds = [], []
    for _ in range(1 + _SPEED_ROUNDS):
        began_at = time.perf_counter()
        _read(context, chunk, range(CHUNK_TOKENS - 1, CHUNK_TOKENS))
        prefilled_at = time.perf_counter()
        row = CHUNK_TOKENS - 1
        for position in range(CHUNK_TOKENS, CHUNK_TOKENS + _DECODED_TOKENS):
            context.decode([int(context.logits(row).argmax())], [position], [0], [True])
            row = 0
        prefill_seconds.append(prefilled_at - began_at)
        decode_seconds.append(time.perf_counter() - prefilled_at)
    return {
        "prefill_tokens_per_second": CHUNK_TOKENS / statistics.median(prefill_seconds[1:]),
        "decode_tokens_per_second": _DECODED_TOKENS / statistics.median(decode_seconds[1:]),
    }


def _read(context: Context, chunk: list[int], outputs: range) -> None:
    """Decode a chunk afresh, with logits of the rows in ``outputs``."""
    context.truncate(0, 0)
    rows = range(len(chunk))
    context.decode(chunk, rows, [0] * len(chunk), [row in outputs for row in rows])


def _quality(
    context: Context, chunks: list[list[int]], vocab_size: int, args: argparse.Namespace
) -> dict[str, float | int | None]:
    score = Score()
    # Unbuffered: what is written reaches the disk, or fails, at once.
    with FileIO(args.logprobs_path, "w" if args.is_reference else "r") as file:
        for number, chunk in enumerate(chunks, 1):
            for logprobs, token in _scored(context, chunk):
                if args.is_reference:
                    _write(file, logprobs)
                    score.add(logprobs, token, None)
                else:
                    reference = np.fromfile(file, "<f4", vocab_size)
                    score.add(logprobs, token, reference.astype(np.float64))
            print(json.dumps({"chunks": [number, len(chunks)]}), flush=True)
    return score.told()


def _write(file: FileIO, logprobs: LogProbs) -> None:
    data = logprobs.astype("<f4").tobytes()
    try:
        written = file.write(data)
    except OSError as error:
        reason = error.strerror
    else:
        if written == len(data):
            return
        reason = "the disk is full"
    raise RuntimeFault(
        f"cannot write {file.name}: {reason}; make room, or set storage.cache_dir to another disk"
    )


def _scored(context: Context, chunk: list[int]) -> Iterator[tuple[LogProbs, int]]:
    """The model's log-probabilities at each scored place of a chunk, and the token that follows it there."""
    _read(context, chunk, _SCORED_ROWS)
    for row, token in zip(
        _SCORED_ROWS, itertools.islice(chunk, _FIRST_SCORED + 1, None), strict=True
    ):
        yield log_softmax(context.logits(row)), token


if __name__ == "__main__":
    sys.exit(main())
