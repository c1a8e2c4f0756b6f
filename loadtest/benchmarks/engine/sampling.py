"""Point 4: what sampling costs with a vocabulary of 128k and 32 sequences."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np

from loadtest.benchmarks.engine.prompts import Corpus
from loadtest.benchmarks.engine.servers import (
    LLAMA_SERVER,
    RIGSERVE,
    Rig,
    Server,
    in_turns,
    require_full,
    servers,
)
from loadtest.benchmarks.engine.table import Figures, Results

_VOCABULARY = 131_072
_SEQUENCES = 32
_CONTEXT_LENGTH = 512
_PROMPT_TOKENS = 78
_OUTPUT_TOKENS = 64
# All tokens stay in play until top_p, so that a vocabulary's size counts.
_SAMPLING = {"temperature": 1.0, "top_p": 0.95, "top_k": 0, "min_p": 0}
_WANTED = {"output tok/s": "llama-server ≥ 1.00"}


def measure(rig: Rig, rounds: int) -> str:
    """Compare random sampling, beside llama-server; Markdown."""
    names = [RIGSERVE, LLAMA_SERVER]
    results = Results(names)
    with TemporaryDirectory() as folder:
        wide = replace(
            rig,
            model_path=_widen(rig.model_path, Path(folder) / "wide.gguf"),
            slots=_SEQUENCES,
            context_length=_CONTEXT_LENGTH,
        )
        with servers(wide, names) as running:
            corpus = Corpus.of(running[0])
            for number, server in in_turns(running, rounds):
                prompts = corpus.prompts(number)
                batch = [prompts.new(_PROMPT_TOKENS) for _ in range(_SEQUENCES)]
                results.add(server.name, asyncio.run(_wave(server, batch)))
    return results.markdown(
        f"Sampling, {_SEQUENCES} sequences, a vocabulary of {_VOCABULARY}",
        _WANTED,
        f"The model with its embeddings repeated up to {_VOCABULARY} tokens; {_SAMPLING}; {_PROMPT_TOKENS} prompt tokens, "
        f"{_OUTPUT_TOKENS} generated a stream; {rounds} rounds.",
    )


async def _wave(server: Server, prompts: list[list[int]]) -> Figures:
    fields: dict[str, Any] = {**server.endless, **_SAMPLING, "max_tokens": _OUTPUT_TOKENS}
    streams = [server.complete(prompt, seed=seed, **fields) for seed, prompt in enumerate(prompts)]
    async with server.awake() as session:
        before = await server.statistics(session)
        started = time.perf_counter()
        await asyncio.gather(*(stream.run(session) for stream in streams))
        seconds = time.perf_counter() - started
        after = await server.statistics(session)
    for stream in streams:
        require_full(stream.reply(), _OUTPUT_TOKENS)
    figures = {"output tok/s": len(streams) * _OUTPUT_TOKENS / seconds}
    if after:
        sampling = after["step_seconds"]["sample"] - before["step_seconds"]["sample"]
        figures["sampling, % of the time"] = 100 * sampling / seconds
        figures["sampling, ms a token"] = 1000 * sampling / (len(streams) * _OUTPUT_TOKENS)
    return figures


def _widen(source: Path, path: Path) -> Path:
    """A copy of a model whose output and input are one matrix, with more tokens."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    more = _VOCABULARY - len(tokens)
    lengthened = {
        "tokenizer.ggml.tokens": [*tokens, *(f"<more-{number}>" for number in range(more))],
        "tokenizer.ggml.token_type": [
            *reader.fields["tokenizer.ggml.token_type"].contents(),
            *[int(gguf.TokenType.NORMAL)] * more,
        ],
    }
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture")) or name.endswith(".vocab_size"):
            continue
        item: Any = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        value = lengthened.get(name, field.contents())
        writer.add_key_value(name, value, field.types[0], sub_type=item)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name == "token_embd.weight":
            data = np.resize(data, (_VOCABULARY, data.shape[1]))
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
