"""Lines of the access log as Envoy writes them."""

from __future__ import annotations

from extproc.accesslog.lines import SEPARATOR
from tests.conftest import OWNER

NAMES = (
    *(
        "kind",
        "rid",
        "owner",
        "address",
        "attempts",
        "status",
        "flags",
        "ttft_us",
        "stream_us",
        "duration_us",
    ),
    *("duration_ms", "received", "sent", "details", "error", "unseen", "top", "nested"),
)

PLAIN = dict.fromkeys(NAMES, "-") | {
    "kind": "DownstreamEnd",
    "rid": "r",
    "owner": OWNER,
    "address": "10.0.0.1:8000",
    "attempts": "1",
    "status": "200",
    "duration_us": "500000",
    "duration_ms": "500",
    "received": "11",
    "sent": "22",
    "details": "via_upstream",
}


def line(**changes: str) -> str:
    """A line as Envoy writes it of an answer that took half a second."""
    return SEPARATOR.join((PLAIN | changes).values())
