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
        timeout_s: Bound on one probe; each that times out doubles the next one's, up to eight times this.
        unhealthy_threshold: Consecutive failed probes that eject.
        passive_threshold: Failures in a row, in real traffic, with which an endpoint that is alone in failing
            is ejected.
        ejection_s: Shortest time out; doubles with each ejection in a row.
        max_ejection_s: Longest time out.
        min_available_ratio: Share of a cluster's endpoints that stay available, rounded down but one at
            least, whatever fails but a refused connection; Envoy's panic threshold.
    """

    path: str = "/health"
    interval_s: float = 5.0
    recovery_interval_s: float = 1.0
    timeout_s: float = 1.0
    unhealthy_threshold: int = 2
    passive_threshold: int = 3
    ejection_s: float = 2.0
    max_ejection_s: float = 60.0
    min_available_ratio: float = 0.5
