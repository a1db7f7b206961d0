"""What istiod and its client say to each other, as values: the parts of delta ADS that are used here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Protocol

CLUSTERS: Final = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
"""Type of CDS: which services and subsets exist."""

ASSIGNMENTS: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
"""Type of EDS: the members of each."""


class MalformedError(ValueError):
    """What came cannot be used; the text says what of it, and ends up in istiod's log."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource of a response: its name and its encoded message."""

    name: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """A `DeltaDiscoveryResponse`.

    Attributes:
        type_url: Of its resources.
        nonce: To be given back.
        resources: Those that are new or differ.
        removed: Names of those that are no more.
        is_last: Nothing more of this response follows: now it is accepted or refused.
    """

    type_url: str
    nonce: str
    resources: tuple[Resource, ...] = ()
    removed: tuple[str, ...] = ()
    is_last: bool = True


_PART_BYTES: Final = 12 * 1024
"""Some hundred endpoints, which are taken in two or three milliseconds."""

_AT_ONCE: Final = 256
"""Resources whose names are looked at without a pause."""


def parting(response: Response) -> Iterator[Response | None]:
    """A response in parts that can be taken one at a time, in order, with something else between them.

    What EDS says of a service and its subsets is in one part, and needs nothing of other services. None
    comes wherever it has worked for a while.
    """
    groups: dict[str, list[Resource]] = {}
    for number, resource in enumerate(response.resources):
        name = _service(resource.name) if response.type_url == ASSIGNMENTS else resource.name
        groups.setdefault(name, []).append(resource)
        if number % _AT_ONCE == _AT_ONCE - 1:
            yield None
    removed, part, size = response.removed, list[Resource](), 0
    for resources in groups.values():
        num_bytes = sum(len(resource.body) for resource in resources)
        if part and size + num_bytes > _PART_BYTES:
            yield replace(response, resources=tuple(part), removed=removed, is_last=False)
            removed, part, size = (), [], 0
        part += resources
        size += num_bytes
    yield replace(response, resources=tuple(part), removed=removed)


def _service(name: str) -> str:
    """What `outbound|port|subset|host` has in common with other subsets."""
    return "|".join(name.split("|")[1::2]) or name


@dataclass(frozen=True, slots=True)
class Request:
    """A `DeltaDiscoveryRequest`.

    Attributes:
        type_url: What it is about.
        subscribe: Names to hear of; none at all in the first request of a type are all.
        unsubscribe: Names to hear of no more.
        nonce: Of the response that it answers; empty for one that answers none.
        error: Why that response is refused; None accepts it.
        is_first: It opens the stream, and says who asks.
    """

    type_url: str
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    nonce: str = ""
    error: str | None = None
    is_first: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """What runs at an endpoint, as istiod knows it; each part is empty if it is not known.

    Attributes:
        name: Of the WorkloadEntry or the Pod's owner.
        namespace: Of it.
        service: Its canonical service: label `service.istio.io/canonical-name`, `app.kubernetes.io/name` or
            `app`.
        version: Its canonical revision: label `service.istio.io/canonical-revision` or `version`.
        cluster: The Kubernetes cluster that it is in.
    """

    name: str = ""
    namespace: str = ""
    service: str = ""
    version: str = ""
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """One endpoint of an assignment.

    Attributes:
        host: An IP address, or a name that is to be looked up.
        port: 1..65535.
        weight: Relative capacity, > 0.
        locality: Region, zone and sub-zone, joined by `/`.
        ready: False for one that is not to be chosen.
        draining: It takes no new requests.
        workload: What runs there.
    """

    host: str
    port: int
    weight: int = 1
    locality: str = ""
    ready: bool = True
    draining: bool = False
    workload: Workload = Workload()


Members = tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What a cluster says of its members.

    Attributes:
        members: Those that stand in the cluster itself; None where EDS has them.
    """

    members: Members | None


class Decoder(Protocol):
    """Reads encoded messages."""

    def cluster(self, body: bytes) -> ClusterFacts:
        """An `envoy.config.cluster.v3.Cluster`.

        Raises:
            MalformedError: It cannot be used.
        """

    def assignment(self, body: bytes) -> Members:
        """An `envoy.config.endpoint.v3.ClusterLoadAssignment`.

        Raises:
            MalformedError: It cannot be used.
        """
