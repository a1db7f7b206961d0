"""The delta xDS protocol without I/O: what is published, and what one Envoy has of it.

Rules:
    1. A resource's version is the hash of its bytes; Envoy is sent a resource iff it lacks that version.
    2. Clusters go before assignments, so Envoy asks for endpoints of clusters it knows.
    3. A cluster that changed, or is new, waits for its assignment even if Envoy has that already:
       the subscription is not repeated (envoyproxy/envoy#47302), and Envoy 1.40 holds its answer
       back until the wait ends. So a response with clusters is followed at once by all
       assignments the stream subscribes to.
    4. A refused version is not sent again; the next one is.
    5. A stream's memory is bounded by what it subscribes to, at most `MAX_NAMES` per type.
    6. Envoy has a cluster from its first acknowledgement on, which it holds back until all clusters are warm,
       and until a response takes the cluster away. A refused change leaves Envoy the version it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from envoy.service.discovery.v3 import discovery_pb2 as pb
from xxhash import xxh3_64_hexdigest

from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE

MAX_NAMES = 65_536
"""Names one stream may subscribe to or claim to have, per type; far above any fleet, far below harm."""

_ORDER = (CLUSTER_TYPE, ASSIGNMENT_TYPE)


class SubscriptionLimitError(Exception):
    """A stream asked for more than `MAX_NAMES` resources of one type."""


@dataclass(frozen=True, slots=True)
class StoredResource:
    """One published resource: serialised message and xxh3_64 of it in hex."""

    body: bytes
    version: str


@dataclass(frozen=True, slots=True)
class Nack:
    """Envoy refused a response and keeps what it had.

    Attributes:
        detail: Envoy's words; they name the resource.
        clusters: Those that it refused, as far as they are known.
    """

    type_url: str
    detail: str
    clusters: tuple[str, ...] = ()


class ResourceStore:
    """What every Envoy should have: per type, name to resource. Owned by one event loop."""

    def __init__(self) -> None:
        self._resources: dict[str, Mapping[str, StoredResource]] = {
            type_url: MappingProxyType({}) for type_url in _ORDER
        }

    def update(self, type_url: str, bodies: Mapping[str, bytes | None]) -> bool:
        """Publish these resources of a type; its others stay.

        Args:
            type_url: Which type.
            bodies: Name to serialised message; None takes the resource away.

        Returns:
            True if anything differs from before.

        Raises:
            KeyError: The type is not served. Nothing changed.
        """
        before = self._resources[type_url]
        gone = [name for name, body in bodies.items() if body is None and name in before]
        changed = {
            name: StoredResource(body, xxh3_64_hexdigest(body))
            for name, body in bodies.items()
            if body is not None and ((known := before.get(name)) is None or known.body != body)
        }
        if not gone and not changed:
            return False
        after = {**before, **changed}
        for name in gone:
            del after[name]
        self._resources[type_url] = MappingProxyType(after)
        return True

    def resources(self, type_url: str) -> Mapping[str, StoredResource]:
        """Published resources of a type, by name: a view that later publications do not change."""
        return self._resources[type_url]


@dataclass(slots=True)
class _Subscription:
    """One type on one stream.

    Attributes:
        names: Subscribed by name.
        is_wildcard: Everything is subscribed.
        known: Name to the version Envoy has or was last sent; None if it knows that there is none.
        is_answered: Some response went out; a wildcard's first one may be empty, for Envoy waits for it.
    """

    names: set[str] = field(default_factory=set)
    is_wildcard: bool = False
    known: dict[str, str | None] = field(default_factory=dict)
    is_answered: bool = False


class DeltaStream:
    """One delta ADS stream: requests in, due responses out.

    Args:
        store: Shared with all streams; read whenever responses are asked for.
    """

    def __init__(self, store: ResourceStore) -> None:
        self._store = store
        self._subscriptions: dict[str, _Subscription] = {}
        self._num_responses = 0
        self._clusters_sent = False
        self._had: set[str] = set()
        self._sent: dict[str, int] = {}
        self._assigned: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._kept: set[str] = set()

    @property
    def takes_clusters(self) -> bool:
        """True once it asked for clusters."""
        return CLUSTER_TYPE in self._subscriptions

    @property
    def had(self) -> AbstractSet[str]:
        """Clusters that Envoy has, by what it acknowledged or said on connecting; a view."""
        return self._had

    def serves(self, cluster: str) -> bool:
        """Whether Envoy has answered the latest assignment of a cluster that it has."""
        subscription = self._subscriptions.get(ASSIGNMENT_TYPE)
        if subscription is None or cluster not in self._had or cluster in self._assigned:
            return False
        published = self._store.resources(ASSIGNMENT_TYPE).get(cluster)
        return published is not None and subscription.known.get(cluster) == published.version

    @property
    def refused(self) -> Mapping[str, str]:
        """Clusters that Envoy refused and has no version of, with Envoy's words; a view."""
        return self._refused

    @property
    def kept(self) -> AbstractSet[str]:
        """Clusters that Envoy has as they were, for it refused what came since; a view."""
        return self._kept

    def receive(self, request: pb.DeltaDiscoveryRequest) -> Nack | None:
        """Take one request: subscriptions, and Envoy's refusal of a response if there was one.

        A type that is not served is ignored: there is nothing to say about it.

        Raises:
            SubscriptionLimitError: The stream should be ended.
        """
        if request.type_url not in _ORDER:
            return None
        subscription = self._subscriptions.get(request.type_url)
        is_first = subscription is None
        if subscription is None:
            subscription = self._open(request)
        for name in request.resource_names_subscribe:
            if name == "*":
                subscription.is_wildcard = True
                continue
            subscription.names.add(name)
            if not is_first:  # asking again means wanting it again
                subscription.known.pop(name, None)
        for name in request.resource_names_unsubscribe:
            if name == "*":
                subscription.is_wildcard = False
            subscription.names.discard(name)
            subscription.known.pop(name, None)
            if request.type_url == CLUSTER_TYPE:
                self._had.discard(name)
                self._kept.discard(name)
            else:
                self._assigned.pop(name, None)
        if max(len(subscription.names), len(subscription.known)) > MAX_NAMES:
            raise SubscriptionLimitError(request.type_url)
        nack = None
        if request.HasField("error_detail"):
            nack = Nack(request.type_url, request.error_detail.message)
        if request.type_url == CLUSTER_TYPE:
            refused = self._judge(request.response_nonce, nack)
            nack = None if nack is None else replace(nack, clusters=refused)
        else:
            nonce = request.response_nonce
            for name in [name for name, awaited in self._assigned.items() if awaited == nonce]:
                del self._assigned[name]
        return nack

    def responses(self) -> list[pb.DeltaDiscoveryResponse]:
        """What Envoy lacks now, in sending order; counts as sent. Empty if it has everything."""
        due = []
        for type_url in _ORDER:
            subscription = self._subscriptions.get(type_url)
            response = None if subscription is None else self._response(type_url, subscription)
            if response is not None:
                due.append(response)
        return due

    def _await(self, changed: list[str], removed: list[str]) -> None:
        """The next word on these clusters is Envoy's."""
        for name in changed:
            self._sent[name] = self._num_responses
            self._refused.pop(name, None)
        for name in removed:
            self._had.discard(name)
            self._kept.discard(name)
            self._sent.pop(name, None)
            self._refused.pop(name, None)

    def _judge(self, nonce: str, nack: Nack | None) -> tuple[str, ...]:
        """Envoy's word on one response, and what it refused; what it does not name in a refusal it took."""
        answered = [name for name, number in self._sent.items() if format(number, "x") == nonce]
        named = set() if nack is None else {name for name in answered if _is_named(name, nack.detail)}
        refused = []
        for name in answered:
            del self._sent[name]
            if nack is None or (named and name not in named):
                self._had.add(name)
                self._kept.discard(name)
                continue
            refused.append(name)
            if name not in self._had:
                self._refused[name] = nack.detail
            else:
                self._kept.add(name)
        return tuple(refused)

    def _open(self, request: pb.DeltaDiscoveryRequest) -> _Subscription:
        """First request of a type: no names means every cluster, and Envoy says what it has."""
        is_cluster = request.type_url == CLUSTER_TYPE
        subscription = _Subscription(is_wildcard=is_cluster and not request.resource_names_subscribe)
        if is_cluster or not self._clusters_sent:
            subscription.known.update(request.initial_resource_versions)
        if is_cluster:
            self._had.update(subscription.known)
        self._subscriptions[request.type_url] = subscription
        return subscription

    def _response(self, type_url: str, subscription: _Subscription) -> pb.DeltaDiscoveryResponse | None:
        published = self._store.resources(type_url)
        known = subscription.known
        wanted = published.keys() if subscription.is_wildcard else subscription.names & published.keys()
        changed = sorted(name for name in wanted if known.get(name) != published[name].version)
        missing = (subscription.names | known.keys()) - published.keys()
        removed = sorted(name for name in missing if known.get(name, "") is not None)
        if not changed and not removed and (subscription.is_answered or not subscription.is_wildcard):
            return None
        for name in changed:
            known[name] = published[name].version
        for name in removed:
            if name in subscription.names:
                known[name] = None
            else:
                known.pop(name, None)
        self._num_responses += 1
        subscription.is_answered = True
        if type_url == CLUSTER_TYPE:
            self._await(changed, removed)
        else:
            self._assigned.update(dict.fromkeys(changed, format(self._num_responses, "x")))
            for name in removed:
                self._assigned.pop(name, None)
        if type_url == CLUSTER_TYPE and changed:
            self._clusters_sent = True
            if ASSIGNMENT_TYPE in self._subscriptions:
                self._subscriptions[ASSIGNMENT_TYPE].known.clear()
        return pb.DeltaDiscoveryResponse(
            type_url=type_url,
            nonce=format(self._num_responses, "x"),
            resources=[_resource(type_url, name, published[name]) for name in changed],
            removed_resources=removed,
        )


def _is_named(name: str, detail: str) -> bool:
    """Whether Envoy's words are of this cluster, and not of one whose name ends like it."""
    return f" {name}: " in f" {detail}"


def _resource(type_url: str, name: str, resource: StoredResource) -> pb.Resource:
    made = pb.Resource(name=name, version=resource.version)
    made.resource.type_url, made.resource.value = type_url, resource.body
    return made
