"""Have all Envoys acknowledged some clusters? This worker knows of its own, and asks other workers.

Rules:
    1. Envoys of other workers count as well: Envoy has one stream of clusters, to some worker, and asks all
       of them about requests. A worker that is there and does not answer is waited for. One that is gone is
       not, its Envoys are expected here (`xds.ads`); one that comes meanwhile is asked, too.
    2. Where no Envoy takes clusters from us (none is there; they are another house's), nothing is waited for.
    3. Nobody waits for longer than `MOST_WAIT_S`; those who wait see to that.
    4. Another worker is answered when Envoys here have all that it asks for, or refused some, and not after
       `ANSWER_S`. Endpoints that it asks for this worker has to know, too: it may read the files, or hear of
       them by a control plane, later than the other one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import MappingProxyType

from extproc.discovery.routable import Places
from extproc.listeners import Listeners
from extproc.server.exchanging.bus import Bus
from extproc.values.endpoints import Endpoint
from extproc.xds.ads import AdsServer, Word

POLL_S = 0.05
"""An Envoy that does not come back says nothing: that its time is over is looked for."""

MOST_WAIT_S = 3.0
"""Longest that a configuration, a cluster that comes late or a worker that starts waits for Envoys. It takes
some 10 ms where they answer."""

ANSWER_S = 5.0
"""Longer than any worker waits for an answer."""


@dataclass(eq=False, slots=True)
class Asked:
    """What is asked here.

    Attributes:
        clusters: Have all Envoys these?
        served: Those of them that must have endpoints, and where: all of these, or any where none is said.
        number: Of the question, as other workers have it.
        unanswered: Workers that have not said so.
        refused: Clusters that their Envoys refused, with the words.
        answered: Set while no answer is missing.
    """

    clusters: frozenset[str]
    served: Places
    number: int
    unanswered: set[int]
    refused: dict[str, str] = field(default_factory=dict)
    answered: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class _Question:
    """The same by another worker."""

    clusters: frozenset[str]
    served: Mapping[str, frozenset[str]]
    until_s: float


class Acknowledgements:
    """Asks and answers.

    Args:
        ads: Envoys of this worker.
        bus: To other workers; None if there are none.
        fleet: Cluster name to its endpoints: a view that follows the fleet.
        clock: Monotonic seconds.

    Attributes:
        looked: Notified, while something is asked, when the answer may be another; and now and then.
        former: Clusters that Envoys refused and that were taken away since, with the words: others get them
            as the answer. Kept by what took them away.
    """

    def __init__(
        self,
        ads: AdsServer,
        bus: Bus | None,
        fleet: Mapping[str, Sequence[Endpoint]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ads = ads
        self._bus = bus
        self._fleet = fleet
        self._clock = clock
        self._number = 0
        self._open: dict[int, Asked] = {}
        self._questions: dict[tuple[int, int], _Question] = {}
        self._timer: asyncio.Handle | None = None
        self.looked: Listeners[[]] = Listeners()
        self.former: dict[str, str] = {}
        if bus is not None:
            bus.questions.add(self._asked)
            bus.answers.add(self._answered)
            bus.came.add(self._came)
            bus.away.add(self._away)

    def ask(self, clusters: AbstractSet[str], served: Places = MappingProxyType({})) -> Asked:
        """Ask; to be closed. Arguments as in `Asked`."""
        self._number += 1
        asked = Asked(frozenset(clusters), served, self._number, set())
        self._open[asked.number] = asked
        if clusters and self._bus is not None:
            asked.unanswered |= self._bus.ask(asked.number, sorted(clusters), _spelled(served))
        if not asked.unanswered:
            asked.answered.set()
        self.look_soon()
        return asked

    def instead(self, asked: Asked | None, clusters: AbstractSet[str]) -> Asked:
        """Ask in place of what was asked before, if anything was."""
        if asked is not None:
            self.close(asked)
        return self.ask(clusters)

    async def ask_those_there(self, clusters: Callable[[], AbstractSet[str]]) -> Asked | None:
        """Ask the other workers that are there for these with their endpoints; None if nobody, or nothing."""
        there = frozenset[int]() if self._bus is None else await self._bus.met()
        needed = clusters()
        if not there or not needed:
            return None
        return self.ask(needed, {name: frozenset() for name in needed if self._fleet.get(name)})

    def close(self, asked: Asked) -> None:
        """The answer does not matter any more."""
        self._open.pop(asked.number, None)

    def word(self, asked: Asked) -> Word:
        """What all Envoys say; those of workers that have not answered may lack anything."""
        word = self._ads.word(asked.clusters, asked.served)
        return Word(word.lacked, {**asked.refused, **word.refused})

    def stop(self) -> None:
        """Answer nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._open.clear()
        self._questions.clear()

    def look_soon(self) -> None:
        """Envoys may say something else than before: look in the next turn, if anything is waited for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._open or self._questions:
            self._timer = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._timer = None
        self._answer_others()
        if self._open:
            self.looked.notify()
        if self._timer is None and (self._open or self._questions):
            self._timer = asyncio.get_running_loop().call_later(POLL_S, self._look)

    def _asked(self, asker: int, number: int, clusters: list[str], served: dict[str, list[str]]) -> None:
        until_s, places = self._clock() + ANSWER_S, {name: frozenset(of) for name, of in served.items()}
        self._questions[asker, number] = _Question(frozenset(clusters), places, until_s)
        self.look_soon()

    def _answered(self, answerer: int, number: int, refused: dict[str, str]) -> None:
        asked = self._open.get(number)
        if asked is not None:
            asked.refused |= refused
            self._settle(asked, answerer)

    def _came(self, worker: int) -> None:
        assert self._bus is not None, "it says so"
        for asked in self._open.values():
            if asked.clusters:
                clusters, served = sorted(asked.clusters), _spelled(asked.served)
                asked.unanswered |= self._bus.ask(asked.number, clusters, served, worker)
                if asked.unanswered:
                    asked.answered.clear()

    def _away(self, worker: int) -> None:
        for asked in self._open.values():
            self._settle(asked, worker)

    def _settle(self, asked: Asked, worker: int) -> None:
        """Nothing is to come from this worker any more."""
        asked.unanswered.discard(worker)
        if not asked.unanswered:
            asked.answered.set()
        self.look_soon()

    def _answer_others(self) -> None:
        """Answer those whose clusters all Envoys here have, or some refused; forget what is old."""
        now_s = self._clock()
        for (asker, number), question in list(self._questions.items()):
            word = self._ads.word(question.clusters, question.served)
            refused = {name: said for name, said in self.former.items() if name in question.clusters}
            refused |= word.refused
            is_unheard = self._ads.has_envoys and not self._knows(question.served)
            is_known = self._bus is not None and bool(refused or not (word.lacked or is_unheard))
            is_said = is_known and self._bus is not None and self._bus.answer(asker, number, refused)
            if is_said or now_s >= question.until_s:
                del self._questions[asker, number]

    def _knows(self, served: Mapping[str, frozenset[str]]) -> bool:
        here = {name: {str(endpoint.address) for endpoint in self._fleet.get(name, ())} for name in served}
        return all(here[name] and here[name] >= places for name, places in served.items())


def _spelled(places: Places) -> dict[str, list[str]]:
    return {name: sorted(map(str, addresses)) for name, addresses in places.items()}
