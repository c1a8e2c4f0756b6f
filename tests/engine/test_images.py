"""Images, through projectors with random weights: what is computed equals what llama.cpp's own helper computes."""

from __future__ import annotations

import base64
import ctypes
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import openai
import pytest
from llama_cpp import mtmd_cpp
from numpy.typing import NDArray
from PIL import Image as Pillow

from serving.llamacpp.runtime import Model, Picture, Projector, RuntimeFault
from serving.llamacpp.sampling import log_softmax
from serving.llamacpp.sequence import Job
from tests.engine.scheduling import Bench
from tests.processes import EngineServer
from tests.tiny_models import (
    TILE_TOKENS,
    with_smolvlm_tokens,
    write_gemma3_projector,
    write_qwen2vl,
    write_qwen2vl_projector,
    write_smolvlm_projector,
)

LIMIT = 4
TEXT = ["<|im_start|>user\nWhat is this? ", "<|im_end|>\n<|im_start|>assistant\n"]


@dataclass(frozen=True)
class Family:
    """A model and its projector."""

    model_path: Path
    projector_path: Path


@pytest.fixture(scope="module")
def smolvlm(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The embedded model with the tokens and a projector of SmolVLM's kind."""
    folder = tmp_path_factory.mktemp("smolvlm")
    return Family(
        with_smolvlm_tokens(model_path, folder / "model.gguf"),
        write_smolvlm_projector(folder / "mmproj.gguf"),
    )


@pytest.fixture(scope="module")
def gemma3(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The embedded model with a projector whose images are attended to as a whole."""
    path = tmp_path_factory.mktemp("gemma3") / "mmproj.gguf"
    return Family(model_path, write_gemma3_projector(path))


@pytest.fixture(scope="module")
def qwen2vl(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A model with positions in two dimensions."""
    folder = tmp_path_factory.mktemp("qwen2vl")
    return Family(
        write_qwen2vl(folder / "model.gguf", model_path),
        write_qwen2vl_projector(folder / "mmproj.gguf"),
    )


@pytest.fixture(params=["smolvlm", "gemma3", "qwen2vl"])
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.getfixturevalue(request.param)
    return found


Parts = list[str | Picture]


def noise(seed: int, width: int = 96, height: int = 96) -> Picture:
    """An image unlike any other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Picture(width, height, pixels.tobytes())


class VisionBench(Bench):
    """A bench whose prompts may hold pictures."""

    def __init__(self, family: Family, **options: Any) -> None:
        super().__init__(family.model_path, **options)
        self.projector = Projector(self.model, family.projector_path, threads=1, use_gpu=False)

    def __exit__(self, *error: object) -> None:
        self.projector.close()
        super().__exit__(*error)

    def ask(self, *parts: str | Picture, wait: bool = True, **options: Any) -> Job:
        """Have the prompt completed, with log-probabilities."""
        tokens, images = self.projector.read(parts, lambda _: None)
        start = self.run if wait else self.submit
        job: Job = start(tokens, images=images, limit=LIMIT, top_logprobs=0, **options)
        return job

    def generated_with_logprobs(self, job: Job, choice: int = 0) -> list[tuple[int, float]]:
        """What was generated: each token and its log-probability."""
        sequence = job.sequences[choice]
        generated = sequence.tokens[sequence.prompt_tokens :]
        logprobs = [each.logprob for each in self.logprobs[sequence]]
        return [(t, p or 0.0) for t, p in zip(generated, logprobs, strict=True)]


def reference(family: Family, *parts: str | Picture) -> list[tuple[int, float]]:
    """The same as llama.cpp's own helper computes it, greedily, one sequence alone."""
    model = Model(family.model_path, gpu_layers=0)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model.handle, params)
    options = mtmd_cpp.mtmd_context_params_default()
    options.use_gpu, options.n_threads, options.media_marker = False, 1, b"<picture>"
    mtmd = mtmd_cpp.mtmd_init_from_file(str(family.projector_path).encode(), model.handle, options)
    bitmaps = [
        mtmd_cpp.mtmd_bitmap_init(
            part.width, part.height, (ctypes.c_uint8 * len(part.pixels))(*part.pixels)
        )
        for part in parts
        if isinstance(part, Picture)
    ]
    data = "".join(part if isinstance(part, str) else "<picture>" for part in parts).encode()
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    text = mtmd_cpp.mtmd_input_text(data, len(data), True, True)
    array = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
    assert mtmd_cpp.mtmd_tokenize(mtmd, chunks, ctypes.byref(text), array, len(bitmaps)) == 0
    position = llama_cpp.llama_pos(0)
    evaluated = mtmd_cpp.mtmd_helper_eval_chunks(
        mtmd, context, chunks, 0, 0, 512, True, ctypes.byref(position)
    )
    assert evaluated == 0

    generated = []
    for _ in range(LIMIT):
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (model.vocab_size,))
        token = int(logits.argmax())
        generated.append((token, float(log_softmax(logits)[token])))
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        assert llama_cpp.llama_decode(context, batch) == 0
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    for bitmap in bitmaps:
        mtmd_cpp.mtmd_bitmap_free(bitmap)
    mtmd_cpp.mtmd_free(mtmd)
    llama_cpp.llama_free(context)
    model.close()
    return generated


def same(left: list[tuple[int, float]], right: list[tuple[int, float]]) -> bool:
    """Equal tokens, and log-probabilities within what the order of additions changes."""
    return [t for t, _ in left] == [t for t, _ in right] and bool(
        np.allclose([p for _, p in left], [p for _, p in right], atol=0.05)
    )


def test_images_are_computed_as_llama_cpp_computes_them(family: Family) -> None:
    prompt: Parts = [TEXT[0], noise(1), " and ", noise(2, 128, 64), TEXT[1]]
    with VisionBench(family) as bench:
        assert same(bench.generated_with_logprobs(bench.ask(*prompt)), reference(family, *prompt))


@pytest.mark.parametrize("name", ["smolvlm", "qwen2vl"])
def test_an_image_may_be_longer_than_a_batch(name: str, request: pytest.FixtureRequest) -> None:
    family = request.getfixturevalue(name)
    prompt: Parts = [TEXT[0], noise(1), TEXT[1]]
    with VisionBench(family) as whole:
        expected = whole.generated_with_logprobs(whole.ask(*prompt))
    with VisionBench(family, batch_tokens=10) as bench:
        assert same(bench.generated_with_logprobs(bench.ask(*prompt)), expected)


def test_the_same_image_is_found_again_and_another_is_not(family: Family) -> None:
    long = "It is a bright cold day in April, and the clocks are striking thirteen. " * 3
    with VisionBench(family) as bench:
        first = bench.ask(long, noise(1), TEXT[1])
        again = bench.ask(long, noise(1), TEXT[1])
        other = bench.ask(long, noise(2), TEXT[1])
        first_usage, again_usage, other_usage = (job.usage(1) for job in (first, again, other))
        image_tokens = sum(token < 0 for token in first.sequences[0].tokens)
        texts = bench.tokens(long)

        assert image_tokens >= TILE_TOKENS
        assert first_usage.cached_tokens == 0
        assert again_usage.cached_tokens == again_usage.prompt_tokens - 1
        assert len(texts) <= other_usage.cached_tokens < len(texts) + image_tokens
        outcomes = [bench.generated_with_logprobs(job) for job in (first, again, other)]
        assert same(outcomes[0], outcomes[1])
        assert not same(outcomes[0], outcomes[2])


def test_another_question_about_an_image_computes_only_the_question(family: Family) -> None:
    picture = noise(1)
    questions = [f" What is {what} in it?{TEXT[1]}" for what in ("red", "left of the house")]
    with VisionBench(family, slots=2) as bench:
        bench.ask(TEXT[0], picture, questions[0])
        second = bench.ask(TEXT[0], picture, questions[1])
        usage = second.usage(1)
        assert usage.prompt_tokens - usage.cached_tokens < len(bench.tokens(questions[1])) + 2
        alone = reference(family, TEXT[0], picture, questions[1])
        assert same(bench.generated_with_logprobs(second), alone)


def test_a_conversation_that_lost_its_slot_comes_back_with_its_image(family: Family) -> None:
    conversation: Parts = [TEXT[0] * 4, noise(1), TEXT[1]]
    with VisionBench(family, slots=1) as bench:
        first = bench.ask(*conversation)
        bench.ask(TEXT[0], noise(2), TEXT[1] * 2)
        again = bench.ask(*conversation)
        assert again.usage(1).cached_tokens == again.usage(1).prompt_tokens - 1
        outcomes = [bench.generated_with_logprobs(job) for job in (first, again)]
        assert same(*outcomes)


def test_a_preempted_conversation_with_an_image_loses_nothing(family: Family) -> None:
    conversation: Parts = [TEXT[0], noise(1), TEXT[1]]
    expected = reference(family, *conversation)
    with VisionBench(family, slots=1, batch_tokens=32) as bench:
        bench.at_first_text = lambda: bench.submit(TEXT[0], limit=LIMIT)
        preempted = bench.ask(*conversation, wait=False, priority="batch")
        bench.ends(2)
        assert bench.scheduler.stats.preemptions == 1
        assert same(bench.generated_with_logprobs(preempted), expected)


def test_neighbours_do_not_notice_an_image(family: Family) -> None:
    text = "The capital of France is"
    conversations: list[Parts] = [[TEXT[0], noise(seed), TEXT[1]] for seed in range(2)]
    with VisionBench(family) as alone:
        expected = alone.generated_with_logprobs(alone.ask(text))
        answers = [alone.generated_with_logprobs(alone.ask(*c)) for c in conversations]
    prompts: list[Parts] = [[text], *conversations, [text]]
    with VisionBench(family) as bench:
        jobs = [bench.ask(*parts, wait=False) for parts in prompts]
        bench.ends(len(jobs))
        outcomes = [bench.generated_with_logprobs(job) for job in jobs]
    assert same(outcomes[0], expected)
    assert same(outcomes[3], expected)
    assert same(outcomes[1], answers[0])
    assert same(outcomes[2], answers[1])


def test_choices_share_the_image(family: Family) -> None:
    conversation: Parts = [TEXT[0] * 4, noise(1), TEXT[1]]
    with VisionBench(family) as bench:
        job = bench.ask(*conversation, choices=3)
        computed = bench.scheduler.stats.prefill_tokens
        assert computed <= job.sequences[0].prompt_tokens + 2
        outcomes = [bench.generated_with_logprobs(job, choice) for choice in range(3)]
        assert same(outcomes[0], outcomes[1])
        assert same(outcomes[0], outcomes[2])


def test_files_that_do_not_belong_together_are_refused(
    smolvlm: Family, qwen2vl: Family, model_path: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(smolvlm.projector_path.read_bytes()[:-50_000])
    model = Model(model_path, gpu_layers=0)
    cases = {
        smolvlm.projector_path: "lacks tokens",
        qwen2vl.projector_path: "mismatch",
        broken: "ends early",
        model_path: "cannot load the projector",
        tmp_path / "missing.gguf": "cannot load the projector",
    }
    for path, reason in cases.items():
        with pytest.raises(RuntimeFault, match=reason):
            Projector(model, path, threads=1, use_gpu=False)
    model.close()


# Over HTTP.


def data_url(seed: int, width: int = 96, height: int = 96, form: str = "PNG") -> str:
    picture = noise(seed, width, height)
    file = io.BytesIO()
    Pillow.frombytes("RGB", (width, height), picture.pixels).save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


Chat = Callable[..., Any]


@pytest.fixture(scope="module")
def seeing(smolvlm: Family) -> Iterator[EngineServer]:
    with EngineServer(
        smolvlm.model_path,
        projector_path=str(smolvlm.projector_path),
        context_length=512,
        max_sequences=4,
    ) as server:
        yield server


def ask(server: EngineServer, *content: dict[str, Any], **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": list(content)}]
    return server.client.chat.completions.create(
        model="smol", messages=messages, max_tokens=LIMIT, temperature=0, **options
    )


def test_a_chat_sees_images(seeing: EngineServer) -> None:
    words = ask(seeing, text("What is this?"))
    one = ask(seeing, text("What is this?"), part(data_url(1)))
    two = ask(seeing, text("What is this?"), part(data_url(1)), part(data_url(2, 128, 64)))
    # A square one has four tiles, one twice as wide as high two; each has an overview as well.
    tiles = one.usage.prompt_tokens - words.usage.prompt_tokens
    assert 5 * TILE_TOKENS < tiles < 10 * TILE_TOKENS
    more = two.usage.prompt_tokens - one.usage.prompt_tokens
    assert 3 * TILE_TOKENS < more < tiles
    again = ask(seeing, text("What is this?"), part(data_url(1)))
    assert again.choices[0].message.content == one.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > tiles


def test_a_streamed_chat_sees_images_too(seeing: EngineServer) -> None:
    whole = ask(seeing, part(data_url(3, form="WEBP")), text("?"))
    chunks = list(ask(seeing, part(data_url(3, form="WEBP")), text("?"), stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (part("https://example.com/cat.png"), "remote images are not fetched"),
        (part("data:image/png;base64,AAAA"), "not a PNG, JPEG, WebP or GIF"),
        (part(data_url(1) + "*"), "not base64"),
        (part("cat.png"), "data URL"),
    ],
)
def test_images_that_cannot_be_read_are_named(
    seeing: EngineServer, content: dict[str, Any], reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as refusal:
        ask(seeing, text("What is this?"), content)
    assert refusal.value.param == "messages[0].content[1].image_url.url"


def test_images_that_do_not_fit_the_context_are_refused(seeing: EngineServer) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(seeing, *(part(data_url(seed)) for seed in range(6)))
    assert refusal.value.code == "context_length_exceeded"
    assert ask(seeing, text("Hello")).usage.completion_tokens


def test_a_model_without_a_projector_says_what_it_lacks(engine: EngineServer) -> None:
    with pytest.raises(openai.BadRequestError, match="'projector'") as refusal:
        ask(engine, part(data_url(1)))
    assert refusal.value.param == "messages"
