"""What Envoy's words in an entry mean, in its line or in its fields."""

from __future__ import annotations

from extproc.errors import Reason
from extproc.values.outcomes import Ended

MAX_DURATION_S = 86_400.0
"""A day: no stream lasts longer, and sums of durations stay finite whatever a log says."""

_ENDED_BY = {
    "DC": Ended.CLIENT_ABORT,
    "DR": Ended.CLIENT_ABORT,
    "UT": Ended.TIMEOUT,
    "SI": Ended.TIMEOUT,
    "DT": Ended.TIMEOUT,
    "UC": Ended.UPSTREAM_RESET,
    "UR": Ended.UPSTREAM_RESET,
    "UPE": Ended.UPSTREAM_RESET,  # what Envoy calls a chunked body cut off by a close
}
"""Flags that alone show how a request ended, the strongest first."""

_BROKEN_OFF = "upstream_reset_after_response_started"
"""Envoy documentation, response code details: the client got the beginning of an answer, status and all."""


_TOKENWAYS = "tokenway_"
_VIA_UPSTREAM = "via_upstream"

_ENVOYS_REFUSALS = {
    400: Reason.INVALID_REQUEST,
    403: Reason.INVALID_REQUEST,
    408: Reason.BODY_TIMEOUT,
    413: Reason.BODY_TOO_LARGE,
    431: Reason.INVALID_REQUEST,
}
"""What Envoy refuses by itself before anybody decides, by status; the codes of envoy/bootstrap.yaml."""

_AFTER_THE_DECISION = "header_mutation_result_exceeds_limit"


def seconds_of(tag: str | None) -> float | None:
    """Microseconds in text; Envoy writes "-" for what did not happen, and nothing takes longer than a day."""
    if tag is None or tag == "-":
        return None
    try:
        seconds = int(tag) / 1e6
    except (ValueError, OverflowError):
        return None
    return seconds if 0.0 <= seconds <= MAX_DURATION_S else None


def ended_how(flags: tuple[str, ...], status: int, details: str) -> Ended:
    """How a request ended, by Envoy's short flags, the status its client saw, and response code details."""
    if flags:
        for flag, ended in _ENDED_BY.items():
            if flag in flags:
                return ended
    if details.startswith(_BROKEN_OFF):
        return Ended.UPSTREAM_RESET
    if details.startswith(_TOKENWAYS):
        return Ended.COMPLETED if status < 400 else Ended.REJECTED
    if details == _AFTER_THE_DECISION:
        return Ended.REJECTED
    if status == 0:
        return Ended.CLIENT_ABORT
    return Ended.UPSTREAM_ERROR if status >= 500 else Ended.COMPLETED


def refused_by_envoy(owner: str | None, status: int, details: str) -> Reason | None:
    """Why Envoy refused a request of which Tokenway never said anything; None if it did not.

    Args:
        owner: Who decided, if anybody did.
        status: The client saw.
        details: Envoy's `response_code_details`: `via_upstream` of an engine's answer, `lua_response` of our
            script's.
    """
    if owner is not None or not details or details.startswith(_TOKENWAYS):
        return None
    if details in (_VIA_UPSTREAM, "lua_response", _AFTER_THE_DECISION):
        return None
    return _ENVOYS_REFUSALS.get(status)
