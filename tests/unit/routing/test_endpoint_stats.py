"""Running totals per endpoint, as endings make them."""

from __future__ import annotations

from extproc.routing.endpoint_stats import EndpointStatsTable
from extproc.values.evidence import FailureKind
from tests.unit.ended import A, B, ending, refusal, sent


def test_answers_and_failures_are_counted_where_they_were() -> None:
    """Of what was not answered, or was refused, nothing is served; only what is configured has totals."""
    table = EndpointStatsTable()
    table.retain([A])
    table.ended(ending(sent(), ttft_s=0.2))
    table.ended(ending(sent(), ttft_s=None))
    table.ended(ending(sent(), FailureKind.RESET))
    table.ended(refusal())
    table.failed(A)
    table.failed(B)
    assert (table[A].served, table[A].failures, table[A].ttft_ewma_s) == (2, 1, 0.2)
    table.retain([A, B])
    assert (table[B].served, table[B].failures) == (0, 0)
