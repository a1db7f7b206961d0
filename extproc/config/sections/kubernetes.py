"""Endpoints from the Kubernetes API: which pods, slices and pools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from extproc.config.sections.fields import ClusterName, FileName, Name, Section

ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", examples=["llama"])]
"""A DNS subdomain, as names of objects are."""

Namespace = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", examples=["models"])]
"""A DNS label."""

TargetPort = Annotated[int, Field(ge=1, le=65_535)]

LabelKey = Annotated[
    str,
    Field(
        pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$",
        examples=["app"],
    ),
]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]


class AddressFamily(StrEnum):
    """Which addresses of pods that have both are used."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"


class PoolSource(Section):
    """An InferencePool: its pods are the endpoints of one cluster."""

    name: ObjectName
    """Of the pool."""
    namespace: Namespace | None = None
    """Of the pool and its pods; null is the gateway's own."""
    group: Literal["inference.networking.k8s.io", "inference.networking.x-k8s.io"] = (
        "inference.networking.k8s.io"
    )
    """API group of the pool: that of v1, or the one before it (v1alpha2)."""
    cluster: ClusterName | None = None
    """What the cluster is called; null is the pool's name."""


class SelectorSource(Section):
    """Pods that have some labels are the endpoints of one cluster."""

    name: ClusterName
    """What the cluster is called."""
    namespace: Namespace | None = None
    """Of the pods; null is the gateway's own."""
    match_labels: Annotated[Mapping[LabelKey, LabelValue], Field(min_length=1)]
    """Labels that the pods have, all of them."""
    target_ports: Annotated[tuple[TargetPort, ...], Field(strict=False, min_length=1, max_length=8)]
    """Where each pod serves; each port is an endpoint of its own."""

    @property
    def cluster(self) -> str:
        """What the cluster is called."""
        return self.name


class ServiceSource(Section):
    """The EndpointSlices of a Service are the endpoints of one cluster."""

    name: ObjectName
    """Of the Service."""
    namespace: Namespace | None = None
    """Of the Service; null is the gateway's own."""
    port: Annotated[str, Field(min_length=1, max_length=63, examples=["http"])] | None = None
    """Name of its port, or the number where its pods serve; null takes the only one."""
    cluster: ClusterName | None = None
    """What the cluster is called; null is the Service's name."""


class KubernetesDiscovery(Section):
    """Endpoints from the Kubernetes API."""

    kubeconfig: FileName | None = None
    """A kubeconfig file; null takes the service account of the pod that the gateway runs in."""
    context: Name | None = None
    """Of the kubeconfig; null takes its current one."""
    pool: PoolSource | None = None
    """An InferencePool."""
    selectors: Annotated[tuple[SelectorSource, ...], Field(strict=False)] = ()
    """Pods by their labels."""
    services: Annotated[tuple[ServiceSource, ...], Field(strict=False)] = ()
    """EndpointSlices of Services."""
    address_family: Annotated[AddressFamily, Field(strict=False)] = AddressFamily.IPV4
    """Which addresses are used, where pods have both."""

    def clusters(self) -> tuple[str, ...]:
        """Clusters that all this lists."""
        return tuple(self._clusters())

    def _clusters(self) -> Iterator[str]:
        if self.pool is not None:
            yield self.pool.cluster or self.pool.name
        yield from (selector.cluster for selector in self.selectors)
        yield from (service.cluster or service.name for service in self.services)

    @model_validator(mode="after")
    def _something_once(self) -> Self:
        clusters = self.clusters()
        if not clusters:
            raise PydanticCustomError(
                "nothing_listed", "nothing is listed; accepted: one at least of pool, selectors and services"
            )
        twice = next((name for i, name in enumerate(clusters) if name in clusters[:i]), None)
        if twice is not None:
            raise PydanticCustomError(
                "cluster_twice",
                "two of pool, selectors and services make the cluster `{name}`; accepted: distinct names",
                {"name": twice},
            )
        if self.context is not None and self.kubeconfig is None:
            raise PydanticCustomError("context_of_nothing", "accepted: context with kubeconfig only")
        return self
