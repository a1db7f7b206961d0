"""Make before break: a configuration is in force once every Envoy has the clusters that it leads to.

Rules:
    1. Envoys of other workers count as well: Envoy has one stream of clusters, to some worker, and asks all
       of them about requests. A worker that does not answer is waited for.
    2. Where no Envoy takes clusters from us (none is there; they are another house's), nothing is waited for.
    3. How long at most is not decided here: see `discovery.following`.
    4. Clusters that some Envoy refused leave the others at once, so that the next attempt is one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from extproc.config.schema import Config
from extproc.server.applying import Coming
from extproc.server.bus import Bus
from extproc.values.endpoints import Endpoint
from extproc.xds.ads import AdsServer

_log = logging.getLogger("tokenway.configuration")


POLL_S = 0.05
"""An Envoy that does not come back says nothing: that its time is over is looked for."""

ANSWER_S = 5.0
"""Longer than any worker waits for an answer."""


class Introducer(Protocol):
    """What sends Envoy clusters before they are in force; `Publisher`."""

    def introduce(self, config: Config, clusters: Mapping[str, Sequence[Endpoint]]) -> None:
        """Send them, in place of those sent so before."""

    def hurry(self, clusters: Sequence[str]) -> None:
        """Take away at once those that are to go."""


@dataclass(frozen=True, slots=True)
class _Question:
    """Of another worker: have Envoys here these clusters?"""

    number: int
    clusters: list[str]
    until_s: float


class Introductions:
    """Introduces configurations, the latest alone, and answers other workers.

    Args:
        ads: Envoys of this worker.
        publisher: Sends them clusters.
        bus: To other workers; None if there are none.
        introduced: Called with the number of a configuration that may come into force, never within `begin`.
        spurned: Called likewise with one that some Envoy refuses, and why.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        ads: AdsServer,
        publisher: Introducer,
        bus: Bus | None,
        introduced: Callable[[int], None],
        spurned: Callable[[int, Sequence[str]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._ads = ads
        self._publisher = publisher
        self._bus = bus
        self._introduced = introduced
        self._spurned = spurned
        self._coming: Coming | None = None
        self._unanswered: set[int] = set()
        self._refused: dict[str, str] = {}
        self._former: dict[str, str] = {}  # refused, of what was introduced last
        self._questions: dict[int, _Question] = {}
        self._timer: asyncio.Handle | None = None
        if bus is not None:
            bus.questions.add(self._asked)
            bus.answers.add(self._answered)

    def begin(self, coming: Coming) -> None:
        """Introduce this in place of what was introduced before; wait only if any cluster is needed."""
        self._coming = coming if coming.needed else None
        self._refused, self._former = {}, {}
        self._publisher.introduce(coming.config, coming.clusters)
        self._unanswered = set()
        if self._coming is not None and self._bus is not None:
            self._unanswered |= self._bus.ask(coming.generation, sorted(coming.needed))
        self.look_soon()

    def applied(self, config: Config) -> None:
        """A configuration came into force; if that is because its time was over, say so."""
        coming = self._coming
        if coming is None or coming.config is not config:
            return
        self._coming = None
        lacked = sorted(self._ads.word(coming.needed).lacked)
        extra = {"clusters": lacked, "silent_workers": sorted(self._unanswered)}
        _log.warning("an Envoy has not acknowledged clusters that requests go to now", extra=extra)

    def stop(self) -> None:
        """Introduce nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._coming = None
        self._questions.clear()

    def _asked(self, asker: int, number: int, clusters: list[str]) -> None:
        self._questions[asker] = _Question(number, clusters, self._clock() + ANSWER_S)
        self.look_soon()

    def _answered(self, answerer: int, number: int, refused: dict[str, str]) -> None:
        if self._coming is not None and number == self._coming.generation:
            self._unanswered.discard(answerer)
            self._refused |= refused
            self.look_soon()

    def look_soon(self) -> None:
        """Envoys may say something else than before: look in the next turn, if anything is waited for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._coming is not None or self._questions:
            self._timer = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._timer = None
        self._answer_others()
        coming = self._coming
        if coming is not None:
            word = self._ads.word(coming.needed)
            refused = {**self._refused, **word.refused}
            if refused:
                self._spurn(coming, refused)
            elif not word.lacked and not self._unanswered:
                self._coming = None
                self._introduced(coming.generation)
        if self._timer is None and (self._coming is not None or self._questions):
            self._timer = asyncio.get_running_loop().call_later(POLL_S, self._look)

    def _spurn(self, coming: Coming, refused: Mapping[str, str]) -> None:
        self._coming = None
        self._former |= refused
        self._publisher.introduce(coming.config, {})
        self._publisher.hurry(list(refused))
        problems = [f"Envoy refuses the cluster `{name}`: {words}" for name, words in refused.items()]
        self._spurned(coming.generation, problems)

    def _answer_others(self) -> None:
        """Answer those whose clusters all Envoys here have, or some refused; forget what is old."""
        now_s = self._clock()
        for asker, question in list(self._questions.items()):
            word = self._ads.word(question.clusters)
            refused = {name: said for name, said in self._former.items() if name in question.clusters}
            refused |= word.refused
            if self._bus is not None and (refused or not word.lacked):
                self._bus.answer(asker, question.number, refused)
            elif now_s < question.until_s:
                continue
            del self._questions[asker]
