"""The delta ADS service: one stream per Envoy, with its requests and our publications.

Rules:
    1. The protocol lives in `delta.py`; here are only calls and what is sent on them.
    2. Publishing reaches all streams and waits for none.
    3. However many publications happen while a stream sends, it then sends the latest state once.
    4. An Envoy whose stream ends is expected back: for `RECONNECT_S`, or until one comes, it counts as having
       what it had; one that another worker had when it died, as having nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from envoy.service.discovery.v3 import discovery_pb2 as pb

from extproc.transport.seam import Call, Received, Rpc, Status
from extproc.xds.delta import DeltaStream, ResourceStore, SubscriptionLimitError
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE

logger = logging.getLogger(__name__)

RECONNECT_S = 2.0
"""Twice the longest pause that the bootstrap lets Envoy make between two attempts to connect."""

MAX_LOST = 64
"""Envoys that are expected back at once, more than there are behind one gateway."""

_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"


@dataclass(frozen=True, slots=True)
class Word:
    """What all Envoys together say of some clusters.

    Attributes:
        lacked: Clusters that some Envoy has not acknowledged, and may yet.
        refused: Clusters that some Envoy refused, with its words.
    """

    lacked: AbstractSet[str]
    refused: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Lost:
    """An Envoy that is expected back.

    Attributes:
        until_s: For how long.
        had: Clusters that it had.
        was_here: Its stream ended here, not at another worker.
    """

    until_s: float
    had: frozenset[str]
    was_here: bool


class AdsServer:
    """Publishes resources to every connected Envoy.

    Args:
        on_nack: Called with the type URL for each response that an Envoy refused, for metrics.
        heard: Called when Envoys may say something else of their clusters than before.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        on_nack: Callable[[str], None],
        heard: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_nack = on_nack
        self._clock = clock
        self._store = ResourceStore()
        self._subscribers: set[Subscriber] = set()
        self._lost: list[_Lost] = []
        self._is_closing = False
        self._heard = heard

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
        subscriber = Subscriber(
            call, DeltaStream(self._store), self._on_nack, self._left, self._taken, self._heard
        )
        self._subscribers.add(subscriber)
        if self._is_closing:
            subscriber.close()
        return subscriber

    @property
    def has_envoys(self) -> bool:
        """Whether some take clusters from here, or did until a moment ago."""
        self._forget_lost()
        return bool(self._lost) or any(one.stream.takes_clusters for one in self._subscribers)

    @property
    def num_envoys(self) -> int:
        """How many take clusters from here, or did until a moment ago and have not been found elsewhere."""
        self._forget_lost()
        here = sum(one.stream.takes_clusters for one in self._subscribers)
        return here + sum(lost.was_here for lost in self._lost)

    @property
    def kept(self) -> AbstractSet[str]:
        """Clusters that some Envoy that is here has as they were, for it refused what came since."""
        return frozenset().union(*(one.stream.kept for one in self._subscribers))

    def expect(self, number: int) -> None:
        """So many Envoys were at a worker that is gone: they may come here."""
        until_s = self._clock() + RECONNECT_S
        self._remember([_Lost(until_s, frozenset(), was_here=False)] * min(number, MAX_LOST))

    def found(self, number: int) -> None:
        """So many came to another worker: of those that are expected, the first."""
        del self._lost[:number]
        self._heard()

    def word(self, clusters: Iterable[str], served: Iterable[str] = ()) -> Word:
        """What Envoys say of these clusters; nothing is lacked where no Envoy is.

        Args:
            clusters: Which.
            served: Those of them whose latest endpoints they must have, too.
        """
        names, filled = frozenset(clusters), frozenset(served)
        self._forget_lost()
        streams = [one.stream for one in self._subscribers if one.stream.takes_clusters]
        refused = {name: one.refused[name] for one in streams for name in names & one.refused.keys()}
        having = [*(one.had for one in streams), *(lost.had - filled for lost in self._lost)]
        lacked = {name for had in having for name in names - had}
        lacked.update(name for one in streams for name in filled if not one.serves(name))
        return Word(lacked - refused.keys(), refused)

    def _forget_lost(self) -> None:
        now_s = self._clock()
        self._lost = [lost for lost in self._lost if now_s < lost.until_s]

    def _remember(self, lost: list[_Lost]) -> None:
        self._lost = [*self._lost, *lost][-MAX_LOST:]
        self._heard()

    def _left(self, subscriber: Subscriber) -> None:
        if subscriber not in self._subscribers:
            return
        self._subscribers.discard(subscriber)
        if subscriber.stream.takes_clusters and not self._is_closing:
            until_s = self._clock() + RECONNECT_S
            self._remember([_Lost(until_s, frozenset(subscriber.stream.had), was_here=True)])

    def _taken(self) -> None:
        """An Envoy asks for clusters: the first that was lost, or a new one."""
        del self._lost[:1]


class Subscriber:
    """One Envoy's stream; a `Receiver`.

    Args:
        call: Its call.
        stream: What it has and wants.
        on_nack: See `AdsServer`.
        left: Called with it when it is over.
        taken: Called when it asks for clusters.
        heard: Called after each of its messages about clusters and their endpoints.

    Attributes:
        stream: See above.
    """

    __slots__ = ("_call", "_heard", "_is_sending", "_left", "_on_nack", "_taken", "stream")

    def __init__(
        self,
        call: Call,
        stream: DeltaStream,
        on_nack: Callable[[str], None],
        left: Callable[[Subscriber], None],
        taken: Callable[[], None],
        heard: Callable[[], None],
    ) -> None:
        self._call = call
        self.stream = stream
        self._on_nack = on_nack
        self._left = left
        self._taken = taken
        self._heard = heard
        self._is_sending = False

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        request, took_clusters = pb.DeltaDiscoveryRequest.FromString(message), self.stream.takes_clusters
        try:
            nack = self.stream.receive(request)
        except SubscriptionLimitError:
            logger.error("xds stream subscribes to too much", extra={"peer": self._call.peer})
            self._left(self)
            self._call.abort(Status.RESOURCE_EXHAUSTED, "too many resources subscribed to")
            return
        if nack is not None:
            logger.error(
                "envoy refused resources",
                extra={
                    "peer": self._call.peer,
                    "type_url": nack.type_url,
                    "clusters": list(nack.clusters),
                    "kept": [name for name in nack.clusters if name in self.stream.kept],
                    "detail": nack.detail,
                },
            )
            self._on_nack(nack.type_url)
        self.send()
        if not took_clusters and self.stream.takes_clusters:
            self._taken()
        if request.type_url in (CLUSTER_TYPE, ASSIGNMENT_TYPE):
            self._heard()

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
        responses = self.stream.responses()
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
