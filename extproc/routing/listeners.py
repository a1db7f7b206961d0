"""The listeners to endings that every worker has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from extproc.discovery.fleet import Fleet
from extproc.health.evidence import HealthEvidence
from extproc.observing.ending_counts import EndingCounts
from extproc.routing.endings import Endings
from extproc.routing.state import EndingState
from extproc.values.endings import EndingListener
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey


def endings_of(
    state: EndingState,
    fleet: Fleet,
    others: Sequence[EndingListener],
    on_fault: Callable[[Exception], None],
) -> Endings:
    """Endings that keep a worker's state.

    Args:
        state: The state.
        fleet: Knows which endpoint is at an address.
        others: Listeners beside those that every worker has.
        on_fault: Called with each exception that a listener raised.
    """

    def failed(endpoint: EndpointKey, kind: FailureKind) -> None:
        state.endpoints.failed(endpoint)
        state.recorder.endpoint_failed(endpoint, kind)

    evidence = HealthEvidence(state.health, state.poison, failed, state.recorder.poison, state.on_transition)
    listeners = (
        evidence.ended,
        state.history.ended,
        state.stored.ended,
        state.teaching.ended,
        state.records.ended,
        state.endpoints.ended,
        state.rivals.ended,
        EndingCounts(state.recorder).ended,
        *others,
    )
    return Endings(
        state.running,
        fleet,
        state.engines.kv_tokens,
        state.recorder.access_log_unmatched,
        listeners,
        [evidence.attempt_failed],
        on_fault,
    )
