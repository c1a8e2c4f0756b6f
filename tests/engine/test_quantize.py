"""`rigserve models quantize` on real weights: what it measures, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtest.prompts import CORPUS_PATH
from serving.llamacpp.measure import CHUNK_TOKENS, log_softmax
from serving.llamacpp.runtime import Context, Model
from serving.models.gguf import read_header
from serving.models.sources import ModelError
from serving.quantization.variants import Comparison, Progress, compare, counted_bytes
from tests.processes import wait_for, write_config

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Measurements here have one: threads that share busy cores wait for each other, and burn what others need."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little more than one chunk."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(CORPUS_PATH.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return path


def quantize(source: Path, cache: Path, text: Path, *types: str) -> Comparison:
    return compare(str(source), types, cache, text, Progress())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what was asked for in ``found`` is kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(small_whole_path: Path, text: Path, cache: Path) -> Comparison:
    """With two types that were asked for, beside the baselines."""
    return quantize(small_whole_path, cache, text, "Q8_0", "Q4_0")


def test_smaller_types_take_less_and_lose_more(
    small_whole_path: Path, cache: Path, found: Comparison
) -> None:
    assert [variant.type for variant in found.variants] == ["F32", "F16", "Q8_0", "Q4_0"]
    full, half, eight, four = (variant.measured for variant in found.variants)
    assert full is not None
    assert half is not None
    assert eight is not None
    assert four is not None
    assert found.reference.type == "F32"
    assert not found.source_is_quantized
    assert (full.kl_divergence, full.scored_tokens) == (None, CHUNK_TOKENS // 2 - 1)
    lost = [each.kl_divergence or 0 for each in (half, eight, four)]
    assert 0 < lost[0] < lost[1] < lost[2] / 10
    assert (eight.same_best_token or 0) > 0.95 > (four.same_best_token or 1)
    assert eight.bits_per_weight == pytest.approx(8.5, abs=0.01)
    for each in (full, half, eight, four):
        weights_bytes = read_weights_bytes(each.bits_per_weight, small_whole_path)
        assert sum(each.buffers_bytes.values()) == pytest.approx(weights_bytes, rel=0.02)
        assert weights_bytes < each.resident_bytes < weights_bytes + 60 * MIB
        assert each.decode_tokens_per_second > 1
        assert each.prefill_tokens_per_second > each.decode_tokens_per_second
    # What was asked for is kept, the rest is gone.
    assert {path.name.rpartition("-")[2] for path in cache.glob("*.gguf")} == {
        "Q8_0.gguf", "Q4_0.gguf",
    }  # fmt: skip
    assert not (cache / "measuring").exists()
    assert found.variants[0].path == small_whole_path


def read_weights_bytes(bits_per_weight: float, model: Path) -> float:
    weights = sum(math.prod(tensor.shape) for tensor in read_header(model).tensors.values())
    return bits_per_weight * weights / 8


def test_perplexity_is_that_of_reading_token_by_token(
    small_whole_path: Path, text: Path, found: Comparison
) -> None:
    measured = found.reference.measured
    assert measured is not None
    lost = []
    with closing(Model(small_whole_path, 0)) as model:
        tokens = model.tokenize(text.read_text(), add_special=True, parse_special=False)
        context = Context(model, slots=1, context_length=CHUNK_TOKENS, batch_tokens=1, threads=1)
        with closing(context):
            for position in range(CHUNK_TOKENS - 1):
                context.decode([tokens[position]], [position], [0], [True])
                if position >= CHUNK_TOKENS // 2:
                    lost.append(-log_softmax(context.logits(0))[tokens[position + 1]])
    assert measured.perplexity == pytest.approx(math.exp(sum(lost) / len(lost)), rel=0.01)


def test_a_baseline_that_cannot_be_made_is_counted_and_so_labelled(
    small_whole_path: Path, text: Path, tmp_path: Path, found: Comparison
) -> None:
    """A limit on the size of files stands for a disk with too little room."""
    with largest_file(15_000_000):
        limited = quantize(small_whole_path, tmp_path, text, "Q8_0")
    half = limited.of_type("F16")
    assert half is not None
    assert half.measured is None
    assert "cannot requantize" in (half.why_counted or "")
    assert limited.of_type("Q8_0") is not None
    made = found.of_type("F16")
    assert made is not None
    assert made.measured is not None
    assert half.file_bytes == pytest.approx(made.file_bytes, abs=100_000)
    header = read_header(small_whole_path)
    assert counted_bytes(header, "F32") == pytest.approx(
        small_whole_path.stat().st_size, abs=100_000
    )


def test_a_full_disk_is_named_and_nothing_is_left(
    small_whole_path: Path, text: Path, tmp_path: Path
) -> None:
    with (
        largest_file(2_000_000),
        pytest.raises(ModelError, match=r"cannot write .*logprobs: .*set storage\.cache_dir"),
    ):
        quantize(small_whole_path, tmp_path, text, "Q8_0")
    assert not list(tmp_path.glob("**/*.gguf*"))
    assert not (tmp_path / "measuring").exists()


class largest_file:  # noqa: N801
    """Files cannot grow beyond a size while this lasts."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size_bytes, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def test_a_model_that_does_not_generate_is_refused(
    minilm_path: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="does not generate text"):
        quantize(minilm_path, tmp_path, text, "Q8_0")
    assert not list(tmp_path.glob("**/*.gguf*"))


def test_a_text_that_is_too_short_is_refused(small_whole_path: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    with pytest.raises(ModelError, match="512 are needed at least"):
        quantize(small_whole_path, tmp_path / "cache", short)


def command(tmp_path: Path, source: Path, *more: str) -> list[str]:
    config = write_config(tmp_path, tmp_path / "cache")
    words = ["models", "quantize", str(source), "--types", "Q8_0", "--config", str(config)]
    return [sys.executable, "-m", "serving", *words, *more]


def test_the_command_prints_a_table_and_json(small_whole_path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, small_whole_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "F16: making" in done.stderr
    assert "The claim, 75 %, does not hold exactly" in done.stdout
    (kept,) = (tmp_path / "cache").glob("*.gguf")
    assert str(kept) in done.stdout
    done = subprocess.run(
        command(tmp_path, small_whole_path, "--json"), capture_output=True, text=True, check=True
    )
    told: dict[str, Any] = json.loads(done.stdout)
    eight = told["variants"][-1]
    assert (eight["type"], eight["path"], told["reference"]) == ("Q8_0", str(kept), "F32")
    less = eight["less_than"]["F32"]
    assert less["buffers_bytes"] == pytest.approx(100 * (1 - 8.5 / 32), abs=0.05)
    # The file has the vocabulary, too, which grows no smaller.
    assert 72 < less["file_bytes"] < less["buffers_bytes"]


def test_an_interrupt_leaves_no_half_file_and_no_process(
    small_whole_path: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command(tmp_path, small_whole_path),
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    logprobs = tmp_path / "cache" / "measuring" / "logprobs"
    wait_for(lambda: logprobs.exists() and logprobs.stat().st_size, "it measures", seconds=60)
    workers = psutil.Process(process.pid).children()
    assert workers
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(20) == 130
    assert said.strip().endswith("nothing else")
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert not list((tmp_path / "cache").glob("**/*.gguf*"))
    assert not (tmp_path / "cache" / "measuring").exists()


def test_two_do_not_measure_at_once(small_whole_path: Path, text: Path, tmp_path: Path) -> None:
    class Second(Progress):
        def begin(self, type_name: str, what: str) -> None:
            with pytest.raises(ModelError, match="another `rigserve models quantize` works"):
                quantize(small_whole_path, tmp_path, text)
            seen.append(type_name)

    seen: list[str] = []
    compare(str(small_whole_path), [], tmp_path, text, Second())
    assert seen == ["F32", "F16", "F16"]
