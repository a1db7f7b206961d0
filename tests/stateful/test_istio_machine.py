"""The client of istiod against a model of istiod, over all orders of edits, deliveries, losses and refusals.

The model sends what istiod sends: on a new stream everything, then what changed; an empty assignment for a
service that is not there; the same again at any time. Whatever the order, once all is delivered the fleet has
what the mesh has, and meanwhile no endpoint goes that the mesh had all along.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from extproc.discovery.fleet import Fleet
from extproc.discovery.istio.effects import Connect, Effect, Send, Update
from extproc.discovery.istio.machine import IstioClient
from extproc.discovery.istio.messages import ASSIGNMENTS, CLUSTERS, Request, Resource, Response
from extproc.discovery.istio.wire import ProtobufDecoder
from extproc.values.mesh_names import MeshName
from tests.mesh import assignment, assignments, clusters

SERVICES = tuple(f"outbound|8000||{name}.internal" for name in ("a", "b", "c"))
SUBSETS = ("v1", "v2")
HOSTS = ("10.0.0.1", "10.0.0.2", "10.0.0.3")

service_names = st.sampled_from(SERVICES)
members = st.frozensets(st.sampled_from(HOSTS))


def of_subset(service: str, subset: str) -> str:
    """The cluster of a subset."""
    return service.replace("||", f"|{subset}|")


class Mesh(RuleBasedStateMachine):
    """`IstioClient` beside the mesh that it follows."""

    def __init__(self) -> None:
        super().__init__()
        self.truth: dict[str, frozenset[str]] = {}
        """Members of each cluster that exists, subsets too."""
        self.steady: set[tuple[str, str]] = set()
        """Endpoints that the fleet has, and the mesh ever since, also in what is still on its way."""
        self.wanted = set(SERVICES)
        self.fleet = Fleet()
        self.client = IstioClient(ProtobufDecoder(), random.Random(1))
        self.now_s = 0.0
        self.number = 0
        self.is_open = False
        self.queue: deque[Response] = deque()
        self.sent_clusters: set[str] = set()
        self.subscribed: set[str] = set()
        self.nonces = 0
        self.is_behind = False
        """Something was refused: istiod says it again only on a new stream."""
        self.take(self.client.follow(self.wanted, self.now_s))
        self.take(self.client.begin(self.now_s))

    # The model of istiod.

    def nonce(self) -> str:
        """Another one."""
        self.nonces += 1
        return f"n{self.nonces}"

    def push(self, touched: set[str]) -> None:
        """Istiod noticed an edit of these clusters."""
        if not self.is_open:
            return
        gone = sorted(self.sent_clusters - self.truth.keys())
        self.sent_clusters = set(self.truth)
        here = sorted(touched & self.truth.keys())
        self.queue.append(clusters(self.nonce(), *here, removed=gone))
        self.tell(touched & self.subscribed)

    def tell(self, names: set[str]) -> None:
        """Assignments of these; empty where there is nothing."""
        if names:
            told = [assignment(name, *sorted(self.truth.get(name, ()))) for name in sorted(names)]
            self.queue.append(assignments(self.nonce(), *told))

    def request(self, request: Request) -> None:
        """The client says this."""
        if request.error is not None:
            self.is_behind = True
        elif request.nonce:
            assert not request.subscribe, "no subscription in an answer"
            assert not request.unsubscribe
        elif request.type_url == CLUSTERS:
            assert request.is_first
            self.sent_clusters = set(self.truth)
            self.queue.append(clusters(self.nonce(), *sorted(self.truth)))
        else:
            assert request.type_url == ASSIGNMENTS
            assert not set(request.subscribe) & self.subscribed, "subscribed once"
            assert set(request.unsubscribe) <= self.subscribed
            self.subscribed |= set(request.subscribe)
            self.subscribed -= set(request.unsubscribe)
            self.tell(set(request.subscribe))

    def take(self, effects: Sequence[Effect]) -> None:
        """Carry out what the client says."""
        for effect in effects:
            match effect:
                case Connect():
                    self.number, self.is_open = effect.number, True
                    self.queue.clear()
                    self.subscribed = set()
                    self.is_behind = False
                    self.take(self.client.opened(self.number))
                case Send():
                    self.request(effect.request)
                case Update():
                    assert self.fleet.update("istio", effect.clusters), "a report changes something"
        if self.is_open and not self.queue:  # nothing is on its way that says otherwise
            self.steady |= self.has() & self.mesh_has()

    def has(self) -> set[tuple[str, str]]:
        """Endpoints of the fleet."""
        return {(one.cluster, one.address.host) for one in self.fleet.endpoints}

    def mesh_has(self) -> set[tuple[str, str]]:
        """Endpoints of the mesh that rules name."""
        return {(name, host) for name, hosts in self.truth.items() if name in self.wanted for host in hosts}

    # What happens.

    @rule(service=service_names, hosts=members)
    def edit(self, service: str, hosts: frozenset[str]) -> None:
        """A service comes, or has other members."""
        self.truth[service] = hosts
        touched = {service}
        for subset in SUBSETS:
            name = of_subset(service, subset)
            if name in self.truth:
                self.truth[name] &= hosts
                touched.add(name)
        self.steady &= self.mesh_has()
        self.push(touched)

    @rule(service=service_names)
    def remove(self, service: str) -> None:
        """A service goes, with its subsets."""
        names = {service, *(of_subset(service, subset) for subset in SUBSETS)} & self.truth.keys()
        for name in names:
            del self.truth[name]
        self.steady &= self.mesh_has()
        self.push(names)

    @rule(service=service_names, subset=st.sampled_from(SUBSETS), hosts=members, is_there=st.booleans())
    def edit_subset(self, service: str, subset: str, hosts: frozenset[str], is_there: bool) -> None:
        """A subset comes, goes, or has other members."""
        if service not in self.truth:
            return
        name = of_subset(service, subset)
        if is_there:
            self.truth[name] = hosts & self.truth[service]
        else:
            self.truth.pop(name, None)
        self.push({service, name})

    @precondition(lambda self: self.queue)
    @rule()
    def deliver(self) -> None:
        """The next response arrives."""
        response = self.queue.popleft()
        self.take(self.client.received(self.number, response, self.now_s))

    @precondition(lambda self: self.queue)
    @rule()
    def spoil(self) -> None:
        """The next response arrives with its first resource in no state to be read."""
        response = self.queue.popleft()
        first, rest = response.resources[:1], response.resources[1:]
        spoilt = replace(response, resources=(*(Resource(one.name, b"\xff\xff") for one in first), *rest))
        self.take(self.client.received(self.number, spoilt, self.now_s))

    @precondition(lambda self: self.is_open)
    @rule()
    def repeat(self) -> None:
        """Istiod says again what it said, for reasons of its own."""
        self.tell(set(self.subscribed))

    @precondition(lambda self: self.is_open)
    @rule()
    def lose(self) -> None:
        """The stream ends."""
        self.is_open = False
        self.queue.clear()
        self.take(self.client.lost(self.number, self.now_s))

    @precondition(lambda self: not self.is_open)
    @rule()
    def reopen(self) -> None:
        """Time passes until there is another one."""
        while not self.is_open:
            next_s = self.client.next_s()
            assert next_s is not None
            self.now_s = max(self.now_s, next_s)
            self.take(self.client.advance(self.now_s))

    @rule(names=st.sets(service_names))
    def name(self, names: set[str]) -> None:
        """Rules name other services."""
        self.wanted = names
        self.steady &= self.mesh_has()
        self.take(self.client.follow(names, self.now_s))

    @invariant()
    def nothing_flaps(self) -> None:
        """What the mesh has all along stays in the fleet."""
        assert self.steady <= self.has()

    @invariant()
    def nothing_is_there_that_no_rule_names(self) -> None:
        """The fleet has services that are wanted, and no subset as a cluster of its own."""
        assert self.fleet.clusters.keys() <= self.wanted

    def teardown(self) -> None:
        """All is delivered in the end: fleet and mesh are the same."""
        if self.is_open and self.is_behind:
            self.lose()
        self.reopen() if not self.is_open else None
        while self.queue:
            self.deliver()
        assert self.client.is_in_sync
        assert self.client.has_first_state
        assert self.has() == self.mesh_has()
        assert self.fleet.clusters.keys() == self.truth.keys() & self.wanted
        for endpoint in self.fleet.endpoints:
            subsets = {
                parsed.subset
                for name, hosts in self.truth.items()
                if (parsed := MeshName.parse(name)) is not None
                and parsed.subset
                and str(parsed.service) == endpoint.cluster
                and endpoint.address.host in hosts
            }
            assert endpoint.labels.get("subset", "") == ",".join(sorted(subsets))


TestMesh = Mesh.TestCase
