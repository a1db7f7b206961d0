"""One collection kept as it is at the API server: listed, then watched. A state machine.

Rules:
    1. Pure. `next` says what is to be done; results come in, and the differences they make go out.
    2. A list counts as a whole, with its last page. Its version is that of the collection, and is where the
       watch begins; every event and bookmark moves it on. Versions are opaque: compared with nothing.
    3. A version that is too old (410, as a status or within a watch) leads to a new list, and what is not in
       it any more is reported as gone; so does any other refusal that is not about the moment (`_PASSING`).
       After any other end the watch goes on from its last version.
    4. What fails is tried again after a pause that doubles up to `MAX_PAUSE_S`, with jitter; a watch that
       held makes it short again. While it fails, what is known stays.
    5. An optional kind that is not there (404), or may not be read (403), has no objects; it is asked for
       every `ABSENT_PAUSE_S`. One that was there has its objects for `ABSENT_S` more: a server that starts
       says 404 of kinds that it has.
    6. What is reported twice makes no difference the second time.
    7. Bound: `MAX_OBJECTS`. A longer list is a failure.

Source: Kubernetes API concepts, "Efficient detection of changes" and "Resource versions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType
from typing import Final, Generic, TypeVar

from extproc.discovery.kubernetes.fields import Object, text_at
from extproc.discovery.kubernetes.messages import Event, EventType, Page
from metadata_center.backoff import Backoff, Rng

T = TypeVar("T")

MAX_OBJECTS: Final = 16_384
"""Of one collection: four times the endpoints that a gateway may have."""

FIRST_LIMIT: Final = 500
"""Objects of a page, as other clients have it; halved for each page that is too large."""

WATCH_S: Final = (300.0, 600.0)
"""A watch ends by itself within these times: servers spread the load of their clients by it."""

FIRST_PAUSE_S: Final = 0.25
MAX_PAUSE_S: Final = 10.0
"""Pauses before jitter. State is as old as that when a server comes back."""

MAX_RETRY_AFTER_S: Final = 60.0
"""A server that is overloaded may ask for that much."""

STEADY_S: Final = 5.0
"""A watch that lasted so long held, though nothing came."""

ABSENT_PAUSE_S: Final = 30.0
ABSENT_S: Final = 60.0

TOO_LARGE: Final = 413
"""As a failure that the client makes of an answer beyond its bound."""

_ABSENT: Final = 404
_NOT_THERE: Final = (403, _ABSENT)

_PASSING: Final = (401, 403, 429, 500, 503)
"""What is said of a watch that may go on from where it was: ask again."""

_TRIES: Final = 4
"""Refusals in a row after which it is not asked again, but listed."""


@dataclass(frozen=True, slots=True)
class ListPage:
    """Ask for a page of the list: `limit` objects, after what `more` says if it is not empty."""

    limit: int
    more: str


@dataclass(frozen=True, slots=True)
class Watch:
    """Watch from `version` for `timeout_s`."""

    version: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait so long."""

    seconds: float


Step = ListPage | Watch | Pause


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that came to nothing, or a watch that broke off.

    Attributes:
        status: Of the answer; None if there was none.
        detail: For people: nothing of it is secret.
        retry_after_s: What the server asked for, or None.
    """

    status: int | None
    detail: str
    retry_after_s: float | None = None


Delta = Mapping[str, T | None]
"""Objects that are new or differ, by name; None for those that are gone."""

_NOTHING: Final[Mapping[str, None]] = MappingProxyType({})


class _Phase(Enum):
    LISTING = auto()
    WATCHING = auto()


@dataclass(slots=True)
class _Listing(Generic[T]):
    """The pages so far."""

    objects: dict[str, T] = field(default_factory=dict)
    more: str = ""


class Reflector(Generic[T]):
    """Keeps one collection.

    Args:
        read: Makes of an object what is kept of it; None if it is to be taken as not there. Never raises.
        rng: Source of jitter.
        is_optional: The kind may be missing.

    Attributes:
        objects: What is known, by name.
        is_synced: A list has been read, or the kind is known to be missing.
        is_absent: The kind is missing now, or may not be read.
        problem: What fails now, for people; None while nothing does.
    """

    def __init__(self, read: Callable[[Object], T | None], rng: Rng, *, is_optional: bool = False) -> None:
        self._read = read
        self._rng = rng
        self._is_optional = is_optional
        self._objects: dict[str, T] = {}
        self._phase = _Phase.LISTING
        self._listing: _Listing[T] = _Listing()
        self._limit = FIRST_LIMIT
        self._version = ""
        self._failures = 0
        self._backoff = Backoff(rng, first_s=FIRST_PAUSE_S, most_s=MAX_PAUSE_S, steady_s=STEADY_S)
        self._pause_s: float | None = None
        self._opened_s: float | None = None
        self._current_s: float | None = None
        self._absent_since_s: float | None = None
        self._has_reported = False
        self.objects: Mapping[str, T] = MappingProxyType(self._objects)
        self.is_synced = False
        self.is_absent = False
        self.problem: str | None = None

    @property
    def is_watching(self) -> bool:
        """The watch that runs is to go on."""
        return self._opened_s is not None

    def age_s(self, now_s: float) -> float | None:
        """How long ago all this was last known to be current: 0 in a watch; None before the first list."""
        if self._current_s is None:
            return None
        return 0.0 if self._opened_s is not None else max(0.0, now_s - self._current_s)

    def next(self) -> Step:
        """What is to be done now."""
        if self._pause_s is not None:
            pause, self._pause_s = Pause(self._pause_s), None
            return pause
        if self._phase is _Phase.LISTING:
            return ListPage(self._limit, self._listing.more)
        shortest_s, longest_s = WATCH_S
        return Watch(self._version, shortest_s + (longest_s - shortest_s) * self._rng.random())

    def listed(self, page: Page, now_s: float) -> Delta[T]:
        """A page came."""
        listing = self._listing
        for one in page.objects:
            kept = self._read(one)
            if kept is not None and (name := text_at(one, "metadata", "name")):
                listing.objects[name] = kept
        if len(listing.objects) > MAX_OBJECTS:
            self._relist()
            return self.failed(Failure(None, f"more than {MAX_OBJECTS} objects"), now_s)
        listing.more = page.more
        if page.more:
            return _NOTHING
        self._listing = _Listing()
        self._phase, self._version = _Phase.WATCHING, page.version
        self._current_s, self._absent_since_s = now_s, None
        self.is_absent = False
        self.is_synced = True
        return self._replace(listing.objects)

    def opened(self, now_s: float) -> None:
        """A watch was granted: each change will be reported."""
        self._opened_s, self._has_reported = now_s, False
        self._current_s, self.problem = now_s, None

    def take(self, event: Event, now_s: float) -> Delta[T]:
        """An event of a watch; if `is_watching` is false afterwards, the watch is over."""
        if event.type is EventType.ERROR:
            detail = text_at(event.object, "reason") or "no reason"
            return self.failed(Failure(event.code, f"the watch ended: {detail}"), now_s)
        self._version, self._current_s, self._has_reported = event.version, now_s, True
        self._well()
        self.problem = None
        name = text_at(event.object, "metadata", "name")
        if event.type is EventType.BOOKMARK or not name:
            return _NOTHING
        kept = None if event.type is EventType.DELETED else self._read(event.object)
        if kept is None:
            return {} if self._objects.pop(name, None) is None else {name: None}
        if self._objects.get(name) == kept:
            return _NOTHING
        if len(self._objects) >= MAX_OBJECTS and name not in self._objects:
            self.problem = f"more than {MAX_OBJECTS} objects"
            return _NOTHING
        self._objects[name] = kept
        return {name: kept}

    def garbled(self, detail: str, now_s: float) -> Delta[T]:
        """An event that cannot be read: what it was about is found by a new list."""
        self._relist()
        return self.failed(Failure(None, detail), now_s)

    def ended(self, now_s: float) -> None:
        """A watch ended as watches do."""
        held = self._opened_s is not None and (self._has_reported or now_s - self._opened_s >= STEADY_S)
        if self._opened_s is not None:
            self._current_s, self._opened_s = now_s, None
        if held:
            self._well()
            self._pause_s = FIRST_PAUSE_S * self._rng.random()
        else:
            self._back_off(None)

    def failed(self, failure: Failure, now_s: float) -> Delta[T]:
        """A request failed, or a watch broke off."""
        if self._opened_s is not None and now_s - self._opened_s >= STEADY_S:
            self._well()
        self._opened_s = None
        self.problem = failure.detail
        if failure.status in _NOT_THERE and self._is_optional:
            return self._absent(failure, now_s)
        if failure.status == TOO_LARGE and self._phase is _Phase.LISTING:
            self._limit = max(1, self._limit // 2)
        elif failure.status is not None and (
            failure.status not in _PASSING or self._failures >= _TRIES
        ):  # of a list: from its first page
            self._relist()
        self._back_off(failure)
        return _NOTHING

    def _absent(self, failure: Failure, now_s: float) -> Delta[T]:
        self._relist()
        self._pause_s = ABSENT_PAUSE_S * (0.5 + self._rng.random())
        if self._absent_since_s is None:
            self._absent_since_s = now_s
        self.is_absent = True
        was_synced, self.is_synced = self.is_synced, True
        if not was_synced:
            return _NOTHING
        if failure.status == _ABSENT and now_s - self._absent_since_s >= ABSENT_S:
            return self._replace({})
        return _NOTHING

    def _relist(self) -> None:
        self._phase, self._listing = _Phase.LISTING, _Listing()

    def _back_off(self, failure: Failure | None) -> None:
        self._failures += 1
        asked_s = 0.0 if failure is None else failure.retry_after_s or 0.0
        self._pause_s = max(self._backoff.after(0.0), min(asked_s, MAX_RETRY_AFTER_S))

    def _well(self) -> None:
        """A watch held."""
        self._failures = 0
        self._backoff.reset()

    def _replace(self, objects: dict[str, T]) -> Delta[T]:
        delta: dict[str, T | None] = {name: None for name in self._objects if name not in objects}
        delta.update((name, one) for name, one in objects.items() if self._objects.get(name) != one)
        self._objects.clear()
        self._objects.update(objects)
        self.problem = None
        return delta
