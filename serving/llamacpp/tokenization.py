"""From text to tokens and back, for clients: requests' prompts, and /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serving.llamacpp.runtime import Model
from serving.protocol.embeddings import DetokenizeRequest, TokenizeRequest
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest


class Tokenization:
    """A model's tokenizer as the API offers it. Safe to use from any thread."""

    def __init__(
        self, model: Model, render: Callable[[ChatCompletionRequest], str], context_length: int
    ) -> None:
        """``render`` makes a conversation's prompt; it raises :class:`ApiError` if it cannot."""
        self._model = model
        self._render = render
        self._context_length = context_length

    def tokens_of(self, prompt: str | list[int], param: str) -> list[int]:
        """A prompt's token ids; raises :class:`ApiError` (400) for ids the model does not know."""
        if isinstance(prompt, str):
            return self._model.tokenize(prompt, add_special=True, parse_special=False)
        for token in prompt:
            if not 0 <= token < self._model.vocab_size:
                raise ApiError(
                    400,
                    f"'{param}': token {token} is not in the vocabulary of "
                    f"{self._model.vocab_size} tokens.",
                    param=param,
                    code="invalid_value",
                )
        return prompt

    def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """The answer to ``/tokenize``: the tokens that a completion of the same prompt would read."""
        chat = request.chat
        tokens = self._model.tokenize(
            self._render(chat) if chat else request.prompt or "",
            add_special=request.add_special_tokens is not False,
            parse_special=chat is not None,
        )
        names = [self._model.token_text(token) for token in tokens]
        return {
            "count": len(tokens),
            "max_model_len": self._context_length,
            "tokens": tokens,
            "token_strs": names if request.return_token_strs else None,
        }

    def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """The answer to ``/detokenize``; raises :class:`ApiError` (400)."""
        return {"prompt": self._model.detokenize(self.tokens_of(request.tokens, "tokens"))}
