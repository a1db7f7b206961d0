"""A fake of istiod's delta ADS on grpc.aio: it sends what a test says, and notes what it is asked.

It stands in for the connection, not for istiod's behaviour: that is `tests/istio/`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from envoy.service.discovery.v3 import discovery_pb2

from extproc.discovery.istio.messages import ASSIGNMENTS, CLUSTERS, Response
from tests.mesh import assignment, assignments, cluster, clusters, encoded

_METHOD = "DeltaAggregatedResources"
_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"


class FakeIstiod:
    """The server.

    Attributes:
        services: Addresses of the members of each cluster.
        requests: All that it was asked, in order.
        headers: Metadata of each stream.
        port: Where it listens, once it was started; the same after a restart.
    """

    def __init__(self) -> None:
        self.services: dict[str, list[str]] = {}
        self.requests: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self._streams: list[asyncio.Queue[bytes]] = []
        self._server: Any = None
        self._nonces = 0
        self._changed = asyncio.Event()

    async def start(self, credentials: Any = None) -> None:
        """Listen."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),)
        )
        where = f"127.0.0.1:{self.port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(where)
        else:
            self.port = self._server.add_secure_port(where, credentials)
        await self._server.start()

    async def stop(self) -> None:
        """End all streams and the server."""
        await self._server.stop(None)

    async def asked(self, is_it: Callable[[Any], bool]) -> Any:
        """Wait for such a request, if there was none."""
        async with asyncio.timeout(20):
            while True:
                for request in self.requests:
                    if is_it(request):
                        return request
                self._changed.clear()
                await self._changed.wait()

    def set(self, name: str, *hosts: str) -> None:
        """A cluster has these members now; it is pushed."""
        is_new = name not in self.services
        self.services[name] = list(hosts)
        if is_new:
            self.push(clusters(self.nonce(), name))
        self.push(assignments(self.nonce(), assignment(name, *hosts)))

    def remove(self, name: str) -> None:
        """A cluster goes; it is pushed."""
        del self.services[name]
        self.push(clusters(self.nonce(), removed=[name]))

    def push(self, response: Response | bytes) -> None:
        """Send this on all streams."""
        for stream in self._streams:
            stream.put_nowait(response if isinstance(response, bytes) else encoded(response))

    def nonce(self) -> str:
        """Another one."""
        self._nonces += 1
        return f"n{self._nonces}"

    async def _serve(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.headers.append({key: str(value) for key, value in context.invocation_metadata()})
        outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._streams.append(outgoing)
        reader = asyncio.create_task(self._read(requests, outgoing))
        try:
            while True:
                yield await outgoing.get()
        finally:
            reader.cancel()
            self._streams.remove(outgoing)

    async def _read(self, requests: AsyncIterator[bytes], outgoing: asyncio.Queue[bytes]) -> None:
        async for message in requests:
            request = discovery_pb2.DeltaDiscoveryRequest.FromString(message)
            self.requests.append(request)
            self._changed.set()
            if request.response_nonce:
                continue
            if request.type_url == CLUSTERS:
                answer = clusters(self.nonce(), *(cluster(name) for name in self.services))
            elif request.type_url == ASSIGNMENTS and request.resource_names_subscribe:
                names = request.resource_names_subscribe
                answer = assignments(
                    self.nonce(), *(assignment(name, *self.services.get(name, ())) for name in names)
                )
            else:
                continue
            outgoing.put_nowait(encoded(answer))
