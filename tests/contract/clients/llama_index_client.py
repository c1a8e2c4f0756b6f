"""What LlamaIndex's OpenAI-like client makes of a server, as JSON. Runs in an environment of its own."""

import json
import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Lima"]
    celsius: Literal[3, 21]


def weather(city: Literal["Oslo", "Lima"]) -> str:
    """Tell the weather of a city."""
    return f"It rains in {city}."


def main(base_url: str) -> None:
    access = {"api_base": base_url, "api_key": "unused", "max_retries": 0}
    chat = OpenAILike(
        model="chat",
        temperature=0,
        max_tokens=40,
        context_window=512,
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        **access,
    )
    question = [ChatMessage(role="user", content="How is the weather in Oslo?")]
    streamed = [chunk.delta or "" for chunk in chat.stream_chat(question)]
    tool = FunctionTool.from_defaults(weather)
    calls = chat.chat_with_tools([tool], chat_history=question, tool_required=True)
    [call] = chat.get_tool_calls_from_response(calls)
    structured = chat.as_structured_llm(Weather).chat(question)
    embeddings = OpenAILikeEmbedding(model_name="embedding", **access)
    json.dump(
        {
            "whole": chat.chat(question).message.content,
            "streamed": "".join(streamed),
            "completed": chat.complete("The sea is").text,
            "call": call.tool_kwargs,
            "structured": json.loads(structured.message.content),
            "embeddings": [
                len(v) for v in embeddings.get_text_embedding_batch(["A cat.", "A rug."])
            ],
        },
        sys.stdout,
    )


main(sys.argv[1])
