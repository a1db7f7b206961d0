"""A placement is charged leg by leg, in the step that chose it.

Rules:
    1. All legs are charged or none: where one finds no room, the others are taken off again.
    2. The first leg is the one that Envoy sends the request to. If the request ended before, or is charged
       already, none is charged. A further leg that ended by itself before stays void: the ledger knows.
"""

from __future__ import annotations

from typing import Final

from extproc.values.placements import Leg, Placement
from metadata_center.store import LoadStore
from metadata_center.types import Charge, EndpointKey, RequestId

PREFILL_DUE_FACTOR: Final = 1.2
"""A prefill without first-token signal is released after this many times its predicted TTFT (AIGW: 12/10)."""

PREFILL_DUE_FLOOR_S: Final = 0.1
"""And not before this (AIGW: 100 ms)."""


def due_s(now_s: float, ttft_s: float) -> float:
    """When a prefill whose end is not reported is taken to be over."""
    return now_s + max(PREFILL_DUE_FLOOR_S, PREFILL_DUE_FACTOR * ttft_s)


def whole(
    request_id: RequestId,
    endpoint: EndpointKey,
    prefill_tokens: int,
    context_tokens: int,
    prefill_due_s: float | None,
) -> Placement:
    """The placement of a request that one engine does alone.

    Args:
        request_id: Whose.
        endpoint: Where.
        prefill_tokens: Of its prompt, to be computed.
        context_tokens: Of its prompt.
        prefill_due_s: When its prefill is taken to be over; None waits for its first token.
    """
    return Placement((Leg(Charge(request_id, endpoint, prefill_tokens, context_tokens), prefill_due_s),))


def charge(load: LoadStore, placement: Placement, now_s: float) -> bool:
    """Charge each leg.

    Returns:
        False if its request is charged already, or ended before.

    Raises:
        CapacityError: There is no room; nothing is charged.
    """
    legs = placement.legs
    first = legs[0]
    if not load.charge(first.charge, now_s, first.prefill_due_s):
        return False
    if len(legs) == 1:
        return True
    try:
        for leg in legs[1:]:
            load.charge(leg.charge, now_s, leg.prefill_due_s)
    except Exception:
        # Leg by leg: the request has not ended, so that nothing is void when it is placed again.
        for one in (leg.charge for leg in legs):
            if load.get(one.request_id, one.leg) is not None:
                load.release_leg(one.request_id, one.leg, now_s)
        raise
    return True
