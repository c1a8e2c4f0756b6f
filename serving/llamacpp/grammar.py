"""Constrained generation: which tokens may come next, found while the model computes the last one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import is_lark_syntax
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from serving.chat.json_schema import (
    Unsupported,
    blame,
    check_pattern,
    make_enforceable,
    with_options,
)
from serving.llamacpp.gbnf import to_lark
from serving.llamacpp.runtime import Model
from serving.llamacpp.runtime.vocabulary import grammar_tokenizer
from serving.protocol.errors import ApiError, dotted
from serving.protocol.structured import ConstraintSpec

_CACHED_GRAMMARS = 64
_LONGEST_REASON = 300
_INTERNALS = re.compile(r"<(?:state|non-verbose|backtrace)")

# For each byte of a mask, what to add to the logits of its eight tokens. Adding is quicker than
# choosing: a mask of many odd bits is poison to branch prediction.
_ALLOWED = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BIAS_OF_BYTE = np.where(_ALLOWED, np.float32(0), np.float32(-np.inf))

# Errors without the parser's state, which only its makers can read.
_LIMITS = LLParserLimits(verbose_errors=False)

# This thread hands masks to the executor's, which work without Python's lock.
_background = ThreadPoolExecutor(1, thread_name_prefix="grammar")
_executor = LLExecutor()


class Matcher:
    """A sequence's way through a grammar. ``stopped``: nothing but the end may follow.

    ``fault``, if there is one, says why the grammar cannot go on.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.stopped = False
        self.fault: str | None = None
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask: Future[None] | None = None
        self._bias: NDArray[np.float32]

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Forbid, in place, what may not come next; waits for the mask if it is not ready."""
        prepare([self])
        assert self._mask is not None
        self._mask.result()
        np.add(logits, self._bias, out=logits)

    def accept(self, token: int) -> None:
        """Go on to what follows ``token``."""
        self._mask = None
        if not self._matcher.consume_token(token):
            self.fault = _message(self._matcher)
        self.stopped = self._matcher.is_stopped()


def prepare(matchers: Sequence[Matcher]) -> None:
    """Begin to compute the masks of those that have none yet, on other threads."""
    waiting = [matcher for matcher in matchers if matcher._mask is None]
    if waiting:
        mask = _background.submit(_compute, waiting)
        for matcher in waiting:
            matcher._mask = mask


def _compute(matchers: list[Matcher]) -> None:
    vocab_size = matchers[0]._vocab_size
    bits = allocate_token_bitmask(len(matchers), vocab_size)
    rows = [(matcher._matcher, row) for row, matcher in enumerate(matchers)]
    fill_next_token_bitmask_par(_executor, rows, bits)
    for matcher, row in zip(matchers, bits.view(np.uint8), strict=True):
        matcher._bias = _BIAS_OF_BYTE.take(row, axis=0).reshape(-1)[:vocab_size]
        if matcher._matcher.is_error():
            matcher.fault = _message(matcher._matcher)


class Grammar:
    """A compiled constraint, for any number of sequences."""

    def __init__(self, start: LLMatcher, vocab_size: int) -> None:
        self._start = start
        self._vocab_size = vocab_size

    def matcher(self) -> Matcher:
        """A way through it, from the start."""
        return Matcher(self._start.deep_copy(), self._vocab_size)


class GrammarCompiler:
    """Compiles constraints for a model's vocabulary, and keeps those used last. Thread-safe."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)

    def compile(self, spec: ConstraintSpec) -> Grammar:
        """Takes a second the first time, which reads the vocabulary.

        Raises :class:`ApiError` (400) that names the request's field and what in it cannot be had.
        """
        return self._compiled(spec)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return grammar_tokenizer(self._model)

    def _compile(self, spec: ConstraintSpec) -> Grammar:
        if spec.kind == "json_schema":
            schema = json.loads(spec.source)
            start = self._compile_schema(schema, spec.param)
            text = _schema_text(schema)
        else:
            text = _grammar_text(spec)
            start = self._start(text)
        if spec.within and not start.is_error():
            start = self._start(_surrounded(text, spec.within))
        if start.is_error():
            raise refusal(spec.param, f"cannot be enforced: {_message(start)}")
        return Grammar(start, self._model.vocab_size)

    def _compile_schema(self, schema: dict[str, Any], param: str) -> LLMatcher:
        try:
            make_enforceable(schema)
            start = self._start(_schema_text(schema))
            if start.is_error():
                path, keyword = blame(
                    schema, lambda part: self._start(_schema_text(part)).is_error()
                )
                raise Unsupported(path, keyword, f"cannot be enforced: {_message(start)}")
        except Unsupported as error:
            place = f"at {dotted(error.path)[-_LONGEST_REASON:]}" if error.path else "at its root"
            reason = f"the schema's {error.keyword!r} {place} {error.reason}"
            raise refusal(param, reason) from error
        return start

    def _start(self, text: str) -> LLMatcher:
        """A matcher at the start of a grammar, its first mask computed; it may be in error."""
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_LIMITS)
        matcher.compute_bitmask()
        return matcher


def _schema_text(schema: dict[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": with_options(schema)}]})


def _grammar_text(spec: ConstraintSpec) -> str:
    """A constraint that is not a schema, in llguidance's own language."""
    source = spec.source
    if spec.kind == "json_object":
        return _schema_text({"type": "object"})
    if spec.kind == "choice":
        choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
        return f"start: CHOICE\nCHOICE: {' | '.join(choices)}"
    if spec.kind == "regex":
        reason = check_pattern(source)
        if reason is not None:
            raise refusal(spec.param, reason)
        # All of the text must match anyway; \d and \w are ASCII, as in JSON Schema.
        return LLMatcher.grammar_from_regex(regex_to_lark(_without_anchors(source), "dw"))
    if source.lstrip().startswith("{"):
        raise refusal(spec.param, "is not a grammar in Lark or GBNF")
    if "::=" not in source or is_lark_syntax(source):
        return source
    try:
        return to_lark(source)
    except Exception as error:  # it has no exception of its own for all that may be wrong
        raise refusal(spec.param, f"is not a grammar in Lark or GBNF: {error}") from error


def _surrounded(text: str, within: str) -> str:
    """The grammar ``within``, which calls the one in ``text`` ``@form``."""
    form = json.loads(text)["grammars"][0] if text.startswith("{") else {"lark_grammar": text}
    return json.dumps({"grammars": [{"lark_grammar": within}, {**form, "name": "form"}]})


def _without_anchors(pattern: str) -> str:
    end = pattern.removesuffix("$")
    escapes = len(end) - len(end.rstrip("\\"))
    return (end if escapes % 2 == 0 else pattern).removeprefix("^")


def refusal(param: str, reason: str) -> ApiError:
    """The answer to a request whose field ``param`` asks for a form that cannot be had."""
    return ApiError(400, f"'{param}': {reason}.", param=param, code="unsupported_value")


def _message(matcher: LLMatcher) -> str:
    """Why a matcher is in error, without the parser's state and the backtraces that may follow."""
    reason = _INTERNALS.split(matcher.get_error())[0].replace(
        "NoExtensionBias", "no text has this form"
    )
    return " ".join(reason.split())[:_LONGEST_REASON].rstrip(".")
