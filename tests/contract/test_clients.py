"""What the clients that people use make of the server, beside the official Python SDKs (tests/e2e)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.engines import ContractServer
from tests.contract.environments import run_node, run_python
from tests.processes import RigServer

# Each client's script calls a tool, among all else.
pytestmark = pytest.mark.needs("tools")

PLACES = ("Oslo", "Lima")
WIDTH = 384
# The two clients ask the same, greedily.
TOKENS = 12


@pytest.fixture(scope="module")
def javascript(contract: RigServer) -> Any:
    """The official JavaScript SDK."""
    return run_node("openai_client.mjs", f"{contract.base_url}/v1")


@pytest.fixture(scope="module")
def langchain(contract: RigServer) -> Any:
    """LangChain's client for OpenAI's API."""
    return run_python("langchain_client.py", "langchain.txt", f"{contract.base_url}/v1")


@pytest.fixture(scope="module")
def llama_index(contract: RigServer) -> Any:
    """LlamaIndex's client for what speaks OpenAI's API."""
    return run_python("llama_index_client.py", "llama_index.txt", f"{contract.base_url}/v1")


@pytest.mark.timeout(900)
class TestJavaScript:
    """The official ``openai`` package, under Node."""

    def test_chat_streamed_or_not_says_the_same(self, javascript: Any) -> None:
        assert javascript["whole"]
        assert javascript["streamed"] == javascript["responses"] == javascript["whole"]

    def test_usage(self, contract: ContractServer, javascript: Any) -> None:
        assert javascript["usage"]["completion_tokens"] == TOKENS
        assert javascript["streamed_usage"]["prompt_tokens"] == javascript["usage"]["prompt_tokens"]
        cached_tokens = javascript["streamed_usage"]["prompt_tokens_details"]["cached_tokens"]
        # vLLM's prefix cache has whole blocks, which are longer than this prompt.
        assert cached_tokens > 0 or contract.engine.name == "vllm"

    def test_run_tools_calls_the_function_and_hands_back_its_result(self, javascript: Any) -> None:
        assert javascript["call"]["city"] in PLACES
        assert javascript["tool_message"] == f"It rains in {javascript['call']['city']}."

    def test_structured_output(self, javascript: Any) -> None:
        assert javascript["structured"].keys() == {"city"}
        assert javascript["structured"]["city"] in PLACES

    def test_the_events_of_a_response(self, javascript: Any) -> None:
        assert javascript["events"] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]

    def test_embeddings_and_models(self, javascript: Any) -> None:
        assert javascript["embeddings"] == [WIDTH, WIDTH]
        assert javascript["models"] == ["chat", "embedding"]

    def test_errors_are_the_sdks_exceptions(self, javascript: Any) -> None:
        assert javascript["errors"] == [
            {"kind": "NotFoundError", "status": 404, "param": "model", "code": "model_not_found"},
            {"kind": "BadRequestError", "status": 400, "param": "temperature", "code": "invalid_value"},
        ]  # fmt: skip


@pytest.mark.timeout(900)
class TestLangChain:
    """``ChatOpenAI`` and ``OpenAIEmbeddings``."""

    def test_chat_streamed_or_not_says_the_same(self, langchain: Any) -> None:
        assert langchain["whole"]
        assert langchain["streamed"] == langchain["responses"] == langchain["whole"]

    def test_usage(self, langchain: Any) -> None:
        assert langchain["usage"]["output_tokens"] == TOKENS
        for count in ("input_tokens", "output_tokens", "total_tokens"):
            assert langchain["streamed_usage"][count] == langchain["usage"][count]

    def test_a_conversation_with_a_tool(self, langchain: Any) -> None:
        assert langchain["call"]["city"] in PLACES
        assert langchain["streamed_call"] == langchain["call"]
        assert langchain["after"]

    def test_structured_output(self, langchain: Any) -> None:
        assert langchain["structured"]["city"] in PLACES
        assert langchain["structured"]["celsius"] in (3, 21)

    def test_embeddings(self, langchain: Any) -> None:
        assert langchain["embeddings"] == [WIDTH, WIDTH]


@pytest.mark.timeout(900)
class TestLlamaIndex:
    """``OpenAILike`` and ``OpenAILikeEmbedding``."""

    def test_chat_streamed_or_not_says_the_same(self, llama_index: Any) -> None:
        assert llama_index["whole"]
        assert llama_index["streamed"] == llama_index["whole"]
        assert llama_index["completed"]

    def test_a_tool(self, llama_index: Any) -> None:
        assert llama_index["call"]["city"] in PLACES

    def test_structured_output(self, llama_index: Any) -> None:
        assert llama_index["structured"]["city"] in PLACES

    def test_embeddings(self, llama_index: Any) -> None:
        assert llama_index["embeddings"] == [WIDTH, WIDTH]
