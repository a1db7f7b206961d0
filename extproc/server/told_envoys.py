"""Makes what tells Envoys of clusters: before a configuration is in force, while it is, and late ones."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from extproc.listeners import Listeners
from extproc.server.envoys.acknowledging import Acknowledgements
from extproc.server.envoys.late_clusters import LateClusters
from extproc.server.envoys.publishing import ADS_TYPES, Publisher
from extproc.server.knowledge import Knowledge, Site
from extproc.server.parts import Part
from extproc.server.reloading.configuration import Configuration
from extproc.server.reloading.introducing import Introductions
from extproc.server.sources.live_sources import LiveSources
from extproc.xds.ads import AdsServer
from extproc.xds.cluster_kinds import ClusterKinds
from extproc.xds.leaving import FormerEndpoints
from extproc.xds.publications import Publications


@dataclass(frozen=True, slots=True)
class ToldEnvoys:
    """Envoys, and what they are told.

    Attributes:
        ads: Their streams.
        publisher: Tells them of the fleet.
        settled: Called when the fleet is another and published.
        look_soon: Called when the health of an endpoint is another.
        publishing: Parts that end after the configuration.
        catching_up: Parts between the bus to other workers and the first request.
    """

    ads: AdsServer
    publisher: Publisher
    settled: Callable[[], None]
    look_soon: Callable[[], None]
    publishing: tuple[Part, ...]
    catching_up: tuple[Part, ...]


def told_envoys(
    site: Site, known: Knowledge, kinds: ClusterKinds, configuration: Configuration, sources: LiveSources
) -> ToldEnvoys:
    """All of it, listening to what it needs but `settled`, which comes after what publishes.

    Args:
        site: Where the worker lives.
        known: What it knows.
        kinds: How clusters are encoded.
        configuration: Waits for what it brings to be introduced.
        sources: Asked for what they list of it.
    """
    owners, health = site.owners, known.state.scheduling.health
    ads, acknowledgements = _envoys(site, known)

    def shown(clusters: AbstractSet[str]) -> None:
        health.reconsider(clusters)
        owners.shown()

    late = LateClusters(owners.routable, acknowledgements, shown, health.is_available)
    former = FormerEndpoints()
    publications = Publications(owners.fleet.clusters, health.state, kinds, former.of)
    publisher = Publisher(ads, publications, former, site.metrics)
    introductions = Introductions(
        acknowledgements, publisher, sources, configuration.introduced, configuration.spurned
    )
    acknowledgements.looked.add(introductions.look, late.look)
    owners.coming.add(introductions.begin)
    owners.read.add(introductions.applied)
    publishing = (
        Part("publisher", stop=publisher.stop),
        Part("acknowledgements", stop=acknowledgements.stop),
        Part("introductions", stop=introductions.stop),
    )
    catching_up = (
        Part("clusters at Envoys", lambda: introductions.catch_up(owners.led_to)),
        Part("late clusters", late.start, late.stop),
    )
    return ToldEnvoys(ads, publisher, late.settled, acknowledgements.look_soon, publishing, catching_up)


def _envoys(site: Site, known: Knowledge) -> tuple[AdsServer, Acknowledgements]:
    """An Envoy whose worker dies comes to another one: they tell each other how many they have."""
    heard: Listeners[[]] = Listeners()
    ads = AdsServer(lambda type_url: site.metrics.ads_refused(ADS_TYPES[type_url]), heard.notify)
    acknowledgements = Acknowledgements(ads, known.bus, site.owners.fleet.clusters)
    heard.add(acknowledgements.look_soon)
    bus = known.bus
    if bus is not None:
        bus.found.add(ads.found)
        bus.lost.add(ads.expect)
        heard.add(lambda: bus.tell_envoys(ads.num_envoys))
    return ads, acknowledgements
