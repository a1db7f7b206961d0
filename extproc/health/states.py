"""What an endpoint is to the router, and what makes it so."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from metadata_center.types import EndpointKey


class HealthState(StrEnum):
    """What an endpoint is to the router; what its source says hides whether it is also ejected."""

    HEALTHY = "healthy"
    EJECTED = "ejected"
    DRAINING = "draining"
    NOT_READY = "not ready"


class ProbeFailure(StrEnum):
    """How a probe failed: what it proves differs."""

    REFUSED = "refused"
    TIMEOUT = "timeout"
    OTHER = "other"


class Cause(StrEnum):
    """What an ejection rests on."""

    GONE = "gone"
    ASLEEP = "asleep"
    PROBES = "probes"
    SLOW_PROBES = "slow probes"
    TRAFFIC = "traffic"


BELOW_THE_FLOOR = frozenset({Cause.GONE, Cause.ASLEEP})
"""Causes that may take a cluster below its floor: what is not there cannot be chosen."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One endpoint changed state.

    Attributes:
        reason: For logs and explain, one short phrase; never from a request.
    """

    key: EndpointKey
    before: HealthState
    after: HealthState
    reason: str


Transitions = tuple[Transition, ...]
