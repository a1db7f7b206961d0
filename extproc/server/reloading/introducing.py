"""Make before break: a configuration is in force once every Envoy has the clusters that it leads to.

Rules:
    1. Who is waited for and how long at most, `acknowledging` says; `discovery.following` sees to it.
    2. Clusters that some Envoy refused leave the others at once, so that the next attempt is one.
    3. A worker that starts takes its first configuration as it is, but no request before the Envoys of those
       workers that are there have its clusters: they may not have read the files yet that it was started by.
    4. Of clusters that the configuration names, other sources than the files may list some only when asked:
       they are asked first, and what they list has to be in Envoy as well. What they list later still is
       hidden from requests meanwhile (`late_clusters`).
    5. Other TLS for a cluster that Envoy has is tried by a cluster beside it, which it may refuse as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from extproc.config.schema import Config
from extproc.server.envoys.acknowledging import MOST_WAIT_S, Acknowledgements, Asked
from extproc.server.reloading.applying import Coming
from extproc.values.endpoints import Endpoint
from extproc.xds.publications import tried_by

_log = logging.getLogger("tokenway.configuration")


class Introducer(Protocol):
    """What sends Envoy clusters before they are in force; `Publisher`."""

    def introduce(
        self, config: Config, clusters: Mapping[str, Sequence[Endpoint]], tried: Iterable[str] = ()
    ) -> None:
        """Send them, in place of those sent so before, and trials of the TLS of others."""

    def hurry(self, clusters: Sequence[str]) -> None:
        """Take away at once those that are to go."""


class Sources(Protocol):
    """Sources other than the files; `LiveSources`."""

    def foresee(self, config: Config | None) -> None:
        """Ask them for what this configuration names beside the one in force; None: for nothing."""

    def are_heard(self) -> bool:
        """They have said what they list of it."""


class Introductions:
    """Introduces configurations, the latest alone.

    Args:
        acknowledgements: Say which clusters Envoys have.
        publisher: Sends them clusters.
        sources: Asked for what they list of clusters to come.
        introduced: Called with the number of a configuration that may come into force, never within `begin`.
        spurned: Called likewise with one that some Envoy refuses, and why.
    """

    def __init__(
        self,
        acknowledgements: Acknowledgements,
        publisher: Introducer,
        sources: Sources,
        introduced: Callable[[int], None],
        spurned: Callable[[int, Sequence[str]], None],
    ) -> None:
        self._acknowledgements = acknowledgements
        self._publisher = publisher
        self._sources = sources
        self._introduced = introduced
        self._spurned = spurned
        self._coming: Coming | None = None
        self._asked: Asked | None = None
        self._are_heard = True

    def begin(self, coming: Coming) -> None:
        """Introduce this in place of what was introduced before."""
        self._sources.foresee(coming.config)
        self._are_heard = self._sources.are_heard()
        self._coming = coming
        self._acknowledgements.former.clear()
        self._publisher.introduce(coming.config, coming.clusters, coming.tried)
        self._asked = self._acknowledgements.instead(self._asked, coming.needed)

    async def catch_up(self, clusters: Callable[[], frozenset[str]]) -> None:
        """Return when Envoys of other workers that are there have these clusters, or after `MOST_WAIT_S`."""
        asked = await self._acknowledgements.ask_those_there(clusters)
        if asked is None:
            return
        try:
            async with asyncio.timeout(MOST_WAIT_S):
                await asked.answered.wait()
        except TimeoutError:
            extra = {"clusters": sorted(asked.clusters), "silent_workers": sorted(asked.unanswered)}
            _log.warning("starting before other workers' Envoys are known to have its clusters", extra=extra)
        finally:
            self._acknowledgements.close(asked)

    def applied(self, config: Config) -> None:
        """A configuration came into force; if that is because its time was over, say so."""
        coming = self._coming
        if coming is None or coming.config is not config:
            return
        asked = self._asked
        self._end()
        if not self._are_heard:
            unlisted = sorted(config.clusters_named() - coming.here.keys() - coming.clusters.keys())
            extra: dict[str, object] = {"clusters": unlisted}
            _log.warning("a source has not said what it lists of clusters that are named now", extra=extra)
            return
        assert asked is not None, "it is coming"
        lacked = sorted({tried_by(name) for name in self._acknowledgements.word(asked).lacked})
        extra = {"clusters": lacked, "silent_workers": sorted(asked.unanswered)}
        _log.warning("an Envoy has not acknowledged clusters that requests go to now", extra=extra)

    def stop(self) -> None:
        """Introduce nothing more."""
        self._end()

    def look(self) -> None:
        """Envoys, or sources, may say something else than before."""
        self._are_heard = self._sources.are_heard()
        coming, asked = self._coming, self._asked
        if coming is None or asked is None or not self._are_heard:
            return
        needed = coming.needed
        if needed != asked.clusters:  # a source has listed some meanwhile
            asked = self._asked = self._acknowledgements.instead(asked, needed)
        word = self._acknowledgements.word(asked)
        if word.refused:
            self._spurn(coming, word.refused)
        elif not word.lacked and not asked.unanswered:
            self._end()
            self._introduced(coming.generation)

    def _end(self) -> None:
        self._coming = None
        if self._asked is not None:
            self._acknowledgements.close(self._asked)
            self._asked = None

    def _spurn(self, coming: Coming, refused: Mapping[str, str]) -> None:
        self._end()
        self._acknowledgements.former.update(refused)
        self._publisher.introduce(coming.config, {})
        self._sources.foresee(None)
        self._publisher.hurry(list(refused))
        words_of = {tried_by(name): words for name, words in refused.items()}
        problems = [f"Envoy refuses the cluster `{name}`: {words}" for name, words in words_of.items()]
        self._spurned(coming.generation, problems)
