"""One endpoint after the other, in proportion to capacity."""

from __future__ import annotations

from heapq import nlargest

from extproc.choosing.terms import Terms
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Choice, Rng, Snapshot


class RoundRobin:
    """`round_robin`: draws nothing."""

    needs_engines = False
    may_wait = False
    takes_turns = True

    def terms(self, snapshot: Snapshot, settings: LoadBalancing) -> Terms:  # noqa: ARG002
        """None: it does not score."""
        return {}

    def choose(self, snapshot: Snapshot, settings: LoadBalancing, rng: Rng, turn: int) -> Choice:  # noqa: ARG002
        """The row owed most; by `turn` alone where the snapshot does not say what each row is owed."""
        rows = len(snapshot.keys)
        wanted = min(1 + settings.fallbacks, rows)
        owed = snapshot.owed
        if owed:
            return Choice(tuple(nlargest(wanted, range(rows), key=owed.__getitem__)), None, 1)
        return Choice(tuple((turn + step) % rows for step in range(wanted)), None, 1)
