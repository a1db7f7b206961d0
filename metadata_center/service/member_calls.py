"""Calls of Tokenway's gateways, which meet here: shares, reservations, and the stream of all messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from metadata_center.service.calls import (
    Code,
    Handler,
    ServiceRequest,
    ServiceResponse,
    frames_of,
    invalid,
    ok,
)
from metadata_center.service.openapi import BINARY, Operation, object_of
from metadata_center.service.rendezvous import Rendezvous
from metadata_center.sharing.http_messages import (
    EVENTS_PATH,
    FRAMES_TYPE,
    KEEP_ALIVE,
    MESSAGE_TYPE,
    RESERVE_PATH,
    RESERVE_TYPE,
    SHARES_PATH,
    decode_reserve,
    encode_frames,
)
from metadata_center.sharing.messages import MAX_AMOUNT, MAX_CANDIDATES, MessageError, decode

_PLACE: Final = object_of(
    "index totals",
    index={"type": "integer", "minimum": 0, "maximum": MAX_CANDIDATES - 1},
    totals={
        "type": "array",
        "maxItems": MAX_CANDIDATES,
        "items": {"type": "integer", "minimum": 0, "maximum": MAX_AMOUNT},
        "description": "Requests in flight per candidate, over all gateways, before this one.",
    },
)

SNAPSHOT: Final = Operation(
    "GET",
    SHARES_PATH,
    "What every gateway has in flight: frames of updates, to be applied in this order",
    content={FRAMES_TYPE: {"schema": BINARY}},
)

SHARE: Final = Operation(
    "POST",
    SHARES_PATH,
    "What a gateway has in flight: an update, passed on to all followers",
    body=BINARY,
    body_type=MESSAGE_TYPE,
    failures=(Code.TOO_MUCH,),
)

RESERVE: Final = Operation(
    "POST",
    RESERVE_PATH,
    "The same, and places for requests: each is charged to its first candidate that has no more "
    "requests than believed, else to the one that has the fewest too many",
    data={"type": "array", "items": _PLACE},
    body=BINARY,
    body_type=RESERVE_TYPE,
    failures=(Code.TOO_MUCH,),
)

FOLLOW: Final = Operation(
    "GET",
    EVENTS_PATH,
    "Frames of updates as gateways send them, without end; an empty frame at first, and when nothing is sent",
    content={FRAMES_TYPE: {"schema": BINARY}},
    failures=(Code.TOO_MUCH,),
)

OPERATIONS: Final = (SNAPSHOT, SHARE, RESERVE, FOLLOW)


class MemberCalls:
    """Answers gateways.

    Args:
        rendezvous: Where they meet.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous

    @property
    def handlers(self) -> Mapping[Operation, Handler]:
        """The handler of each call."""
        return {
            SNAPSHOT: self._snapshot,
            SHARE: self._share,
            RESERVE: self._reserve,
            FOLLOW: self._follow,
        }

    def _snapshot(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        return frames_of(request, encode_frames(self._rendezvous.snapshot(now_s)))

    def _share(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        try:
            self._rendezvous.publish(decode(request.body), request.body, now_s)
        except MessageError as error:
            raise invalid(str(error)) from error
        return ok(request)

    def _reserve(self, request: ServiceRequest, now_s: float) -> ServiceResponse:
        try:
            places = self._rendezvous.reserve(*decode_reserve(request.body), now_s)
        except MessageError as error:
            raise invalid(str(error)) from error
        return ok(request, [{"index": place.index, "totals": place.totals} for place in places])

    def _follow(self, request: ServiceRequest, _: float) -> ServiceResponse:
        return frames_of(request, KEEP_ALIVE, follows=True)
