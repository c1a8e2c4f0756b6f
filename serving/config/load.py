"""Loads a configuration file, or says everything that is wrong with it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from serving.config.document import (
    ConfigError,
    Document,
    KeyPath,
    Problem,
    dotted,
    read_document,
)
from serving.config.schema import Config

__all__ = ["ConfigError", "Problem", "config_json_schema", "load_config"]

_REMOTE_SCHEMES = ("package://", "hf://")

# What pydantic's kinds of errors ask for, in the reader's words.
_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "keys and values",
    "dict_type": "keys and values",
    "model_attributes_type": "keys and values",
    "finite_number": "a finite number",
}


def config_json_schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors."""
    return Config.model_json_schema()


def load_config(file: Path) -> Config:
    """Load and check a file; raises :class:`ConfigError` with all its problems.

    Relative model paths are taken from the file's folder; ``~`` stands for the home folder.
    """
    document = read_document(file)
    if document.problems:
        raise ConfigError(document.problems)
    _place_files(document)
    try:
        config = Config.model_validate(document.values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            inside = any(
                other["loc"][: len(detail["loc"])] == detail["loc"]
                for other in details
                if other is not detail
            )
            # A list whose entries are wrong is not also too short.
            if not (detail["type"] == "too_short" and inside):
                _report(document, detail)
        raise ConfigError(document.problems) from error
    _check_names(document, config)
    _check_ports(document, config)
    if document.problems:
        raise ConfigError(document.problems)
    return config


def _place_files(document: Document) -> None:
    """Make paths absolute; a model file that is not there is a problem of the config."""
    storage = document.values.get("storage")
    if isinstance(storage, dict):
        for key, value in storage.items():
            if isinstance(value, str):
                storage[key] = str(Path(value).expanduser())
    models = document.values.get("models")
    for position, model in enumerate(models if isinstance(models, list) else []):
        source = model.get("source") if isinstance(model, dict) else None
        if not isinstance(source, str) or source.startswith(_REMOTE_SCHEMES):
            continue
        if "://" in source:
            known = " or ".join(_REMOTE_SCHEMES)
            document.report(
                ("models", position, "source"), f"expected a path, {known}; got {source!r}"
            )
            continue
        path = document.file.parent / Path(source).expanduser()
        model["source"] = str(path)
        if not path.is_file():
            document.report(("models", position, "source"), f"there is no file {path}")


def _check_names(document: Document, config: Config) -> None:
    first_use: dict[str, KeyPath] = {}
    for position, model in enumerate(config.models):
        paths: list[tuple[str, KeyPath]] = [(model.name, ("models", position, "name"))]
        paths += [
            (alias, ("models", position, "aliases", number))
            for number, alias in enumerate(model.aliases)
        ]
        for name, path in paths:
            if name in first_use:
                other = first_use[name]
                document.report(
                    path,
                    f"the name {name!r} is taken by {dotted(other)} on line {document.lines[other]}; "
                    "names and aliases must differ",
                )
            first_use.setdefault(name, path)


def _check_ports(document: Document, config: Config) -> None:
    taken: dict[int, str] = {config.server.port: "server.port"} if config.server.port else {}
    for position, model in enumerate(config.models):
        if model.port is None:
            continue
        path: KeyPath = ("models", position, "port")
        if model.port in taken:
            document.report(
                path,
                f"port {model.port} is taken by {taken[model.port]}; "
                "choose another, or leave it out for a free one",
            )
        taken.setdefault(model.port, dotted(path))


def _report(document: Document, detail: Any) -> None:
    """One of pydantic's errors, in words for the file's author."""
    path: KeyPath = detail["loc"]
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys_at(path[:-1])
        document.report(
            path, f"unknown key{_nearest(str(path[-1]), known)}; known: {', '.join(known)}"
        )
    elif kind == "missing":
        document.report(path, "this key is required")
    elif kind == "literal_error":
        choices = [
            choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")
        ]
        document.report(
            path,
            f"expected one of {', '.join(choices)}; got {value!r}{_nearest(str(value), choices)}",
        )
    elif kind in _EXPECTED:
        document.report(path, f"expected {_EXPECTED[kind]}; got {value!r}")
    elif kind == "too_short":
        document.report(path, f"expected at least {context['min_length']} entry")
    elif kind == "value_error":
        document.report(path, str(context["error"]))
    elif kind == "string_pattern_mismatch":
        document.report(
            path,
            f"expected letters, digits and any of . _ : / @ -, beginning with one of the first two; got {value!r}",
        )
    else:
        # Bounds and lengths: pydantic says them well, but for its opening words.
        wording = (
            detail["msg"]
            .replace("Input should be", "expected a value")
            .replace("Tuple", "the list")
        )
        document.report(path, f"{wording}; got {value!r}")


def _keys_at(path: KeyPath) -> list[str]:
    """The keys that the schema knows in the mapping at a path."""
    model: type[BaseModel] = Config
    for part in path:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation
        while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            annotation = get_args(annotation)[0]
        model = annotation
    return list(model.model_fields)


def _nearest(word: str, known: list[str]) -> str:
    """A suggestion to append to a message, if a known word is near."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""
