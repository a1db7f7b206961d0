"""Endpoints that come to clusters to which rules lead: requests see them once Envoy has them.

Rules:
    1. Which are hidden, `discovery.routable` says. They are shown in the turn in which they came
       where no Envoy has to acknowledge them, else when all have, and after `MOST_WAIT_S` in any case.
    2. A worker that starts hides nothing: it takes no request before Envoys have what it starts with
       (`introducing`).
    3. What came in one turn is asked for, and shown, together. What goes meanwhile is asked for no more:
       should it come again, it comes anew.
    4. Where none of a cluster's endpoints that requests see is available, those that are hidden are shown: by
       waiting nothing is won.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from extproc.discovery.routable import Places, RoutableClusters, within, without
from extproc.server.envoys.acknowledging import MOST_WAIT_S, Acknowledgements, Asked
from metadata_center.types import EndpointKey

_log = logging.getLogger("tokenway.fleet")


@dataclass(frozen=True, slots=True)
class _Late:
    """What came in one turn."""

    asked: Asked
    until_s: float


class LateClusters:
    """Shows endpoints that are hidden.

    Args:
        routable: Hides them.
        acknowledgements: Say which Envoys have.
        shown: Called with the clusters of those that requests see from now on.
        is_available: Whether requests may be sent to an endpoint, by its health.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        routable: RoutableClusters,
        acknowledgements: Acknowledgements,
        shown: Callable[[AbstractSet[str]], None],
        is_available: Callable[[EndpointKey], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routable = routable
        self._acknowledgements = acknowledgements
        self._shown = shown
        self._is_available = is_available
        self._clock = clock
        self._late: list[_Late] = []

    def start(self) -> None:
        """Hide from now on what Envoy does not have."""
        self._routable.hide()

    def stop(self) -> None:
        """Show nothing more."""
        self._late.clear()

    def settled(self) -> None:
        """The fleet is another, and published: ask for what is newly hidden."""
        hidden = self._routable.hidden
        if not hidden and not self._late:
            return
        self._late = [kept for late in self._late if (kept := self._kept(late, hidden)) is not None]
        new = without(hidden, [late.asked.served for late in self._late])
        if new:
            self._late.append(_Late(self._acknowledgements.ask(new.keys(), new), self._clock() + MOST_WAIT_S))
        self.look()

    def _kept(self, late: _Late, hidden: Places) -> _Late | None:
        """What of it is still hidden, for as long as before."""
        left = within(late.asked.served, hidden)
        if left == late.asked.served:
            return late
        self._acknowledgements.close(late.asked)
        return _Late(self._acknowledgements.ask(left.keys(), left), late.until_s) if left else None

    def look(self) -> None:
        """Show what Envoys have by now, or had their time for."""
        now_s, missed = self._clock(), self._missed()
        self._routable.show(missed)
        shown = set(missed)
        for late in list(self._late):
            word = self._acknowledgements.word(late.asked)
            is_over = now_s >= late.until_s
            if (word.lacked or late.asked.unanswered) and not is_over:
                continue
            self._late.remove(late)
            self._acknowledgements.close(late.asked)
            places = within(late.asked.served, self._routable.hidden)
            if is_over and places:
                extra = {"clusters": sorted(places), "silent_workers": sorted(late.asked.unanswered)}
                _log.warning("an Envoy has not acknowledged clusters that requests go to now", extra=extra)
            self._routable.show(places)
            shown |= places.keys()
        if shown:
            self._shown(shown)  # which may settle the fleet anew

    def _missed(self) -> Places:
        """What is hidden of clusters that requests see endpoints of, and none that is available."""
        return {
            name: addresses
            for name, addresses in self._routable.hidden.items()
            if (seen := self._routable.clusters.get(name))
            and not any(self._is_available(endpoint.key) for endpoint in seen)
        }
