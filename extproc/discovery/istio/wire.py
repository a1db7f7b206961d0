"""Delta ADS messages: bytes to values and back. It is imported only where a control plane is configured.

Rules:
    1. Strict where a mistake would send requests elsewhere: an address, a port or a weight that is none
       spoils its resource. What is not for us (pipes, internal listeners) is left out.
    2. Bounds on what one member may say; the transport bounds the message.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import replace
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
from extproc.protobuf_fields import NoFieldError, fields
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


_WHOLE_BYTES: Final = 32 * 1024
"""A response of this size is read at once: a fraction of a millisecond."""

_AT_ONCE: Final = 128
"""Resources of a larger one that are read without a pause."""

_FEW: Final = 32
"""Endpoints that are."""

_RESOURCES_TAG: Final = discovery_pb2.DeltaDiscoveryResponse.RESOURCES_FIELD_NUMBER << 3 | 2
_GROUPS_TAG: Final = endpoint_pb2.ClusterLoadAssignment.ENDPOINTS_FIELD_NUMBER << 3 | 2
_MEMBERS_TAG: Final = endpoint_components_pb2.LocalityLbEndpoints.LB_ENDPOINTS_FIELD_NUMBER << 3 | 2


def decoding(message: bytes) -> Generator[None, None, Response]:
    """`decode` with pauses: it yields wherever it has worked for a while, and returns the response.

    Its resources are read one by one; what is left of the message, without them, is a small response.

    Raises:
        MalformedError: It is none; nothing of it was given to anybody then.
    """
    if len(message) <= _WHOLE_BYTES:
        return decode(message)
    resources: list[Resource] = []
    rest = bytearray()
    for tag, whole, content, stop in _fields(message):
        if tag != _RESOURCES_TAG:
            rest += message[whole:stop]
            continue
        try:
            one = discovery_pb2.Resource.FromString(message[content:stop])
        except DecodeError as error:
            raise MalformedError(f"no DeltaDiscoveryResponse: {error}") from None
        resources.append(Resource(one.name, one.resource.value))
        if len(resources) % _AT_ONCE == 0:
            yield
    return replace(decode(bytes(rest)), resources=tuple(resources))


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """See `protobuf_fields.fields`; raises MalformedError instead."""
    try:
        yield from fields(message)
    except NoFieldError as error:
        raise MalformedError(str(error)) from None


class ProtobufDecoder:
    """See `Decoder`."""

    def __init__(self) -> None:
        self._prepared: dict[bytes, Members | MalformedError] = {}

    def preparing(self, bodies: Iterable[bytes]) -> Iterator[None]:
        """Read assignments that are large before they are asked for, with pauses: it yields."""
        self._prepared.clear()
        for body in bodies:
            if len(body) > _WHOLE_BYTES:
                try:
                    self._prepared[body] = yield from _assigned(body)
                except MalformedError as error:
                    self._prepared[body] = error

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
        prepared = self._prepared.pop(body, None) if self._prepared else None
        if isinstance(prepared, MalformedError):
            raise prepared
        if prepared is not None:
            return prepared
        try:
            assignment = endpoint_pb2.ClusterLoadAssignment.FromString(body)
        except DecodeError as error:
            raise MalformedError(f"no ClusterLoadAssignment: {error}") from None
        return tuple(_members(assignment))


def _assigned(body: bytes) -> Generator[None, None, Members]:
    """The members of an assignment, read one by one.

    Raises:
        MalformedError: It cannot be used.
    """
    found: list[Member] = []
    rest = bytearray()
    try:
        for tag, whole, content, stop in _fields(body):
            if tag == _GROUPS_TAG:
                yield from _grouped(body[content:stop], found)
            else:
                rest += body[whole:stop]
        endpoint_pb2.ClusterLoadAssignment.FromString(bytes(rest))
    except DecodeError as error:
        raise MalformedError(f"no ClusterLoadAssignment: {error}") from None
    return tuple(found)


def _grouped(group: bytes, found: list[Member]) -> Iterator[None]:
    rest = bytearray()
    places: list[slice] = []
    for tag, whole, content, stop in _fields(group):
        if tag == _MEMBERS_TAG:
            places.append(slice(content, stop))
        else:
            rest += group[whole:stop]
        if len(places) % _AT_ONCE == 0:
            yield
    locality = _locality(endpoint_components_pb2.LocalityLbEndpoints.FromString(bytes(rest)))
    for number, place in enumerate(places):
        member = _member(endpoint_components_pb2.LbEndpoint.FromString(group[place]), locality)
        if member is not None:
            found.append(member)
        if number % _FEW == 0:
            yield


def _locality(group: endpoint_components_pb2.LocalityLbEndpoints) -> str:
    at = group.locality
    return f"{at.region}/{at.zone}/{at.sub_zone}".rstrip("/")[: 3 * _MAX_TEXT]


def _members(assignment: endpoint_pb2.ClusterLoadAssignment) -> Iterator[Member]:
    for group in assignment.endpoints:
        locality = _locality(group)
        for endpoint in group.lb_endpoints:
            member = _member(endpoint, locality)
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
