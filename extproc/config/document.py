"""A configuration text as plain data that remembers the line of every key, and its problems in words.

Rules:
    1. Pure: text in, data out; the only exception is `ConfigError`, with every problem found.
    2. What a problem says is accepted comes from the JSON schema that is published, so the two agree.
    3. A key given twice is an error; so is a YAML key that is not text.
    4. Our bounds are checked before a library's own can be met: another version of it changes no sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from extproc.errors import ConfigError

Location = tuple[int | str, ...]
"""Path of a value inside a document, in the form of pydantic's `loc`; `()` is the document itself."""

Lines = Mapping[Location, int]
"""1-based line of each key and list item."""

M = TypeVar("M", bound=BaseModel)

_MAX_VALUES = 200_000
"""Bound on values after expanding YAML anchors; a thousand models with every key set have 30,000."""

_MAX_DEPTH = 64
"""Bound on nesting; the deepest key of either file is at 6. The libraries' own bounds come and go with their
versions: libyaml's are none or 1,000, those of Python's JSON reader depend on the stack."""

_MAX_DIGITS = 300
"""Bound on an integer's decimal digits: then it fits a double. Python's own is a setting, and not for hex."""

_TOO_LONG = f"an integer without end; accepted: up to {_MAX_DIGITS} digits"

_SHOWN_CHARS = 60
"""Longest part of a wrong value that a problem repeats: enough to recognise it in the file."""

UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What PyYAML raises for a scalar that is not what its tag or its form says: `!!bool maybe`, `!!int ""`."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE_TAG = "tag:yaml.org,2002:merge"

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")

_JSON_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:\n]|[^\s{}\[\],:"]+')

_JSON_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}\[\]]')
"""Brackets, and the strings that may hide some; a string that does not end is one to the end of its line."""

_WRONG = {
    "bool_type": "wrong type",
    "dict_type": "wrong type",
    "enum": "unknown value",
    "finite_number": "not a finite number",
    "float_type": "wrong type",
    "greater_than": "out of range",
    "greater_than_equal": "out of range",
    "int_from_float": "wrong type",
    "int_type": "wrong type",
    "less_than": "out of range",
    "less_than_equal": "out of range",
    "literal_error": "unknown value",
    "mapping_type": "wrong type",
    "model_type": "wrong type",
    "string_pattern_mismatch": "malformed",
    "string_too_long": "too long",
    "string_too_short": "too short",
    "string_type": "wrong type",
    "too_short": "too few items",
    "tuple_type": "wrong type",
}
"""pydantic's error types in our words; other types keep pydantic's own message."""


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data with the lines it came from.

    Attributes:
        path: The file, for messages.
        data: Dictionaries with text keys, lists and scalars.
        locate: Gives the line of every key; called for messages only, since JSON pays for it then.
    """

    path: str
    data: Any
    locate: Callable[[], Lines]

    def validated(self, model: type[M]) -> M:
        """The data as `model`; an empty document is an empty mapping.

        Raises:
            ConfigError: Naming every value that the model refuses.
        """
        try:
            return model.model_validate({} if self.data is None else self.data)
        except ValidationError as error:
            schema = model.model_json_schema()
            self.refuse([_problem(schema, details) for details in error.errors() if not _is_echo(details)])

    def overlaid(self, settings: Mapping[str, Any]) -> Document:
        """The same with `settings` before what it says itself; mappings are merged key by key."""
        return replace(self, data=_overlaid(self.data, settings)) if settings else self

    def refuse(self, problems: list[tuple[Location, str]]) -> NoReturn:
        """Raise `ConfigError` for these (location, text) pairs, in the order of the file."""
        raise ConfigError(self.path, self.located(problems))

    def located(self, problems: list[tuple[Location, str]]) -> list[str]:
        """These (location, text) pairs as a line each, in the order of the file."""
        if not problems:
            return []
        lines = self.locate()
        located = sorted((_line(lines, location), dotted(location), text) for location, text in problems)
        return [
            ": ".join(part for part in (f"line {line}", key, text) if part) for line, key, text in located
        ]


def _overlaid(data: Any, settings: Mapping[str, Any]) -> Any:
    if data is not None and not isinstance(data, dict):
        return data  # no mapping: refused as it is
    merged = dict(data or {})
    for key, value in settings.items():
        merged[key] = _overlaid(merged.get(key), value) if isinstance(value, Mapping) else value
    return merged


def read_yaml(text: str, path: str) -> Document:
    """Read YAML 1.1, one document, anchors and merge keys included.

    Raises:
        ConfigError: Syntax, a key given twice, a key that is not text, or an anchor inside itself.
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
    data = builder.build(root, ()) if root is not None else None
    document = Document(path, data, lambda: builder.lines)
    if builder.problems:
        document.refuse(builder.problems)
    return document


def read_json(text: str, path: str) -> Document:
    """Read strict JSON (RFC 8259: no comments, no NaN).

    Raises:
        ConfigError: Syntax, a key given twice, nesting or an integer without end.
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
    document = Document(path, data, lambda: _json_lines(text)[0])
    if repeated:
        document.refuse(_json_lines(text)[1])
    return document


def dotted(location: Location) -> str:
    """The location as people write it: `models.llama.rules[0].cluster`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def unknown(name: str, accepted: Mapping[str, Any] | list[str]) -> str:
    """The end of a problem about a name that does not exist: a guess, and the names there are."""
    by_folded = {each.casefold(): each for each in accepted}
    close = get_close_matches(name, accepted, n=1)
    close = close or [by_folded[each] for each in get_close_matches(name.casefold(), by_folded, n=1)]
    hint = f", did you mean `{close[0]}`?" if close else ""
    return f"{hint}; accepted: {', '.join(accepted) or 'none'}"


def _refuse_deep_yaml(text: str, path: str) -> None:
    """Refuse what is nested deeper than our bound.

    libyaml reads up to 1,024 characters ahead of the events it gives, so a bound of its own may speak before
    ours is reached. Where it refuses a text, PyYAML's own scanner, slower and without a bound, counts again.

    Raises:
        ConfigError: Nested too deep.
        yaml.YAMLError: Not valid, as `_Loader` says it.
    """
    try:
        _count_levels(text, path, _Loader)
    except yaml.YAMLError:
        with suppress(yaml.YAMLError):
            _count_levels(text, path, yaml.SafeLoader)
        raise


def _count_levels(text: str, path: str, loader: Any) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise _too_deep(path, event.start_mark.line + 1 if event.start_mark else 1)


def _refuse_deep_json(text: str, path: str) -> None:
    depth = 0
    for found in _JSON_BRACKET.finditer(text):
        if found[0] in "{[":
            depth += 1
            if depth > _MAX_DEPTH:
                raise _too_deep(path, text.count("\n", 0, found.start()) + 1)
        elif found[0] in "}]":
            depth -= 1


def _too_deep(path: str, line: int) -> ConfigError:
    return ConfigError(path, [f"line {line}: nested too deep; accepted: {_MAX_DEPTH} levels"])


class _YamlBuilder:
    """Turns composed nodes into data, collecting lines and problems on the way."""

    def __init__(self) -> None:
        self.lines: dict[Location, int] = {(): 1}
        self.problems: list[tuple[Location, str]] = []
        self._scalars = yaml.constructor.SafeConstructor()
        self._open: set[int] = set()

    def build(self, node: yaml.Node, location: Location) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, location)
        if id(node) in self._open or len(self._open) > _MAX_DEPTH or len(self.lines) > _MAX_VALUES:
            self.problems.append((location, "an anchor here contains itself or expands without end"))
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
        try:
            value = self._scalars.construct_object(node)
        except UNREADABLE:
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
    for piece in _JSON_PIECE.findall(text):
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


def _line(lines: Lines, location: Location) -> int:
    """Line of the value, or of the nearest parent that the file has."""
    while location not in lines:
        location = location[:-1]
    return lines[location]


def _is_echo(details: ErrorDetails) -> bool:
    """True for "too few items" where the items are there but were refused one by one."""
    return details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]


def _problem(schema: dict[str, Any], details: ErrorDetails) -> tuple[Location, str]:
    kind, location, value = details["type"], details["loc"], details["input"]
    if kind == "extra_forbidden":
        properties = _node(schema, location[:-1]).get("properties", {})
        if location[-1] in properties:
            return location, "the key is given in its other spelling as well; accepted: one of the two"
        keys = [key for key, property_ in properties.items() if not property_.get("deprecated")]
        return location, f"unknown key{unknown(str(location[-1]), keys)}"
    if location and location[-1] == "[key]":
        location = location[:-1]
        node = _node(schema, location[:-1]).get("propertyNames", {})
    else:
        node = _node(schema, location)
    if kind == "missing":
        return location, f"the key is required; accepted: {_accepted(schema, node)}"
    if kind not in _WRONG:
        return location, details["msg"]
    hint = " (YAML 1.1 takes it for text: without an exponent)" if _is_exponent(kind, value) else ""
    return location, f"{_WRONG[kind]}: {shown(value)}{hint}; accepted: {_accepted(schema, node)}"


def _is_exponent(kind: str, value: Any) -> bool:
    """True for text in a number's place such as `1e3`, which YAML 1.2 and JSON take for a number."""
    return kind in ("float_type", "int_type") and isinstance(value, str) and bool(_EXPONENT.fullmatch(value))


def shown(value: Any) -> str:
    """The wrong value, short enough for one line."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """The node behind references and `or null`."""
    while True:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        elif "anyOf" in node:
            node = next(option for option in node["anyOf"] if option.get("type") != "null")
        else:
            return node


def _node(schema: dict[str, Any], location: Location) -> dict[str, Any]:
    """The part of the JSON schema that describes the value at this location; empty if none does."""
    node = schema
    for part in location:
        node = _resolved(schema, node)
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
    return _resolved(schema, node)


def _accepted(schema: dict[str, Any], node: dict[str, Any]) -> str:
    """What the schema node allows, in words."""
    if "enum" in node:
        return ", ".join(str(value) for value in node["enum"])
    if "const" in node:
        return json.dumps(node["const"])
    if "examples" in node:
        return "text like " + ", ".join(f"`{example}`" for example in node["examples"])
    match node.get("type"):
        case "boolean":
            return "true or false"
        case "integer" | "number" as kind:
            return ("an integer" if kind == "integer" else "a number") + _range(node)
        case "array":
            items = _accepted(schema, _resolved(schema, node.get("items", {})))
            return f"a list{' of at least one' if node.get('minItems') else ''}, each item {items}"
        case "object" if "properties" in node:
            return f"a mapping with the keys {', '.join(node['properties'])}"
        case "object":
            return "a mapping"
        case _:
            least, most = node.get("minLength", 0), node.get("maxLength")
            bound = f" of {least} to {most} characters" if most else ""
            return f"text{bound} (quote numbers and yes/no)"


def _range(node: dict[str, Any]) -> str:
    low, above, high = (node.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f" from {low} to {high}"
    bounds = ((">=", low), (">", above), ("<=", high))
    text = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
    return f" {text}" if text else ""
