"""What LangChain's OpenAI client makes of a server, as JSON. Runs in an environment of its own."""

import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Lima"]
    celsius: Literal[3, 21]


@tool
def weather(city: Literal["Oslo", "Lima"]) -> str:
    """Tell the weather of a city."""
    return f"It rains in {city}."


def main(base_url: str) -> None:
    access = {"base_url": base_url, "api_key": "unused", "max_retries": 0}
    chat = ChatOpenAI(model="chat", temperature=0, max_tokens=12, stream_usage=True, **access)
    question = HumanMessage("How is the weather in Oslo?")
    whole = chat.invoke([question])
    chunks = list(chat.stream([question]))
    responses = ChatOpenAI(
        model="chat", temperature=0, max_tokens=12, use_responses_api=True, **access
    ).invoke([question])
    roomy = ChatOpenAI(model="chat", temperature=0, max_tokens=60, **access)
    caller = roomy.bind_tools([weather], tool_choice="weather", strict=True)
    call = caller.invoke([question])
    streamed_call = None
    for chunk in caller.stream([question]):
        streamed_call = chunk if streamed_call is None else streamed_call + chunk
    [made] = call.tool_calls
    result = ToolMessage(weather.invoke(made["args"]), tool_call_id=made["id"])
    after = chat.bind_tools([weather], tool_choice="none").invoke([question, call, result])
    structured = roomy.with_structured_output(Weather, method="json_schema").invoke([question])
    embeddings = OpenAIEmbeddings(model="embedding", check_embedding_ctx_length=False, **access)
    json.dump(
        {
            "whole": whole.content,
            "usage": whole.usage_metadata,
            "streamed": "".join(chunk.content for chunk in chunks),
            "streamed_usage": [c.usage_metadata for c in chunks if c.usage_metadata][-1],
            "responses": responses.text,
            "call": made["args"],
            "streamed_call": streamed_call.tool_calls[0]["args"],
            "after": after.content,
            "structured": structured.model_dump(),
            "embeddings": [len(v) for v in embeddings.embed_documents(["A cat.", "A rug."])],
        },
        sys.stdout,
    )


main(sys.argv[1])
