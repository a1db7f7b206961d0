"""What a page of the admin port is: a path, the answer of one worker, and how several answers become one.

No prompt text exists behind the port.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson

from extproc.observing.records import RecordRing

JSON_TYPE: Final = "application/json"


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A request to the port.

    Attributes:
        segments: What stands for the `{names}` of the page's path, decoded.
        query: The query, decoded; of a name that is repeated, the first.
        target: Path and query as they came, encoded.
    """

    segments: Mapping[str, str]
    query: Mapping[str, str]
    target: str


@dataclass(frozen=True, slots=True)
class PageResponse:
    """What the port says.

    Attributes:
        body: As it is sent.
        content_type: The whole header.
        status: Of HTTP.
        rest: Pieces of the body behind `body`, where to join them would hold up requests.
    """

    body: bytes
    content_type: str = JSON_TYPE
    status: int = 200
    rest: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class PagePieces:
    """What the port says, where to make all of it at once would hold up requests.

    Attributes:
        pieces: Of the body; each is made when it is asked for, from what there is by then.
        content_type: The whole header.
    """

    pieces: Iterator[bytes]
    content_type: str = JSON_TYPE


class Source(Protocol):
    """What the pages of one worker are made of."""

    @property
    def records(self) -> RecordRing:
        """Recent decisions."""

    def is_ready(self) -> bool:
        """True while new requests are taken."""

    def metrics_pieces(self) -> Iterator[bytes]:
        """The Prometheus exposition, in pieces that are quickly made."""

    def endpoints_json(self) -> dict[str, Any]:
        """The body of `/endpoints`."""


def refuse_nothing(_asked: PageRequest) -> PageResponse | None:
    """Every request of the page's path is a good one."""
    return None


@dataclass(frozen=True, slots=True)
class ProcessPage:
    """A page that a worker and a supervisor answer alike, each for itself.

    Attributes:
        method: Of HTTP.
        path: With `{name}` for a segment that varies.
        answer: The answer.
    """

    method: str
    path: str
    answer: Callable[[PageRequest], PageResponse]


@dataclass(frozen=True, slots=True)
class WorkerPage:
    """A page that a worker answers; a supervisor asks all workers.

    Attributes:
        method: Of HTTP.
        path: With `{name}` for a segment that varies.
        answer: Of one worker.
        merge: One answer out of those of several, by worker number; the mapping is empty if none answers.
        refuse: What is wrong with a request, of whichever process; None if nothing is.
    """

    method: str
    path: str
    answer: Callable[[Source, PageRequest], PageResponse | PagePieces]
    merge: Callable[[PageRequest, Mapping[int, PageResponse]], PageResponse]
    refuse: Callable[[PageRequest], PageResponse | None] = refuse_nothing


Page = ProcessPage | WorkerPage


def json_answer(body: object, status: int = 200) -> PageResponse:
    """An answer in JSON."""
    try:
        data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        # An integer of over 64 bits: all are bounded where they come from, an operator must see it.
        data = json.dumps(body, default=str).encode()
    return PageResponse(data, status=status)


def good_bodies(answers: Mapping[int, PageResponse]) -> list[Any]:
    """The JSON of the answers with status 200, in the order of the workers."""
    return [orjson.loads(answer.body) for answer in answers.values() if answer.status == 200]


def no_worker() -> PageResponse:
    """The answer where no worker gives one."""
    return json_answer({"error": "no worker answers"}, 503)
