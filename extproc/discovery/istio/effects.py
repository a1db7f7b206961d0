"""What the client of istiod has its surroundings do, as values, in the order in which it is to be done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from extproc.discovery.istio.messages import Request
from extproc.discovery.listed import Listed


@dataclass(frozen=True, slots=True)
class Connect:
    """Drop the stream that is open, if any, and open another; say `opened`, or `lost`, with its number."""

    number: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send this on the stream."""

    request: Request


@dataclass(frozen=True, slots=True)
class Update:
    """The fleet is to have this now, as `Fleet.update` takes it."""

    clusters: Mapping[str, Sequence[Listed] | None]


@dataclass(frozen=True, slots=True)
class LookUp:
    """Look this host name up, and say `answered` once."""

    name: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Something in a response was refused, for this reason; to be logged and counted."""

    type_url: str
    detail: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """A response does not fit this limit; `is_final` if there is no larger one."""

    limit_bytes: int
    is_final: bool


_AT_ONCE: Final = 64
"""Endpoints, and clusters, that the fleet is given without a pause."""


def slices_of(update: Update) -> Iterator[Update]:
    """The same in steps, clusters that go last: a replica may go from one to another.

    A cluster is in one step: nobody sees a part of it.
    """
    part: dict[str, Sequence[Listed] | None] = {}
    size = 0
    for name in sorted(update.clusters, key=lambda name: update.clusters[name] is None):
        listed = update.clusters[name]
        num = 1 + len(listed or ())
        if part and size + num > _AT_ONCE:
            yield Update(part)
            part, size = {}, 0
        part[name] = listed
        size += num
    if part:
        yield Update(part)


Effect = Connect | Send | Update | LookUp | Refused | TooLarge
