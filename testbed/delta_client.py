"""A small client of a control plane's delta ADS, for tests and recordings: what was sent, in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from google.protobuf import json_format

_KNOWN: Final = (cluster_pb2, endpoint_pb2, http_protocol_options_pb2)
"""Types that are inside of `Any`: imported, they can be written as JSON."""

CLUSTERS: Final = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
ASSIGNMENTS: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

NODE: Final = {
    "id": "router~127.0.0.1~edge-1.tokenway~tokenway.svc.cluster.local",
    "cluster": "edge",
    "metadata": {"NAMESPACE": "tokenway", "CLUSTER_ID": "Kubernetes", "ISTIO_VERSION": "1.31.0"},
}
"""A gateway of namespace `tokenway`, as istiod wants it described."""

TIMEOUT_S: Final = 30.0


class DeltaStream:
    """One stream; `delta_stream` opens and closes it."""

    def __init__(self, call: Any, node: dict[str, Any]) -> None:
        self._call = call
        self._node: dict[str, Any] | None = node
        self.received: list[Any] = []

    async def subscribe(self, type_url: str, names: Iterable[str] = ()) -> None:
        """Ask for resources by name, or, of clusters, for all."""
        request = discovery_pb2.DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=list(names))
        if self._node is not None:
            json_format.ParseDict(self._node, request.node)
            self._node = None
        await self._call.write(request)

    async def receive(self, type_url: str | None = None, timeout_s: float | None = TIMEOUT_S) -> Any:
        """The next `DeltaDiscoveryResponse`, of one type if one is named; acknowledges what it reads.

        Raises:
            TimeoutError: None came in time.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                response = await self._call.read()
                assert response is not grpc.aio.EOF, "the control plane closed the stream"
                self.received.append(response)
                await self._call.write(
                    discovery_pb2.DeltaDiscoveryRequest(
                        type_url=response.type_url, response_nonce=response.nonce
                    )
                )
                if type_url in (None, response.type_url):
                    return response


@asynccontextmanager
async def delta_stream(address: str, node: dict[str, Any] = NODE) -> AsyncIterator[DeltaStream]:
    """A stream over a plaintext connection to `ip:port`."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources()
        try:
            yield DeltaStream(call, node)
        finally:
            call.cancel()


def clusters(response: Any) -> dict[str, Any]:
    """The clusters of a response by name."""
    return {resource.name: _unpacked(resource, cluster_pb2.Cluster()) for resource in response.resources}


def assignments(response: Any) -> dict[str, list[str]]:
    """`ip:port` of the endpoints of each assignment, in order of their groups."""
    found = {}
    for resource in response.resources:
        assignment = _unpacked(resource, endpoint_pb2.ClusterLoadAssignment())
        sockets = [
            endpoint.endpoint.address.socket_address
            for group in assignment.endpoints
            for endpoint in group.lb_endpoints
        ]
        found[resource.name] = [f"{socket.address}:{socket.port_value}" for socket in sockets]
    return found


def _unpacked(resource: Any, into: Any) -> Any:
    assert resource.resource.Unpack(into), resource.resource.type_url
    return into


def write_recording(path: Path, responses: Iterable[Any]) -> None:
    """One response per line, as protobuf's JSON."""
    lines = [json.dumps(json_format.MessageToDict(response)) + "\n" for response in responses]
    path.write_text("".join(lines))


def read_recording(path: Path) -> list[Any]:
    """The responses of `write_recording`, as `DeltaDiscoveryResponse`."""
    return [
        json_format.Parse(line, discovery_pb2.DeltaDiscoveryResponse())
        for line in path.read_text().splitlines()
    ]
