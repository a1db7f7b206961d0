"""Plain data that remembers the line of every key, made a model of, and its problems in words.

Rules:
    1. Pure; the only exception is `ConfigError`, with the first problems of the file, in its order.
    2. What a problem says is accepted comes from the JSON schema that is published, so the two agree.
    3. What is said is bounded, however much is wrong, and quotes no password of a URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from extproc.errors import ConfigError

Location = tuple[int | str, ...]
"""Path of a value inside a document, in the form of pydantic's `loc`; `()` is the document itself."""

Lines = Mapping[Location, int]
"""1-based line of each key and list item."""

M = TypeVar("M", bound=BaseModel)

MAX_PROBLEMS = 100
"""Bound on what is said of one file: what is wrong in four thousand endpoints is mostly one mistake."""

_SHOWN_CHARS = 60
"""Longest part of a wrong value that a problem repeats: enough to recognise it in the file."""

_KEY_CHARS = 256
"""Longest part of a key that a problem repeats: as long as names may be."""

_LOOKED_AT_CHARS = 16_384
"""Of a wrong value: what is repeated is looked at for passwords first."""

_SHOWN_NAMES = 50
"""Bound on the names that a problem lists as accepted; no section has as many keys."""

_GUESSED_AMONG = 1_000
"""Names that a mistyped one is compared with: some 10 ms of work."""

_NAMES_A_VARIABLE = "_env"
"""Ends keys that name a variable with a secret: who writes the secret there finds it in no log."""

_PASSWORD = re.compile(r"(://[^@:]*):.*@", re.DOTALL)
"""To the last `@`: a password may have one itself, or a slash, by which the store's URL is none."""

_SENTINELS = re.compile(r"([?&]sentinel_password=)[^&]*")

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")

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
    "string_unicode": "not Unicode text",
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
            schema, lines = model.model_json_schema(), self.locate()
            found = [details for details in error.errors(include_url=False) if not _is_echo(details)]
            found.sort(key=lambda details: _line(lines, details["loc"]))
            first = [_problem(schema, details) for details in found[:MAX_PROBLEMS]]
            self._refuse(first, len(found))

    def overlaid(self, settings: Mapping[str, Any]) -> Document:
        """The same with `settings` before what it says itself; mappings are merged key by key."""
        return replace(self, data=_overlaid(self.data, settings)) if settings else self

    def refuse(self, problems: list[tuple[Location, str]]) -> NoReturn:
        """Raise `ConfigError` for these (location, text) pairs, in the order of the file."""
        self._refuse(problems, len(problems))

    def _refuse(self, problems: list[tuple[Location, str]], count: int) -> NoReturn:
        """`count` is of all that there are, these being the first of them."""
        raise ConfigError(self.path, self.located(problems, count))

    def located(self, problems: list[tuple[Location, str]], count: int | None = None) -> list[str]:
        """These (location, text) pairs as a line each, in the order of the file.

        At most `MAX_PROBLEMS`, and one that says how many more there are.

        Args:
            problems: The pairs.
            count: How many there are in all, if these are but the first.
        """
        if not problems:
            return []
        lines = self.locate()
        located = sorted((_line(lines, location), dotted(location), text) for location, text in problems)
        told = [
            ": ".join(part for part in (f"line {line}", key, text) if part)
            for line, key, text in located[:MAX_PROBLEMS]
        ]
        more = (len(problems) if count is None else count) - len(told)
        return [*told, f"and {more} more problems"] if more else told


def _overlaid(data: Any, settings: Mapping[str, Any]) -> Any:
    if data is not None and not isinstance(data, dict):
        return data  # no mapping: refused as it is
    merged = dict(data or {})
    for key, value in settings.items():
        merged[key] = _overlaid(merged.get(key), value) if isinstance(value, Mapping) else value
    return merged


def dotted(location: Location) -> str:
    """The location as people write it: `models.llama.rules[0].cluster`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" for part in location)
    return text.removeprefix(".")


def _cut(key: str) -> str:
    return key if len(key) <= _KEY_CHARS else f"{key[:_KEY_CHARS]}…"


def unknown(name: str, accepted: Collection[str]) -> str:
    """The end of a problem about a name that does not exist: a guess, and the first of those there are."""
    looked_at = list(islice(accepted, _GUESSED_AMONG))
    by_folded = {each.casefold(): each for each in looked_at}
    close = get_close_matches(name, looked_at, n=1)
    close = close or [by_folded[each] for each in get_close_matches(name.casefold(), by_folded, n=1)]
    hint = f", did you mean `{close[0]}`?" if close else ""
    more = len(accepted) - _SHOWN_NAMES
    names = [*looked_at[:_SHOWN_NAMES], *([f"and {more} more"] if more > 0 else [])]
    return f"{hint}; accepted: {', '.join(names) or 'none'}"


def without_passwords(text: str) -> str:
    """The text with what stands for a password in a URL as `***`."""
    return _SENTINELS.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


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
    if location and str(location[-1]).endswith(_NAMES_A_VARIABLE):
        return location, f"{_WRONG[kind]}; accepted: {_accepted(schema, node)}"
    hint = " (YAML 1.1 takes it for text: without an exponent)" if _is_exponent(kind, value) else ""
    return location, f"{_WRONG[kind]}: {shown(value)}{hint}; accepted: {_accepted(schema, node)}"


def _is_exponent(kind: str, value: Any) -> bool:
    """True for text in a number's place such as `1e3`, which YAML 1.2 and JSON take for a number."""
    return kind in ("float_type", "int_type") and isinstance(value, str) and bool(_EXPONENT.fullmatch(value))


def shown(value: Any) -> str:
    """The wrong value, short enough for one line."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    if isinstance(value, str):
        value = without_passwords(value[:_LOOKED_AT_CHARS])
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = text.encode(errors="backslashreplace").decode()  # half a pair of UTF-16 is in no log
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
