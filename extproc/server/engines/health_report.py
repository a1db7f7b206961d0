"""Changes of an endpoint's health, in the log and in the metrics."""

from __future__ import annotations

import logging
from enum import StrEnum

from extproc.health.states import HealthState, Transition
from extproc.observing.metrics.collector import Metrics
from extproc.values.evidence import FailureKind

_log = logging.getLogger("tokenway.worker")


class EjectionCause(StrEnum):
    """Why an endpoint was ejected, but for what failed in traffic; a metric label."""

    PROBE = "probe_failed"
    ASLEEP = "asleep"


_TRAFFIC_CAUSES = {kind.value: kind for kind in FailureKind}


def ejection_cause(reason: str) -> EjectionCause | FailureKind:
    """The cause behind a `Transition.reason`; a metric label."""
    if reason.startswith("probe"):
        return EjectionCause.PROBE
    return _TRAFFIC_CAUSES.get(reason, EjectionCause.ASLEEP)


class HealthReport:
    """Reports.

    Args:
        metrics: Count ejections.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def changed(self, transition: Transition) -> None:
        """Report one change."""
        if transition.after is HealthState.EJECTED:
            self._metrics.ejected(transition.key, ejection_cause(transition.reason))
        _log.warning(
            "endpoint health changed",
            extra={
                "endpoint": transition.key,
                "before": transition.before,
                "after": transition.after,
                "reason": transition.reason,
            },
        )
