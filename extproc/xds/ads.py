"""The delta ADS service: one stream per Envoy, with its requests and our publications.

Rules:
    1. The protocol lives in `delta.py`; here are only calls and what is sent on them.
    2. Publishing reaches all streams and waits for none.
    3. However many publications happen while a stream sends, it then sends the latest state once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from envoy.service.discovery.v3 import discovery_pb2 as pb

from extproc.transport.seam import Call, Received, Rpc, Status
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
        self._subscribers: set[Subscriber] = set()
        self._is_closing = False

    def publish(self, resources: Mapping[str, Mapping[str, bytes | None]]) -> list[str]:
        """Publish these resources, all at once; others stay.

        Args:
            resources: Type URL to (name to serialised message, or None to take the resource away).

        Returns:
            The types of which anything changed, and therefore goes out.

        Raises:
            KeyError: A type is not served.
        """
        changed = [type_url for type_url, bodies in resources.items() if self._store.update(type_url, bodies)]
        if changed:
            for subscriber in list(self._subscribers):
                subscriber.send()
        return changed

    def close(self) -> None:
        """End all streams, now and from now on, so that each Envoy reconnects elsewhere."""
        self._is_closing = True
        for subscriber in list(self._subscribers):
            subscriber.close()

    @property
    def rpc(self) -> Rpc:
        """To be served."""
        return Rpc(_SERVICE, "DeltaAggregatedResources", self.open)

    def open(self, call: Call) -> Subscriber:
        """One Envoy, for as long as it lives."""
        subscriber = Subscriber(call, DeltaStream(self._store), self._on_nack, self._subscribers.discard)
        self._subscribers.add(subscriber)
        if self._is_closing:
            subscriber.close()
        return subscriber


class Subscriber:
    """One Envoy's stream; a `Receiver`.

    Args:
        call: Its call.
        stream: What it has and wants.
        on_nack: See `AdsServer`.
        left: Called with it when it is over.
    """

    __slots__ = ("_call", "_is_sending", "_left", "_on_nack", "_stream")

    def __init__(
        self,
        call: Call,
        stream: DeltaStream,
        on_nack: Callable[[str], None],
        left: Callable[[Subscriber], None],
    ) -> None:
        self._call = call
        self._stream = stream
        self._on_nack = on_nack
        self._left = left
        self._is_sending = False

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        try:
            nack = self._stream.receive(pb.DeltaDiscoveryRequest.FromString(message))
        except SubscriptionLimitError:
            logger.error("xds stream subscribes to too much", extra={"peer": self._call.peer})
            self._left(self)
            self._call.abort(Status.RESOURCE_EXHAUSTED, "too many resources subscribed to")
            return
        if nack is not None:
            logger.error(
                "envoy refused resources",
                extra={"peer": self._call.peer, "type_url": nack.type_url, "detail": nack.detail},
            )
            self._on_nack(nack.type_url)
        self.send()

    def on_half_close(self) -> None:
        """See `Receiver`."""
        self.close()

    def on_reset(self) -> None:
        """See `Receiver`."""
        self._left(self)

    def send(self) -> None:
        """Send what this Envoy lacks; while something is on its way, later."""
        if self._is_sending:
            return
        responses = self._stream.responses()
        for response in responses[:-1]:
            self._call.send(response.SerializeToString())
        if responses:
            self._is_sending = True
            self._call.send(responses[-1].SerializeToString(), self._sent)

    def close(self) -> None:
        """End it."""
        self._left(self)
        self._call.finish()

    def _sent(self) -> None:
        self._is_sending = False
        self.send()
