"""YAML and JSON texts as plain data that remembers the line of every key.

Rules:
    1. Pure: text in, data out; the only exception is `ConfigError`.
    2. A key given twice is an error; so is a YAML key that is not text.
    3. Our bounds are checked before a library's own can be met: another version of it changes no sentence.
    4. No text, however it is made, costs more than its size: depth, values and digits are bounded before
       anything is made of them, anchors and merges included.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any, NoReturn

import yaml

from extproc.config.document import Document, Lines, Location
from extproc.errors import ConfigError

_MAX_VALUES = 200_000
"""Bound on values, after expanding anchors; a thousand models with every key set have 30,000."""

_MAX_EVENTS = 3 * _MAX_VALUES
"""Bound on what YAML is made of before anything is: a key, its value, the end of what it is in."""

_MAX_JSON_VALUES = 500_000
"""Bound on values of JSON; four thousand endpoints with a hundred labels have as many."""

_MAX_RESCANNED_CHARS = 1024 * 1024
"""Of a text that libyaml refuses: PyYAML's own scanner takes some 10 s for so much."""

_MAX_DEPTH = 64
"""Bound on nesting; the deepest key of either file is at 6. The libraries' own bounds come and go with their
versions: libyaml's are none or 1,000, those of Python's JSON reader depend on the stack."""

_MAX_DIGITS = 300
"""Bound on an integer's decimal digits: then it fits a double. Python's own is a setting, and not for hex."""

_ENDLESS = "an anchor here contains itself or expands without end"

_TOO_LONG = f"an integer without end; accepted: up to {_MAX_DIGITS} digits"

_MAX_NUMBER_CHARS = 4 * _MAX_DIGITS
"""As long as so many digits are in binary. YAML 1.1 also counts by sixties, `1:59:59`, which takes PyYAML the
square of the length."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What PyYAML raises for a scalar that is not what its tag or its form says: `!!bool maybe`, `!!int ""`."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE_TAG = "tag:yaml.org,2002:merge"

_JSON_PIECE = re.compile(r'"(?:[^"\\]++|\\.)*+"|[{}\[\],:\n]|[^\s{}\[\],:"]+')

_JSON_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[{}\[\]]')
"""Brackets, and the strings that may hide some; a string that does not end is one to the end of its line."""


def read_yaml(text: str, path: str) -> Document:
    """Read YAML 1.1, one document, anchors and merge keys included.

    Raises:
        ConfigError: Syntax, a key given twice, a key that is not text, nesting, numbers or anchors without
            end, too many values.
    """
    try:
        _refuse_deep_yaml(text, path)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(path, [f"line {line}: not valid YAML: {error.problem or error.context}"]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(path, [f"line {line}: not valid YAML: {error.reason}"]) from error
    builder = _YamlBuilder()
    try:
        data = builder.build(root, ()) if root is not None else None
    except _TooManyError as error:
        builder.problems.append((error.location, _ENDLESS))
        data = None
    document = Document(path, data, lambda: builder.lines)
    if builder.problems:
        document.refuse(builder.problems)
    return document


def read_json(text: str, path: str) -> Document:
    """Read strict JSON (RFC 8259: no comments, no NaN).

    Raises:
        ConfigError: Syntax, a key given twice, nesting or an integer without end, too many values.
    """
    _refuse_deep_json(text, path)
    repeated = False

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        result = dict(pairs)
        repeated |= len(result) < len(pairs)
        return result

    def no_constant(name: str) -> NoReturn:
        line = text.count("\n", 0, max(text.find(name), 0)) + 1
        raise ConfigError(path, [f"line {line}: not valid JSON: {name} is no JSON number"])

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            line = text.count("\n", 0, max(text.find(digits), 0)) + 1
            raise ConfigError(path, [f"line {line}: {_TOO_LONG}"])
        return int(digits)

    try:
        data = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_int=integer)
    except json.JSONDecodeError as error:
        raise ConfigError(
            path, [f"line {error.lineno}: not valid JSON: {error.msg} (column {error.colno})"]
        ) from error
    if _has_more(data, _MAX_JSON_VALUES):
        raise _too_many(path, 1, _MAX_JSON_VALUES)
    document = Document(path, data, lambda: _json_lines(text)[0])
    if repeated:
        document.refuse(_json_lines(text)[1])
    return document


def _refuse_deep_yaml(text: str, path: str) -> None:
    """Refuse what is nested deeper than our bound.

    libyaml reads up to 1,024 characters ahead of the events it gives, so a bound of its own may speak before
    ours is reached. Where it refuses a text, PyYAML's own scanner, slower and without a bound, counts again.

    Raises:
        ConfigError: Nested too deep, or too many values.
        yaml.YAMLError: Not valid, as `_Loader` says it.
    """
    try:
        _count_levels(text, path, _Loader)
    except yaml.YAMLError:
        if len(text) <= _MAX_RESCANNED_CHARS:
            with suppress(yaml.YAMLError):
                _count_levels(text, path, yaml.SafeLoader)
        raise


def _count_levels(text: str, path: str, loader: Any) -> None:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=loader)):
        if count > _MAX_EVENTS:
            raise _too_many(path, event.start_mark.line + 1 if event.start_mark else 1, _MAX_VALUES)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise _too_deep(path, event.start_mark.line + 1 if event.start_mark else 1)


def _refuse_deep_json(text: str, path: str) -> None:
    depth = count = 0
    for found in _JSON_BRACKET.finditer(text):
        if found[0] in "{[":
            depth += 1
            count += 1
            if count > _MAX_JSON_VALUES:
                raise _too_many(path, text.count("\n", 0, found.start()) + 1, _MAX_JSON_VALUES)
            if depth > _MAX_DEPTH:
                raise _too_deep(path, text.count("\n", 0, found.start()) + 1)
        elif found[0] in "}]":
            depth -= 1


def _too_deep(path: str, line: int) -> ConfigError:
    return ConfigError(path, [f"line {line}: nested too deep; accepted: {_MAX_DEPTH} levels"])


def _too_many(path: str, line: int, bound: int) -> ConfigError:
    return ConfigError(path, [f"line {line}: too many values; accepted: {bound} in all"])


def _has_more(data: Any, bound: int) -> bool:
    """True if there are more values in it than the bound."""
    count, held = 0, [data]
    while held and count <= bound:
        found = held.pop()
        children = found.values() if isinstance(found, dict) else found
        count += len(children) if isinstance(found, dict | list) else 0
        if isinstance(found, dict | list) and count <= bound:
            held += [child for child in children if isinstance(child, dict | list)]
    return count > bound


class _TooManyError(Exception):
    """More values than our bound.

    Args:
        location: Of the one that is too many.
    """

    def __init__(self, location: Location) -> None:
        super().__init__()
        self.location = location


class _YamlBuilder:
    """Turns composed nodes into data, collecting lines and problems on the way.

    What counts against the bound is what is built, also where a merge puts it in the place of another.

    Raises:
        _TooManyError: By `build`.
    """

    def __init__(self) -> None:
        self._built = 0
        self.lines: dict[Location, int] = {(): 1}
        self.problems: list[tuple[Location, str]] = []
        self._scalars = yaml.constructor.SafeConstructor()
        self._open: set[int] = set()

    def build(self, node: yaml.Node, location: Location) -> Any:
        self._built += 1
        if self._built > _MAX_VALUES:
            raise _TooManyError(location)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, location)
        if id(node) in self._open or len(self._open) > _MAX_DEPTH:
            self.problems.append((location, _ENDLESS))
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self._value(item, item, (*location, i)) for i, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, location)
        finally:
            self._open.remove(id(node))

    def _value(self, key: yaml.Node, value: yaml.Node, location: Location) -> Any:
        self.lines.setdefault(location, key.start_mark.line + 1)
        return self.build(value, location)

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == _MERGE_TAG:
                continue
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            here = (*location, name)
            if key.tag != "tag:yaml.org,2002:str":
                self.lines.setdefault(here, key.start_mark.line + 1)
                self.problems.append((here, "the key is not text: put it in quotes"))
            elif name in result:
                line = key.start_mark.line + 1
                self.problems.append((here, f"the key is given twice, again at line {line}"))
            else:
                result[name] = self._value(key, value, here)
        for key, value in node.value:
            if key.tag == _MERGE_TAG:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    merged = self.build(source, location)
                    if not isinstance(merged, dict):
                        self.problems.append((location, "`<<` needs a mapping"))
                        continue
                    result = {**merged, **result}
        return result

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _MAX_NUMBER_CHARS:
            self.problems.append((location, _TOO_LONG))
            return None
        try:
            value = self._scalars.construct_object(node)
        except _UNREADABLE:
            self.problems.append((location, f"cannot be read as {node.tag.rpartition(':')[2]}: quote it"))
            return None
        if isinstance(value, str) and "\0" in value:
            self.problems.append((location, "text with a NUL, which neither paths nor headers may have"))
            return None
        if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
            self.problems.append((location, _TOO_LONG))
            return None
        return value


def _json_lines(text: str) -> tuple[Lines, list[tuple[Location, str]]]:
    """Lines of all values of a valid JSON text, and one problem for each key given twice."""
    lines: dict[Location, int] = {(): 1}
    problems: list[tuple[Location, str]] = []
    repeated: set[Location] = set()
    line = 1
    parents: list[Location] = []
    indices: list[int | None] = []  # per open container: next list index, or None inside an object
    here: Location = ()
    key: str | None = None
    for piece in (found[0] for found in _JSON_PIECE.finditer(text)):
        if piece == "\n":
            line += 1
        elif piece in "}]":
            here = parents.pop()
            indices.pop()
        elif piece == ":":
            location = (*parents[-1], str(json.loads(key or '""')))
            inside_repeated = any(location[:depth] in repeated for depth in range(len(location)))
            if location in lines and not inside_repeated:
                repeated.add(location)
                problems.append((location, f"the key is given twice, again at line {line}"))
            here = location
            lines.setdefault(location, line)
        elif piece != ",":
            if indices and (index := indices[-1]) is not None:
                here = (*parents[-1], index)
                lines[here] = line
                indices[-1] = index + 1
            if piece in "{[":
                parents.append(here)
                indices.append(0 if piece == "[" else None)
            key = piece
    return lines, problems
