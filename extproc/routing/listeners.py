"""Who listens to the endings of every worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from extproc.discovery.fleet import Fleet
from extproc.health.evidence import HealthEvidence
from extproc.observing.ending_counts import EndingCounts
from extproc.routing.books import EndingBooks
from extproc.routing.endings import Endings
from extproc.values.endings import EndingListener
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey


def endings_of(
    books: EndingBooks,
    fleet: Fleet,
    others: Sequence[EndingListener],
    on_fault: Callable[[Exception], None],
) -> Endings:
    """Endings that keep a worker's books.

    Args:
        books: The books.
        fleet: Knows who is at an address.
        others: Who listens beside those that every worker has.
        on_fault: Told of each exception that a listener raised.
    """

    def failed(endpoint: EndpointKey, kind: FailureKind) -> None:
        books.endpoints.failed(endpoint)
        books.recorder.endpoint_failed(endpoint, kind)

    evidence = HealthEvidence(books.health, books.poison, failed, books.recorder.poison, books.on_transition)
    listeners = (
        evidence.ended,
        books.history.ended,
        books.stored.ended,
        books.teaching.ended,
        books.records.ended,
        books.endpoints.ended,
        books.rivals.ended,
        EndingCounts(books.recorder).ended,
        *others,
    )
    return Endings(
        books.running,
        fleet,
        books.engines.kv_tokens,
        books.recorder.access_log_unmatched,
        listeners,
        [evidence.attempt_failed],
        on_fault,
    )
