"""Trackers of the health of four endpoints, and what happens to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from extproc.health.failures import MAY_BE_THE_CLIENTS
from extproc.health.settings import HealthSettings
from extproc.health.states import Transition
from extproc.health.tracker import HealthTracker
from extproc.values.endpoints import Endpoint
from extproc.values.evidence import FailureKind
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

A, B, C, D = (EndpointKey(f"uid/{i}") for i in (1, 2, 3, 4))


SETTINGS = HealthSettings()


NOT_REFUSED = [kind for kind in FailureKind if kind is not FailureKind.CONNECT_FAILURE]


ENDPOINTS_FAULTS = [
    kind for kind in NOT_REFUSED if kind not in {*MAY_BE_THE_CLIENTS, FailureKind.MISSING_MODEL}
]


def endpoint(key: EndpointKey, cluster: str = "m", *, draining: bool = False) -> Endpoint:
    """An endpoint of the configuration."""
    return Endpoint(key, cluster, Address("10.0.0.1", 8000), draining=draining)


def replace_endpoints(
    built: HealthTracker, endpoints: Iterable[Endpoint], now_s: float = 0.0
) -> tuple[Transition, ...]:
    """These are all endpoints there are now."""
    now: dict[EndpointKey, list[Endpoint]] = {key: [] for key in (A, B, C, D)}
    for one in endpoints:
        now[one.key].append(one)
    return built.update(now, now_s)


def tracker(*keys: EndpointKey, settings: HealthSettings = SETTINGS) -> HealthTracker:
    """A tracker of healthy endpoints, all of one cluster."""
    built = HealthTracker(settings)
    replace_endpoints(built, [endpoint(key) for key in keys])
    return built


def fail(built: HealthTracker, key: EndpointKey, kind: FailureKind, times: int, now_s: float = 0.0) -> None:
    """Let real traffic fail so many times."""
    for _ in range(times):
        built.attempt_failed(key, kind, now_s)


def refuse(built: HealthTracker, key: EndpointKey, now_s: float = 0.0) -> Transition:
    """A connection is refused, which ejects."""
    (transition,) = built.attempt_failed(key, FailureKind.CONNECT_FAILURE, now_s)
    return transition


def candidates(built: HealthTracker, keys: Sequence[EndpointKey], now_s: float) -> list[EndpointKey]:
    """What a router may choose from: as `routing.scheduling` does it."""
    available = [key for key in keys if built.is_available(key)]
    doubted = built.doubted("")
    trusted = [key for key in available if key not in doubted or built.trial_due(key, "", now_s)]
    return trusted or available
