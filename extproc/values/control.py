"""Control headers, by which a request, or the gateway for it, says what it is due; those that say nothing.

Rules:
    1. A value that is none says nothing, as if the header were not there: no request is refused for it.
    2. That it said nothing is counted and, now and then, logged; the value itself is in no log.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from extproc.values.headers import SLO_TPOT_HEADER, SLO_TTFT_HEADER
from extproc.values.limits import limit_ms
from metadata_center.types import value


class ControlHeader(StrEnum):
    """What is said; each under one name or two."""

    MODEL = "model"
    OBJECTIVE = "objective"
    FAIRNESS_ID = "fairness_id"
    TTFT_LIMIT = "slo_ttft_ms"
    TPOT_LIMIT = "slo_tpot_ms"


class Flaw(StrEnum):
    """Why it says nothing."""

    MALFORMED = "malformed"
    UNKNOWN = "unknown"
    """Nothing here has that name."""


@value
class Ignored:
    """A control header of a request that says nothing.

    Attributes:
        control: What it was to say.
        flaw: Why it does not.
        header: Its name, as it came.
        unknown: The name that is unknown, well-formed; empty for other flaws.
    """

    control: ControlHeader
    flaw: Flaw
    header: str
    unknown: str = ""


def malformed_limits(headers: Mapping[str, str]) -> tuple[Ignored, ...]:
    """Those of a request's limits on its latency that are no limits.

    Args:
        headers: Lower-case names.
    """
    if SLO_TTFT_HEADER not in headers and SLO_TPOT_HEADER not in headers:
        return ()
    pairs = ((ControlHeader.TTFT_LIMIT, SLO_TTFT_HEADER), (ControlHeader.TPOT_LIMIT, SLO_TPOT_HEADER))
    return tuple(
        Ignored(control, Flaw.MALFORMED, name)
        for control, name in pairs
        if name in headers and limit_ms(headers[name]) is None
    )
