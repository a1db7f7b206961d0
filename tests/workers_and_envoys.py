"""What of workers applies configurations and lists clusters, and Envoys that say what a test has them say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2 as pb
from prometheus_client import CollectorRegistry

from extproc.config.schema import Config
from extproc.discovery.fleet import Difference
from extproc.discovery.listed import Listed
from extproc.discovery.resolution import Resolution
from extproc.listeners import Listeners
from extproc.observing.metrics.collector import Metrics
from extproc.server.envoys.acknowledging import Acknowledgements
from extproc.server.envoys.late_clusters import LateClusters
from extproc.server.envoys.publishing import Publisher
from extproc.server.reloading.applying import Owners
from extproc.server.reloading.introducing import Introductions
from extproc.transport.seam import Message, Status, joined
from extproc.xds.ads import AdsServer
from extproc.xds.cluster_encoding import encode
from extproc.xds.cluster_kinds import ClusterKinds
from extproc.xds.leaving import FormerEndpoints
from extproc.xds.publications import Publications
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey


class Envoy:
    """A client of the ADS that says what a test has it say; a `Call`.

    Attributes:
        has: Clusters that it was sent and that were not taken away since.
        owed: Responses with clusters that it has not answered, by nonce.
        assigned: Responses with endpoints, likewise.
        takes_endpoints: It answers them by itself.
        serves: Clusters to how many endpoints it has of them, of what it acknowledged.
        places: The same to where these are.
    """

    peer = "envoy"

    def __init__(self, ads: AdsServer, has: Sequence[str] = (), *, answers: bool = True) -> None:
        self.has: set[str] = set(has)
        self.owed: dict[str, list[str]] = {}
        self.assigned: list[tuple[str, dict[str, frozenset[str]]]] = []
        self.places: dict[str, frozenset[str]] = {}
        self.takes_endpoints = True
        self.answers = answers
        self.stream = ads.open(self)
        first = pb.DeltaDiscoveryRequest(
            type_url=CLUSTER_TYPE, initial_resource_versions=dict.fromkeys(has, "of another time")
        )
        self.stream.on_message(first.SerializeToString())

    @property
    def serves(self) -> dict[str, int]:
        """See above."""
        return {name: len(places) for name, places in self.places.items()}

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """See `Call`."""
        response = pb.DeltaDiscoveryResponse.FromString(bytes(joined(message)))
        loop = asyncio.get_running_loop()
        if response.type_url == CLUSTER_TYPE:
            names = [resource.name for resource in response.resources]
            self.has |= set(names)
            self.has -= set(response.removed_resources)
            for name in response.removed_resources:
                self.places.pop(name, None)
            self.owed[response.nonce] = names
            loop.call_soon(self._subscribe, names)
            if self.answers:
                loop.call_soon(self.acknowledge)
        else:
            told = [
                endpoint_pb2.ClusterLoadAssignment.FromString(resource.resource.value)
                for resource in response.resources
            ]
            hosts = {
                one.cluster_name: frozenset(
                    host.endpoint.address.socket_address.address
                    for locality in one.endpoints
                    for host in locality.lb_endpoints
                )
                for one in told
            }
            self.assigned.append((response.nonce, hosts))
            if self.takes_endpoints:
                loop.call_soon(self.acknowledge_endpoints)
        if sent is not None:
            loop.call_soon(sent)

    def finish(self, _last: Message | None = None) -> None:
        """See `Call`."""

    def abort(self, _status: Status, _detail: str) -> None:
        """See `Call`."""

    def acknowledge(self) -> None:
        """Everything it owes an answer for."""
        self._say("")

    def acknowledge_endpoints(self) -> None:
        """The same of endpoints."""
        while self.assigned:
            nonce, hosts = self.assigned.pop(0)
            self.places |= hosts
            said = pb.DeltaDiscoveryRequest(type_url=ASSIGNMENT_TYPE, response_nonce=nonce)
            self.stream.on_message(said.SerializeToString())

    def refuse(self, words: str) -> None:
        """The same the other way round."""
        for names in self.owed.values():
            self.has -= {name for name in names if name in words}
        self._say(words)

    def leave(self) -> None:
        """Its connection breaks."""
        self.stream.on_reset()

    def _subscribe(self, names: list[str]) -> None:
        wanted = pb.DeltaDiscoveryRequest(type_url=ASSIGNMENT_TYPE, resource_names_subscribe=names)
        self.stream.on_message(wanted.SerializeToString())

    def _say(self, words: str) -> None:
        for nonce in list(self.owed):
            del self.owed[nonce]
            said = pb.DeltaDiscoveryRequest(type_url=CLUSTER_TYPE, response_nonce=nonce)
            if words:
                said.error_detail.message = words
            self.stream.on_message(said.SerializeToString())


class Wire:
    """In place of a bus."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.others: dict[int, Wire] = {}
        self.is_cut = False
        self.is_away = False
        self.is_deaf = False
        self.questions: Listeners[[int, int, list[str], dict[str, list[str]]]] = Listeners()
        self.answers: Listeners[[int, int, dict[str, str]]] = Listeners()
        self.came: Listeners[[int]] = Listeners()
        self.away: Listeners[[int]] = Listeners()

    @classmethod
    def pair(cls) -> tuple[Wire, Wire]:
        """Those of two workers."""
        wires = cls(0), cls(1)
        for wire, other in (wires, wires[::-1]):
            wire.others[other.index] = other
        return wires

    def ask(
        self,
        number: int,
        clusters: Sequence[str],
        served: Mapping[str, list[str]],
        worker: int | None = None,
    ) -> frozenset[int]:
        """See `Bus`."""
        asked = [other for other in self.others.values() if worker in (other.index, None)]
        for other in asked:
            if not (self.is_cut or other.is_cut or self.is_away):
                other.questions.notify(self.index, number, list(clusters), dict(served))
        return frozenset() if self.is_away else frozenset(other.index for other in asked)

    async def met(self) -> frozenset[int]:
        """See `Bus`."""
        return frozenset() if self.is_cut or self.is_away else frozenset(self.others)

    def answer(self, asker: int, number: int, refused: Mapping[str, str]) -> bool:
        """See `Bus`."""
        if not self.others[asker].is_deaf:
            self.others[asker].answers.notify(self.index, number, dict(refused))
        return not self.others[asker].is_deaf


class Source:
    """Lists a cluster once it was asked for it; a `Sources`."""

    def __init__(self, report: Callable[[str, dict[str, list[Listed]]], None]) -> None:
        self._report = report
        self.lists: str | None = None
        self.asked: Config | None = None
        self.is_silent = False

    def foresee(self, config: Config | None) -> None:
        """See `LiveSource`."""
        self.asked = config
        self.is_silent = config is not None and self.lists in config.clusters_named()

    def are_heard(self) -> bool:
        """See `LiveSource`."""
        return not self.is_silent

    def say(self) -> None:
        """What it was asked for."""
        assert self.lists is not None
        self.is_silent = False
        self._report("mesh", {self.lists: [Listed("10.0.0.2:80", Address("10.0.0.2", 80))]})


class Worker:
    """What of a worker applies configurations, and which it may."""

    def __init__(self, wire: Wire | None = None) -> None:
        self.now_s = 0.0
        self.shown: list[AbstractSet[str]] = []
        self.ejected: set[str] = set()
        self.owners = Owners()
        self.source = Source(self.owners.report)
        heard: Listeners[[]] = Listeners()
        self.ads = AdsServer(lambda _: None, heard.notify, lambda: self.now_s)
        self.wire = wire
        self.acknowledgements = Acknowledgements(
            self.ads,
            wire,  # type: ignore[arg-type]
            self.owners.fleet.clusters,
            lambda: self.now_s,
        )
        self.late = LateClusters(
            self.owners.routable, self.acknowledgements, self._shown, self._is_available, lambda: self.now_s
        )
        former, kinds = FormerEndpoints(), ClusterKinds(encode)
        publications = Publications(self.owners.fleet.clusters, lambda _: None, kinds, former.of)
        self.publisher = Publisher(self.ads, publications, former, Metrics(CollectorRegistry(), "0"))
        self.introductions = Introductions(
            self.acknowledgements, self.publisher, self.source, self._introduced, self._spurned
        )
        heard.add(self.acknowledgements.look_soon)
        self.acknowledgements.looked.add(self.introductions.look, self.late.look)
        self._config = Config()
        self._generation = 0
        self.asked: dict[int, tuple[Config, Resolution]] = {}
        self.in_force = ""
        self.spurned: list[str] = []
        owners = self.owners
        owners.coming.add(self.introductions.begin)
        owners.read.add(self.introductions.applied)
        owners.add(self._configure)
        owners.changes.add(self._update)
        owners.settled.add(self._publish, self.late.settled)

    def start(self, cluster: str) -> None:
        """The first configuration, which waits for nobody."""
        self.owners.apply(*configured(cluster))
        self.in_force = cluster

    def rename(self, cluster: str, *others: str, **settings: Any) -> None:
        """A configuration with a cluster of that name, and a rule that leads to it."""
        self._generation += 1
        self.asked[self._generation] = configured(cluster, *others, **settings)
        self.owners.introduce(self._generation, *self.asked[self._generation])

    def time_is_over(self) -> None:
        """What `Following` does after `introduce_s`."""
        self._introduced(self._generation)

    def stop(self) -> None:
        """End its timers."""
        self.introductions.stop()
        self.acknowledgements.stop()
        self.publisher.stop()

    def _introduced(self, generation: int) -> None:
        assert generation == self._generation, "one that was replaced"
        config, resolution = self.asked[generation]
        self.owners.apply(config, resolution)
        self.in_force = next(iter(resolution.clusters))

    def _spurned(self, generation: int, problems: Sequence[str]) -> None:
        assert generation == self._generation
        self.spurned += problems

    def _shown(self, clusters: AbstractSet[str]) -> None:
        self.shown.append(clusters)
        self.owners.shown()

    def _is_available(self, key: EndpointKey) -> bool:
        return key not in self.ejected

    def _configure(self, config: Config) -> None:
        self._config, self._is_published = config, False

    def _update(self, difference: Difference) -> None:
        self.publisher.departed(difference.departed)
        if self._is_published:
            self.publisher.update(difference.clusters, came_or_went=True)

    def _publish(self) -> None:
        if not self._is_published:
            self._is_published = True
            self.publisher.configure(self._config)


def configured(cluster: str, *others: str, **settings: Any) -> tuple[Config, Resolution]:
    """A model with one rule, its cluster, and clusters beside it."""
    config = Config.model_validate({"models": {"m": {"rules": [{"cluster": cluster}]}}, **settings})
    endpoints = (Listed("10.0.0.1:80", Address("10.0.0.1", 80)),)
    return config, Resolution(dict.fromkeys((cluster, *others), endpoints))


async def settled() -> None:
    """All that follows has happened."""
    for _ in range(20):
        await asyncio.sleep(0)
