"""Every answer is what OpenAI's SDK declares, to the letter: no wrong type, no field too many, none lost."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from typing import Any

import openai
import pytest
import requests
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from openai.types import Batch, Completion, CreateEmbeddingResponse, FileObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from tests.contract.engines import CHAT, EMBEDDING, SLOTS, ContractServer
from tests.contract.probes import HELLO
from tests.contract.strictness import events_of, stream_of, strictly

CITY = {"type": "string", "enum": ["Oslo", "Lima"]}
PLACE: Any = {
    "type": "object",
    "properties": {"city": CITY},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Tell the weather.", "parameters": PLACE},
}
TIME: Any = {"type": "function", "function": {"name": "time", "parameters": PLACE}}
QUESTION: Any = [{"role": "user", "content": "How is the weather, and what time is it, in Oslo?"}]


def chat(rig: ContractServer, **fields: Any) -> ChatCompletion:
    asked = {"model": CHAT, "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
    answer = rig.post("/v1/chat/completions", **asked)
    assert answer.status_code == 200, answer.text
    completion: ChatCompletion = strictly(ChatCompletion, answer.content)
    return completion


def chat_stream(rig: ContractServer, **fields: Any) -> list[ChatCompletionChunk]:
    asked = {"model": CHAT, "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
    answer = rig.post("/v1/chat/completions", stream=True, **asked)
    return [strictly(ChatCompletionChunk, data) for data in stream_of(answer)]


def test_a_chat_completion(contract: ContractServer) -> None:
    answer = chat(contract)
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.system_fingerprint
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens == 8
    assert usage.total_tokens == usage.prompt_tokens + 8
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None


def test_a_stream_is_the_role_then_text_then_the_reason(contract: ContractServer) -> None:
    chunks = chat_stream(contract)
    assert {(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, chunks[0].system_fingerprint)
    }
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert [choice.finish_reason for choice in (first, *middle)] == [None] * (len(chunks) - 1)
    assert all(choice.delta.role is None and choice.delta.content for choice in middle)
    assert (last.finish_reason, last.delta.to_dict()) == ("length", {})
    assert all(chunk.usage is None for chunk in chunks)
    text = "".join(choice.delta.content or "" for choice in middle)
    assert text == chat(contract).choices[0].message.content


def test_the_usage_of_a_stream_comes_last(contract: ContractServer) -> None:
    *chunks, last = chat_stream(contract, stream_options={"include_usage": True})
    # Null, and not left out: that is how OpenAI does it.
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks)
    assert last.choices == []
    whole = chat(contract).usage
    assert last.usage is not None
    assert whole is not None
    assert last.usage.prompt_tokens == whole.prompt_tokens
    assert last.usage.completion_tokens == whole.completion_tokens


@pytest.mark.needs("n", "seed")
def test_several_choices(contract: ContractServer) -> None:
    fields: Any = {"n": 3, "temperature": 1, "seed": 7}
    choices = chat(contract, **fields).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    texts = [choice.message.content for choice in choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in chat_stream(contract, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


@pytest.mark.needs("stop")
def test_a_stop_string_ends_an_answer_and_is_not_in_it(contract: ContractServer) -> None:
    words = (chat(contract, max_tokens=20).choices[0].message.content or "").split()
    [choice] = chat(contract, max_tokens=20, stop=[f" {words[4]}"]).choices
    assert choice.finish_reason == "stop"
    assert (choice.message.content or "").split() == words[:4]


@pytest.mark.needs("logprobs")
def test_log_probabilities(contract: ContractServer) -> None:
    [choice] = chat(contract, logprobs=True, top_logprobs=2).choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content
    assert tokens is not None
    assert len(tokens) == 8
    assert b"".join(bytes(t.bytes or []) for t in tokens).decode() == choice.message.content
    for token in tokens:
        assert token.logprob <= 0
        # Greedy: what is said is what is likeliest.
        assert token.top_logprobs[0].token == token.token
        assert len(token.top_logprobs) == 2
    streamed = [
        token.token
        for chunk in chat_stream(contract, logprobs=True, top_logprobs=2)
        for token in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or ()
    ]
    assert streamed == [token.token for token in tokens]


@pytest.mark.needs("tools")
@pytest.mark.parametrize("how", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_call(contract: ContractServer, how: Any) -> None:
    fields: Any = {"messages": QUESTION, "tools": [WEATHER], "tool_choice": how, "max_tokens": 60}
    [choice] = chat(contract, parallel_tool_calls=False, **fields).choices
    assert choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in CITY["enum"]
    # OpenAI says so: a function that is named is called, and the answer has stopped.
    assert choice.finish_reason in ("tool_calls", "stop")
    chunks = chat_stream(contract, parallel_tool_calls=False, **fields)
    deltas = [d for c in chunks for d in (c.choices[0].delta.tool_calls or ())]
    assert {delta.index for delta in deltas} == {0}
    assert [delta.id is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert deltas[0].function is not None
    assert deltas[0].function.name == "weather"
    streamed = "".join((d.function and d.function.arguments) or "" for d in deltas)
    # Engines that read calls out of text may write the JSON of a whole one anew.
    assert json.loads(streamed) == json.loads(call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


@pytest.mark.needs("tools")
def test_a_model_may_answer_instead_of_calling(contract: ContractServer) -> None:
    for how in ("auto", "none"):
        [choice] = chat(contract, tools=[WEATHER], tool_choice=how).choices
        assert choice.message.content
        assert choice.message.tool_calls is None


@pytest.mark.needs("tools", "parallel_tools", "structured_outputs")
def test_parallel_calls_are_numbered(contract: ContractServer) -> None:
    fields: Any = {
        "messages": QUESTION,
        "tools": [WEATHER, TIME],
        "tool_choice": "required",
        "parallel_tool_calls": True,
        "max_tokens": 400,
    }
    calls = chat(contract, **fields).choices[0].message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    order: list[int] = []
    for chunk in chat_stream(contract, **fields):
        for choice in chunk.choices:
            order += [delta.index for delta in choice.delta.tool_calls or ()]
    assert order == sorted(order)
    assert set(order) == set(range(len(calls)))


class Place(BaseModel):
    """A place."""

    city: str
    coastal: bool


@pytest.mark.needs("json_schema")
def test_structured_output_is_parsed_by_the_sdk(contract: ContractServer) -> None:
    fields: Any = {"model": CHAT, "messages": QUESTION, "max_tokens": 100, "temperature": 0}
    parsed = contract.client.chat.completions.parse(response_format=Place, **fields)
    assert isinstance(parsed.choices[0].message.parsed, Place)
    with contract.client.chat.completions.stream(response_format=Place, **fields) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


@pytest.mark.needs("json_schema")
def test_output_that_is_cut_short_is_the_sdks_exception(contract: ContractServer) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        contract.client.chat.completions.parse(
            model=CHAT, messages=QUESTION, response_format=Place, max_tokens=2
        )


@pytest.mark.needs("tools")
def test_the_sdk_parses_the_arguments_of_strict_tools(contract: ContractServer) -> None:
    parsed = contract.client.chat.completions.parse(
        model=CHAT,
        messages=QUESTION,
        tools=[openai.pydantic_function_tool(Place, name="visit")],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
    )
    [call] = parsed.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Place)


@pytest.mark.needs("json_object")
def test_any_json_object(contract: ContractServer) -> None:
    [choice] = chat(
        contract, response_format={"type": "json_object"}, max_tokens=200, stop=["}"]
    ).choices
    assert (choice.message.content or "").startswith("{")


def complete(rig: ContractServer, **fields: Any) -> Completion:
    asked = {"model": CHAT, "prompt": "The sea is", "max_tokens": 4, "temperature": 0, **fields}
    answer = rig.post("/v1/completions", **asked)
    assert answer.status_code == 200, answer.text
    completion: Completion = strictly(Completion, answer.content)
    return completion


@pytest.mark.needs("completions")
def test_text_completions(contract: ContractServer) -> None:
    answer = complete(contract)
    assert answer.id.startswith("cmpl-")
    text = answer.choices[0].text
    # Not read strictly: the type of a chunk is that of a whole answer, which has a reason for its end.
    chunks = contract.client.completions.create(
        model=CHAT, prompt="The sea is", max_tokens=4, temperature=0, stream=True
    )
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == text
    assert choices[-1].finish_reason == "length"


@pytest.mark.needs("token_prompts", "tokenize")
def test_a_prompt_of_tokens(contract: ContractServer) -> None:
    tokens = contract.post("/tokenize", model=CHAT, prompt="The sea is").json()["tokens"]
    text = complete(contract).choices[0].text
    assert complete(contract, prompt=tokens).choices[0].text == text
    told = contract.post("/detokenize", model=CHAT, tokens=tokens)
    assert told.json() == {"prompt": "The sea is"}


@pytest.mark.needs("n", "token_prompts", "tokenize")
def test_several_prompts(contract: ContractServer) -> None:
    tokens = contract.post("/tokenize", model=CHAT, prompt="The sea is").json()["tokens"]
    text = complete(contract).choices[0].text
    both = complete(contract, prompt=[tokens, tokens]).choices
    assert [(choice.index, choice.text) for choice in both] == [(0, text), (1, text)]


@pytest.mark.needs("completions", "echo")
def test_a_completion_with_its_prompt_and_log_probabilities(contract: ContractServer) -> None:
    text = complete(contract, logprobs=1).choices[0].text
    # Not read strictly: OpenAI's first token has no probability either, though its types say so.
    echoed = contract.client.completions.create(
        model=CHAT, prompt="The sea is", max_tokens=4, temperature=0, echo=True, logprobs=1
    ).choices[0]
    assert echoed.text == "The sea is" + text
    assert echoed.logprobs is not None
    assert echoed.logprobs.token_logprobs is not None
    assert echoed.logprobs.token_logprobs[0] is None
    assert "".join(echoed.logprobs.tokens or ()) == echoed.text


@pytest.mark.needs("embeddings")
def test_embeddings(contract: ContractServer) -> None:
    fields: Any = {"model": EMBEDDING, "input": ["A cat.", "A rug."]}
    answer = contract.post("/v1/embeddings", **fields)
    floats: CreateEmbeddingResponse = strictly(CreateEmbeddingResponse, answer.content)
    assert [item.index for item in floats.data] == [0, 1]
    assert floats.usage.total_tokens == floats.usage.prompt_tokens > 0
    # The SDK asks for base64 unless told otherwise, and decodes it.
    decoded = contract.client.embeddings.create(**fields)
    raw = contract.post("/v1/embeddings", encoding_format="base64", **fields).json()
    for item, same, text in zip(floats.data, decoded.data, raw["data"], strict=True):
        packed = base64.b64decode(text["embedding"])
        assert list(struct.unpack(f"<{len(packed) // 4}f", packed)) == same.embedding
        assert same.embedding == pytest.approx(item.embedding, abs=1e-6)


@pytest.mark.needs("embeddings", "dimensions")
def test_shorter_embeddings(contract: ContractServer) -> None:
    fields: Any = {"model": EMBEDDING, "input": ["A cat.", "A rug."]}
    short = contract.client.embeddings.create(dimensions=8, **fields)
    for item in short.data:
        assert len(item.embedding) == 8
        assert sum(x * x for x in item.embedding) == pytest.approx(1, abs=1e-4)


def test_models(contract: ContractServer) -> None:
    listed = contract.get("/v1/models").json()
    assert listed.keys() == {"object", "data"}
    for entry in listed["data"]:
        strictly(Model, json.dumps(entry))
        assert strictly(Model, contract.get(f"/v1/models/{entry['id']}").content).id == entry["id"]


def test_responses(contract: ContractServer) -> None:
    fields: Any = {"model": CHAT, "input": "Say hello.", "max_output_tokens": 8, "temperature": 0}
    answer = strictly(Response, contract.post("/v1/responses", **fields).content)
    stored = contract.get(f"/v1/responses/{answer.id}")
    assert strictly(Response, stored.content) == answer
    events = events_of(contract.post("/v1/responses", stream=True, **fields))
    parsed = [strictly(ResponseStreamEvent, data) for data in events]
    assert parsed[-1].response.output_text == answer.output_text


def test_anthropics_messages(contract: ContractServer) -> None:
    fields: Any = {"model": CHAT, "messages": HELLO, "max_tokens": 8, "temperature": 0}
    answer = strictly(Message, contract.post("/v1/messages", **fields).content)
    events = events_of(contract.post("/v1/messages", stream=True, **fields))
    parsed = [strictly(RawMessageStreamEvent, data) for data in events]
    text = "".join(e.delta.text for e in parsed if e.type == "content_block_delta")
    assert text == answer.content[0].text


@pytest.mark.needs("tokenize")
def test_the_tokens_of_anthropics_messages(contract: ContractServer) -> None:
    fields: Any = {"model": CHAT, "messages": HELLO}
    counted = contract.post("/v1/messages/count_tokens", **fields)
    assert strictly(MessageTokensCount, counted.content).input_tokens > 0


def test_files_and_batches(contract: ContractServer) -> None:
    body = {"model": CHAT, "messages": HELLO, "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    form: Any = {"files": {"file": ("in.jsonl", json.dumps(line))}, "data": {"purpose": "batch"}}
    uploaded = requests.post(f"{contract.base_url}/v1/files", timeout=30, **form)
    file = strictly(FileObject, uploaded.content)
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    begun = contract.post("/v1/batches", input_file_id=file.id, **asked)
    batch = strictly(Batch, begun.content)
    deadline = time.monotonic() + 30
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        batch = strictly(Batch, contract.get(f"/v1/batches/{batch.id}").content)
    assert batch.status == "completed"
    [done] = contract.client.files.content(batch.output_file_id).text.splitlines()
    strictly(ChatCompletion, json.dumps(json.loads(done)["response"]["body"]))


@pytest.mark.needs("n", "ignore_eos")
def test_requests_are_sent_again_when_there_is_room(contract: ContractServer) -> None:
    """What cannot begin in time is refused with a ``Retry-After``, which the SDK heeds."""
    # As many as the engine gets at a time.
    held = contract.client.chat.completions.create(
        model=CHAT,
        messages=HELLO,
        n=SLOTS + SLOTS // 4,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(held))
    asked: Any = {
        "model": CHAT,
        "messages": HELLO,
        "max_tokens": 2,
        "extra_headers": {"x-rigserve-deadline-seconds": "0.1"},
    }
    with pytest.raises(openai.InternalServerError) as refused:
        contract.client.chat.completions.create(**asked)
    assert refused.value.status_code == 503
    assert refused.value.code == "deadline_unmeetable"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    leaves = threading.Timer(0.5, held.close)
    leaves.start()
    patient = contract.client.with_options(max_retries=10).chat.completions.with_raw_response
    answer = patient.create(**asked)
    leaves.join()
    assert answer.retries_taken >= 1
    assert answer.parse().choices[0].message.content


@pytest.mark.needs("ignore_eos")
def test_a_client_that_waits_no_longer(contract: ContractServer) -> None:
    impatient = contract.client.with_options(timeout=0.4)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(
            model=CHAT, messages=HELLO, extra_body={"ignore_eos": True}
        )
