"""How many tokens a request can use at most, known before it goes to its engine."""

from __future__ import annotations

from serving.config import AnyModel, RemoteModel
from serving.protocol.embeddings import EmbeddingRequest, RerankRequest
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest, ModelRequest

# What chat templates add to a conversation, beside what engines mark beginnings and ends with.
_TEMPLATE_TOKENS = 256
_MARKER_TOKENS = 8
_BYTES_OF_A_TOKEN = 4
_TYPICAL_ANSWER_TOKENS = 256
_LONGEST_CONTEXT_TOKENS = 131_072
# In a string the quotes would be escaped.
_IMAGE = b'"image_url":'


def token_bound(model: AnyModel, asked: ModelRequest, sent: bytes) -> int:
    """An upper bound of the prompt's and the completions' tokens; ``sent`` is the body as the engine gets it.

    A token stands for a byte of text at least, so a prompt has no more tokens than its JSON has bytes; an
    image may have. And no prompt together with one completion is longer than the model's context.
    """
    prompt_tokens, completion_tokens = token_bounds(model, asked, sent)
    return min(_sequences(asked) * _context_of(model), prompt_tokens + completion_tokens)


def token_bounds(model: AnyModel, asked: ModelRequest, sent: bytes) -> tuple[int, int]:
    """Upper bounds of the prompt's tokens, and of the completions'."""
    context = _context_of(model)
    if isinstance(asked, ChatCompletionRequest | CompletionRequest):
        prompts = len(asked.prompts) if isinstance(asked, CompletionRequest) else 1
        around = _MARKER_TOKENS if isinstance(asked, CompletionRequest) else _TEMPLATE_TOKENS
        # How much a remote takes at most is known less well than how long the prompt is.
        most = context if asked.token_limit is None else asked.token_limit
        longest = most if isinstance(model, RemoteModel) else min(most, context)
        prompt_tokens = context if _IMAGE in sent else len(sent) + prompts * around
        return prompt_tokens, _sequences(asked) * longest
    if isinstance(asked, EmbeddingRequest):
        return len(sent) + len(asked.inputs) * _MARKER_TOKENS, 0
    assert isinstance(asked, RerankRequest)
    # The query is read again with each document.
    each = len(asked.query.encode()) + _MARKER_TOKENS
    return len(sent) + len(asked.documents) * each, 0


def _context_of(model: AnyModel) -> int:
    """The longest prompt and completion. Where an engine decides that by itself, more than it will."""
    length = model.context_length
    return length if isinstance(length, int) else _LONGEST_CONTEXT_TOKENS


def expected_tokens(asked: ModelRequest, sent: bytes) -> int:
    """About how many tokens a request will take, to compare loads by: mostly four bytes make one."""
    tokens = len(sent) // _BYTES_OF_A_TOKEN
    if isinstance(asked, ChatCompletionRequest | CompletionRequest):
        limit = asked.token_limit
        tokens += _sequences(asked) * (_TYPICAL_ANSWER_TOKENS if limit is None else limit)
    return tokens


def _sequences(asked: ModelRequest) -> int:
    """How many texts the model reads and continues."""
    if isinstance(asked, CompletionRequest):
        return len(asked.prompts) * (asked.n or 1)
    if isinstance(asked, EmbeddingRequest):
        return len(asked.inputs)
    if isinstance(asked, RerankRequest):
        return len(asked.documents)
    return (asked.n or 1) if isinstance(asked, ChatCompletionRequest) else 1
