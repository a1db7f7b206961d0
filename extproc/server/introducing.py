"""Make before break: a configuration is in force once every Envoy has the clusters that it leads to.

Rules:
    1. Envoys of other workers count as well: Envoy has one stream of clusters, to some worker, and asks all
       of them about requests. A worker that does not answer is waited for.
    2. Where no Envoy takes clusters from us (none is there; they are another house's), nothing is waited for.
    3. How long at most is not decided here: see `discovery.following`.
    4. Clusters that some Envoy refused leave the others at once, so that the next attempt is one.
    5. A worker that starts takes its first configuration as it is, but no request before the Envoys of those
       workers that are there have its clusters: they may not have read the files yet that it was started by.
    6. Of clusters that the configuration names, other sources than the files may list some only when asked:
       they are asked first, and what they list has to be in Envoy as well.
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

START_S = 3.0
"""Longest that a worker that starts waits for answers: as long as a change does."""


class Introducer(Protocol):
    """What sends Envoy clusters before they are in force; `Publisher`."""

    def introduce(self, config: Config, clusters: Mapping[str, Sequence[Endpoint]]) -> None:
        """Send them, in place of those sent so before."""

    def hurry(self, clusters: Sequence[str]) -> None:
        """Take away at once those that are to go."""


class Sources(Protocol):
    """Sources other than the files; `LiveSources`."""

    def foresee(self, config: Config | None) -> None:
        """Ask them for what this configuration names beside the one in force; None: for nothing."""

    def are_heard(self) -> bool:
        """They have said what they list of it."""


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
        sources: Asked for what they list of clusters to come.
        bus: To other workers; None if there are none.
        introduced: Called with the number of a configuration that may come into force, never within `begin`.
        spurned: Called likewise with one that some Envoy refuses, and why.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        ads: AdsServer,
        publisher: Introducer,
        sources: Sources,
        bus: Bus | None,
        introduced: Callable[[int], None],
        spurned: Callable[[int, Sequence[str]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._ads = ads
        self._publisher = publisher
        self._sources = sources
        self._bus = bus
        self._introduced = introduced
        self._spurned = spurned
        self._coming: Coming | None = None
        self._number = 0
        self._asked_for: frozenset[str] = frozenset()
        self._are_heard = True
        self._unanswered: set[int] = set()
        self._refused: dict[str, str] = {}
        self._former: dict[str, str] = {}  # refused, of what was introduced last
        self._questions: dict[int, _Question] = {}
        self._first: tuple[int, set[int], asyncio.Event] | None = None
        self._timer: asyncio.Handle | None = None
        if bus is not None:
            bus.questions.add(self._asked)
            bus.answers.add(self._answered)

    def begin(self, coming: Coming) -> None:
        """Introduce this in place of what was introduced before."""
        self._sources.foresee(coming.config)
        self._are_heard = self._sources.are_heard()
        self._coming = coming
        self._refused, self._former = {}, {}
        self._publisher.introduce(coming.config, coming.clusters)
        self._ask(coming.needed)
        self.look_soon()

    async def catch_up(self, clusters: Callable[[], frozenset[str]]) -> None:
        """Return when Envoys of the other workers that are there have these clusters, or after `START_S`."""
        if self._bus is None:
            return
        there, needed = await self._bus.met(), sorted(clusters())
        if not there or not needed:
            return
        self._number += 1
        self._first = number, silent, all_said = self._number, set(there), asyncio.Event()
        self._bus.ask(number, needed)
        try:
            async with asyncio.timeout(START_S):
                await all_said.wait()
        except TimeoutError:
            extra = {"clusters": needed, "silent_workers": sorted(silent)}
            _log.warning("starting before other workers' Envoys are known to have its clusters", extra=extra)
        finally:
            self._first = None

    def _ask(self, needed: frozenset[str]) -> None:
        """Ask other workers for these clusters, in place of those that they were asked for before."""
        self._number += 1
        self._asked_for, self._unanswered = needed, set()
        if needed and self._bus is not None:
            self._unanswered |= self._bus.ask(self._number, sorted(needed))

    def applied(self, config: Config) -> None:
        """A configuration came into force; if that is because its time was over, say so."""
        coming = self._coming
        if coming is None or coming.config is not config:
            return
        self._coming = None
        if not self._are_heard:
            unlisted = sorted(config.clusters_named() - coming.here.keys() - coming.clusters.keys())
            extra: dict[str, object] = {"clusters": unlisted}
            _log.warning("a source has not said what it lists of clusters that are named now", extra=extra)
            return
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
        if self._first is not None and number == self._first[0]:
            self._first[1].discard(answerer)
            if not self._first[1]:
                self._first[2].set()
        elif self._coming is not None and number == self._number:
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
        self._are_heard = self._sources.are_heard()
        if self._coming is not None and self._are_heard:
            self._look_after(self._coming)
        if self._timer is None and (self._coming is not None or self._questions):
            self._timer = asyncio.get_running_loop().call_later(POLL_S, self._look)

    def _look_after(self, coming: Coming) -> None:
        needed = coming.needed
        if needed != self._asked_for:  # a source has listed some meanwhile
            self._ask(needed)
        word = self._ads.word(needed)
        refused = {**self._refused, **word.refused}
        if refused:
            self._spurn(coming, refused)
        elif not word.lacked and not self._unanswered:
            self._coming = None
            self._introduced(coming.generation)

    def _spurn(self, coming: Coming, refused: Mapping[str, str]) -> None:
        self._coming = None
        self._former |= refused
        self._publisher.introduce(coming.config, {})
        self._sources.foresee(None)
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
            is_known = self._bus is not None and bool(refused or not word.lacked)
            is_said = is_known and self._bus is not None and self._bus.answer(asker, question.number, refused)
            if is_said or now_s >= question.until_s:
                del self._questions[asker]
