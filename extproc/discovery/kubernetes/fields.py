"""Fields of Kubernetes objects, read as what they are to be: what is missing or of another type is nothing.

Objects come from all who may write them. No reading of one raises, and each text is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from metadata_center.addresses import MAX_PORT

MAX_TEXT: Final = 512
"""Longest text that is read: names have 253 characters at most, keys of labels 317."""

MAX_LABELS: Final = 64
"""Labels read of one object."""

Object = Mapping[str, Any]
"""A JSON object."""

_NOTHING: Final[Object] = {}


def mapping_at(value: object, *path: str) -> Object:
    """The object there; empty if there is none."""
    found = _at(value, path)
    return found if isinstance(found, dict) else _NOTHING


def list_at(value: object, *path: str) -> Sequence[Any]:
    """The list there; empty if there is none."""
    found = _at(value, path)
    return found if isinstance(found, list) else ()


def text_at(value: object, *path: str) -> str:
    """The text there; empty if there is none, or one that no name or label is."""
    return text_of(_at(value, path))


def text_of(value: object) -> str:
    """The value if it is a text of printable ASCII of at most `MAX_TEXT` characters, else nothing."""
    if isinstance(value, str) and len(value) <= MAX_TEXT and value.isascii() and value.isprintable():
        return value
    return ""


def is_true_at(value: object, *path: str) -> bool | None:
    """The truth value there; None if there is none."""
    found = _at(value, path)
    return found if isinstance(found, bool) else None


def int_of(value: object, lowest: int, highest: int) -> int | None:
    """The value if it is a whole number within these bounds."""
    if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
        return value
    return None


def port_of(value: object) -> int | None:
    """The value if it is a port."""
    return int_of(value, 1, MAX_PORT)


def labels_at(value: object, *path: str) -> dict[str, str]:
    """The labels there, sorted; the first `MAX_LABELS` of those that are what labels may be."""
    found: dict[str, str] = {}
    for key, text in sorted(mapping_at(value, *path).items()):
        if len(found) == MAX_LABELS:
            break
        if text_of(key) and text_of(text) == text:
            found[key] = text
    return found


def _at(value: object, path: Sequence[str]) -> object:
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value
