"""A configuration comes into force: each owner applies what is its own, in one turn of the loop.

Rules:
    1. Owners follow a configuration that differs from the one in force. One that was read anew and says the
       same changes nothing but the files that it names.
    2. What the files list is a source of the fleet like any other: it is the fleet's difference that is
       followed then, not the files.
    3. Make before break: clusters are made known before the configuration that brings them is in force, and
       what waits for a cluster hears that it goes before it is gone. A cluster gets endpoints before it loses
       others (`discovery.swaps`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from extproc.config.schema import Config
from extproc.discovery.fleet import Difference, Fleet
from extproc.discovery.listed import Listed
from extproc.discovery.resolution import FILES, Resolution
from extproc.discovery.routable import RoutableClusters
from extproc.discovery.swaps import Swaps
from extproc.listeners import Listeners
from extproc.values.endpoints import Endpoint
from extproc.values.pool_policies import PoolPolicies
from extproc.xds.publications import trial_of

Apply = Callable[[Config], None]
"""Makes one owner follow. It neither awaits nor fails: a change is in force as a whole. The first one alone
may raise, which leaves all as it was."""


@dataclass(frozen=True, slots=True)
class Coming:
    """A configuration that is to come into force.

    Attributes:
        generation: Its number.
        config: Its settings.
        clusters: Those that the fleet gets by it.
        here: Those that the fleet has: a view that follows it, for other sources may list some meanwhile.
        led_to: Those of them that the one in force leads to.
        tried: Those that are listed and get other TLS by it than Envoy may have, or the same by other files.
    """

    generation: int
    config: Config
    clusters: Mapping[str, Sequence[Endpoint]]
    here: Mapping[str, Sequence[Endpoint]]
    led_to: frozenset[str]
    tried: frozenset[str] = frozenset()

    @property
    def needed(self) -> frozenset[str]:
        """Those of all clusters that are listed now that it leads to, and the one in force does not.

        And the trials of those that get other TLS.
        """
        listed = self.here.keys() | self.clusters.keys()
        return (self.config.clusters_named() & listed) - self.led_to | set(map(trial_of, self.tried))


class Owners:
    """What follows the configuration, and what the fleet.

    Attributes:
        fleet: All endpoints.
        routable: What requests see of it.
        read: Notified of each configuration that was read, whether it differs or not.
        changes: Notified of what is different of the fleet.
        coming: Notified of a configuration before it is in force.
        leaving: Notified of clusters that a source lists no more, while they are still there.
        policies: Notified of what a source says of requests, when that is another.
        settled: Notified when the configuration in force and the fleet go together again.
    """

    def __init__(self) -> None:
        self._owners: list[Apply] = []
        self._read: Config | None = None
        self.fleet = Fleet()
        self.routable = RoutableClusters(self.fleet.clusters)
        self._swaps = Swaps(self.routable)
        self.read: Listeners[[Config]] = Listeners()
        self.changes: Listeners[[Difference]] = Listeners()
        self.settled: Listeners[[]] = Listeners()
        self.coming: Listeners[[Coming]] = Listeners()
        self.leaving: Listeners[[frozenset[str]]] = Listeners()
        self._files: frozenset[str] = frozenset()
        self.policies: Listeners[[PoolPolicies]] = Listeners()

    def add(self, *owners: Apply) -> None:
        """Have these follow, after those that were added before."""
        self._owners.extend(owners)

    def led_to(self) -> frozenset[str]:
        """Clusters that are listed, and that the configuration in force leads to."""
        read = self._read
        return frozenset[str]() if read is None else read.clusters_named() & self.fleet.clusters.keys()

    def introduce(self, generation: int, config: Config, resolution: Resolution) -> None:
        """Make known what a configuration will bring; it is not in force yet."""
        clusters = self.fleet.foreseen(FILES, resolution.clusters)
        led_to = self.led_to()
        listed = self.fleet.clusters.keys() | clusters.keys()
        tried = frozenset(name for name in listed if self._gets_other_tls(name, config, led_to))
        self.coming.notify(Coming(generation, config, clusters, self.fleet.clusters, led_to, tried))

    def _gets_other_tls(self, cluster: str, config: Config, led_to: frozenset[str]) -> bool:
        """One that no rule led to may be there all the same, for it left a moment ago."""
        now = self._read.engine_tls.get(cluster) if self._read is not None and cluster in led_to else None
        coming = config.engine_tls.get(cluster)
        return coming is not None and coming != now

    def apply(self, config: Config, resolution: Resolution) -> None:
        """Make a configuration the one in force, with what its files list."""
        before = self._read
        gone, self._files = self._files - resolution.clusters.keys(), frozenset(resolution.clusters)
        if gone:
            self.leaving.notify(gone)
        if config != before:
            for owner in self._owners:
                owner(config)
            self.routable.configure(config.clusters_named())
        if config is not before:
            self._read = config
            self.read.notify(config)
        self._take(FILES, {**dict.fromkeys(gone), **resolution.clusters}, introduced=True)

    def report(self, source: str, clusters: Mapping[str, Sequence[Listed] | None]) -> None:
        """A source other than the files says what some of its clusters have now: see `Fleet.update`."""
        gone = frozenset(name for name, listed in clusters.items() if listed is None)
        if gone:
            self.leaving.notify(gone)
        self._take(source, clusters, introduced=False)

    def shown(self) -> None:
        """Requests see more of some clusters, perhaps: what was to go of these, or to change, does now."""
        for source, word in self._swaps.due().items():
            self._settle(self.fleet.update(source, word), introduced=False)

    def _take(self, source: str, word: Mapping[str, Sequence[Listed] | None], *, introduced: bool) -> None:
        now = self._swaps.first(source, self.fleet.listed(source), word)
        self._settle(self.fleet.update(source, now), introduced=introduced)
        self.shown()

    def _settle(self, difference: Difference, *, introduced: bool) -> None:
        if difference:
            self.routable.follow(difference, introduced=introduced)
            self.changes.notify(difference)
        self.settled.notify()
