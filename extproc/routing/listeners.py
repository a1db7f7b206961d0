"""Who listens to the endings of every worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from extproc.health.evidence import HealthEvidence
from extproc.health.states import Transition
from extproc.observing.ending_counts import EndingCounts
from extproc.routing.endings import Endings
from extproc.routing.state import State
from extproc.values.endings import EndingListener
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey


def endings_of(
    state: State,
    on_transition: Callable[[Transition], None],
    others: Sequence[EndingListener],
    on_fault: Callable[[Exception], None],
) -> Endings:
    """Endings that keep a worker's books.

    Args:
        state: The books.
        on_transition: Told when an endpoint's health changed.
        others: Who listens beside those that every worker has.
        on_fault: Told of each exception that a listener raised.
    """

    def failed(endpoint: EndpointKey, kind: FailureKind) -> None:
        state.endpoints.failed(endpoint)
        state.metrics.endpoint_failed(endpoint, kind)

    evidence = HealthEvidence(state.health, state.poison, failed, state.metrics.poison, on_transition)
    listeners = (
        evidence.ended,
        state.history.ended,
        state.stored.ended,
        state.teaching.ended,
        state.records.ended,
        state.endpoints.ended,
        EndingCounts(state.metrics).ended,
        *others,
    )
    return Endings(state, listeners, [evidence.attempt_failed], on_fault)
