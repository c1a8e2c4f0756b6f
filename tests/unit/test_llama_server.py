"""llama.cpp's own server: how it is launched, asked and understood, by what a real one printed and answered.

``recordings/llama_server`` holds that, as the program of llama-cpp-python 0.3.36's llama.cpp wrote it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serving.config import AdapterConfig, ConfigError, LlamaCppModel, LlamaServerModel, load_config
from serving.engines.launch import AdapterFile, Files
from serving.engines.llama_server import LlamaServerLauncher, explain
from serving.gateway.dialects import only_llama_server
from serving.gateway.llama_server.answer import Events, refusal, whole
from serving.gateway.llama_server.load import load_of
from serving.gateway.llama_server.request import written
from serving.gateway.llama_server.schemas import reason_to_refuse
from serving.gateway.remote_call import NotStarted
from serving.gateway.sharing import SharedTime
from serving.gateway.stream import StreamTap
from serving.models.sources import ModelError
from serving.protocol.embeddings import EmbeddingRequest, RerankRequest, TokenizeRequest
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest
from tests.contract.strictness import strictly

RECORDINGS = Path(__file__).parent / "recordings" / "llama_server"
HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "listen")
]


def a_model(**options: Any) -> LlamaServerModel:
    return LlamaServerModel(
        **{"name": "chat", "engine": "llama_server", "source": "m.gguf", **options}
    )


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.of({"model": "chat", "messages": HELLO, **fields})


def recorded(name: str) -> bytes:
    return (RECORDINGS / name).read_bytes()


def sent(asked: Any, **options: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(written(a_model(**options), asked))
    return fields


class TestConfig:
    """What the file says of it."""

    def write(self, folder: Path, more: str) -> Path:
        (folder / "m.gguf").write_bytes(b"GGUF")
        path = folder / "rig.yaml"
        path.write_text(
            "models:\n  - name: chat\n    engine: llama_server\n    source: m.gguf\n" + more
        )
        return path

    def test_a_program_on_path_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "llama-server"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert load_config(self.write(tmp_path, "")).local_models[0].engine == "llama_server"

    def test_one_that_is_nowhere_is_told_with_where_was_looked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(ConfigError) as refused:
            load_config(self.write(tmp_path, ""))
        assert "models[0].binary: there is no llama-server on PATH (/nowhere)" in str(refused.value)

    @pytest.mark.parametrize(
        ("more", "expected"),
        [
            ("    binary: gone\n", "models[0].binary: there is no file"),
            ("    binary: m.gguf\n", "cannot be run; allow it with chmod +x"),
            ("    context_length: 1000\n", "context_length (1000) must be a multiple of 256"),
            ("    kv_tokens: 4096\n", "models[0].kv_tokens: unknown key"),
            ("    extra_args: [--port, '1']\n", "--port is for rigserve to give"),
            ("    extra_args: [--ctx-size=9]\n", "set context_length and max_sequences"),
        ],
    )
    def test_a_mistake_is_shown_with_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, expected: str
    ) -> None:
        monkeypatch.setenv("PATH", f"/nowhere{os.pathsep}{tmp_path}")
        with pytest.raises(ConfigError) as refused:
            load_config(self.write(tmp_path, more))
        assert expected in str(refused.value)

    def test_the_example_names_keys_that_there_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "llama-server").touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        example = Path(__file__).parents[2] / "configs" / "llama-server.yaml"
        [model] = load_config(example).local_models
        assert model.engine == "llama_server"


class TestLaunch:
    """The process that is started."""

    def launcher(self, tmp_path: Path) -> tuple[LlamaServerLauncher, str]:
        program = tmp_path / "llama-server"
        program.touch(mode=0o755)
        return LlamaServerLauncher(tmp_path), str(program)

    def words(self, tmp_path: Path, files: Files, **options: Any) -> list[str]:
        launcher, program = self.launcher(tmp_path)
        model = a_model(binary=program, **options)
        return launcher.launch(model, files, 81, "secret", None).command

    def test_its_key_is_not_on_its_command_line(self, tmp_path: Path) -> None:
        launcher, program = self.launcher(tmp_path)
        launch = launcher.launch(
            a_model(binary=program), Files(Path("m.gguf")), 81, "secret", ("GPU-1",)
        )
        assert "secret" not in " ".join(launch.command)
        assert launch.environment["LLAMA_API_KEY"] == "secret"
        assert launch.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"
        assert launch.health_path == "/metrics"

    def test_a_slot_has_the_whole_context(self, tmp_path: Path) -> None:
        words = self.words(tmp_path, Files(Path("m.gguf")), context_length=512, max_sequences=4)
        arguments = dict(zip(words[1::2], words[2::2], strict=False))
        assert arguments["--ctx-size"] == "2048"
        assert arguments["--parallel"] == "4"
        assert arguments["--host"] == "127.0.0.1"
        # OpenAI's defaults, not llama-server's.
        assert (arguments["--temp"], arguments["--top-k"], arguments["--min-p"]) == ("1", "0", "0")

    def test_what_the_operator_adds_comes_last(self, tmp_path: Path) -> None:
        words = self.words(tmp_path, Files(Path("m.gguf")), extra_args=("--flash-attn", "on"))
        assert words[-2:] == ["--flash-attn", "on"]

    @pytest.mark.parametrize(("pooling", "flag"), [(1, "--embeddings"), (4, "--rerank")])
    def test_a_text_that_becomes_a_vector_is_one_batch(
        self, tmp_path: Path, pooling: int, flag: str
    ) -> None:
        files = Files(Path("m.gguf"), pooling=pooling)
        words = self.words(tmp_path, files, context_length=2048)
        assert flag in words
        assert words[words.index("--ubatch-size") + 1] == "2048"

    def test_adapters_count_only_where_they_are_asked_for(self, tmp_path: Path) -> None:
        adapters = ({"name": "a", "path": "a.gguf", "scale": 0.5}, {"name": "b", "path": "b.gguf"})
        files = {name: AdapterFile(Path(f"{name}.gguf"), 1.0, "") for name in "ab"}
        words = self.words(tmp_path, Files(Path("m.gguf"), adapters=files), adapters=adapters)
        assert [words[at + 1] for at, word in enumerate(words) if word == "--lora"] == [
            "a.gguf",
            "b.gguf",
        ]
        assert "--lora-init-without-apply" in words
        model = a_model(adapters=adapters)
        for name, lora in [("chat", []), ("a", [{"id": 0, "scale": 0.5}])]:
            asked = ChatCompletionRequest.of({"model": name, "messages": HELLO})
            assert json.loads(written(model, asked))["lora"] == lora

    def test_a_change_of_what_is_on_the_command_line_is_a_restart(self, tmp_path: Path) -> None:
        launcher, program = self.launcher(tmp_path)
        model = a_model(binary=program)
        assert not launcher.differ(model, model.model_copy(update={"ttl_seconds": 9.0}))
        adapter = AdapterConfig(name="a", path="a.gguf")
        for change in (
            *({"extra_args": ("-v",)}, {"context_length": 1024}, {"binary": "/other"}),
            *({"adapters": (adapter,)}, {"sha256": "0" * 64}),
        ):
            assert launcher.differ(model, model.model_copy(update=change))

    def test_a_program_that_is_gone_is_said_before_anything_is_fetched(
        self, tmp_path: Path
    ) -> None:
        launcher = LlamaServerLauncher(tmp_path)
        with pytest.raises(ModelError, match="there is no llama-server at /gone"):
            launcher.prepare(a_model(binary="/gone", source="hf://nobody/nothing/x.gguf"))


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("flag.log", "it does not know the argument --no-such-flag; correct extra_args"),
        ("value.log", "it does not take what follows the argument --parallel"),
        ("novalue.log", "it does not take what follows the argument --flash-attn"),
        ("cut.log", "the model's file is damaged or no GGUF file"),
        ("nogguf.log", "the model's file is damaged or no GGUF file"),
        (
            "memory.log",
            "there is not enough memory; lower context_length (now 4096), max_sequences",
        ),
        ("lora.log", "an adapter is none of this model's"),
        ("port.log", "another program has its port"),
    ],
)
def test_why_it_did_not_start_is_told_with_the_mend(log: str, expected: str) -> None:
    lines = recorded(log).decode().splitlines()[-40:]
    assert explain(a_model(), lines).startswith(expected)


def test_what_is_not_known_is_not_explained() -> None:
    assert explain(a_model(), recorded("ok.log").decode().splitlines()) == ""


class TestRequests:
    """What it would leave out in silence is refused; the rest is in its words."""

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            (chat(n=2), "n"),
            (chat(guided_regex="a+"), "guided_regex"),
            (chat(reasoning_effort="low"), "reasoning_effort"),
            (chat(chat_template_kwargs={"enable_thinking": False}), "chat_template_kwargs"),
            (chat(messages=[{**HELLO[0], "name": "Ann"}]), "messages[].name"),
            (
                chat(tools=TOOLS, response_format={"type": "json_object"}),
                "response_format",
            ),
            (chat(tools=TOOLS, stream=True, logprobs=True), "logprobs"),
            (chat(tools=TOOLS, tool_choice="required"), "tool_choice"),
            (chat(tools=TOOLS, parallel_tool_calls=False), "parallel_tool_calls"),
            (
                CompletionRequest.of({"model": "chat", "prompt": "x", "echo": True}),
                "echo",
            ),
            (CompletionRequest.of({"model": "chat", "prompt": "x", "logprobs": 0}), "logprobs"),
            (EmbeddingRequest.of({"model": "chat", "input": "x", "dimensions": 8}), "dimensions"),
        ],
    )
    def test_is_refused_by_name_or_left_out(self, asked: Any, param: str) -> None:
        with pytest.raises(ApiError, match="llama-server") as refused:
            only_llama_server(a_model(), asked, lenient=False)
        assert (refused.value.status, refused.value.param) == (400, param)
        left, dropped = only_llama_server(a_model(), asked, lenient=True)
        assert dropped == [param]
        assert only_llama_server(a_model(), left, lenient=False) == (left, [])

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            (CompletionRequest.of({"model": "chat", "prompt": ["x", "y"]}), "prompt"),
            (chat(tools=[{**TOOLS[0], "function": {"name": "f", "strict": True}}]), "tools"),
            (
                chat(
                    messages=[
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}
                            ],
                        }
                    ]
                ),
                "messages",
            ),
        ],
    )
    def test_is_refused_even_where_fields_are_dropped(self, asked: Any, param: str) -> None:
        model = a_model(projector="p.gguf")
        with pytest.raises(ApiError) as refused:
            only_llama_server(model, asked, lenient=True)
        assert (refused.value.status, refused.value.param) == (400, param)

    def test_what_asks_for_nothing_is_no_reason(self) -> None:
        asked = CompletionRequest.of(
            {"model": "chat", "prompt": ["x"], "n": 1, "echo": False, "suffix": ""}
        )
        assert only_llama_server(a_model(), asked, lenient=False) == (asked, [])
        assert sent(asked) == {"model": "chat", "prompt": ["x"], "max_tokens": 16}

    def test_only_the_tools_that_are_allowed_are_told(self) -> None:
        allowed = {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "listen"}}],
        }
        fields = sent(
            chat(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        )
        assert [tool["function"]["name"] for tool in fields["tools"]] == ["listen"]
        assert fields["tool_choice"] == "auto"

    def test_no_seed_stands_for_none(self) -> None:
        assert sent(chat(seed=-1))["seed"] == 2**32 - 2
        assert sent(chat(seed=2**32 - 1))["seed"] == 0
        assert sent(chat(seed=7))["seed"] == 7

    def test_a_stream_tells_what_it_has_used_so_far(self) -> None:
        fields = sent(chat(stream=True))
        assert fields["timings_per_token"] is True
        assert fields["stream_options"] == {"include_usage": True}

    def test_gateways_own_fields_stay_here(self) -> None:
        assert sent(chat(user="ann", service_tier="flex")).keys() == {"model", "messages"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}},
        {"type": ["string", "null"]},
        {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "x"}], "title": "T"},
        {"$defs": {"n": {"type": "number"}}, "type": "array", "items": {"$ref": "#/$defs/n"}},
        {"enum": ["a", 1], "description": "d"},
        {"type": "string", "format": "date"},
        {},
    ],
)
def test_schemas_that_its_grammars_hold_an_answer_to(schema: dict[str, Any]) -> None:
    assert reason_to_refuse(schema) is None


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "number", "minimum": 1}, "#/minimum would not be enforced"),
        ({"type": "string", "pattern": "^a$"}, "#/pattern"),
        ({"type": "string", "format": "email"}, "#/format: 'email'"),
        ({"type": "string", "format": "date", "maxLength": 2}, "#/maxLength"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
        ({"oneOf": [{"type": "string"}]}, "#/oneOf"),
        ({"not": {}}, "#/not"),
        (
            {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 2}}},
            "#/properties/a/multipleOf",
        ),
        ({"type": "object", "required": ["a"]}, "#/required: 'a' is not in properties"),
        ({"$ref": "other.json"}, "#/$ref"),
        ({"anyOf": [{"type": "string"}], "type": "string"}, "#/type"),
        ({"type": "text"}, "'text' is no type"),
    ],
)
def test_schemas_that_they_are_too_loose_for(schema: dict[str, Any], reason: str) -> None:
    assert reason in (reason_to_refuse(schema) or "")
    format_of = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    with pytest.raises(ApiError) as refused:
        only_llama_server(a_model(), chat(response_format=format_of), lenient=False)
    assert refused.value.param == "response_format"


def body_of(name: str) -> tuple[int, dict[str, Any]]:
    """The status and JSON body of a recorded answer."""
    head, _, body = recorded(name).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


class TestAnswers:
    """Its answers in the form of ours."""

    def test_a_whole_chat(self) -> None:
        _, body = body_of("chat.txt")
        timings = dict(body["timings"])
        told = whole(a_model(), chat(), body)
        assert list(told)[-2:] == ["usage", "timings"]
        assert told["timings"] == {
            "prefill_seconds": timings["prompt_ms"] / 1000,
            "decode_seconds": timings["predicted_ms"] / 1000,
        }
        answer = strictly(ChatCompletion, json.dumps(told))
        assert answer.usage.completion_tokens == 4
        assert answer.choices[0].finish_reason == "length"

    def test_log_probabilities_are_as_many_as_were_asked_for(self) -> None:
        for count in (0, 1):
            _, body = body_of("logprobs.txt")
            told = whole(a_model(), chat(logprobs=True, top_logprobs=count), body)
            tokens = strictly(ChatCompletion, json.dumps(told)).choices[0].logprobs.content
            assert [len(token.top_logprobs) for token in tokens] == [count] * 4

    def test_a_tool_call_has_an_id_and_no_text_beside_it(self) -> None:
        _, body = body_of("chat.txt")
        call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
        body["choices"][0]["message"] |= {"content": "", "tool_calls": [call]}
        [choice] = whole(a_model(), chat(tools=TOOLS), body)["choices"]
        assert choice["message"]["tool_calls"][0]["id"].startswith("call-")
        assert choice["message"]["content"] is None

    @pytest.mark.parametrize("step", [1, 50, 100_000])
    def test_a_stream(self, step: int) -> None:
        data = recorded("stream.txt")
        asked = chat(stream=True, stream_options={"include_usage": True})
        events, tap = Events(asked), StreamTap(forward_usage=True)
        told = b"".join(
            tap.feed(events.feed(data[at : at + step])) for at in range(0, len(data), step)
        )
        assert tap.finished
        assert tap.final is not None
        assert tap.final["usage"]["completion_tokens"] == 4
        assert tap.final["timings"].keys() == {"prefill_seconds", "decode_seconds"}
        assert tap.text_events == 4
        chunks = [
            strictly(ChatCompletionChunk, event.removeprefix(b"data: "))
            for event in told.split(b"\n\n")
            if event
        ]
        first, *middle, last, usage = chunks
        assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
        assert all(chunk.choices[0].delta.content for chunk in middle)
        assert last.choices[0].finish_reason == "length"
        assert usage.choices == []
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1

    def test_a_stream_that_is_broken_off_has_used_what_it_last_said(self) -> None:
        data = recorded("stream.txt")
        events, tap = Events(chat(stream=True)), StreamTap(forward_usage=False)
        assert events.so_far() == b""
        two_texts = data.split(b"\n\n")[:3]
        tap.feed(events.feed(b"\n\n".join(two_texts) + b"\n\n"))
        tap.feed(events.so_far())
        assert tap.final is not None
        assert tap.final["usage"]["completion_tokens"] == 2
        assert tap.final["usage"]["prompt_tokens"] > 2

    def test_an_error_within_a_stream_has_our_form(self) -> None:
        events, tap = Events(chat(stream=True)), StreamTap(forward_usage=False)
        told = tap.feed(
            events.feed(b'data: {"error":{"code":500,"message":"oh","type":"server_error"}}\n\n')
        )
        assert tap.failed
        error = json.loads(told.removeprefix(b"data: "))["error"]
        assert error == {
            "message": "oh",
            "type": "api_error",
            "param": None,
            "code": "engine_failed",
        }

    def test_a_prompt_that_is_too_long(self) -> None:
        for name in ("long.txt", "longstream.txt"):
            status, body = body_of(name)
            error = refusal(a_model(), chat(), status, body)
            assert isinstance(error, NotStarted)
            assert (error.status, error.code) == (400, "context_length_exceeded")
            assert error.param == "messages"
            assert "3" in error.message

    def test_what_a_model_is_not_made_for(self) -> None:
        status, body = body_of("emb501.txt")
        error = refusal(
            a_model(), EmbeddingRequest.of({"model": "chat", "input": "x"}), status, body
        )
        assert (error.status, error.param) == (400, "model")

    def test_a_text_that_is_too_long_to_embed(self) -> None:
        message = "input (600 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
        asked = EmbeddingRequest.of({"model": "chat", "input": "x"})
        error = refusal(
            a_model(), asked, 500, {"error": {"message": message, "type": "server_error"}}
        )
        assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "input")

    def test_a_failure_is_its_own_fault(self) -> None:
        error = refusal(a_model(), chat(), 500, {"error": {"message": "oh", "code": 500}})
        assert not isinstance(error, NotStarted)
        assert error.status == 500

    def test_tokens(self) -> None:
        _, body = body_of("tok.txt")
        asked = TokenizeRequest.of(
            {"model": "chat", "prompt": "The sea is 🌊", "return_token_strs": True}
        )
        told = whole(a_model(), asked, body)
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
        assert "".join(told["token_strs"]).startswith("The sea is ")

    def test_a_ranking_repeats_documents_where_that_is_asked_for(self) -> None:
        asked = RerankRequest.of(
            {"model": "r", "query": "q", "documents": ["a", "b"], "return_documents": True}
        )
        told = whole(
            a_model(),
            asked,
            {
                "model": "r",
                "object": "list",
                "usage": {"prompt_tokens": 8, "total_tokens": 8},
                "results": [{"index": 1, "relevance_score": 0.5}],
            },
        )
        assert told["results"] == [{"index": 1, "relevance_score": 0.5, "document": {"text": "b"}}]


def test_what_it_counts_has_our_names() -> None:
    counts = load_of(recorded("metrics.txt"))
    assert counts["running"] == 0
    assert counts["prefix_hit_tokens"] >= 0


def test_requests_that_are_there_together_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    shared = SharedTime()
    first = shared.enter()
    now[0] = 2.0
    second = shared.enter()
    now[0] = 6.0
    assert shared.leave(first) == pytest.approx(2 + 2)
    now[0] = 7.0
    assert shared.leave(second) == pytest.approx(2 + 1)
    # While nobody is there, no time passes.
    now[0] = 100.0
    third = shared.enter()
    now[0] = 101.0
    assert shared.leave(third) == pytest.approx(1)


def test_llama_cpp_models_are_as_they_were() -> None:
    model = LlamaCppModel(name="m", source="m.gguf", context_length=128, max_sequences=2)
    assert model.kv_cells == 256
    assert model.model_copy(update={"kv_tokens": 512}).kv_cells == 512
    assert a_model(gpu_layers=0).is_for_cpu
    assert a_model(devices=("cpu",)).is_for_cpu
    assert not a_model().is_for_cpu
