"""What the API says in answer to a list and to a watch: bytes to values.

Source: Kubernetes API concepts, "Efficient detection of changes"; meta/v1 `ListMeta`, `WatchEvent`, `Status`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import orjson

from extproc.discovery.kubernetes.fields import Object, int_of, list_at, mapping_at, text_at


class MalformedMessageError(ValueError):
    """It is not what the API says. The text quotes nothing of it."""


class EventType(StrEnum):
    """What a line of a watch reports."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"
    ERROR = "ERROR"


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list.

    Attributes:
        version: Of the whole list: of the collection, not of an object.
        objects: As they came.
        more: What the next page is asked for with; empty at the end.
    """

    version: str
    objects: tuple[Object, ...]
    more: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """A line of a watch.

    Attributes:
        type: What it reports.
        object: The object, or for an error the `Status`.
        version: Of the collection since this event; empty for an error.
        code: Of an error: an HTTP status; else 0.
    """

    type: EventType
    object: Object
    version: str = ""
    code: int = 0


def page_of(body: bytes) -> Page:
    """A list.

    Raises:
        MalformedMessageError: It is none.
    """
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise MalformedMessageError("a list that is not JSON") from None
    version, items = text_at(said, "metadata", "resourceVersion"), list_at(said, "items")
    if not version:
        raise MalformedMessageError("a list without a version")
    more = mapping_at(said, "metadata").get("continue", "")
    objects = tuple(item for item in items if isinstance(item, dict))
    return Page(version, objects, more if isinstance(more, str) else "")


def event_of(line: bytes) -> Event:
    """A line of a watch.

    Raises:
        MalformedMessageError: It is none.
    """
    try:
        said = orjson.loads(line)
        kind = EventType(text_at(said, "type"))
    except orjson.JSONDecodeError:
        raise MalformedMessageError("an event that is not JSON") from None
    except ValueError:
        raise MalformedMessageError("an event of no known type") from None
    about = mapping_at(said, "object")
    if kind is EventType.ERROR:
        return Event(kind, about, code=int_of(about.get("code"), 100, 599) or 500)
    version = text_at(about, "metadata", "resourceVersion")
    if not version:
        raise MalformedMessageError("an event without a version")
    return Event(kind, about, version)
