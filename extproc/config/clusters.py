"""clusters.json: which clusters and endpoints the operator names, before any name is resolved.

Rules:
    1. AIGW's format, `{"clusters":[{"name","endpoints":[{"address","port"}]}]}`, plus optional keys.
    2. Strict: an unknown key, a duplicate or a port out of range is an error with its line.
    3. At most `MAX_ENDPOINTS` endpoints, each counted once by address and port, whichever clusters list it,
       as many clusters, and `MAX_PLACES` of endpoints in them: what is beyond is refused before it is read.
    4. Pure; turning host names into addresses is `resolve.py`'s job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from extproc.config.document import Document, Location, shown
from extproc.config.notation import read_json
from extproc.config.sections.fields import ClusterName, Labels, Name, Section
from extproc.values.endpoints import MAX_NUM_SEQS_LABEL, MOST_SEQUENCES
from metadata_center.addresses import ip_or_none
from metadata_center.load.counters import MAX_ENDPOINTS

MAX_CLUSTERS = MAX_ENDPOINTS
"""Bound on clusters: each is one of Envoy's, with endpoints or without."""

MAX_PLACES = 4 * MAX_ENDPOINTS
"""Bound on endpoints where each counts as often as clusters list it: Envoy has it as often."""

_HOST_NAME = re.compile(
    r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
)
"""RFC 1123 labels, and underscores, which container networks put into service names."""


_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""The last label of what resolvers take for an IPv4 address in another spelling: `127.1`, `0x7f000001`."""


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """One endpoint as written.

    Attributes:
        address: IPv4, IPv6 (no brackets, shortest form) or lower-case host name.
        port: 1..65535.
        weight: Relative capacity, 1..1000.
        labels: The cluster's labels with the endpoint's own on top; rules select by them. `max_num_seqs`
            of either is one of its labels.
        metadata: Free for the operator; shown, never interpreted.
        draining: True takes no new requests and finishes those it has.
    """

    address: str
    port: int
    weight: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False

    @property
    def is_host_name(self) -> bool:
        """True if the address has to be resolved."""
        return ip_or_none(self.address) is None


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """One cluster as written.

    Attributes:
        name: Envoy's name for it, distinct.
        endpoints: Distinct by address and port; may be empty.
        model: Model it serves where tokenway.yaml names no models; None means the cluster's name.
    """

    name: str
    endpoints: tuple[EndpointSpec, ...]
    model: str | None = None


def _address(text: str) -> str:
    host = text.lower().removesuffix(".")
    ip = ip_or_none(text)
    if ip is not None:
        return ip
    if not _HOST_NAME.fullmatch(host) or _NUMBER.fullmatch(host.rpartition(".")[2]):
        raise PydanticCustomError(
            "address",
            "not an address: {text}; accepted: IPv4, IPv6 without brackets and zone, or a host name",
            {"text": shown(text)},
        )
    return host


class _Endpoint(Section):
    address: Annotated[str, AfterValidator(_address)]
    port: int = Field(ge=1, le=65_535)
    weight: int = Field(default=1, ge=1, le=1_000)
    labels: Labels = Field(default_factory=dict)
    max_num_seqs: int | None = Field(default=None, ge=1, le=MOST_SEQUENCES)
    metadata: Mapping[Name, Annotated[str, Field(max_length=4_096)]] = Field(default_factory=dict)
    draining: bool = False


class _Cluster(Section):
    name: ClusterName
    model: Name | None = None
    labels: Labels = Field(default_factory=dict)
    max_num_seqs: int | None = Field(default=None, ge=1, le=MOST_SEQUENCES)
    endpoints: Annotated[tuple[_Endpoint, ...], Field(strict=False)]


class _ClustersFile(Section):
    clusters: Annotated[tuple[_Cluster, ...], Field(strict=False)]


def parse_clusters(text: str, path: str) -> tuple[ClusterSpec, ...]:
    """The clusters of a clusters.json, in the order of the file.

    Args:
        text: The whole file.
        path: Its name, for messages only.

    Raises:
        ConfigError: With every problem, each naming line and key.
    """
    document = read_json(text, path)
    _refuse_many(document)
    clusters = document.validated(_ClustersFile).clusters
    problems = [*_duplicates(clusters), *_beyond_the_bound(clusters)]
    if problems:
        document.refuse(problems)
    return tuple(_spec(cluster) for cluster in clusters)


def _refuse_many(document: Document) -> None:
    """Raise ConfigError for more than is worth looking at one by one."""
    data = document.data
    clusters = data.get("clusters") if isinstance(data, dict) else None
    if not isinstance(clusters, list):
        return
    if len(clusters) > MAX_CLUSTERS:
        text = f"{len(clusters)} clusters; accepted: at most {MAX_CLUSTERS}"
        document.refuse([(("clusters",), text)])
    lists = [cluster.get("endpoints") for cluster in clusters if isinstance(cluster, dict)]
    places = sum(len(endpoints) for endpoints in lists if isinstance(endpoints, list))
    if places > MAX_PLACES:
        text = f"endpoints in {places} places; accepted: at most {MAX_PLACES}, and {MAX_ENDPOINTS} of them"
        document.refuse([(("clusters",), text)])


def _spec(cluster: _Cluster) -> ClusterSpec:
    return ClusterSpec(
        name=cluster.name,
        model=cluster.model,
        endpoints=tuple(
            EndpointSpec(
                address=endpoint.address,
                port=endpoint.port,
                weight=endpoint.weight,
                labels={
                    **_said(cluster.labels, cluster.max_num_seqs),
                    **_said(endpoint.labels, endpoint.max_num_seqs),
                },
                metadata=endpoint.metadata,
                draining=endpoint.draining,
            )
            for endpoint in cluster.endpoints
        ),
    )


def _said(labels: Mapping[str, str], max_num_seqs: int | None) -> Mapping[str, str]:
    """Labels, and the limit on sequences as one of them: there sources of all kinds have it."""
    return labels if max_num_seqs is None else {**labels, MAX_NUM_SEQS_LABEL: str(max_num_seqs)}


def _beyond_the_bound(clusters: tuple[_Cluster, ...]) -> list[tuple[Location, str]]:
    places = {(endpoint.address, endpoint.port) for cluster in clusters for endpoint in cluster.endpoints}
    if len(places) <= MAX_ENDPOINTS:
        return []
    text = f"{len(places)} endpoints in all; accepted: at most {MAX_ENDPOINTS}"
    return [(("clusters",), text)]


def _duplicates(clusters: tuple[_Cluster, ...]) -> list[tuple[Location, str]]:
    problems: list[tuple[Location, str]] = []
    names: set[str] = set()
    for i, cluster in enumerate(clusters):
        if cluster.name in names:
            problems.append(
                (("clusters", i, "name"), f"the cluster `{cluster.name}` is given twice; accepted: one")
            )
        names.add(cluster.name)
        addresses: set[tuple[str, int]] = set()
        for j, endpoint in enumerate(cluster.endpoints):
            address = (endpoint.address, endpoint.port)
            if address in addresses:
                text = f"the endpoint {endpoint.address} port {endpoint.port} is given twice; accepted: one"
                problems.append((("clusters", i, "endpoints", j), text))
            addresses.add(address)
    return problems
