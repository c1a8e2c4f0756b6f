"""How many tokens a request can use at most, known before it goes to its engine."""

from __future__ import annotations

from serving.config import ModelConfig
from serving.protocol.embeddings import EmbeddingRequest, RerankRequest
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest, ModelRequest

# What chat templates add to a conversation, beside what engines mark beginnings and ends with.
_TEMPLATE_TOKENS = 256
_MARKER_TOKENS = 8
# In a string the quotes would be escaped.
_IMAGE = b'"image_url":'


def token_bound(model: ModelConfig, asked: ModelRequest, sent: bytes) -> int:
    """An upper bound of the prompt's and the completions' tokens; ``sent`` is the body as the engine gets it.

    A token stands for a byte of text at least, so a prompt has no more tokens than its JSON has bytes; an
    image may have. And no prompt together with one completion is longer than the model's context.
    """
    context = model.context_length
    if isinstance(asked, ChatCompletionRequest | CompletionRequest):
        prompts = len(asked.prompts) if isinstance(asked, CompletionRequest) else 1
        around = _MARKER_TOKENS if isinstance(asked, CompletionRequest) else _TEMPLATE_TOKENS
        completions = prompts * (asked.n or 1)
        longest = context if asked.token_limit is None else min(asked.token_limit, context)
        prompt_tokens = context if _IMAGE in sent else len(sent) + prompts * around
        return min(completions * context, prompt_tokens + completions * longest)
    if isinstance(asked, EmbeddingRequest):
        inputs = len(asked.inputs)
        return min(inputs * context, len(sent) + inputs * _MARKER_TOKENS)
    assert isinstance(asked, RerankRequest)
    documents = len(asked.documents)
    # The query is read again with each document.
    each = len(asked.query.encode()) + _MARKER_TOKENS
    return min(documents * context, len(sent) + documents * each)
