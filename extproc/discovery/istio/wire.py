"""Delta ADS messages: bytes to values and back. It is imported only where a control plane is configured.

Rules:
    1. Strict where a mistake would send requests elsewhere: an address, a port or a weight that is none
       spoils its resource. What is not for us (pipes, internal listeners) is left out.
    2. Bounds on what one member may say; the transport bounds the message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2, health_check_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import json_format, struct_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, status_pb2

from extproc.discovery.istio.messages import (
    ClusterFacts,
    MalformedError,
    Member,
    Members,
    Request,
    Resource,
    Response,
    Workload,
)
from metadata_center.addresses import MAX_PORT, ip_or_none

MAX_WEIGHT: Final = 1_000_000
"""Envoy adds the weights of an assignment in 32 bits: 4,096 endpoints of this one still fit."""

_MAX_TEXT: Final = 253
"""Longest part of a workload's description that is kept: the longest name that Kubernetes has."""

_MAX_DETAIL: Final = 4_096
"""Longest reason that istiod is given for a refusal."""

_EDS: Final = cluster_pb2.Cluster.DiscoveryType.Value("EDS")
_NOT_READY: Final = frozenset({health_check_pb2.UNHEALTHY, health_check_pb2.TIMEOUT})


def node(node_id: str, cluster: str, metadata: Mapping[str, object]) -> bytes:
    """An encoded `envoy.config.core.v3.Node`.

    Args:
        node_id: `type~ip~id~domain`.
        cluster: Shown by istiod.
        metadata: As istiod reads it: NAMESPACE, LABELS and so on.
    """
    message = base_pb2.Node(id=node_id, cluster=cluster)
    json_format.ParseDict(dict(metadata), message.metadata)
    encoded: bytes = message.SerializeToString(deterministic=True)
    return encoded


def encode(request: Request, encoded_node: bytes) -> bytes:
    """A `DeltaDiscoveryRequest`.

    Args:
        request: What to say.
        encoded_node: Who says it; goes with the first request of a stream.
    """
    message = discovery_pb2.DeltaDiscoveryRequest(
        type_url=request.type_url,
        resource_names_subscribe=request.subscribe,
        resource_names_unsubscribe=request.unsubscribe,
        response_nonce=request.nonce,
    )
    if request.is_first:
        message.node.ParseFromString(encoded_node)
    if request.error is not None:
        detail = request.error[:_MAX_DETAIL]
        message.error_detail.CopyFrom(status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=detail))
    encoded: bytes = message.SerializeToString()
    return encoded


def decode(message: bytes) -> Response:
    """A `DeltaDiscoveryResponse`.

    Raises:
        MalformedError: It is none.
    """
    try:
        response = discovery_pb2.DeltaDiscoveryResponse.FromString(message)
    except DecodeError as error:
        raise MalformedError(f"no DeltaDiscoveryResponse: {error}") from None
    return Response(
        response.type_url,
        response.nonce,
        tuple(Resource(one.name, one.resource.value) for one in response.resources),
        tuple(response.removed_resources),
    )


class ProtobufDecoder:
    """See `Decoder`."""

    def cluster(self, body: bytes) -> ClusterFacts:
        """See `Decoder`."""
        try:
            cluster = cluster_pb2.Cluster.FromString(body)
        except DecodeError as error:
            raise MalformedError(f"no Cluster: {error}") from None
        if cluster.WhichOneof("cluster_discovery_type") == "type" and cluster.type == _EDS:
            return ClusterFacts(None)
        return ClusterFacts(tuple(_members(cluster.load_assignment)))

    def assignment(self, body: bytes) -> Members:
        """See `Decoder`."""
        try:
            assignment = endpoint_pb2.ClusterLoadAssignment.FromString(body)
        except DecodeError as error:
            raise MalformedError(f"no ClusterLoadAssignment: {error}") from None
        return tuple(_members(assignment))


def _members(assignment: endpoint_pb2.ClusterLoadAssignment) -> Iterator[Member]:
    for group in assignment.endpoints:
        at = group.locality
        locality = f"{at.region}/{at.zone}/{at.sub_zone}".rstrip("/")
        for endpoint in group.lb_endpoints:
            member = _member(endpoint, locality[: 3 * _MAX_TEXT])
            if member is not None:
                yield member


def _member(endpoint: endpoint_components_pb2.LbEndpoint, locality: str) -> Member | None:
    if endpoint.WhichOneof("host_identifier") != "endpoint":
        return None
    address = endpoint.endpoint.address
    if address.WhichOneof("address") != "socket_address":
        return None
    socket = address.socket_address
    host, port = socket.address, socket.port_value
    if socket.WhichOneof("port_specifier") != "port_value" or not 0 < port <= MAX_PORT:
        raise MalformedError(f"the endpoint `{host[:_MAX_TEXT]}` has no port of 1..{MAX_PORT}")
    host = ip_or_none(host) or host.lower().removesuffix(".")
    if not host or len(host) > _MAX_TEXT or not _is_host(host):
        raise MalformedError(f"`{host[:_MAX_TEXT]}` is neither an IP address nor a host name")
    weight = endpoint.load_balancing_weight.value if endpoint.HasField("load_balancing_weight") else 1
    return Member(
        host,
        port,
        min(max(1, weight), MAX_WEIGHT),
        locality,
        endpoint.health_status not in _NOT_READY,
        endpoint.health_status == health_check_pb2.DRAINING,
        _workload(endpoint.metadata.filter_metadata),
    )


def _is_host(host: str) -> bool:
    if ip_or_none(host) is not None:
        return True
    labels = host.split(".")
    return not labels[-1].isdigit() and all(
        label and len(label) <= 63 and label.isascii() and label.replace("-", "").replace("_", "").isalnum()
        for label in labels
    )


def _workload(metadata: Mapping[str, struct_pb2.Struct]) -> Workload:
    """`istio.workload`, `name;namespace;service;revision;cluster`; empty if it is absent or odd."""
    if "istio" not in metadata or "workload" not in metadata["istio"].fields:
        return Workload()
    parts = metadata["istio"].fields["workload"].string_value.split(";")
    if len(parts) != 5 or any(len(part) > _MAX_TEXT or not part.isprintable() for part in parts):
        return Workload()
    return Workload(*parts)
