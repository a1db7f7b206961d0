"""A configuration comes into force: each owner applies what is its own, in one turn of the loop.

Rules:
    1. Owners follow a configuration that differs from the one in force. One that was read anew and says the
       same changes nothing but the files that it names.
    2. What the files list is a source of the fleet like any other: it is the fleet's difference that is
       followed then, not the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from extproc.config.schema import Config
from extproc.discovery.fleet import Difference, Fleet
from extproc.discovery.listed import Listed
from extproc.discovery.resolution import FILES, Resolution
from extproc.listeners import Listeners
from extproc.values.pool_policies import PoolPolicies

Apply = Callable[[Config], None]
"""Makes one owner follow. It neither awaits nor fails: a change is in force as a whole. The first one alone
may raise, which leaves all as it was."""


class Owners:
    """What follows the configuration, and what the fleet.

    Attributes:
        fleet: All endpoints.
        read: Notified of each configuration that was read, whether it differs or not.
        changes: Notified of what is different of the fleet.
        policies: Notified of what a source says of requests, when that is another.
        settled: Notified when the configuration in force and the fleet go together again.
    """

    def __init__(self) -> None:
        self._owners: list[Apply] = []
        self._read: Config | None = None
        self.fleet = Fleet()
        self.read: Listeners[[Config]] = Listeners()
        self.changes: Listeners[[Difference]] = Listeners()
        self.settled: Listeners[[]] = Listeners()
        self.policies: Listeners[[PoolPolicies]] = Listeners()

    def add(self, *owners: Apply) -> None:
        """Have these follow, after those that were added before."""
        self._owners.extend(owners)

    def apply(self, config: Config, resolution: Resolution) -> None:
        """Make a configuration the one in force, with what its files list."""
        before = self._read
        if config != before:
            for owner in self._owners:
                owner(config)
        if config is not before:
            self._read = config
            self.read.notify(config)
        self._settle(self.fleet.replace(FILES, resolution.clusters))

    def report(self, source: str, clusters: Mapping[str, Sequence[Listed] | None]) -> None:
        """A source other than the files says what some of its clusters have now: see `Fleet.update`."""
        self._settle(self.fleet.update(source, clusters))

    def _settle(self, difference: Difference) -> None:
        if difference:
            self.changes.notify(difference)
        self.settled.notify()
