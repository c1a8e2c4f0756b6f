"""What the config changes about requests: parameters set, bounded and dropped, for each model.

Whatever of a request thereby does not count is named in the response's header ``x-rigserve-ignored``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from serving.config import AnyModel, ConfigError, FiltersConfig, Problem
from serving.gateway.dialects import dialect_of
from serving.protocol.embeddings import EmbeddingRequest, RerankRequest, TokenizeRequest
from serving.protocol.errors import (
    UNKNOWN_PARAMETER,
    UNSUPPORTED_PARAMETER,
    ApiError,
    Location,
    dotted,
)
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    ModelRequest,
    TextPart,
    validated,
)

Asked = TypeVar("Asked", bound=ModelRequest)

IGNORED_HEADER = "x-rigserve-ignored"

# The smallest request of each kind, to try parameters on.
_SMALLEST: Mapping[type[ModelRequest], Mapping[str, Any]] = {
    ChatCompletionRequest: {"model": "m", "messages": [{"role": "user", "content": "?"}]},
    CompletionRequest: {"model": "m", "prompt": "?"},
    EmbeddingRequest: {"model": "m", "input": "?"},
    RerankRequest: {"model": "m", "query": "?", "documents": ["?"]},
}
_LIMITS = ("max_tokens", "max_completion_tokens")
# These are about the tools of a request: where it has none, they do not apply.
_OF_TOOLS = {"parallel_tool_calls", "tool_choice"}
_ANY_TOOL = {"type": "function", "function": {"name": "f"}}
# What a request is, and in what form it is answered, is its client's to say.
_CLIENTS_OWN = {
    *(name for smallest in _SMALLEST.values() for name in smallest),
    *("stream", "stream_options"),
}
# Each field is dropped from all items of a list that are alike: more than a few are no oversight.
_MAX_DROPPED = 64
_SHOWN_CHARACTERS = 64
_ITEM = re.compile(r"\[\d+\]")


class Filters:
    """What is changed about requests to one model; without one, what holds for all."""

    def __init__(self, model: AnyModel | None, *, lenient: bool) -> None:
        """The filters of a model. Raises :class:`ParameterError` for those that can apply to nothing."""
        self._config = model.filters if model else FiltersConfig()
        self._model = model
        self._only_known = dialect_of(model) if model else None
        own = model.lenient if model else None
        self._lenient = lenient if own is None else own
        self._settings = _parameters(self._config)

    def read(
        self, fields: dict[str, Any], read: Callable[[dict[str, Any]], Asked]
    ) -> tuple[Asked, list[str]]:
        """What ``read`` makes of a request's fields, and the names of those that do not count.

        ``fields`` stays as it is. Raises what ``read`` does.
        """
        ignored = [name for name in self._config.stripped if name in fields]
        left = {name: value for name, value in fields.items() if name not in ignored}
        while True:
            try:
                return read(left), ignored
            except ApiError as error:
                if not self._may_be_dropped(error) or len(ignored) >= _MAX_DROPPED:
                    raise
                try:
                    left = _without(left, error.location)
                except LookupError:
                    # It is no field of the client's, but one of what its request was translated to.
                    raise error from None
                ignored.append(_ITEM.sub("[]", dotted(error.location)))

    def _may_be_dropped(self, error: ApiError) -> bool:
        return self._lenient and error.code in (UNKNOWN_PARAMETER, UNSUPPORTED_PARAMETER)

    def apply(self, asked: Asked) -> tuple[Asked, list[str]]:
        """The request as its engine should get it, and its parameters that do not count as they were.

        Raises :class:`ApiError` (400) if what the request says does not go with what is set here.
        """
        result = self._bounded(self._with_parameters(asked))
        ignored = [
            name
            for name in sorted(asked.model_fields_set)
            if getattr(asked, name) is not None and getattr(asked, name) != getattr(result, name)
        ]
        if self._only_known is not None:
            result, beyond = self._only_known(self._model, result, lenient=self._lenient)
            ignored += beyond
        return self._introduced(result), ignored

    def _with_parameters(self, asked: Asked) -> Asked:
        kinds = (settings for kind, settings in self._settings.items() if isinstance(asked, kind))
        defaults, forced = next(kinds, ({}, {}))
        if not getattr(asked, "tools", None):
            defaults, forced = _without_any(defaults, _OF_TOOLS), _without_any(forced, _OF_TOOLS)
        said = {
            name: value
            for name in asked.model_fields_set
            if (value := getattr(asked, name)) is not None
        }
        # What is stripped may have another name in the API that the request was translated from.
        stripped = said.keys() & set(self._config.stripped)
        if not (defaults or forced or stripped):
            return asked
        left = {name: value for name, value in said.items() if name not in stripped}
        return validated(type(asked), {**defaults, **left, **forced})

    def _bounded(self, asked: Asked) -> Asked:
        """The request with its limit of tokens, as the default and the ceiling have it."""
        request: ModelRequest = asked
        if not isinstance(request, ChatCompletionRequest | CompletionRequest):
            return asked
        default, ceiling = self._config.max_tokens_default, self._config.max_tokens_ceiling
        said = [name for name in _LIMITS if getattr(request, name, None) is not None]
        limit = request.token_limit if said or default is None else default
        if ceiling is not None:
            limit = ceiling if limit is None else min(limit, ceiling)
        if limit == request.token_limit:
            return asked
        return asked.model_copy(update=dict.fromkeys(said or _LIMITS[:1], limit))

    def _introduced(self, asked: Asked) -> Asked:
        """The request with the system prompt before its conversation, if it has one."""
        request: ModelRequest = asked
        prompt = self._config.system_prompt
        if prompt is None or not isinstance(request, ChatCompletionRequest | TokenizeRequest):
            return asked
        if request.messages is None:
            return asked
        return asked.model_copy(update={"messages": _introduced(prompt, request.messages)})


class ParameterError(Exception):
    """A parameter of a config's filters cannot be what it is; ``path`` is the key's."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def filters_of(models: Sequence[AnyModel], *, lenient: bool) -> dict[str, Filters]:
    """Each model's filters; raises :class:`ConfigError` with all that is wrong with them."""
    filters, problems = {}, []
    for position, model in enumerate(models):
        try:
            filters[model.name] = Filters(model, lenient=lenient)
        except ParameterError as error:
            path = f"models[{position}].filters.{error.path}"
            problems.append(Problem(Path("config"), None, path, str(error)))
    if problems:
        raise ConfigError(problems)
    return filters


def ignored_header(names: Iterable[str]) -> str:
    """The value of ``x-rigserve-ignored``: names as they are if they look like names, otherwise quoted."""
    return ", ".join(quote(name[:_SHOWN_CHARACTERS], safe="[].-_") for name in dict.fromkeys(names))


_Settings = tuple[dict[str, Any], dict[str, Any]]


def _parameters(config: FiltersConfig) -> dict[type[ModelRequest], _Settings]:
    """The defaults and forced parameters that each kind of request can take.

    Raises :class:`ParameterError` for one that none of them can.
    """
    _check_names(config)
    wanted = {**config.defaults, **config.forced}
    refusals: dict[str, str] = {}
    fitting = {kind: _that_fit(kind, wanted, refusals) for kind in _SMALLEST}
    for name in wanted:
        if not any(name in names for names in fitting.values()):
            key = "forced" if name in config.forced else "defaults"
            raise ParameterError(f"{key}.{name}", refusals[name])
    return {
        kind: (
            {name: value for name, value in config.defaults.items() if name in names},
            {name: value for name, value in config.forced.items() if name in names},
        )
        for kind, names in fitting.items()
    }


def _check_names(config: FiltersConfig) -> None:
    named = [("stripped", name) for name in config.stripped]
    set_here = [("defaults", name) for name in config.defaults]
    set_here += [("forced", name) for name in config.forced]
    for key, name in named + set_here:
        if name in _CLIENTS_OWN:
            raise ParameterError(f"{key}.{name}", "this is for clients to say")
    for key, name in set_here:
        if name in _LIMITS:
            raise ParameterError(
                f"{key}.{name}", "set filters.max_tokens_default or max_tokens_ceiling instead"
            )


def _that_fit(
    kind: type[ModelRequest], wanted: Mapping[str, Any], refusals: dict[str, str]
) -> set[str]:
    """The names of parameters that a kind of request takes; why it refuses others goes to ``refusals``."""
    # A name that is no field of any kind is tried on all, so that it is refused.
    names = {name for name in wanted if name in kind.model_fields or not _is_field(name)}
    while True:
        try:
            tools = {"tools": [_ANY_TOOL]} if names & _OF_TOOLS and "tools" not in names else {}
            kind.of({**_SMALLEST[kind], **tools, **{name: wanted[name] for name in names}})
        except ApiError as error:
            culprit = max(filter((error.param or "").startswith, names), key=len)
            refusals.setdefault(culprit, error.message)
            names.remove(culprit)
        else:
            return names


def _without_any(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _is_field(name: str) -> bool:
    return any(name in kind.model_fields for kind in _SMALLEST)


def _introduced(prompt: str, messages: Sequence[Message]) -> list[Message]:
    """The conversation with ``prompt`` before it: many chat templates take one system message at most."""
    first, rest = messages[0], messages[1:]
    if first.role not in ("system", "developer"):
        return [Message(role="system", content=prompt), *messages]
    if isinstance(first.content, list):
        content: Any = [TextPart(type="text", text=f"{prompt}\n\n"), *first.content]
    else:
        content = f"{prompt}\n\n{first.content}"
    return [first.model_copy(update={"content": content}), *rest]


def _without(value: Any, location: Location) -> Any:
    """A JSON value without the field or item at a location, nor its like in the other items of a list.

    Raises :class:`LookupError` if there is none.
    """
    part, below = location[0], location[1:]
    if isinstance(value, list) and isinstance(part, int):
        kind = _kind_of(value[part])
        if not below:
            return [each for each in value if _kind_of(each) != kind]
        return [
            _without(each, below)
            if number == part
            else _without_if_there(each, below)
            if _kind_of(each) == kind
            else each
            for number, each in enumerate(value)
        ]
    if not isinstance(value, dict) or part not in value:
        raise LookupError
    if below:
        return {**value, part: _without(value[part], below)}
    return {name: kept for name, kept in value.items() if name != part}


def _without_if_there(value: Any, location: Location) -> Any:
    try:
        return _without(value, location)
    except LookupError:
        return value


def _kind_of(item: Any) -> tuple[Any, Any]:
    """What tells the forms of a list's items apart."""
    return (item.get("type"), item.get("role")) if isinstance(item, dict) else (None, None)
