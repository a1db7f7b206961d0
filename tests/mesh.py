"""What istiod sends, made by hand: clusters and assignments as encoded messages, and responses with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import address_pb2, base_pb2, health_check_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import wrappers_pb2

from extproc.discovery.istio.messages import ASSIGNMENTS, CLUSTERS, Resource, Response

HOST = "llama.models.internal"
SERVICE = f"outbound|8000||{HOST}"


def subset_of(name: str, host: str = HOST, port: int = 8000) -> str:
    """The name of a subset's cluster."""
    return f"outbound|{port}|{name}|{host}"


def lb_endpoint(
    host: str,
    port: int = 8000,
    *,
    weight: int | None = None,
    health: str = "HEALTHY",
    workload: str | None = None,
) -> endpoint_components_pb2.LbEndpoint:
    """One member, as istiod describes it."""
    message = endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(
            address=address_pb2.Address(
                socket_address=address_pb2.SocketAddress(address=host, port_value=port)
            )
        ),
        health_status=health_check_pb2.HealthStatus.Value(health),
    )
    if weight is not None:
        message.load_balancing_weight.CopyFrom(wrappers_pb2.UInt32Value(value=weight))
    if workload is not None:
        message.metadata.filter_metadata["istio"].update({"workload": workload})
    return message


def assignment(
    name: str,
    *members: endpoint_components_pb2.LbEndpoint | str,
    locality: tuple[str, str, str] = ("", "", ""),
) -> endpoint_pb2.ClusterLoadAssignment:
    """An assignment of one group; a member that is text is an address."""
    region, zone, sub_zone = locality
    group = endpoint_components_pb2.LocalityLbEndpoints(
        locality=base_pb2.Locality(region=region, zone=zone, sub_zone=sub_zone),
        lb_endpoints=[lb_endpoint(one) if isinstance(one, str) else one for one in members],
    )
    return endpoint_pb2.ClusterLoadAssignment(cluster_name=name, endpoints=[group])


def cluster(name: str, kind: str = "EDS", *members: Any) -> cluster_pb2.Cluster:
    """A cluster; of a kind of DNS, with its members in it."""
    message = cluster_pb2.Cluster(name=name, type=cluster_pb2.Cluster.DiscoveryType.Value(kind))
    if members:
        message.load_assignment.CopyFrom(assignment(name, *members))
    return message


def clusters(nonce: str, *listed: cluster_pb2.Cluster | str, removed: Iterable[str] = ()) -> Response:
    """A CDS response; a cluster that is text is an EDS cluster of that name."""
    made = [cluster(one) if isinstance(one, str) else one for one in listed]
    resources = tuple(Resource(one.name, one.SerializeToString()) for one in made)
    return Response(CLUSTERS, nonce, resources, tuple(removed))


def assignments(nonce: str, *of_clusters: endpoint_pb2.ClusterLoadAssignment) -> Response:
    """An EDS response."""
    resources = tuple(Resource(one.cluster_name, one.SerializeToString()) for one in of_clusters)
    return Response(ASSIGNMENTS, nonce, resources)


def encoded(response: Response, version: str = "1") -> bytes:
    """A response as it travels."""
    message = discovery_pb2.DeltaDiscoveryResponse(
        type_url=response.type_url,
        nonce=response.nonce,
        system_version_info=version,
        removed_resources=response.removed,
    )
    for one in response.resources:
        resource = message.resources.add(name=one.name)
        resource.resource.type_url, resource.resource.value = response.type_url, one.body
    body: bytes = message.SerializeToString()
    return body


def keys_of(clusters_told: Mapping[str, Any]) -> dict[str, list[str] | None]:
    """Keys of the endpoints of each cluster."""
    return {
        name: None if listed is None else [one.key for one in listed]
        for name, listed in clusters_told.items()
    }
