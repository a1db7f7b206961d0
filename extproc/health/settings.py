"""When an endpoint stops being chosen, and what brings it back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Active probes, passive signals, ejection and recovery.

    Attributes:
        path: Probed by GET; any 2xx is a success.
        interval_s: Between probes of a healthy endpoint.
        recovery_interval_s: Between probes of an ejected endpoint.
        timeout_s: Bound on one probe.
        unhealthy_threshold: Consecutive failed probes that eject.
        passive_threshold: Consecutive failed attempts in real traffic that eject.
        ejection_s: Shortest time out; doubles with each ejection in a row.
        max_ejection_s: Longest time out.
    """

    path: str = "/health"
    interval_s: float = 5.0
    recovery_interval_s: float = 1.0
    timeout_s: float = 1.0
    unhealthy_threshold: int = 2
    passive_threshold: int = 3
    ejection_s: float = 2.0
    max_ejection_s: float = 60.0
