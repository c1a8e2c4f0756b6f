"""YAML with line numbers: a file as plain values, and where in the file each of them stands."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

# $${ is a literal ${; ${NAME} and ${NAME:-default} are variables; any other ${ is a mistake.
_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{[^}]*\}?")

_KINDS = {yaml.SequenceNode: "list", yaml.ScalarNode: "single value"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a file: where, and what to do."""

    file: Path
    line: int | None
    path: str
    message: str

    def __str__(self) -> str:
        where = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (where, self.path, self.message) if part)


class ConfigError(Exception):
    """A configuration that cannot be used; its text lists every problem, one a line."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


@dataclass(slots=True)
class Document:
    """A parsed file. ``lines`` holds the line of each key path; the root is ``()``."""

    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def report(self, path: KeyPath, message: str) -> None:
        """Note a problem at a key path; a missing key is placed at the mapping it is missing from."""
        known = path
        while known not in self.lines and known:
            known = known[:-1]
        self.problems.append(Problem(self.file, self.lines.get(known), dotted(path), message))


def dotted(path: KeyPath) -> str:
    """``("models", 0, "name")`` as ``models[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_document(file: Path, environment: Mapping[str, str] = os.environ) -> Document:
    """Parse a file and put environment variables in place; raises :class:`ConfigError` if it is no mapping."""
    document = Document(file)
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError([Problem(file, None, "", f"cannot read it: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            [Problem(file, None, "", f"it is not UTF-8 text (byte {error.start})")]
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        reason = f"it is not valid YAML: {error.problem or error.context}"
        raise ConfigError([Problem(file, line, "", reason)]) from error
    except yaml.reader.ReaderError as error:
        reason = f"it is not text: it holds the control character {error.character:#x}"
        raise ConfigError([Problem(file, None, "", reason)]) from error
    if not isinstance(root, yaml.MappingNode):
        found = "it is empty" if root is None else f"found a {_KINDS[type(root)]}"
        raise ConfigError(
            [Problem(file, None, "", f"expected keys such as 'models:' at the top level; {found}")]
        )
    _Reader(document, environment).mapping(root, ())
    return document


class _Reader:
    """Walks the parse tree; what it finds goes into the document."""

    def __init__(self, document: Document, environment: Mapping[str, str]) -> None:
        self._document = document
        self._environment = environment
        self._constructor = yaml.constructor.SafeConstructor()
        self._resolver = yaml.resolver.Resolver()
        self._open: list[yaml.Node] = []

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> None:
        values = self._mapping(node, path)
        self._document.values.update(values)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._document.report(path, "a key must be a single word")
                continue
            key = str(key_node.value)
            below = (*path, key)
            if key in values:
                first = self._document.lines[below]
                self._document.lines[below] = key_node.start_mark.line + 1
                self._document.report(below, f"this key stands here twice, first on line {first}")
                self._document.lines[below] = first  # the value that counts below
                continue
            self._document.lines[below] = key_node.start_mark.line + 1
            values[key] = self._value(value_node, below)
        return values

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        if node in self._open:
            self._document.report(path, "this alias (*) stands inside its own anchor (&)")
            return None
        self._open.append(node)
        try:
            return self._content(node, path)
        finally:
            self._open.pop()

    def _content(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for position, item in enumerate(node.value):
                below = (*path, position)
                self._document.lines[below] = item.start_mark.line + 1
                items.append(self._value(item, below))
            return items
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = _VARIABLE.sub(lambda match: self._variable(match, path), node.value)
        tag = node.tag
        if text != node.value and not node.style:  # a plain scalar: 8000 from ${PORT} is a number
            tag = self._resolver.resolve(yaml.ScalarNode, text, (True, False))
        try:
            return self._constructor.construct_object(yaml.ScalarNode(tag, text))
        except yaml.constructor.ConstructorError:
            self._document.report(
                path, f"the YAML tag {node.tag} has no meaning here; leave it out"
            )
        except ValueError as error:
            self._document.report(path, f"cannot read the value {text!r}: {error}")
        return text

    def _variable(self, match: re.Match[str], path: KeyPath) -> str:
        name, default = match.group(1), match.group(2)
        if match.group() == "$${":
            return "${"
        if name is None:
            self._document.report(
                path,
                f"{match.group()!r} is no variable; write ${{NAME}} or ${{NAME:-default}}, "
                "or $${ for the characters themselves",
            )
            return ""
        value = self._environment.get(name)
        if default is not None:
            value = value or default  # as in a shell, :- stands in for an empty value, too
        if value is None:
            self._document.report(
                path,
                f"the environment variable {name} is not set; "
                f"set it, or give a default as in ${{{name}:-value}}",
            )
            return ""
        return value
