"""Given a bare engine with the real model, what an OpenAI SDK client sees."""

from __future__ import annotations

import concurrent.futures
import json
import math
from collections import Counter
from typing import Any

import openai
import pytest
import requests

from tests.processes import ENGINE_KEY, EngineServer, wait_for

HELLO = [{"role": "user", "content": "Tell me about the sea."}]


def chat(engine: EngineServer, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": "smol", "messages": HELLO, "max_tokens": 24} | options
    extra = {name: fields.pop(name) for name in ("top_k", "min_p", "ignore_eos") if name in fields}
    return engine.client.chat.completions.create(**fields, extra_body=extra)


def text_of(engine: EngineServer, **options: Any) -> str:
    content: str = chat(engine, **options).choices[0].message.content
    return content


def test_a_whole_answer(engine: EngineServer) -> None:
    answer = chat(engine, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content.strip()
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_says_what_the_whole_answer_says(engine: EngineServer) -> None:
    # The prompt is in the cache both times, so that both compute the same batches.
    text_of(engine, temperature=0)
    whole = chat(engine, temperature=0)
    chunks = list(chat(engine, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_tokens_stream_as_they_are_made(engine: EngineServer) -> None:
    chunks = [c for c in chat(engine, stream=True, ignore_eos=True) if c.choices[0].delta.content]
    assert len(chunks) > 12


def test_temperature_zero_and_a_seed_repeat(engine: EngineServer) -> None:
    text_of(engine, temperature=0)
    assert text_of(engine, temperature=0) == text_of(engine, temperature=0)
    assert text_of(engine, seed=7) == text_of(engine, seed=7)
    assert text_of(engine, seed=7) != text_of(engine, seed=8)


def test_top_k_one_is_greedy(engine: EngineServer) -> None:
    greedy = text_of(engine, temperature=0)
    greedy = text_of(engine, temperature=0)
    assert text_of(engine, top_k=1) == greedy
    assert text_of(engine, min_p=1) == greedy
    assert text_of(engine, top_p=1e-6) == greedy


def test_the_lowest_temperatures_are_greedy(engine: EngineServer) -> None:
    assert text_of(engine, temperature=1e-45, seed=3) == text_of(engine, temperature=0)


def test_tokens_that_do_not_exist_are_refused_by_name(engine: EngineServer) -> None:
    for fields in ({"prompt": [[1], [-1]]}, {"prompt": [10**30]}, {"logit_bias": {"49152": 1}}):
        body: Any = {"model": "smol", "prompt": "a", "max_tokens": 1} | fields
        with pytest.raises(openai.BadRequestError, match="is not in the vocabulary") as refused:
            engine.client.completions.create(**body)
        assert refused.value.param == next(iter(fields))


def test_a_stop_string_ends_the_answer_and_is_not_in_it(engine: EngineServer) -> None:
    text_of(engine, temperature=0)
    full = text_of(engine, temperature=0)
    stop = full[9:13]
    answer = chat(engine, temperature=0, stop=[stop])
    assert answer.choices[0].message.content == full.partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 24


def test_logit_bias_forbids_and_forces(engine: EngineServer) -> None:
    first = chat(engine, temperature=0, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    forced = chat(engine, temperature=0, max_tokens=3, logit_bias={"30": 100})
    assert len(set(forced.choices[0].message.content)) == 1
    assert forced.choices[0].message.content[0] != first.token


def test_penalties_end_repetition(engine: EngineServer) -> None:
    def most_repeated(**penalty: float) -> int:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = chat(
            engine, messages=question, temperature=0, max_tokens=48, logprobs=True, **penalty
        )
        return max(Counter(t.token for t in answer.choices[0].logprobs.content).values())

    assert most_repeated() > 4
    assert most_repeated(frequency_penalty=2) < most_repeated()
    assert most_repeated(presence_penalty=2) < most_repeated()


def test_n_choices_differ_and_the_prompt_counts_once(engine: EngineServer) -> None:
    one = chat(engine, seed=3)
    three = chat(engine, n=3, seed=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in three.choices}) == 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 72


def test_logprobs_are_those_of_the_distribution(engine: EngineServer) -> None:
    answer = chat(engine, temperature=0, logprobs=True, top_logprobs=20, max_tokens=8)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 8
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == answer.choices[0].message.content
    for token in tokens:
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.top_logprobs[0].logprob == token.logprob
        values = [other.logprob for other in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert 0.2 < sum(map(math.exp, values)) <= 1.0001


def test_the_chosen_token_is_among_the_top_of_a_text_completion(engine: EngineServer) -> None:
    for top in (0, 2):
        answer = engine.client.completions.create(
            model="smol", prompt="The sea", max_tokens=6, logprobs=top, temperature=2, seed=1
        )
        logprobs: Any = answer.choices[0].logprobs
        chosen = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        for token, logprob, alternatives in chosen:
            assert alternatives[token] == logprob
            assert top <= len(alternatives) <= top + 1


def test_text_offsets_run_on_through_a_stream(engine: EngineServer) -> None:
    stream = engine.client.completions.create(
        model="smol", prompt="The sea", max_tokens=6, logprobs=1, stream=True, temperature=0
    )
    text, offsets = "", []
    for chunk in stream:
        if chunk.choices[0].logprobs is not None:
            offsets += chunk.choices[0].logprobs.text_offset or []
            assert offsets[-1] == len(text)
        text += chunk.choices[0].text
    assert offsets == sorted(set(offsets))
    assert len(offsets) == 6


def test_ignore_eos_generates_to_the_limit(engine: EngineServer) -> None:
    short = [{"role": "user", "content": "Say only: yes"}]
    answer = chat(engine, messages=short, ignore_eos=True, max_tokens=200, temperature=0)
    assert answer.usage.completion_tokens == 200


def test_without_a_limit_an_answer_ends_with_the_context(engine: EngineServer) -> None:
    answer = chat(engine, max_tokens=None, ignore_eos=True)
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_a_prompt_beyond_the_context_is_refused(engine: EngineServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(engine, messages=[{"role": "user", "content": "sea " * 600}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as too_long:
        engine.client.completions.create(model="smol", prompt="sea " * 600)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")


def test_batched_and_tokenized_prompts(engine: EngineServer) -> None:
    create: Any = engine.client.completions.create
    answer = create(model="smol", prompt=["One", "Two"], max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert create(model="smol", prompt=[1, 2, 3], max_tokens=1).usage.prompt_tokens == 3
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        create(model="smol", prompt=[10**6], max_tokens=1)


def test_a_conversation_that_goes_on_computes_only_what_is_new(engine: EngineServer) -> None:
    story = [{"role": "user", "content": "Remember these words: " + "ship sail harbour gull " * 12}]
    first = chat(engine, messages=story, temperature=0)
    turns = [
        *story,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Go on."},
    ]
    second = chat(engine, messages=turns, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_many_at_once_each_get_their_own_answer(engine: EngineServer) -> None:
    # 4 slots and a queue of 4: eight requests just fit.
    def ask(seed: int) -> Any:
        return chat(engine, seed=seed, messages=[{"role": "user", "content": f"Number {seed}?"}])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert len({answer.choices[0].message.content for answer in answers}) == 8
    assert all(answer.usage.completion_tokens <= 24 for answer in answers)


def test_a_full_queue_turns_requests_away(engine: EngineServer) -> None:
    streams = [chat(engine, max_tokens=400, ignore_eos=True, stream=True) for _ in range(8)]
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            chat(engine)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
    finally:
        for stream in streams:
            stream.close()
    wait_for(lambda: engine.load()["running"] + engine.load()["waiting"] == 0, "all slots are free")


def test_a_request_that_can_never_fit_is_refused_for_good(engine: EngineServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(engine, n=9)
    assert caught.value.param == "n"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(engine: EngineServer, stream: bool) -> None:
    # Left alone it would work for many seconds.
    body: Any = {"model": "smol", "messages": HELLO, "ignore_eos": True, "stream": stream, "n": 4}
    headers = {"Authorization": f"Bearer {ENGINE_KEY}"}
    url = f"{engine.base_url}/v1/chat/completions"
    if stream:
        with requests.post(url, json=body, headers=headers, stream=True, timeout=30) as answer:
            next(answer.iter_content(16))
            assert engine.load()["running"] == 4
    else:
        with pytest.raises(requests.ReadTimeout):
            requests.post(url, json=body, headers=headers, timeout=0.3)
    wait_for(lambda: engine.load()["running"] == 0, "the slots are free", 4)


def test_a_cancelled_stream_ends_in_order_with_its_usage(engine: EngineServer) -> None:
    headers = {"Authorization": f"Bearer {ENGINE_KEY}", "x-request-id": "to-cancel"}
    body: Any = {
        "model": "smol", "messages": HELLO, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    with requests.post(
        f"{engine.base_url}/v1/chat/completions",
        json=body,
        headers=headers,
        stream=True,
        timeout=30,
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        requests.post(f"{engine.base_url}/internal/cancel/to-cancel", headers=headers, timeout=5)
        rest = [line for line in lines if line]
    assert rest[-1] == b"data: [DONE]"
    usage = json.loads(rest[-2].removeprefix(b"data: "))["usage"]
    assert 1 <= usage["completion_tokens"] < 400


def test_a_prompt_that_was_cancelled_in_the_queue_counts_for_nothing(engine: EngineServer) -> None:
    headers = {"Authorization": f"Bearer {ENGINE_KEY}", "x-request-id": "queued"}
    busy = [chat(engine, max_tokens=400, ignore_eos=True, stream=True) for _ in range(4)]
    try:
        wait_for(lambda: engine.load()["running"] == 4, "all slots are taken")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                requests.post,
                f"{engine.base_url}/v1/chat/completions",
                json={"model": "smol", "messages": HELLO},
                headers=headers,
                timeout=30,
            )
            wait_for(lambda: engine.load()["waiting"] == 1, "the request waits")
            requests.post(f"{engine.base_url}/internal/cancel/queued", headers=headers, timeout=5)
            answer = waiting.result().json()
    finally:
        for stream in busy:
            stream.close()
    assert answer["usage"]["prompt_tokens"] == 0
    assert answer["usage"]["completion_tokens"] == 0


def test_the_engine_answers_only_its_gateway(engine: EngineServer) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert engine.get("/v1/models", headers=headers).status_code == 401
        assert engine.get("/health", headers=headers).status_code == 401


def test_an_empty_prompt_is_refused(engine: EngineServer) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt is empty"):
        engine.client.completions.create(model="smol", prompt="", max_tokens=1)
