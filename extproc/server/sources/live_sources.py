"""The sources of endpoints that have connections: started together, waited for once, shown as they stand.

Rules:
    1. The start waits for the first state of each source, `wait_s` at most: a gateway that starts while a
       control plane is away serves with what the others list. The log says so.
    2. Which sources there are is settled by the configuration of the start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from extproc.config.schema import Config
from extproc.config.sections.discovery import Discovery
from extproc.discovery.listed import Listed
from extproc.discovery.live import LiveSource, SourceStatus
from extproc.values.pool_policies import PoolPolicies

_log = logging.getLogger("tokenway.discovery")


class LiveSources:
    """All of one worker.

    Args:
        sources: Their names are distinct.
        wait_s: Longest that the start waits for their first states.
    """

    def __init__(self, sources: Iterable[LiveSource], wait_s: float) -> None:
        self._sources = tuple(sources)
        self._wait_s = wait_s
        self._firsts: dict[asyncio.Task[None], str] = {}

    def follow(self, config: Config) -> None:
        """See `applying.Apply`."""
        for source in self._sources:
            source.follow(config)

    def foresee(self, config: Config | None) -> None:
        """See `LiveSource`."""
        for source in self._sources:
            source.foresee(config)

    def are_heard(self) -> bool:
        """Each has said what it lists of clusters that are only foreseen."""
        return all(source.is_heard() for source in self._sources)

    async def start(self) -> None:
        """Start all; return when each has reported its first state, or the wait is over."""
        for source in self._sources:
            await source.start()
        if not self._sources:
            return
        self._firsts = {
            asyncio.create_task(source.first_state(), name=source.name): source.name
            for source in self._sources
        }
        _, late = await asyncio.wait(self._firsts, timeout=self._wait_s)
        for task in late:
            extra = {"source": self._firsts[task], "waited_s": self._wait_s}
            _log.warning("a source of endpoints says nothing yet: starting without it", extra=extra)

    async def stop(self) -> None:
        """Stop all."""
        for task in self._firsts:
            task.cancel()
        await asyncio.gather(*self._firsts, return_exceptions=True)
        await asyncio.gather(*(source.stop() for source in self._sources))

    def are_known(self) -> bool:
        """Each has reported its first state."""
        return all(task.done() for task in self._firsts)

    def statuses(self) -> Mapping[str, SourceStatus]:
        """How each stands now, by name."""
        return {source.name: source.status() for source in self._sources}


def live_sources_of(
    discovery: Discovery,
    index: int,
    base: Path,
    report: Callable[[str, Mapping[str, Sequence[Listed] | None]], None],
    on_policies: Callable[[PoolPolicies], None],
) -> list[LiveSource]:
    """The sources that a configuration asks for.

    What speaks to a control plane is imported only where there is one.

    Args:
        discovery: The settings of the start.
        index: Which worker.
        base: Folder of the configuration, for the files that it names.
        report: Takes the name of a source and what some of its clusters have now.
        on_policies: Called with what Kubernetes says of requests.

    Raises:
        ConfigError: The Kubernetes API cannot be reached from here.
    """
    sources: list[LiveSource] = []
    if discovery.istio is not None:
        from extproc.server.sources.istio_source import IstioSource

        sources.append(IstioSource(discovery.istio, index, partial(report, IstioSource.name)))
    if discovery.kubernetes is not None:
        from extproc.server.sources.kubernetes_source import KubernetesSource, kubernetes_source

        report_pods = partial(report, KubernetesSource.name)
        sources.append(kubernetes_source(discovery.kubernetes, base, report_pods, on_policies))
    return sources
