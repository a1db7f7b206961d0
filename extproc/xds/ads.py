"""Delta ADS over grpc.aio: one stream per Envoy, woken by requests and by publications.

Rules:
    1. The protocol lives in `delta.py`; here are only reading, waiting and writing.
    2. A stream sleeps on its own event: publishing wakes all and waits for none.
    3. However many publications happen while a stream writes, it then sends the latest state once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from envoy_data_plane.envoy.service.discovery import v3 as discovery_v3

from extproc.xds.delta import DeltaStream, ResourceStore, SubscriptionLimitError

logger = logging.getLogger(__name__)

_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"


class AdsServer:
    """Publishes resources to every connected Envoy.

    Args:
        on_nack: Called with the type URL for each response that an Envoy refused, for metrics.
    """

    def __init__(self, on_nack: Callable[[str], None]) -> None:
        self._on_nack = on_nack
        self._store = ResourceStore()
        self._wakes: set[asyncio.Event] = set()
        self._is_closing = False

    @property
    def num_streams(self) -> int:
        """Envoys connected now."""
        return len(self._wakes)

    def publish(self, resources: Mapping[str, Mapping[str, bytes]]) -> list[str]:
        """Make these the resources of the given types, all at once; other types keep theirs.

        Args:
            resources: Type URL to (name to serialised message).

        Returns:
            The types of which anything changed, and therefore goes out.

        Raises:
            KeyError: A type is not served.
        """
        changed = [
            type_url for type_url, bodies in resources.items() if self._store.replace(type_url, bodies)
        ]
        if changed:
            self._wake_all()
        return changed

    def close(self) -> None:
        """End all streams, now and from now on, so that each Envoy reconnects elsewhere."""
        self._is_closing = True
        self._wake_all()

    def handlers(self) -> grpc.GenericRpcHandler:
        """For `grpc.aio.Server.add_generic_rpc_handlers`."""
        return grpc.method_handlers_generic_handler(
            _SERVICE,
            {
                "DeltaAggregatedResources": grpc.stream_stream_rpc_method_handler(
                    self._serve,
                    request_deserializer=discovery_v3.DeltaDiscoveryRequest.FromString,
                    response_serializer=bytes,
                )
            },
        )

    async def _serve(
        self,
        requests: AsyncIterator[discovery_v3.DeltaDiscoveryRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        stream, wake = DeltaStream(self._store), asyncio.Event()
        self._wakes.add(wake)
        is_over_limit = False
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(requests, stream, wake, context.peer()))
                while not reader.done() and not self._is_closing:
                    wake.clear()
                    for response in stream.responses():
                        await context.write(response)
                    await wake.wait()
                reader.cancel()
        except* SubscriptionLimitError:
            is_over_limit = True
        finally:
            self._wakes.discard(wake)
        if is_over_limit:
            logger.error("xds stream subscribes to too much", extra={"peer": context.peer()})
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many resources subscribed to")

    async def _read(
        self,
        requests: AsyncIterator[discovery_v3.DeltaDiscoveryRequest],
        stream: DeltaStream,
        wake: asyncio.Event,
        peer: str,
    ) -> None:
        try:
            async for request in requests:
                nack = stream.receive(request)
                if nack is not None:
                    logger.error(
                        "envoy refused resources",
                        extra={"peer": peer, "type_url": nack.type_url, "detail": nack.detail},
                    )
                    self._on_nack(nack.type_url)
                wake.set()
        finally:
            wake.set()

    def _wake_all(self) -> None:
        for wake in self._wakes:
            wake.set()
