"""A configuration comes into force: each owner applies what is its own, in one turn of the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from extproc.config.schema import Config
from extproc.discovery.resolution import Resolution
from extproc.server.engine_tls import request_tls
from extproc.values.endpoints import Endpoint
from metadata_center.types import EndpointKey


@dataclass(frozen=True, slots=True)
class InForce:
    """A configuration and its endpoints, as owners apply them.

    Attributes:
        config: All settings.
        resolution: The endpoints, by cluster.
        keys: Of all endpoints.
        gone: Endpoints that were in force until now.
        tls: What aiohttp is told with a request to endpoints that speak TLS; others are left out.
    """

    config: Config
    resolution: Resolution
    keys: frozenset[EndpointKey]
    gone: frozenset[EndpointKey]
    tls: Mapping[EndpointKey, Mapping[str, Any]]


Apply = Callable[[InForce], None]
"""Makes one owner follow. It neither awaits nor fails: a change is in force as a whole. The first one alone
may raise, which leaves all as it was."""


class Owners:
    """Who follows the configuration."""

    def __init__(self) -> None:
        self._owners: list[Apply] = []
        self._now: InForce | None = None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints in force; none before the first configuration."""
        return () if self._now is None else self._now.resolution.endpoints

    def add(self, *owners: Apply) -> None:
        """Have these follow, after those that were added before."""
        self._owners.extend(owners)

    def apply(self, config: Config, resolution: Resolution) -> None:
        """Make a configuration the one in force."""
        keys = frozenset(endpoint.key for endpoint in resolution.endpoints)
        before = frozenset() if self._now is None else self._now.keys
        tls = request_tls(config.engine_tls, resolution.clusters)
        now = InForce(config, resolution, keys, before - keys, tls)
        for owner in self._owners:
            owner(now)
        self._now = now
