"""The fewest requests in flight, relative to capacity."""

from __future__ import annotations

from operator import truediv

from extproc.choosing.policy import ByTerms
from extproc.choosing.terms import Terms
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Snapshot


class LeastRequest(ByTerms):
    """`least_request`."""

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:  # noqa: ARG002
        """One term, `requests`: in-flight requests per weight, negated."""
        return {"requests": [-row for row in map(truediv, snapshot.requests, snapshot.weights)]}
