"""A second model's drafts: they are its own greedy continuation, whatever it was asked before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from serving.llamacpp.draft_model import DraftModel
from serving.llamacpp.runtime import Context, Model, RuntimeFault, Sampler
from serving.llamacpp.sampling import SamplingParams
from serving.llamacpp.speculation import speculation_of
from serving.models.requantize import prepare
from serving.models.sources import resolve
from tests.conftest import SOURCE

CONTEXT_LENGTH = 256


@pytest.fixture(scope="module")
def draft_path(cache_dir: Path) -> Path:
    return prepare(resolve(SOURCE), "Q4_0", cache_dir)


@pytest.fixture(scope="module")
def target(model_path: Path) -> Iterator[Model]:
    with closing(Model(model_path, 0)) as model:
        yield model


@pytest.fixture(scope="module")
def draft_model(draft_path: Path, target: Model) -> Iterator[DraftModel]:
    with closing(
        DraftModel(draft_path, target, context_length=CONTEXT_LENGTH, threads=1, gpu_layers=0)
    ) as model:
        yield model


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """What a model says, computed in the plainest way."""
    with (
        closing(Model(path, 0)) as model,
        closing(
            Context(model, slots=1, context_length=CONTEXT_LENGTH, batch_tokens=64, threads=1)
        ) as context,
        closing(Sampler(model, SamplingParams(temperature=0.0), CONTEXT_LENGTH)) as sampler,
    ):
        tokens = prompt[:]
        for position in range(len(prompt) + count - 1):
            context.decode([tokens[position]], [position], [0], [True])
            if position >= len(prompt) - 1:
                tokens.append(sampler.sample(context, 0))
        return tokens[len(prompt) :]


def tokens_of(model: Model, text: str) -> list[int]:
    return model.tokenize(text, add_special=True, parse_special=False)


def test_drafts_are_the_greedy_continuation(
    draft_model: DraftModel, draft_path: Path, target: Model
) -> None:
    prompt = tokens_of(target, "The capital of France is")
    expected = greedy(draft_path, prompt, 8)
    assert draft_model.propose(prompt, 8) == expected
    # Some are accepted, then the target goes another way; then the whole draft is right.
    other = [*prompt, *expected[:3], *tokens_of(target, " Berlin, and")]
    assert draft_model.propose(other, 6) == greedy(draft_path, other, 6)
    longer = [*prompt, *expected]
    assert draft_model.propose(longer, 2) == greedy(draft_path, longer, 2)
    assert draft_model.propose(prompt, 4) == expected[:4]


def test_a_long_prompt_is_read_first(draft_model: DraftModel, target: Model) -> None:
    prompt = tokens_of(target, "One two three four five six seven eight nine ten. " * 10)
    assert len(prompt) > 64
    assert draft_model.propose(prompt, 4) == []
    assert len(draft_model.propose(prompt, 4)) == 4


def test_drafts_end_with_the_context(draft_model: DraftModel, target: Model) -> None:
    tokens = tokens_of(target, "A sea of words. ")[:1] * (CONTEXT_LENGTH - 2)
    draft_model.propose(tokens, 8)
    assert len(draft_model.propose(tokens, 8)) == 2


def test_it_drafts_for_a_sequence_that_runs_alone(draft_model: DraftModel) -> None:
    assert draft_model.evidence([1], 1)
    assert not draft_model.evidence([1], 2)


def test_drafts_of_the_same_model_are_all_accepted(draft_path: Path, target: Model) -> None:
    speculation = speculation_of(
        "draft_model",
        target,
        draft_path,
        context_length=CONTEXT_LENGTH,
        threads=1,
        gpu_layers=0,
    )
    assert speculation is not None
    with closing(speculation):
        prompt = tokens_of(target, "The capital of France is")
        truth = [*prompt, *greedy(draft_path, prompt, 40)]
        speculator = speculation.of(prompt)
        speculation.observe(1, 10.0)  # steps so slow that drafts pay on any machine
        tokens, steps = prompt[:], 0
        while len(tokens) < len(truth):
            drafts = speculator.draft(tokens, 1, len(truth) - len(tokens) - 1)
            assert drafts == truth[len(tokens) :][: len(drafts)]
            tokens = truth[: len(tokens) + len(drafts) + 1]
            speculator.record(len(drafts), len(drafts))
            speculation.observe(1 + len(drafts), 10.0)
            steps += 1
        assert steps <= 8


def test_another_vocabulary_is_refused(draft_path: Path, target: Model, tmp_path: Path) -> None:
    data = draft_path.read_bytes()
    token = "Ġthe".encode()
    entry = len(token).to_bytes(8, "little") + token
    assert data.count(entry) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(entry, len(token).to_bytes(8, "little") + "Ġthx".encode()))
    with pytest.raises(RuntimeFault, match=r"needs the vocabulary.*'Ġthx'.*'Ġthe'"):
        DraftModel(other, target, context_length=64, threads=1, gpu_layers=0)


def test_a_missing_file_is_named(target: Model, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no.gguf", "no.gguf"), (None, "draft model's file")):
        with pytest.raises(RuntimeFault, match=message):
            speculation_of("draft_model", target, path, context_length=64, threads=1, gpu_layers=0)
