"""Makes a worker: every object whole, out of the settings of the start; nothing is set on any afterwards.

Rules:
    1. An object is given what it needs when it is made, so what is needed is made first.
    2. Where two need each other, one of them is called by a list of listeners that exists before both.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry

from extproc.accesslog.service import AccessLog, Dispatcher
from extproc.admin.table import PAGES
from extproc.build_kind import build_kind
from extproc.config.loading import NO_SETTINGS, Settings
from extproc.config.schema import Config
from extproc.health.prober import Prober
from extproc.listeners import Listeners
from extproc.observing.ignored_headers import IgnoredHeaders
from extproc.observing.metrics.collector import Metrics
from extproc.observing.metrics.family import Values
from extproc.observing.metrics.kv_events import event_values
from extproc.observing.metrics.process import StallCause, process_values
from extproc.observing.metrics.sharing import sharing_values
from extproc.observing.request_log import RequestLog
from extproc.protocol.bootstrap_dialect import BootstrapDialect
from extproc.protocol.istio_dialect import IstioDialect
from extproc.protocol.servicer import Processor
from extproc.routing.gateway import Gateway
from extproc.routing.listeners import endings_of
from extproc.routing.router import Router
from extproc.routing.waiting import RequestQueue
from extproc.server.bodies.body_readers import BodyReaders
from extproc.server.bodies.unpacking import Unpacking
from extproc.server.draining import Draining
from extproc.server.engines.engine_news import EngineNews
from extproc.server.engines.health_report import HealthReport
from extproc.server.envoys.cluster_encoder import encode_all_here, encode_here
from extproc.server.envoys.forwarded_headers import ForwardedHeaders
from extproc.server.envoys.publishing import Encode, KindsPreparation
from extproc.server.exchanging.sharing import Shared, reserve_by
from extproc.server.housekeeping import Housekeeping
from extproc.server.knowledge import Knowledge, News, Site, knowledge
from extproc.server.listening.admin_answers import OneWorker
from extproc.server.listening.admin_port import AdminPort, TcpPlace
from extproc.server.listening.metrics_ports import metrics_ports
from extproc.server.listening.picking import Picking, picking_of
from extproc.server.listening.rpc_places import places_of
from extproc.server.listening.rpc_server import RpcServer, rpc_server
from extproc.server.listening.run_dir import (
    Residence,
    admin_path,
    counters_path,
    home_of,
    prepare,
    socket_path,
)
from extproc.server.listening.socket_watch import Kept, SocketWatch, kept_of
from extproc.server.parts import Part, Parts
from extproc.server.process.trimming import Trimmer
from extproc.server.reloading.applying import Owners
from extproc.server.reloading.configuration import Configuration
from extproc.server.reloading.fleet_changes import FleetChanges
from extproc.server.reloading.pending_settings import PendingSettings
from extproc.server.reloading.preparing import CompiledRules
from extproc.server.reloading.request_settings import RequestPath, router_settings, routing_table
from extproc.server.sources.live_sources import LiveSources, live_sources_of
from extproc.server.status import Status
from extproc.server.told_envoys import ToldEnvoys, told_envoys
from extproc.server.worker import Life, Worker
from extproc.values.endings import RequestEvent
from extproc.values.placements import Decision
from extproc.xds.ads import AdsServer
from extproc.xds.cluster_kinds import ClusterKinds
from metadata_center.sharing.store_watch import StoreStatus

_log = logging.getLogger("tokenway.worker")

Stalls = Listeners[[float, float, StallCause]]
"""How long a turn of the event loop took, and what took most of it."""

_MESSAGE_OVERHEAD_BYTES = 1024 * 1024
"""Room in a gRPC message beside the body: headers, metadata."""


@dataclass(frozen=True, slots=True)
class RequestWay:
    """What a request goes through.

    Attributes:
        readers: Read large bodies.
        router: Decides.
        waiting: Requests that wait for room.
        unpacking: Has compressed bodies decoded first.
        request_log: Leaves a line for each request.
        gateway: Decides for all that ask.
        processor: Envoy's ext_proc streams.
        access_log: Envoy's reports.
    """

    readers: BodyReaders
    router: Router
    waiting: RequestQueue[Decision]
    unpacking: Unpacking
    request_log: RequestLog
    gateway: Gateway
    processor: Processor
    access_log: AccessLog


def build_worker(
    path: Path,
    *,
    index: int = 0,
    supervised: bool = False,
    stalls: Stalls | None = None,
    settings: Settings = NO_SETTINGS,
    encode: Encode = encode_all_here,
    log_lines_lost: Callable[[], int] = lambda: 0,
    counters: Path | None = None,
) -> Worker:
    """A worker that is ready to start.

    Args:
        path: tokenway.yaml, or a clusters.json for embedded defaults.
        index: Which worker.
        supervised: True if a supervisor serves the admin port and made the shared counters.
        stalls: Tells of long turns of the loop that the worker will run in; None if nothing watches it.
        settings: What goes before what the file says.
        encode: Makes what Envoy is told of clusters.
        log_lines_lost: So far.
        counters: Where the supervisor has the shared counters; None for their place in the run directory.

    Raises:
        ConfigError: The configuration cannot be used.
        OSError: The supervisor's counters cannot be mapped.
    """
    registry, owners, life = CollectorRegistry(), Owners(), Life()
    metrics = Metrics(registry, version("tokenway"))
    if stalls is not None:
        stalls.add(metrics.stalled)
    kinds = ClusterKinds(encode_here)
    preparation, rules = KindsPreparation(kinds, encode), CompiledRules()
    preparations = (preparation, rules)
    configuration = Configuration(path, metrics, owners.apply, settings, preparations, owners.introduce)
    config = configuration.current
    site = _site(path, index, supervised, config, registry, metrics, owners, counters)
    news = News(Listeners(), Listeners(), Listeners(), Listeners(), Listeners())
    known = knowledge(site, news)
    state, follower = known.state, known.kv_event_follower
    way = _request_way(site, news, known, rules)
    engines = EngineNews(
        state.scheduling.engines, known.history, state.scheduling.predictor, follower, config
    )
    prober = _prober(news, known, engines, config)
    sources = _sources(site)
    envoys = told_envoys(site, known, kinds, configuration, sources)
    changes = FleetChanges(owners.fleet, state, prober, follower, envoys.publisher, metrics, time.monotonic)
    server = _server(site, way, envoys.ads)
    load = known.state.scheduling.load

    def is_busy() -> bool:
        return bool(way.processor.streams_active or load.in_flight_of_all_workers)

    picking = _picking(site, news, known, way, lambda: life.is_ready() and sources.are_known(), is_busy)
    draining = _draining(known, way, server, envoys.ads, configuration, picking, is_busy)
    watch = SocketWatch(partial(prepare, site.folder), life.is_ready)
    answering = OneWorker(
        _status(site, known, way, configuration, life, changes, sources, envoys.ads, watch, log_lines_lost)
    )
    admin = AdminPort(PAGES, answering, _admin_place(site))
    _follow_health(site, news, known, engines, changes)
    _follow_configuration(site, known, way, rules, engines, prober, changes, sources)
    owners.settled.add(envoys.settled)
    news.transitions.add(lambda _: envoys.look_soon())
    ports = [] if site.supervised else metrics_ports(config, answering)
    ports = [Part("admin", admin.start, admin.stop), *ports]
    if site.supervised:
        watch.keep([Kept(admin_path(site.folder, index), admin.renew)])
    parts = _parts(site, known, way, configuration, sources, prober, server, picking, envoys, ports, watch)
    preparation.prepare(config)
    facts = {"socket": str(socket_path(site.folder, index)), "owner": site.owner, "build": build_kind()}
    return Worker(life, parts, draining.drain, configuration.reload, lambda: admin.port, facts)


def _site(
    path: Path,
    index: int,
    supervised: bool,
    config: Config,
    registry: CollectorRegistry,
    metrics: Metrics,
    owners: Owners,
    counters: Path | None,
) -> Site:
    workers, owner = config.server.workers if supervised else 1, f"{index}.{secrets.token_hex(4)}"
    folder = home_of(config, path)
    shared = counters if counters is not None and counters.exists() else counters_path(folder)
    return Site(path, index, workers, supervised, folder, shared, owner, config, registry, metrics, owners)


def _request_way(site: Site, news: News, known: Knowledge, rules: CompiledRules) -> RequestWay:
    scheduling, ending, met, config = known.state.scheduling, known.state.ending, known.met, site.config
    readers = BodyReaders()
    router = Router(
        scheduling,
        routing_table(
            config, rules.of(config), site.owners.routable.clusters, scheduling.load.slots, time.time()
        ),
        router_settings(config),
        random.Random(),
        time.monotonic,
        time.time,
        reserve_by(met.sync) if isinstance(met, Shared) and config.metadata_center.reserve else None,
        asyncio.get_running_loop,
        readers,
        time.thread_time,
    )
    assert router.waiting is not None, "there is a loop to wait in"
    news.freed.add(router.waiting.wake)
    unpacking = Unpacking(router.decide, lambda: router.settings)
    request_log = RequestLog()
    endings = endings_of(ending, site.owners.fleet, [request_log.ended], _report_fault)
    news.lost.add(endings.lost)
    news.entries.add(lambda entry: endings.take(entry, time.monotonic()))
    gateway = Gateway(
        router,
        known.state.first_tokens,
        ending.stored,
        endings,
        site.metrics,
        unpacking.decide,
        time.monotonic,
        time.time,
        IgnoredHeaders(site.metrics, time.monotonic).report,
    )
    dialect = BootstrapDialect(site.owner)
    if site.config.istio_gateway is not None:
        dialect = IstioDialect(site.owner)
    processor = Processor(gateway.judge, gateway, dialect, lambda: router.settings.first_chunk)
    wires = [wire for wire in (known.bus, known.relay) if wire is not None]
    dispatcher = Dispatcher(
        site.owner,
        news.entries.notify,
        lambda owner, entry: any(wire.hand_over(owner, entry) for wire in wires),
        wires[-1].broadcast if wires else _drop,
        site.metrics,
    )
    access_log = AccessLog(dispatcher.dispatch, site.metrics)
    return RequestWay(readers, router, router.waiting, unpacking, request_log, gateway, processor, access_log)


def _server(site: Site, way: RequestWay, ads: AdsServer) -> RpcServer:
    config = site.config
    return rpc_server(
        config.server.transport,
        (way.processor.rpc, way.access_log.rpc, ads.rpc),
        places_of(config.server, socket_path(site.folder, site.index), site.index),
        config.request.max_body_bytes + _MESSAGE_OVERHEAD_BYTES,
        site.metrics.transport_fault,
    )


def _picking(
    site: Site,
    news: News,
    known: Knowledge,
    way: RequestWay,
    is_ready: Callable[[], bool],
    is_busy: Callable[[], bool],
) -> Picking | None:
    return picking_of(
        site.config,
        site.index,
        site.workers,
        site.folder,
        site.owner,
        way.gateway,
        news.entries.notify,
        way.access_log.rpc,
        is_ready,
        is_busy,
        partial(_is_reached, known, "picker"),
        site.metrics.transport_fault,
    )


def _is_reached(known: Knowledge, where: str, is_here: Callable[[], bool]) -> bool:
    """Whether somebody is connected to that server of any worker."""
    return is_here() if known.bus is None else known.bus.is_reached(where, is_here)


def _draining(
    known: Knowledge,
    way: RequestWay,
    server: RpcServer,
    ads: AdsServer,
    configuration: Configuration,
    picking: Picking | None,
    is_busy: Callable[[], bool],
) -> Draining:
    return Draining(
        server,
        ads,
        way.processor,
        way.waiting,
        way.access_log,
        is_busy,
        lambda: _is_reached(known, "own", server.is_reached),
        lambda: configuration.current.server.drain_s,
        picking,
        has_peers=known.relay is not None,
    )


def _sources(site: Site) -> LiveSources:
    discovery, owners = site.config.discovery, site.owners
    listing = live_sources_of(discovery, site.index, site.path.parent, owners.report, owners.policies.notify)
    return LiveSources(listing, discovery.wait_s)


def _drop(_entry: RequestEvent) -> None:
    """There is no other worker."""


def _report_fault(error: Exception) -> None:
    """A bug with one listener does not lose the ending for the others."""
    _log.error("an ending was not taken in", exc_info=error)


def _prober(news: News, known: Knowledge, engines: EngineNews, config: Config) -> Prober:
    return Prober(
        known.state.scheduling.health,
        config.health.settings(),
        clock=time.monotonic,
        rng=random.Random(),
        on_transition=news.transitions.notify,
        on_cache_config=engines.cache_config,
        on_cache_cleared=engines.cache_cleared,
        on_occupancy=engines.occupancy,
        tls_of=known.tls.of,
    )


def _admin_place(site: Site) -> TcpPlace | Path:
    place = site.config.server.admin
    return admin_path(site.folder, site.index) if site.supervised else TcpPlace(place.address, place.port)


def _status(
    site: Site,
    known: Knowledge,
    way: RequestWay,
    configuration: Configuration,
    life: Life,
    changes: FleetChanges,
    sources: LiveSources,
    ads: AdsServer,
    watch: SocketWatch,
    log_lines_lost: Callable[[], int],
) -> Status:
    bus, met = known.bus, known.met

    def shared_values() -> Values:
        values = event_values(known.kv_event_follower.stats, known.cache_map.stats)
        values |= process_values(log_lines_lost(), watch.renewals, are_sockets_in_place=watch.are_in_place)
        if isinstance(met, Shared):
            values.update(sharing_values(met.sync.stats, met.store.live_gateways))
        return values

    def store_status() -> StoreStatus | None:
        return met.sync.store_status(time.monotonic()) if isinstance(met, Shared) else None

    status = Status(
        known.state,
        site.registry,
        site.owners.fleet,
        lambda: way.processor.streams_active,
        lambda: sum(wire.dropped for wire in (bus, known.relay) if wire is not None),
        lambda: len(ads.kept),
        shared_values,
        known.event_caches.is_announcing,
        way.waiting.by_reason,
        site.workers,
        configuration.files,
        configuration.names,
        lambda: changes.named,
        sources.statuses,
        store_status,
        life.is_ready,
    )
    site.metrics.watch(status.gauges)
    return status


def _follow_health(
    site: Site, news: News, known: Knowledge, engines: EngineNews, changes: FleetChanges
) -> None:
    """Connects the listeners to changes of an endpoint's health, in this order."""
    news.transitions.add(
        lambda _: known.state.scheduling.ages.health_changed(time.monotonic()),
        HealthReport(site.metrics).changed,
        engines.transition,
        lambda _: news.freed.notify(),
        changes.health_changed,
    )


def _follow_configuration(
    site: Site,
    known: Knowledge,
    way: RequestWay,
    rules: CompiledRules,
    engines: EngineNews,
    prober: Prober,
    changes: FleetChanges,
    sources: LiveSources,
) -> None:
    """Connects what applies a configuration, in this order; what none of them reads needs a restart."""
    scheduling, base = known.state.scheduling, site.path.parent
    requests = RequestPath(
        way.router, way.request_log, rules, site.owners.routable.clusters, scheduling.load.slots, time.time
    )
    site.owners.add(
        requests.follow,
        engines.follow,
        lambda config: scheduling.homes.configure(config.responses.max_remembered, config.responses.expiry_s),
        lambda config: known.kv_event_follower.configure(config, base),
        lambda config: logging.getLogger("tokenway").setLevel(config.logging.level.upper()),
        ForwardedHeaders().follow,
        PendingSettings(site.config).follow,
        changes.configure,
        sources.follow,
    )
    # Models that were missed are asked for again, though the configuration be the same.
    site.owners.read.add(lambda config: prober.configure(config.health.settings()))
    site.owners.changes.add(changes.apply)
    site.owners.policies.add(requests.follow_policies)
    site.owners.leaving.add(way.waiting.place)
    site.owners.settled.add(changes.publish, changes.find_missing)


def _parts(
    site: Site,
    known: Knowledge,
    way: RequestWay,
    configuration: Configuration,
    sources: LiveSources,
    prober: Prober,
    server: RpcServer,
    picking: Picking | None,
    envoys: ToldEnvoys,
    ports: list[Part],
    watch: SocketWatch,
) -> Parts:
    """What starts in this order and stops in the reverse one; no request comes before the configuration."""
    residence = Residence(site.folder, is_alone=not site.supervised)
    supervisor = os.getppid() if site.supervised else None
    if not site.supervised:
        watch.keep([Kept(residence.lock_path, residence.renew)])
    watch.keep(kept_of(server))
    advance, trimmer = known.state.scheduling.running.advance, Trimmer()
    housekeeping = Housekeeping(advance, time.monotonic, supervisor, trimmer.tick)
    parts = [
        Part("residence", residence.start, residence.stop),
        Part("decoders", stop=way.unpacking.close),
        Part("readers", stop=way.readers.close),
        Part("prober", prober.start, prober.stop),
        Part("KV events", known.kv_event_follower.start, known.kv_event_follower.stop),
        *envoys.publishing,
        Part("configuration", configuration.start, configuration.stop),
        Part("discovery", sources.start, sources.stop),
    ]
    if known.bus is not None:
        parts.append(Part("bus", known.bus.start, known.bus.stop))
        watch.keep([Kept(known.bus.path, known.bus.renew)])
    parts += envoys.catching_up
    if known.relay is not None:
        parts.append(Part("entries of other replicas", known.relay.start, known.relay.stop))
    parts.append(Part("server", server.listen, server.close))
    if picking is not None:
        parts.append(Part("picker", picking.start, picking.stop))
        watch.keep(picking.kept())
    if isinstance(known.met, Shared):
        parts.append(Part("sync", known.met.sync.start, known.met.sync.stop))
    parts.append(Part("housekeeping", housekeeping.start, housekeeping.stop))
    return Parts([*parts, *ports, Part("sockets", watch.start, watch.stop)])
