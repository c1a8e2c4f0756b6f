"""Loads a configuration file, or says everything that is wrong with it."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serving.config.document import (
    ConfigError,
    Document,
    KeyPath,
    Problem,
    dotted,
    read_document,
)
from serving.config.schema import (
    KINDS_OF_MODELS,
    Config,
    ServerConfig,
    StorageConfig,
    kind_of_model,
)

__all__ = ["ConfigError", "Problem", "config_json_schema", "load_config", "located"]

_HUB = "hf://"
_REMOTE_SCHEMES = ("package://", _HUB)
# Keys of a model, all of the same forms.
_SOURCES = ("source", "projector", "draft_model")

# What pydantic's kinds of errors ask for, in the reader's words.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_short": "a list with at least {min_length} entry",
    "string_too_short": "at least {min_length} character",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "letters, digits and any of . _ : / @ -, beginning with one of the first two",
}
LLAMA_SERVER = "llama-server"
PEFT_CONFIG = "adapter_config.json"
_SHOWN_CHARACTERS = 60


def config_json_schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors."""
    return Config.model_json_schema()


def load_config(file: Path) -> Config:
    """Load and check a file; raises :class:`ConfigError` with all its problems, in the order of their lines.

    Relative paths are taken from the file's folder; ``~`` stands for the home folder.
    """
    document = read_document(file)
    _place_files(document)
    _check_names(document)
    _check_routes(document)
    _check_keys_of_remotes(document)
    _check_ports(document)
    config = _validate(document)
    if config is None or document.problems:
        raise ConfigError(sorted(document.problems, key=lambda problem: problem.line or 0))
    return config


@contextmanager
def located(file: Path) -> Iterator[None]:
    """Problems with what was loaded from ``file`` that show only later get their lines in it."""
    try:
        yield
    except ConfigError as error:
        lines = {dotted(path): line for path, line in read_document(file).lines.items()}
        raise ConfigError([_located(problem, file, lines) for problem in error.problems]) from error


def _located(problem: Problem, file: Path, lines: Mapping[str, int]) -> Problem:
    if problem.line is not None:
        return problem
    key = problem.path
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return replace(problem, file=file, line=lines.get(key))


def _validate(document: Document) -> Config | None:
    """The typed configuration; None if there are problems, which are then in the document."""
    try:
        return Config.model_validate(document.values)
    except ValidationError as error:
        # What is said of a value already, such as an unset variable, is why it does not fit.
        known = {problem.path for problem in document.problems}
        for detail in error.errors(include_url=False):
            # Tags of unions are no keys of the file.
            path = tuple(part for part in detail["loc"] if not str(part).startswith("<"))
            # Pydantic counts only good items: a list whose items are bad is not empty for that.
            is_empty_of_good = detail["type"] == "too_short" and detail["input"]
            if dotted(path) not in known and not is_empty_of_good:
                document.report(path, _message(detail, path, document))
    return None


def _place_files(document: Document) -> None:
    """Make paths absolute; a model file that is not there is a problem of the config."""
    storage = document.values.setdefault("storage", {})
    if isinstance(storage, dict):
        for key, field in StorageConfig.model_fields.items():
            folder = storage.setdefault(key, field.default)
            if isinstance(folder, str):
                storage[key] = str(_absolute(document, ("storage", key), folder))
    server = document.values.get("server")
    for key in ("tls_certificate", "tls_key"):
        if isinstance(server, dict) and isinstance(server.get(key), str):
            _place(document, ("server",), server, key)
    for position, model in _models(document):
        if model.get("engine") == "llama_server":
            _place_binary(document, position, model)
        if isinstance(model.get("api_key_file"), str):
            _place(document, ("models", position), model, "api_key_file")
        for number, adapter in _entries(model.get("adapters")):
            if isinstance(adapter.get("path"), str):
                _place_adapter(document, ("models", position, "adapters", number), adapter)
        if model.get("engine") == "vllm":
            _place_vllm(document, position, model)
            continue
        for key in _SOURCES:
            _place_source(document, ("models", position), model, key)


def _place_source(document: Document, parent: KeyPath, model: dict[str, Any], key: str) -> None:
    """Make a path absolute where a source is one; what it says else stays."""
    source = model.get(key)
    if not isinstance(source, str) or source.startswith(_REMOTE_SCHEMES):
        return
    if "://" in source:
        expected = " or ".join(_REMOTE_SCHEMES)
        document.report((*parent, key), f"expected a path, {expected}; got {source!r}")
        return
    _place(document, parent, model, key)


def _place(document: Document, parent: KeyPath, values: dict[str, Any], key: str) -> None:
    """Make one path absolute; its file must be there."""
    file = _absolute(document, (*parent, key), values[key])
    values[key] = str(file)
    if not file.is_file():
        document.report((*parent, key), f"there is no file {file}")


def _place_adapter(document: Document, parent: KeyPath, adapter: dict[str, Any]) -> None:
    """Make an adapter's path absolute; a file must be there, or a folder of PEFT's."""
    folder = _absolute(document, (*parent, "path"), adapter["path"])
    if not folder.is_dir():
        _place(document, parent, adapter, "path")
        return
    adapter["path"] = str(folder)
    if not (folder / PEFT_CONFIG).is_file():
        document.report(
            (*parent, "path"),
            f"the folder {folder} has no {PEFT_CONFIG}; name one that PEFT has saved, or a GGUF file",
        )


def _place_vllm(document: Document, position: int, model: dict[str, Any]) -> None:
    """A model of vLLM's is a folder that is there, a GGUF file, or a repository; so are the files beside it."""
    parent: KeyPath = ("models", position)
    source = model.get("source")
    if isinstance(source, str) and not source.startswith(_REMOTE_SCHEMES) and "://" not in source:
        folder = _absolute(document, (*parent, "source"), source)
        if folder.is_dir():
            model["source"] = str(folder)
            if not (folder / "config.json").is_file():
                document.report(
                    (*parent, "source"),
                    f"the folder {folder} has no config.json; name one in Hugging Face's format",
                )
        else:
            _place_source(document, parent, model, "source")
    else:
        _place_source(document, parent, model, "source")
    for key in ("environment", "chat_template"):
        if isinstance(model.get(key), str):
            _place(document, parent, model, key)
    speculation = model.get("speculation")
    if isinstance(speculation, dict) and isinstance(speculation.get("model"), str):
        _place_draft(document, (*parent, "speculation"), speculation)


def _place_draft(document: Document, parent: KeyPath, speculation: dict[str, Any]) -> None:
    """What vLLM guesses with is a folder that is there, or a repository; another name it would look for on the Hub."""
    if speculation["model"].startswith(_HUB):
        return
    folder = _absolute(document, (*parent, "model"), speculation["model"])
    speculation["model"] = str(folder)
    if not folder.is_dir():
        document.report(
            (*parent, "model"), f"there is no folder {folder}; name one, or {_HUB}ORG/REPO"
        )


def _place_binary(document: Document, position: int, model: dict[str, Any]) -> None:
    """llama-server is where the config says, or on PATH, and can be run."""
    parent: KeyPath = ("models", position)
    named = model.get("binary")
    if isinstance(named, str):
        _place(document, parent, model, "binary")
        if Path(model["binary"]).is_file() and not os.access(model["binary"], os.X_OK):
            document.report(
                (*parent, "binary"), f"{model['binary']} cannot be run; allow it with chmod +x"
            )
    elif named is None and shutil.which(LLAMA_SERVER) is None:
        document.report(
            (*parent, "binary"),
            f"there is no {LLAMA_SERVER} on PATH ({os.environ.get('PATH', '')}); install llama.cpp "
            "(docs/engines.md), or name the program's file here",
        )


def _absolute(document: Document, path: KeyPath, text: str) -> Path:
    try:
        expanded = Path(text).expanduser()
    except RuntimeError:
        document.report(path, f"there is no home folder for {text!r}; write the path out")
        expanded = Path(text)
    return (document.file.parent / expanded).absolute()


def _models(document: Document) -> list[tuple[int, dict[str, Any]]]:
    """The models that are mappings, with their positions, whatever else is wrong with them."""
    return _entries(document.values.get("models"))


def _entries(values: Any) -> list[tuple[int, dict[str, Any]]]:
    """The mappings of a list, with their positions in it."""
    entries = enumerate(values if isinstance(values, list) else [])
    return [(position, entry) for position, entry in entries if isinstance(entry, dict)]


def _check_names(document: Document) -> None:
    """No two things have one name."""
    first_use: dict[str, KeyPath] = {}
    for name, path in _names(document):
        if name in first_use:
            other = first_use[name]
            document.report(
                path,
                f"the name {name!r} is taken by {dotted(other)} on line {document.lines[other]}; "
                "names, aliases, adapters and routes must differ",
            )
        first_use.setdefault(name, path)


def _names(document: Document) -> Iterator[tuple[str, KeyPath]]:
    """All names that clients may ask for, and where they stand."""
    for position, model in _models(document):
        names: list[tuple[Any, KeyPath]] = [(model.get("name"), ("models", position, "name"))]
        aliases = model.get("aliases")
        names += [
            (alias, ("models", position, "aliases", number))
            for number, alias in enumerate(aliases if isinstance(aliases, list) else [])
        ]
        names += [
            (adapter.get("name"), ("models", position, "adapters", number, "name"))
            for number, adapter in _entries(model.get("adapters"))
        ]
        yield from ((name, path) for name, path in names if isinstance(name, str))
    for position, route in _entries(document.values.get("routes")):
        if isinstance(route.get("name"), str):
            yield route["name"], ("routes", position, "name")


def _check_routes(document: Document) -> None:
    """Routes lead to models that are there, never to routes, and to each of them once."""
    routes = _entries(document.values.get("routes"))
    names_of_routes = [route.get("name") for _, route in routes]
    models: dict[str, dict[str, Any]] = {}
    for name, path in _names(document):
        if path[0] == "models" and isinstance(path[1], int):
            models[name] = document.values["models"][path[1]]
    for position, route in routes:
        seen: set[str] = set()
        for name, path in _targets(position, route):
            if name in models:
                if name in seen:
                    document.report(path, f"{name!r} is in this route already; keep one of them")
                seen.add(name)
                if path[2] == "spill_over" and (missing := _missing_for_spill_over(models[name])):
                    document.report(path, f"{name!r} cannot be spilled over to: {missing}")
            elif name in names_of_routes:
                what = "this route itself" if name == route.get("name") else "a route"
                document.report(
                    path,
                    f"{name!r} is {what}; routes lead to models only, so that none leads in a circle",
                )
            else:
                document.report(path, f"there is no model {name!r}{_nearest(name, list(models))}")


def _targets(position: int, route: dict[str, Any]) -> Iterator[tuple[str, KeyPath]]:
    """The names that a route leads to, and where they stand."""
    for number, target in _entries(route.get("targets")):
        if isinstance(target.get("model"), str):
            yield target["model"], ("routes", position, "targets", number, "model")
    for key in ("fallback", "spill_over"):
        names = route.get(key)
        for number, name in enumerate(names if isinstance(names, list) else []):
            if isinstance(name, str):
                yield name, ("routes", position, key, number)


def _missing_for_spill_over(model: dict[str, Any]) -> str:
    """What a model lacks of what a commercial API must have; empty if nothing."""
    if model.get("engine") != "remote":
        return "it is not a remote model (engine: remote)"
    needs = {
        "a key (api_key_env or api_key_file)": ("api_key_env", "api_key_file"),
        "a price (price_of or usd_per_million)": ("price_of", "usd_per_million"),
        "budget_usd": ("budget_usd",),
    }
    lacking = [need for need, keys in needs.items() if all(model.get(key) is None for key in keys)]
    return f"it needs {', '.join(lacking)}" if lacking else ""


def _check_keys_of_remotes(document: Document) -> None:
    """The API keys for other servers are where they are said to be. They are read when they are used."""
    for position, model in _models(document):
        variable = model.get("api_key_env")
        if isinstance(variable, str) and not os.environ.get(variable, "").strip():
            document.report(
                ("models", position, "api_key_env"),
                f"the environment variable {variable} is not set; it is to hold the API key",
            )


def _check_ports(document: Document) -> None:
    server = document.values.get("server")
    default = ServerConfig.model_fields["port"].default
    port = server.get("port", default) if isinstance(server, dict) else default
    taken: dict[int, str] = {port: "server.port"} if type(port) is int else {}
    for position, model in _models(document):
        port, path = model.get("port"), ("models", position, "port")
        if type(port) is not int or port == 0:  # a bool is an int, too
            continue
        if port in taken:
            document.report(
                path,
                f"port {port} is taken by {taken[port]}; "
                "choose another, or leave it out for a free one",
            )
        taken.setdefault(port, dotted(path))


def _message(detail: ErrorDetails, path: KeyPath, document: Document) -> str:
    """One of pydantic's errors, in words for the file's author."""
    kind, value = detail["type"], detail["input"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys_at(path[:-1], document)
        return f"unknown key{_nearest(str(path[-1]), known)}; known: {', '.join(known)}"
    if kind == "missing":
        return "this key is required"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        choices = [
            choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")
        ]
        if path[-1] == "engine":
            choices = list(KINDS_OF_MODELS)
        return f"expected one of {', '.join(choices)}; got {_shown(value)}{_nearest(str(value), choices)}"
    if kind not in _EXPECTED:
        return f"{detail['msg']}; got {_shown(value)}"
    expected = _EXPECTED[kind].format(**context)
    return f"expected {expected}; got {_shown(value)}{_quoting(kind, value)}"


def _shown(value: Any) -> str:
    """A value as the author wrote it, or what it is if that is long."""
    if isinstance(value, list | dict):
        return "keys and values" if isinstance(value, dict) else f"a list of {len(value)}"
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _quoting(kind: str, value: Any) -> str:
    """A mend to append to a message, where only the quotes are wrong."""
    if kind == "string_type" and not isinstance(value, list | dict | None):
        return "; put it in quotes"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        try:
            plain = yaml.safe_load(value)
        except yaml.YAMLError:
            return ""
        wanted = bool if kind == "bool_type" else int if kind == "int_type" else (int, float)
        return "; leave out the quotes" if isinstance(plain, wanted) else ""
    return ""


def _keys_at(path: KeyPath, document: Document) -> list[str]:
    """The keys that the schema knows in the mapping at a path."""
    schema: type[BaseModel] = Config
    values: Any = document.values
    for part in path:
        values = values[part]
        if isinstance(part, int):
            if schema in KINDS_OF_MODELS.values():
                schema = KINDS_OF_MODELS[kind_of_model(values)]
            continue
        annotation: Any = schema.model_fields[part].annotation
        while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            annotation = get_args(annotation)[0]
        schema = annotation
    return list(schema.model_fields)


def _nearest(word: str, known: list[str]) -> str:
    """A suggestion to append to a message, if a known word is near."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""
