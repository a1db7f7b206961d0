"""Endings as their listeners get them, without anything that makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from extproc.values.choices import Choice, Snapshot
from extproc.values.decisions import CacheSource, DecisionRecord
from extproc.values.endings import Ending
from extproc.values.evidence import Evidence, NoFailure
from extproc.values.inflight import Inflight
from extproc.values.outcomes import Ended, Outcome
from extproc.values.requests import Operation
from metadata_center.types import EndpointKey, RequestId

MODEL = "m"
GROUP = "pool"
A, B = EndpointKey("10.0.0.1:8000"), EndpointKey("10.0.0.2:8000")

OUTCOME = Outcome(Ended.COMPLETED, 1.0, A, 1, 200, 0.2, 400, 11, 0)
"""A streamed answer at A that took a second."""

SNAPSHOT = Snapshot(
    keys=(A, B),
    requests=(0, 0),
    prefill_tokens=(0, 0),
    context_tokens=(0, 0),
    matched_blocks=(0, 0),
    num_blocks=4,
    weights=(1.0, 1.0),
    prefilling=(0, 0),
    cached_tokens=(0, 0),
    steps_s=(0.01, 0.01),
    prompt_tokens=400,
)


def sent(request_id: str = "r", **record: Any) -> Inflight:
    """A request that was sent to A, with B behind it."""
    made: dict[str, Any] = {
        "model": MODEL,
        "cluster": GROUP,
        "stream": True,
        "prompt_bytes": 1600,
        "prompt_tokens": 400,
        "snapshot": SNAPSHOT,
        "choice": Choice((0, 1), None, 2),
        "cached_tokens": (0, 0),
        "views": (CacheSource.HISTORY, CacheSource.HISTORY),
        "data_age_s": {},
    }
    decision = DecisionRecord(request_id=RequestId(request_id), time_unix_s=0.0, **{**made, **record})
    return Inflight(decision, Operation.CHAT, A, [1, 2, 3, 4], GROUP, (GROUP,), 0.0, served_model=MODEL)


def ending(
    request: Inflight,
    evidence: Evidence = NoFailure.ANSWERED,
    now_s: float = 1.0,
    *,
    stream_s: float | None = 0.8,
    usage_unseen: str = "",
    **outcome: Any,
) -> Ending:
    """Its end; a whole answer unless arguments say otherwise."""
    whole = replace(OUTCOME, **{"endpoint": request.endpoint, **outcome})
    row = request.record.row(request.endpoint)
    return Ending(request.record, whole, now_s, request, evidence, row, stream_s, usage_unseen)


def refusal(status: int = 400, **record: Any) -> Ending:
    """A request that was refused before it was sent."""
    refused = DecisionRecord(request_id=RequestId("no"), time_unix_s=0.0, data_age_s={}, **record)
    return Ending(refused, Outcome(Ended.REJECTED, 0.0, status=status), 1.0)
