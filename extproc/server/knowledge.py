"""What a worker is made for and what it knows; `building` makes the rest around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from extproc.choosing.lines import OtherLines
from extproc.config.schema import Config
from extproc.health.states import Transition
from extproc.health.tracker import HealthTracker
from extproc.listeners import Listeners
from extproc.observing.metrics.collector import Metrics
from extproc.observing.records import RecordRing
from extproc.predicting.tokens import TokensPerByte
from extproc.routing.caches import Caches
from extproc.routing.event_caches import EventCaches
from extproc.routing.homes import Homes
from extproc.routing.state import Outside, RoutingState, make_routing_state
from extproc.server.engines.engine_news import capacity_blocks
from extproc.server.engines.engine_tls import RequestTls
from extproc.server.engines.kv_event_follower import KvEventFollower
from extproc.server.exchanging.bus import Bus
from extproc.server.exchanging.entry_relay import EntryRelay
from extproc.server.exchanging.hearsay import Hearsay
from extproc.server.exchanging.sharing import Alone, Shared, entry_relay, store_of
from extproc.server.reloading.applying import Owners
from extproc.values.endings import RequestEvent
from extproc.values.inflight import Inflight
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.shared_counters import SharedCounters
from metadata_center.types import EndpointKey, Waiter


@dataclass(frozen=True, slots=True)
class Site:
    """Which worker is made, and what all of it is measured and configured by.

    Attributes:
        path: tokenway.yaml, or a clusters.json for embedded defaults.
        index: Which worker.
        workers: How many there are.
        supervised: A supervisor serves the admin port and made the shared counters.
        folder: Of the sockets.
        counters: Where the load of all workers is counted.
        owner: The name that its requests carry.
        config: The settings of the start.
        registry: Of all metrics.
        metrics: The gateway's own.
        owners: What follows the configuration.
    """

    path: Path
    index: int
    workers: int
    supervised: bool
    folder: Path
    counters: Path
    owner: str
    config: Config
    registry: CollectorRegistry
    metrics: Metrics
    owners: Owners


@dataclass(frozen=True, slots=True)
class News:
    """What happens to a worker, for the parts that have to know.

    Attributes:
        cached: An endpoint has blocks cached, or responses live there; for the other workers and gateways.
        entries: The access log says something of a request decided here.
        freed: Room was freed at an endpoint.
        lost: The lease of a request expired.
        transitions: An endpoint's health changed.
    """

    cached: Listeners[[EndpointKey, Sequence[int]]]
    entries: Listeners[[RequestEvent]]
    freed: Listeners[[]]
    lost: Listeners[[Inflight, float]]
    transitions: Listeners[[Transition]]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a worker knows, and those that bring it news from elsewhere.

    Attributes:
        state: What decisions read and endings change.
        tls: How engines are spoken to.
        met: Load and history, and the way to other gateways.
        history: Blocks by routing history.
        cache_map: What engines announced.
        event_caches: The same, as decisions ask for it.
        kv_event_follower: Follow the engines.
        bus: To the other workers; None if there are none.
        relay: To workers of other replicas that serve the same gateway; None where a gateway has one.
    """

    state: RoutingState
    tls: RequestTls
    met: Alone | Shared
    history: PrefixIndex
    cache_map: CacheMap
    event_caches: EventCaches
    kv_event_follower: KvEventFollower
    bus: Bus | None
    relay: EntryRelay | None


def knowledge(site: Site, news: News) -> Knowledge:
    """What a new worker knows: nothing yet, in whole objects."""
    config, kv_events = site.config, site.config.cache.kv_events
    health = HealthTracker(config.health.settings())
    tls = RequestTls(site.owners.fleet)
    site.owners.read.add(lambda read: tls.configure(read.engine_tls))
    homes = Homes(config.responses.max_remembered, config.responses.expiry_s)
    history = PrefixIndex(
        capacity_blocks(config.cache.default_kv_tokens, TokensPerByte().ratio, config),
        config.cache.max_blocks_per_endpoint,
    )
    cache_map = CacheMap(
        kv_events.max_blocks,
        max(1, kv_events.max_blocks // 2),  # one engine gone mad leaves the others their room
        slow_weight=kv_events.slow_medium_weight,
    )
    event_caches = EventCaches(cache_map, time.time)
    lines = OtherLines()
    hearsay = Hearsay(homes, history, health, lines, time.monotonic, news.freed.notify)
    counters = SharedCounters(site.counters, site.index) if site.supervised else Counters()
    met = store_of(
        config, str(site.path), site.index, counters, history, hearsay.responses, homes.latest, hearsay.line
    )
    bus, relay = None, entry_relay(config, str(site.path), site.owner, news.entries.notify)
    if site.workers > 1:
        take = news.entries.notify if relay is None else relay.take
        bus = Bus(site.folder, site.index, site.workers, take, hearsay.cached, homes.latest, hearsay.line)
        news.cached.add(bus.share)
    news.cached.add(met.store.share)
    state = make_routing_state(
        load=met.store.load,
        caches=Caches(history, events=event_caches),
        health=health,
        records=RecordRing(config.explain.ring_size),
        recorder=site.metrics,
        homes=homes,
        outside=Outside(
            share=news.cached.notify,
            processes=_processes(site.workers, met),
            load_age_s=met.sync.age_s if isinstance(met, Shared) else _always_current,
            freed=news.freed.notify,
            on_lost=news.lost.notify,
            on_transition=news.transitions.notify,
            lines=lines,
            tell_line=_tell_line(bus, met),
        ),
    )
    kv_event_follower = KvEventFollower(cache_map, event_caches, time.monotonic, time.time, tls.of)
    return Knowledge(state, tls, met, history, cache_map, event_caches, kv_event_follower, bus, relay)


def _tell_line(bus: Bus | None, met: Alone | Shared) -> Callable[[Sequence[Waiter]], None] | None:
    """Tells the other workers and gateways who waits here; None where there are none."""
    if isinstance(met, Alone):
        return None if bus is None else bus.tell_line
    if bus is None:
        return met.store.tell_line
    wires = (bus.tell_line, met.store.tell_line)

    def tell(line: Sequence[Waiter]) -> None:
        for wire in wires:
            wire(line)

    return tell


def _processes(workers: int, met: Alone | Shared) -> Callable[[], int]:
    """Processes that place requests on these endpoints, of all gateways."""
    if isinstance(met, Alone):
        return lambda: workers
    peers = met.store.peers
    return lambda: workers + peers.live_members


def _always_current(_now_s: float) -> float:
    """The age of news of other gateways' load, where there are none."""
    return 0.0
