"""The Responses API as the official OpenAI SDK and bare HTTP see it, with the embedded model."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
import requests
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item import ResponseItem

from tests.processes import RigServer, wait_for, write_config
from tests.thinking import SHOWN, TEMPLATE, with_template

MODEL = "smollm2-135m"
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "London"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather.",
    "parameters": PLACE,
    "strict": True,
}
CLOCK: Any = {"type": "function", "name": "get_time", "parameters": {"type": "object"}}
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
ITEM: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseItem)
LONG = "Count from one to a thousand in words."


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """A server whose answers can be long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("rig")
    with RigServer(write_config(folder, cache_dir, context_length=4096, max_sequences=4)) as server:
        server.wait_until_ready()
        yield server


def create(rig: RigServer, **fields: Any) -> Any:
    asked = {"model": MODEL, "input": "Say hello.", "max_output_tokens": 8, **fields}
    return rig.client.responses.create(**asked)


def post(rig: RigServer, path: str = "", **fields: Any) -> requests.Response:
    body = {"model": MODEL, "input": "Say hello.", "max_output_tokens": 8, **fields}
    return requests.post(f"{rig.base_url}/v1/responses{path}", json=body, timeout=30)


def events_of(rig: RigServer, **fields: Any) -> list[dict[str, Any]]:
    """A stream's events; each is what its ``event:`` line says, and parses as the SDK's type for it."""
    answer = post(rig, stream=True, **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    for block in (each for each in blocks if not each.startswith(":")):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        parsed = EVENT.validate_python(event)
        assert parsed.type == event["type"]
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def in_database(rig: RigServer) -> int:
    with closing(sqlite3.connect(rig.ledger_path.with_name("responses.sqlite"))) as connection:
        return int(connection.execute("SELECT count(*) FROM responses").fetchone()[0])


def test_a_whole_answer(rig: RigServer) -> None:
    answer = create(rig, temperature=0, metadata={"who": "me"}, user="ann", max_output_tokens=400)
    Response.model_validate(answer.to_dict())
    assert answer.status == "completed"
    assert answer.completed_at is not None
    assert answer.output_text
    assert answer.metadata == {"who": "me"}
    assert answer.model == MODEL
    assert answer.temperature == 0
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_the_same_words_as_a_chat_completion(rig: RigServer) -> None:
    chat = rig.client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are a poet."},
            {"role": "user", "content": "Say hello."},
        ],
        max_tokens=8,
        temperature=0,
    )
    answer = create(rig, instructions="You are a poet.", temperature=0)
    assert answer.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    again = create(rig, instructions="You are a poet.", temperature=0)
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_an_answer_that_is_cut_short(rig: RigServer) -> None:
    answer = create(rig)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"
    assert answer.completed_at is None
    assert answer.usage.output_tokens == 8


def test_a_streams_events(rig: RigServer) -> None:
    events = events_of(rig, temperature=0)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    last = events[-1]["response"]
    text = "".join(event["delta"] for event in events if "delta" in event)
    assert text == create(rig, temperature=0).output_text
    assert last["output"][0]["content"][0]["text"] == text
    assert last["output"][0] == events[-2]["item"]
    assert last["usage"]["output_tokens"] == 8
    assert {events[0]["response"]["id"], events[1]["response"]["id"]} == {last["id"]}
    assert rig.client.responses.retrieve(last["id"]).to_dict() == last


class Place(pydantic.BaseModel):
    """Where somebody is."""

    city: str
    days: int


def test_the_sdks_stream_helper_parses(rig: RigServer) -> None:
    with rig.client.responses.stream(
        model=MODEL, input="Where are you?", text_format=Place, max_output_tokens=300, temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
    assert isinstance(final.output_parsed, Place)
    parsed = rig.client.responses.parse(
        model=MODEL, input="Where are you?", text_format=Place, max_output_tokens=300, temperature=0
    )
    assert parsed.output_parsed == final.output_parsed


def test_any_json_object(rig: RigServer) -> None:
    form: Any = {"format": {"type": "json_object"}}
    assert create(rig, text=form, temperature=0).output_text.startswith("{")
    assert not create(rig, temperature=0).output_text.startswith("{")


def test_log_probabilities_are_those_of_the_text(rig: RigServer) -> None:
    include: Any = ["message.output_text.logprobs"]
    answer = create(rig, include=include, top_logprobs=2, temperature=0)
    [part] = answer.output[0].content
    assert b"".join(bytes(token.bytes) for token in part.logprobs).decode() == part.text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)
    events = events_of(rig, include=include, top_logprobs=2, temperature=0)
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    streamed = [token for event in events if "delta" in event for token in event["logprobs"]]
    assert [token["token"] for token in streamed] == [token.token for token in part.logprobs]
    assert done["logprobs"] == streamed
    assert create(rig).output[0].content[0].logprobs == []


@pytest.mark.parametrize("stateless", [False, True])
def test_a_function_is_called_and_its_output_answered(rig: RigServer, stateless: bool) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    tools: Any = [WEATHER, CLOCK]
    call = create(
        rig,
        input=question,
        tools=tools,
        tool_choice={
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "get_weather"}],
        },
        parallel_tool_calls=False,
        max_output_tokens=100,
        store=not stateless,
    )
    Response.model_validate(call.to_dict())
    [made] = call.output
    assert (made.type, made.name, made.status) == ("function_call", "get_weather", "completed")
    assert json.loads(made.arguments)["city"] in ("Paris", "London")
    output = {"type": "function_call_output", "call_id": made.call_id, "output": "17 degrees"}
    if stateless:
        answer = create(
            rig, input=[*question, *call.output, output], tools=tools, tool_choice="none"
        )
    else:
        answer = create(
            rig, input=[output], previous_response_id=call.id, tools=tools, tool_choice="none"
        )
        listed = list(rig.client.responses.input_items.list(answer.id, order="asc"))
        assert [item.type for item in listed] == [
            *("message", "function_call", "function_call_output")
        ]
    assert answer.output_text
    bare = create(rig, input=question, tools=tools, tool_choice="none")
    assert answer.usage.input_tokens > bare.usage.input_tokens + 20


def test_a_streamed_call(rig: RigServer) -> None:
    with rig.client.responses.stream(
        model=MODEL,
        input="What is the weather in Paris?",
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=100,
    ) as stream:
        deltas = [e for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    [call] = final.output
    assert call.type == "function_call"
    assert "".join(delta.delta for delta in deltas) == call.arguments
    assert len(deltas) > 1
    assert call.parsed_arguments == json.loads(call.arguments)
    fields: Any = {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "get_weather"}}
    events = events_of(rig, **fields, max_output_tokens=100)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2] == "output_item.added"
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]


def test_a_conversation_goes_on_from_the_store(rig: RigServer) -> None:
    first = create(rig, instructions="You are a very old and very tired poet.", temperature=0)
    second = create(rig, input="Go on.", previous_response_id=first.id, temperature=0)
    by_hand = create(
        rig,
        input=[
            {"role": "user", "content": "Say hello."},
            *first.output,
            {"role": "user", "content": "Go on."},
        ],
        temperature=0,
    )
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens == by_hand.usage.input_tokens
    assert second.output_text == by_hand.output_text
    third = create(rig, input="And on.", previous_response_id=second.id)
    page = rig.client.responses.input_items.list(third.id, limit=2)
    assert page.has_more
    items = list(page)
    assert len({item.id for item in items}) == len(items) == 5
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr, index]
    assert texts[::-1] == [
        *("Say hello.", first.output_text, "Go on.", second.output_text, "And on.")
    ]
    for item in items:
        ITEM.validate_python(item.to_dict())
    # The end of a conversation outlives its beginning, but cannot be continued without it.
    rig.client.responses.delete(first.id)
    assert rig.client.responses.retrieve(third.id).id == third.id
    with pytest.raises(openai.BadRequestError) as caught:
        create(rig, previous_response_id=third.id)
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"


def test_stored_items_can_be_referred_to(rig: RigServer) -> None:
    question: Any = {"role": "user", "content": "Say hello."}
    first = create(rig, input=[question], temperature=0)
    goes_on: Any = {"role": "user", "content": "Go on."}
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    by_hand = create(rig, input=[question, first.output[0], goes_on], temperature=0)
    for sent in (reference, {"id": reference["id"]}):
        answer = create(rig, input=[question, sent, goes_on], temperature=0)
        assert answer.usage.input_tokens == by_hand.usage.input_tokens
        assert answer.output_text == by_hand.output_text
    items = list(rig.client.responses.input_items.list(answer.id, order="asc"))
    assert items[1].to_dict()["content"][0]["text"] == first.output_text  # type: ignore[index]
    rig.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        create(rig, input=[question, reference, goes_on])
    assert caught.value.param == "input[1]"


def test_what_is_not_to_be_stored_is_not(rig: RigServer) -> None:
    before = in_database(rig)
    answer = create(rig, store=False, input="A secret that nobody may keep.")
    assert answer.to_dict()["store"] is False
    events_of(rig, store=False)
    assert in_database(rig) == before
    with pytest.raises(openai.NotFoundError):
        rig.client.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError):
        create(rig, previous_response_id=answer.id)


def test_a_response_is_retrieved_and_deleted(rig: RigServer) -> None:
    answer = create(rig)
    assert rig.client.responses.retrieve(answer.id).to_dict() == answer.to_dict()
    deleted = requests.delete(f"{rig.base_url}/v1/responses/{answer.id}", timeout=30)
    assert deleted.json() == {"id": answer.id, "object": "response", "deleted": True}
    for call in (
        rig.client.responses.retrieve,
        rig.client.responses.delete,
        rig.client.responses.cancel,
        rig.client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call(answer.id)
        assert caught.value.code == "not_found"


def test_only_what_is_made_in_the_background_can_be_cancelled(rig: RigServer) -> None:
    with pytest.raises(openai.BadRequestError, match="background"):
        rig.client.responses.cancel(create(rig).id)


def ended(rig: RigServer, response_id: str) -> Any:
    """A response, once it has ended."""

    def over() -> bool:
        return rig.client.responses.retrieve(response_id).status != "in_progress"

    wait_for(over, "the response ends")
    return rig.client.responses.retrieve(response_id)


def begin_long(rig: RigServer) -> Any:
    """A response in the background that takes long."""
    numbers = {"type": "array", "minItems": 3000, "items": {"enum": [1, 2]}}
    schema = {"type": "object", "properties": {"n": numbers}, "required": ["n"]}
    form = {"format": {"type": "json_schema", "name": "numbers", "schema": schema}}
    answer = create(rig, text=form, background=True, max_output_tokens=3500)
    wait_for(lambda: rig.total("rigserve_sequences_running") == 1, "it is being made")
    return answer


def test_a_response_is_made_in_the_background(rig: RigServer) -> None:
    answer = create(rig, background=True)
    assert answer.status == "in_progress"
    assert answer.background
    assert answer.output == []
    made = ended(rig, answer.id)
    Response.model_validate(made.to_dict())
    assert made.status == "incomplete"
    assert made.usage.output_tokens == 8
    assert made.created_at == answer.created_at
    # Nothing happens to what has ended.
    assert rig.client.responses.cancel(answer.id).status == "incomplete"


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_the_work_on_what_is_not_wanted_any_more_ends(rig: RigServer, how: str) -> None:
    answer = begin_long(rig)
    with pytest.raises(openai.BadRequestError, match="in_progress"):
        create(rig, previous_response_id=answer.id)
    if how == "cancel":
        assert rig.client.responses.cancel(answer.id).status == "cancelled"
    else:
        rig.client.responses.delete(answer.id)
    wait_for(lambda: rig.total("rigserve_sequences_running") == 0, "its work ends", 3)
    if how == "cancel":
        cancelled = rig.client.responses.retrieve(answer.id)
        Response.model_validate(cancelled.to_dict())
        assert (cancelled.status, cancelled.output) == ("cancelled", [])
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            create(rig, previous_response_id=answer.id)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_leaves_nothing_stored(rig: RigServer, stream: bool) -> None:
    before = in_database(rig)
    # Greedy: chance would have it end before the client leaves.
    fields = {"model": MODEL, "input": LONG, "stream": stream, "temperature": 0}
    body = json.dumps(fields).encode()
    with socket.create_connection(("127.0.0.1", rig.config["server"]["port"])) as client:
        client.sendall(
            b"POST /v1/responses HTTP/1.1\r\nHost: rig\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        wait_for(lambda: rig.total("rigserve_sequences_running") == 1, "it is being made")
        if stream:
            assert client.recv(100)
    wait_for(lambda: rig.total("rigserve_sequences_running") == 0, "its work ends", 3)
    assert in_database(rig) == before
    assert "Traceback" not in rig.output


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"truncation": "auto"}, "truncation"),
        ({"made_up": 1}, "made_up"),
        ({"input": [{"type": "image_generation_call", "id": "ig_1"}]}, "input[0]"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"input": "sea " * 5000}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nothing"}}}},
         "text.format"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
def test_refusals_name_the_field(
    rig: RigServer, fields: dict[str, Any], param: str, stream: bool
) -> None:
    before = in_database(rig)
    answer = post(rig, stream=stream, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert not any(name in error["message"] for name in ("response_format", "reasoning_effort"))
    assert in_database(rig) == before


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("resp_1?stream=true", "stream"),
        ("resp_1?include[]=file_search_call.results", "include[0]"),
        ("resp_1?starting_after=0", "starting_after"),
        ("resp_1?what=1", "what"),
        ("resp_1/input_items?limit=0", "limit"),
        ("resp_1/input_items?limit=many", "limit"),
        ("resp_1/input_items?order=up", "order"),
    ],
)
def test_bad_queries_are_refused(rig: RigServer, path: str, param: str) -> None:
    answer = rig.get(f"/v1/responses/{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_numbers_that_json_libraries_do_not_agree_on(rig: RigServer) -> None:
    tool = {**WEATHER, "parameters": {"type": "object", "maxProperties": 2**70}, "strict": None}
    answer = post(rig, tools=[tool], tool_choice="none")
    assert answer.status_code == 200
    assert rig.get(f"/v1/responses/{answer.json()['id']}").json() == answer.json()


def test_an_engine_killed_mid_answer(rig: RigServer) -> None:
    lost = begin_long(rig)
    stream = iter(rig.client.responses.create(model=MODEL, stream=True, input=LONG, temperature=0))
    events = [next(stream) for _ in range(6)]
    assert events[-1].type == "response.output_text.delta"
    [engine] = rig.engines()
    engine.kill()
    events += stream
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    last: Any = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "stopped while it worked" in last.response.error.message
    assert last.response.output
    assert rig.client.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()
    failed = ended(rig, lost.id)
    assert failed.status == "failed"
    assert "stopped while it worked" in failed.error.message
    rig.wait_until_ready()


def test_reasoning_is_an_item_of_its_own(tmp_path: Path, cache_dir: Path, model_path: Path) -> None:
    model = with_template(model_path, TEMPLATE, tmp_path / "model.gguf")
    path = write_config(tmp_path, cache_dir, source=str(model), max_sequences=1)
    path.write_text(path.read_text().replace("  quantization: Q8_0\n", ""))
    shown: list[Any] = []
    for turn in SHOWN:
        if thought := turn.get("reasoning_content"):
            content = [{"type": "reasoning_text", "text": thought}]
            shown.append({"type": "reasoning", "id": "rs", "summary": [], "content": content})
        shown.append({"role": turn["role"], "content": turn["content"]})
    fields: Any = {"input": shown, "temperature": 0, "max_output_tokens": 40}
    with RigServer(path) as thinker:
        thinker.wait_until_ready()
        answer = create(thinker, **fields)
        Response.model_validate(answer.to_dict())
        reasoning, message = answer.output
        assert (reasoning.type, message.type) == ("reasoning", "message")
        assert "add" in reasoning.content[0].text
        assert "It is" in answer.output_text
        details = answer.usage.output_tokens_details
        assert 0 < details.reasoning_tokens < answer.usage.output_tokens
        events = events_of(thinker, **fields)
        thoughts = [e["delta"] for e in events if e["type"] == "response.reasoning_text.delta"]
        assert "".join(thoughts) == reasoning.content[0].text
        # Its reasoning goes with an answer, from the store and by hand.
        goes_on = {"role": "user", "content": "7+7?"}
        stored = create(thinker, input=[goes_on], previous_response_id=answer.id, temperature=0)
        by_hand = create(thinker, input=[*shown, *answer.output, goes_on], temperature=0)
        without = create(thinker, input=[*shown, message, goes_on], temperature=0)
        assert stored.usage.input_tokens == by_hand.usage.input_tokens > without.usage.input_tokens
        silent = create(thinker, **fields, reasoning={"effort": "none"})
        assert silent.output[0].type == "message"


@pytest.fixture
def own_rig(tmp_path: Path, cache_dir: Path) -> Iterator[RigServer]:
    """A server that the test may break."""
    filters = {"max_tokens_ceiling": 3000, "forced": {"top_p": 0.5}}
    path = write_config(tmp_path, cache_dir, context_length=4096, filters=filters, lenient=True)
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def test_a_kill_loses_nothing_and_leaves_nothing_in_progress(own_rig: RigServer) -> None:
    kept, lost = create(own_rig), begin_long(own_rig)
    own_rig.stop(signal.SIGKILL)
    with RigServer(own_rig.config_path) as again:
        again.wait_until_ready()
        assert again.client.responses.retrieve(kept.id).to_dict() == kept.to_dict()
        failed = again.client.responses.retrieve(lost.id)
        Response.model_validate(failed.to_dict())
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error.code == "server_error"
        create(again, previous_response_id=kept.id)
        # What the config changes of a request is told in this API's words.
        changed = post(
            again,
            temperature=0,
            truncation="auto",
            top_p=1,
            max_output_tokens=3001,
            tools=[CLOCK | {"output_schema": {}}],
            tool_choice="none",
        )
        assert changed.status_code == 200
        ignored = changed.headers["x-rigserve-ignored"].split(", ")
        assert ignored == ["truncation", "tools[].output_schema", "max_output_tokens", "top_p"]
        told = changed.json()
        assert (told["top_p"], told["max_output_tokens"]) == (0.5, 3000)
        # A server that is stopped in order finishes what it is working on.
        running = create(again, background=True, max_output_tokens=40)
        assert again.stop() == 0
    path = own_rig.ledger_path.with_name("responses.sqlite")
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT status FROM responses WHERE id = ?"
        assert connection.execute(query, (running.id,)).fetchone()[0] in ("completed", "incomplete")
    assert path.stat().st_mode & 0o077 == 0
    assert not list(path.parent.glob(f"{path.name}.*.lock"))
