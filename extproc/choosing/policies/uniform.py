"""Any endpoint, in proportion to capacity."""

from __future__ import annotations

from extproc.choosing.policy import ByTerms
from extproc.choosing.terms import Terms
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Snapshot


class Uniform(ByTerms):
    """`random`."""

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:  # noqa: ARG002
        """None: all rows are equal."""
        return {}
