"""Endpoint addresses as configured → endpoints Envoy can be told: literal `ip:port` only.

Rules:
    1. A literal address costs no look-up; a host name becomes one endpoint per A and AAAA record.
    2. All names are looked up at once, each once, within one time bound; a name without an answer
       fails the whole resolution, so a caller never publishes half a cluster.
    3. Within a cluster a key occurs once; the first mention keeps its weight and labels.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from extproc.discovery.clusters import ClusterSpec
from extproc.types import Endpoint
from metadata_center.types import EndpointKey

_TIMEOUT_S = 2.0
"""Bound on all look-ups together: glibc asks its first server for 5 s, a start should not."""


class ResolveError(OSError):
    """Host names that could not be resolved.

    Args:
        failures: Host name to cause.
    """

    def __init__(self, failures: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"cannot resolve {name!r}: {cause}" for name, cause in failures.items()))
        self.failures = failures


@dataclass(frozen=True, slots=True)
class Resolution:
    """Clusters with addresses resolved, valid until a name's records change (no TTL is known here).

    Attributes:
        clusters: Cluster name to its endpoints, in configuration order.
        has_host_names: True if anything was looked up, so that resolving again can change the answer.
    """

    clusters: Mapping[str, tuple[Endpoint, ...]]
    has_host_names: bool

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints of all clusters; one that serves two clusters occurs twice."""
        return tuple(endpoint for endpoints in self.clusters.values() for endpoint in endpoints)


async def resolve(clusters: Iterable[ClusterSpec], *, timeout_s: float = _TIMEOUT_S) -> Resolution:
    """Resolve every endpoint address of every cluster.

    Raises:
        ResolveError: Naming each host name that failed or took longer than `timeout_s`.
    """
    clusters = tuple(clusters)
    names = {spec.address for cluster in clusters for spec in cluster.endpoints if spec.is_host_name}
    addresses = await _look_up(sorted(names), timeout_s)
    resolved: dict[str, tuple[Endpoint, ...]] = {}
    for cluster in clusters:
        endpoints: dict[EndpointKey, Endpoint] = {}
        for spec in cluster.endpoints:
            for address in addresses[spec.address] if spec.is_host_name else (spec.address,):
                key = _key(address, spec.port)
                endpoints.setdefault(
                    key,
                    Endpoint(
                        key=key,
                        cluster=cluster.name,
                        weight=spec.weight,
                        labels=spec.labels,
                        metadata=spec.metadata,
                        draining=spec.draining,
                    ),
                )
        resolved[cluster.name] = tuple(endpoints.values())
    return Resolution(resolved, bool(names))


def _key(address: str, port: int) -> EndpointKey:
    return EndpointKey(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")


async def _look_up(names: list[str], timeout_s: float) -> dict[str, list[str]]:
    """All addresses of each name, sorted so that equal answers compare equal."""
    found: dict[str, list[str]] = {}
    failures: dict[str, str] = {}

    async def look_up(name: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                answers = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found[name] = sorted({str(answer[4][0]) for answer in answers})
        except TimeoutError:
            failures[name] = f"no answer within {timeout_s:g} s"
        except (OSError, UnicodeError) as error:  # UnicodeError: not encodable as IDNA
            failures[name] = str(error)

    async with asyncio.TaskGroup() as tasks:
        for name in names:
            tasks.create_task(look_up(name))
    if failures:
        raise ResolveError(dict(sorted(failures.items())))
    return found
