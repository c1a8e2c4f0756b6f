"""What goes wrong in the engine goes wrong for the requests concerned, in clear words, and for no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving.llamacpp.runtime import Context, Model, RuntimeFault
from serving.llamacpp.runtime.adapters import LoraAdapter
from serving.llamacpp.sequence import Failed, Finished
from tests.engine.scheduling import Bench
from tests.lora_files import Lora, write_lora

PROMPT = "Describe a voyage across the ocean, the ship, its captain and crew, the weather they met."


def overflowing_adapter(path: Path) -> Path:
    """An adapter of ordinary numbers whose scale will be beyond what float32 can hold."""
    a, b = np.ones((2, 576), np.float32), np.ones((576, 2), np.float32)
    return write_lora(path, Lora({"blk.0.attn_q.weight": (a, b)}, alpha=2.0))


def test_not_a_number_ends_the_request_that_brought_it(model_path: Path, tmp_path: Path) -> None:
    with Bench(model_path) as bench:
        adapter = LoraAdapter(bench.model, overflowing_adapter(tmp_path / "a.gguf"), 1e38)
        good = bench.submit(PROMPT, limit=20)
        bad = bench.submit(PROMPT, limit=20, adapter=adapter)
        ends = {end.sequence.job: end for end in bench.ends(2)}
        failed = ends[bad]
        assert isinstance(failed, Failed)
        assert "NaN" in failed.message
        assert isinstance(ends[good], Finished)
        # Its cells are not believed either: the same prompt is computed again, and fails again.
        again = bench.submit(PROMPT, limit=20, adapter=adapter)
        assert isinstance(bench.ends(1)[0], Failed)
        assert again.usage(1).cached_tokens == 0
        assert bench.run(PROMPT, limit=20).done
        adapter.close()


def test_a_failed_decode_ends_the_requests_of_its_batch(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(model_path) as bench:
        decode, poison = bench.context.decode, bench.tokens(PROMPT)[0]

        def failing(tokens: list[int], positions: list[int], slots: list[int], outputs: list[bool]):  # type: ignore[no-untyped-def]
            # llama.cpp itself refuses a token that is not in its vocabulary.
            decode(
                [10**9 if token == poison else token for token in tokens], positions, slots, outputs
            )

        bench.run("Good day", limit=4)
        monkeypatch.setattr(bench.context, "decode", failing)
        bench.submit(PROMPT, limit=4)
        (end,) = bench.ends(1)
        assert isinstance(end, Failed)
        assert "llama_decode failed" in end.message
        monkeypatch.undo()
        assert bench.run(PROMPT, limit=4).usage(1).cached_tokens == 0


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: b"GGML" + data[4:], id="another format"),
        pytest.param(lambda data: data[:4] + b"\x63\0\0\0" + data[8:], id="a future version"),
        pytest.param(
            lambda data: data.replace(b"\x05" + bytes(7) + b"llama", b"\x05" + bytes(7) + b"lhama"),
            id="unknown",
        ),
        pytest.param(lambda data: data[:64] + b"\xff" * 64 + data[128:], id="corrupt"),
        pytest.param(lambda _: b"", id="empty"),
    ],
)
def test_a_file_that_cannot_be_served_is_a_clear_error(
    model_path: Path, tmp_path: Path, damage: object
) -> None:
    assert callable(damage)
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage(model_path.read_bytes()))
    run = subprocess.run(
        [sys.executable, "-m", "serving.llamacpp", "--model-path", path, "--served-name", "x",
         "--port", "1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert f"error: cannot load {path}: " in run.stderr
    assert "Traceback" not in run.stderr


def test_a_context_beyond_what_llama_cpp_counts_is_a_clear_error(model_path: Path) -> None:
    model = Model(model_path, gpu_layers=0)
    with pytest.raises(RuntimeFault, match="more than llama"):
        Context(model, slots=256, context_length=2**24, batch_tokens=64, threads=1)
    model.close()
