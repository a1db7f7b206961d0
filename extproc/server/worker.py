"""One worker process: builds everything, owns it, starts, drains and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import time
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry

from extproc.accesslog.service import AccessLog, Dispatcher
from extproc.admin.table import PAGES
from extproc.config.schema import Config, ListenTls
from extproc.discovery.resolution import Resolution
from extproc.health.prober import Occupancy, Prober
from extproc.health.tracker import HealthState, HealthTracker, Transition
from extproc.observing.metrics.collector import Metrics
from extproc.observing.metrics.family import Values
from extproc.observing.metrics.kv_events import event_values
from extproc.observing.metrics.sharing import sharing_values
from extproc.observing.records import RecordRing
from extproc.observing.request_log import MIN_KEY_CHARS, block_key
from extproc.predicting.predictor import Predictor
from extproc.predicting.tokens import TokensPerByte
from extproc.protocol.servicer import Processor
from extproc.protocol.wire import Answers
from extproc.request.rules import RuleTable
from extproc.routing.announced import Announced
from extproc.routing.caches import Caches
from extproc.routing.gateway import Gateway
from extproc.routing.homes import Homes
from extproc.routing.outcomes import Outcomes
from extproc.routing.router import Router
from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.routing.state import State
from extproc.routing.table import RoutingTable
from extproc.server.admin_answers import OneWorker
from extproc.server.admin_port import AdminPort, TcpPlace
from extproc.server.announcements import Announcements
from extproc.server.body_readers import BodyReaders
from extproc.server.bootstrap import template, withheld
from extproc.server.bus import Bus
from extproc.server.configuration import Configuration
from extproc.server.engine_tls import request_tls
from extproc.server.run_dir import closed_to_others, lock, prepare, run_dir
from extproc.server.sharing import member_of, reserve_by, transport_of
from extproc.server.status import Status
from extproc.server.unpacking import Unpacking
from extproc.transport import grpc_aio
from extproc.values.endings import RequestEvent
from extproc.values.evidence import FailureKind
from extproc.xds.ads import AdsServer
from extproc.xds.open_models import open_models, subset_pools
from extproc.xds.resources import (
    ASSIGNMENT_TYPE,
    CLUSTER_TYPE,
    UpstreamTls,
    cluster_resources,
    load_assignments,
)
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.shared_counters import SharedCounters
from metadata_center.load.table import LoadTable
from metadata_center.sharing.store import SharedStore
from metadata_center.sharing.sync import Sync, SyncSettings
from metadata_center.store import EmbeddedStore
from metadata_center.types import EndpointKey

_log = logging.getLogger("tokenway.worker")

_DRAIN_POLL_S = 0.05
"""Between looks at what still runs while stopping."""

_LEAST_DRAIN_S = 0.5
"""For the answers to requests that waited here until the stop; as long as Envoy waits for any answer."""

TICK_S = 1.0
"""Leases and predicted prefills are released at every decision; without traffic, this often."""

ADS_TYPES = {CLUSTER_TYPE: "CDS", ASSIGNMENT_TYPE: "EDS"}
"""Metric labels of the published resource types."""

COUNTERS_FILE = "load.counters"

_MESSAGE_OVERHEAD_BYTES = 1024 * 1024
"""Room in a gRPC message beside the body: headers, metadata."""


def socket_path(run_dir: Path, index: int) -> Path:
    """The gRPC socket of a worker."""
    return run_dir / f"gw{index}.sock"


def admin_path(run_dir: Path, index: int) -> Path:
    """The admin socket of a worker, for its supervisor."""
    return run_dir / f"admin{index}.sock"


def listen_credentials(tls: ListenTls | None) -> grpc.ServerCredentials | None:
    """Mutual TLS for gRPC; None for clear text.

    Raises:
        OSError: A file cannot be read.
    """
    if tls is None:
        return None
    key, certificate, authority = (
        Path(name).read_bytes() for name in (tls.key_file, tls.cert_file, tls.client_ca_file)
    )
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=authority, require_client_auth=True
    )


class EjectionCause(StrEnum):
    """Why an endpoint was ejected, but for what failed in traffic; a metric label."""

    PROBE = "probe_failed"
    ASLEEP = "asleep"


_TRAFFIC_CAUSES = {kind.value: kind for kind in FailureKind}


def ejection_cause(reason: str) -> EjectionCause | FailureKind:
    """The cause behind a `Transition.reason`; a metric label."""
    if reason.startswith("probe"):
        return EjectionCause.PROBE
    return _TRAFFIC_CAUSES.get(reason, EjectionCause.ASLEEP)


def capacity_blocks(kv_tokens: int, tokens_per_byte: float, config: Config) -> int:
    """How many of our blocks a KV cache of `kv_tokens` holds."""
    blocks = int(kv_tokens / tokens_per_byte / config.request.block_bytes)
    return min(config.cache.max_blocks_per_endpoint, max(1, blocks))


class Worker:
    """A whole gateway, or one of several processes of one.

    Args:
        path: tokenway.yaml, or a clusters.json for embedded defaults.
        index: Which worker.
        supervised: True if a supervisor serves the admin port and made the shared counters.

    Raises:
        ConfigError: The configuration cannot be used.
    """

    def __init__(self, path: Path, *, index: int = 0, supervised: bool = False) -> None:
        self._path = path
        self._index = index
        self._supervised = supervised
        self._supervisor = os.getppid()
        self._registry = CollectorRegistry()
        metrics = self._metrics = Metrics(self._registry, version("tokenway"))
        self._configuration = Configuration(path, metrics, self._apply)
        config = self._configuration.current
        self._owner = f"{index}.{secrets.token_hex(4)}"
        self._health = HealthTracker(config.health.settings())
        workers = config.server.workers if supervised else 1
        self._run_dir = run_dir(config.server)
        self._lock = contextlib.ExitStack()
        counters = SharedCounters(self._run_dir / COUNTERS_FILE, index) if supervised else Counters()
        history = PrefixIndex(
            capacity_blocks(config.cache.default_kv_tokens, TokensPerByte().ratio, config),
            config.cache.max_blocks_per_endpoint,
        )
        kv_events = config.cache.kv_events
        cache_map = CacheMap(
            kv_events.max_blocks,
            max(1, kv_events.max_blocks // 2),  # one engine gone mad leaves the others their room
            slow_weight=kv_events.slow_medium_weight,
        )
        announced = Announced(cache_map, time.time)
        self._announcements = Announcements(cache_map, announced, time.monotonic, time.time)
        self._cache_map = cache_map
        store, self._sync = self._store(config, counters, history)
        self._shared_store = store if isinstance(store, SharedStore) else None
        self.state = State(
            load=store.load,
            caches=Caches(history, announcing=announced),
            health=self._health,
            predictor=Predictor(),
            records=RecordRing(config.explain.ring_size),
            metrics=metrics,
            homes=Homes(config.responses.max_remembered, config.responses.expiry_s),
        )
        self._bus = (
            Bus(self._run_dir, index, workers, self._take, self._cached_elsewhere) if workers > 1 else None
        )
        if self._bus is not None:
            self._bus.on_connected = self._worker_came
        self._store_share = store.share
        self.state.share = self._share
        if self._sync is not None:
            self.state.load_age_s = self._sync.age_s
        if isinstance(store, SharedStore):
            store.on_responses = self._responses_elsewhere
            store.on_newcomer = self._gateway_came
            self.state.placing = lambda: workers + store.peers.live_members
        else:
            self.state.placing = lambda: workers
        self._resolution = Resolution({})
        self._rule_headers: frozenset[str] | None = None
        self._config = config
        self._readers = BodyReaders()
        self._router = Router(
            self.state,
            self._table(config, self._resolution),
            self._router_settings(config),
            Answers(self._owner),
            random.Random(),
            time.monotonic,
            time.time,
            None if self._sync is None or not config.metadata_center.reserve else reserve_by(self._sync),
            asyncio.get_running_loop,
            self._readers,
            time.thread_time,
        )
        assert self._router.waiting is not None
        self._waiting = self._router.waiting
        self.state.freed = self._waiting.wake
        self._gateway = Gateway(self._router, self.state, time.monotonic, time.time)
        self._unpacking = Unpacking(self._gateway.decide, lambda: self._router.settings)
        self._gateway.decide = self._unpacking.decide
        self._processor = Processor(self._gateway.judge, self._gateway, self._wants_first_chunk)
        self.state.on_transition = self._transition
        self._outcomes = Outcomes(self.state, self._transition, self._gateway.ended)
        dispatcher = Dispatcher(
            self._owner,
            self._take,
            (lambda _owner, _entry: False) if self._bus is None else self._bus.hand_over,
            (lambda _entry: None) if self._bus is None else self._bus.tell_all,
            metrics,
        )
        self._access_log = AccessLog(dispatcher.dispatch, metrics)
        self._ads = AdsServer(lambda type_url: metrics.ads_refused(ADS_TYPES[type_url]))
        self._prober = Prober(
            self._health,
            config.health.settings(),
            clock=time.monotonic,
            rng=random.Random(),
            on_transition=self._transition,
            on_cache_config=self._cache_config,
            on_cache_cleared=self._cache_cleared,
            on_occupancy=self._occupancy,
        )
        status = Status(
            self.state,
            self._registry,
            lambda: self._resolution.endpoints,
            lambda: self._processor.streams_active,
            lambda: 0 if self._bus is None else self._bus.dropped,
            self._shared_values,
            announced.is_announcing,
            self._waiting.by_reason,
            workers,
            self._configuration.files,
            self._configuration.names,
            lambda: self.ready,
        )
        metrics.watch(status.gauges)
        admin = config.server.admin
        self._admin = AdminPort(
            PAGES,
            OneWorker(status),
            admin_path(self._run_dir, index) if supervised else TcpPlace(admin.address, admin.port),
        )
        self._ticker: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self.ready = False

    async def start(self) -> None:
        """Serve.

        Raises:
            ConfigError: The run directory cannot be used.
            OSError: A socket cannot be opened.
        """
        prepare(self._run_dir)
        if not self._supervised:  # else the supervisor holds it
            self._lock.enter_context(lock(self._run_dir))
        await self._configuration.start()
        config = self._configuration.current
        server = grpc.aio.server(
            options=[
                (
                    "grpc.max_receive_message_length",
                    config.request.max_body_bytes + _MESSAGE_OVERHEAD_BYTES,
                ),
                ("grpc.so_reuseport", 0),
            ]
        )
        server.add_generic_rpc_handlers(
            grpc_aio.handlers((self._processor.rpc, self._access_log.rpc, self._ads.rpc))
        )
        socket = socket_path(self._run_dir, self._index)
        socket.unlink(missing_ok=True)
        with closed_to_others():
            server.add_insecure_port(f"unix:{socket}")
        if self._index == 0:
            credentials = listen_credentials(config.server.listen_tls)
            for address in config.server.listen:
                if credentials is None or address.startswith("unix:"):
                    server.add_insecure_port(address)
                else:
                    server.add_secure_port(address, credentials)
        if self._bus is not None:
            await self._bus.start()
        await server.start()
        self._server = server
        self._prober.start()
        self._announcements.start()
        if self._sync is not None:
            self._sync.start()
        self._ticker = asyncio.create_task(self._tick(), name="tick")
        await self._admin.start()
        self.ready = True
        _log.info("serving", extra={"socket": str(socket), "owner": self._owner})

    @property
    def admin_port(self) -> int:
        """The TCP port the admin surface got, 0 if it has none."""
        return self._admin.port

    async def stop(self) -> None:
        """Drain: no new work, let running requests end and be reported, then close everything."""
        self.ready = False
        server_config = self._configuration.current.server
        self._ads.close()
        drain_s = max(server_config.drain_s, _LEAST_DRAIN_S if len(self._waiting) else 0.0)
        self._waiting.close()
        if self._server is not None:
            stopping = asyncio.create_task(self._server.stop(drain_s), name="stop")
            while not stopping.done() and (self._processor.streams_active or self.state.load.in_flight):
                await asyncio.wait([stopping], timeout=_DRAIN_POLL_S)
            self._access_log.close()
            await stopping
        await self._readers.close()
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker])
        self._unpacking.close()
        await self._configuration.stop()
        await self._prober.stop()
        await self._announcements.stop()
        if self._sync is not None:
            await self._sync.stop()
        if self._bus is not None:
            await self._bus.stop()
        await self._admin.stop()
        socket_path(self._run_dir, self._index).unlink(missing_ok=True)
        self._lock.close()
        _log.info("stopped")

    def reload(self) -> None:
        """Read the configuration and look host names up now."""
        self._configuration.reload()

    def _store(
        self, config: Config, counters: Counters, history: PrefixIndex
    ) -> tuple[EmbeddedStore | SharedStore, Sync | None]:
        """The load table, and what keeps it in step with other gateways if there may be any."""
        load, shared = config.load, config.metadata_center
        if shared.url is None:
            table = LoadTable(
                counters,
                lease_s=load.lease_s,
                tombstone_s=load.tombstone_s,
                max_tombstones=load.max_tombstones,
                max_requests=load.max_requests,
            )
            return EmbeddedStore(table, history), None
        store = SharedStore(
            member_of(config, self._index, secrets.token_hex(4)),
            counters,
            history,
            share_lease_s=shared.lease_s,
            optimistic=not shared.reserve,
            lease_s=load.lease_s,
            tombstone_s=load.tombstone_s,
            max_tombstones=load.max_tombstones,
            max_requests=load.max_requests,
        )
        transport = transport_of(shared, str(self._path))
        settings = SyncSettings(shared.timeout_s, shared.reserve_timeout_s)
        return store, Sync(store, transport, time.monotonic, random.Random(), settings)

    # What other parts report.

    def _take(self, entry: RequestEvent) -> None:
        self._outcomes.take(entry, time.monotonic())

    def _cached_elsewhere(self, endpoint: EndpointKey, blocks: list[int]) -> None:
        if self.state.homes.hear(endpoint, blocks, time.monotonic()):
            return
        if self._health.state(endpoint) is not None:
            self.state.caches.history.record(endpoint, blocks)

    def _share(self, endpoint: EndpointKey, blocks: list[int]) -> None:
        """Tell the other workers and the other gateways what an endpoint has cached."""
        if self._bus is not None:
            self._bus.share(endpoint, blocks)
        self._store_share(endpoint, blocks)

    def _responses_elsewhere(self, endpoint: EndpointKey, chain: list[int]) -> None:
        self.state.homes.hear(endpoint, chain, time.monotonic())

    def _gateway_came(self) -> None:
        """Another gateway starts anew, or this one was away: tell all where stored responses live."""
        for endpoint, chain in self.state.homes.told().items():
            self._store_share(endpoint, chain)

    def _worker_came(self, peer: int) -> None:
        """A worker of this gateway starts anew: the first of the others tells it the same."""
        assert self._bus is not None
        if self._index == (0 if peer else 1):
            for endpoint, chain in self.state.homes.told().items():
                self._bus.share_with(peer, endpoint, chain)

    def _shared_values(self) -> Values:
        values = event_values(self._announcements.stats, self._cache_map.stats)
        if self._sync is not None and self._shared_store is not None:
            values.update(sharing_values(self._sync.stats, self._shared_store.live_gateways))
        return values

    def _wants_first_chunk(self) -> bool:
        return self._router.settings.first_chunk

    def _transition(self, transition: Transition) -> None:
        self.state.health_changed_s = time.monotonic()
        if transition.after is HealthState.EJECTED:
            self._metrics.ejected(transition.key, ejection_cause(transition.reason))
        else:
            self._announcements.came_back(transition.key)
            self.state.engines.restarted(transition.key)
        _log.warning(
            "endpoint health changed",
            extra={
                "endpoint": transition.key,
                "before": transition.before,
                "after": transition.after,
                "reason": transition.reason,
            },
        )
        self.state.freed()
        self._publish()

    # Configuration.

    def _apply(self, config: Config, resolution: Resolution) -> None:
        """Make a configuration the one in force; nothing in here can fail half-way."""
        table = self._table(config, resolution)
        before = {endpoint.key for endpoint in self._resolution.endpoints}
        self._resolution = resolution
        self._config = config
        self._health.settings = self._prober.settings = config.health.settings()
        keys = frozenset(endpoint.key for endpoint in resolution.endpoints)
        state = self.state
        state.configured_s = time.monotonic()
        state.health_changed_s = state.health_changed_s or state.configured_s
        self._router.table = table
        self._router.settings = self._router_settings(config)
        self._gateway.log_requests = config.logging.requests
        self._gateway.block_key = self._block_key(config)
        state.homes.max_entries = config.responses.max_remembered
        state.homes.expiry_s = config.responses.expiry_s
        tls = request_tls(config.engine_tls, resolution.clusters)
        self._prober.tls = self._announcements.tls = tls
        self._prober.set_endpoints(resolution.endpoints)
        state.load.retain(keys)
        state.endpoints.retain(keys)
        for key in before - keys:
            state.caches.history.remove(key)
            state.caches.running.forget(key)
            state.engines.forget(key)
        self._announcements.configure(config, resolution.clusters, self._path.parent)
        self._metrics.configure(models=config.models, clusters=resolution.clusters, endpoints=keys)
        logging.getLogger("tokenway").setLevel(config.logging.level.upper())
        self._tell_new_rule_headers(config.rule_headers())
        self._publish()

    def _tell_new_rule_headers(self, names: frozenset[str]) -> None:
        """A header that no rule matched at the start may be one that Envoy, set up then, does not forward."""
        added = names - (names if self._rule_headers is None else self._rule_headers)
        self._rule_headers = names | (self._rule_headers or frozenset())
        withheld_headers = withheld(template(), added) if added else []
        if withheld_headers:
            extra = {"names": withheld_headers, "do": "tokenway bootstrap, then restart Envoy with it"}
            _log.warning("new rules match what Envoy may not forward", extra=extra)

    def _table(self, config: Config, resolution: Resolution) -> RoutingTable:
        counters = self.state.load
        return RoutingTable(
            rules=RuleTable(config.rules()),
            clusters=resolution.clusters,
            models=[name for model, section in config.models.items() for name in (model, *section.aliases)],
            default_cluster=config.default_cluster,
            allowed_fields=frozenset(config.request.allow_fields),
            slots_of=counters.slots,
            loaded_unix_s=time.time(),
            admin_paths=frozenset(config.default_cluster_admin_paths),
        )

    @staticmethod
    def _block_key(config: Config) -> bytes | None:
        """Under which prompts' blocks are logged; None if they are not to be, or not without a good key."""
        if not config.logging.prompt_blocks:
            return None
        name = config.logging.prompt_blocks_key_env
        secret = os.environ.get(name, "")
        if len(secret) < MIN_KEY_CHARS:
            _log.warning("prompt blocks are not logged: no key", extra={"variable": name})
            return None
        return block_key(secret)

    @staticmethod
    def _router_settings(config: Config) -> RouterSettings:
        name = config.explain.debug_token_env
        return RouterSettings(
            first_chunk=config.signals.first_chunk,
            timeout_s=config.signals.timeout_s,
            first_byte_timeout_s=config.signals.first_byte_timeout_s,
            block_bytes=config.request.block_bytes,
            usage_injection=config.request.usage_injection,
            max_body_bytes=config.request.max_body_bytes,
            debug_token=None if name is None else os.environ.get(name) or None,
            hold=HoldSettings(config.holding.max_requests, config.holding.max_s)
            if config.holding.enabled
            else None,
        )

    def _publish(self) -> None:
        config, models = self._config, open_models(self._config)
        clusters = {**subset_pools(models, self._resolution.clusters), **self._resolution.clusters}
        for type_url in self._ads.publish(
            {
                CLUSTER_TYPE: cluster_resources(
                    clusters,
                    {name: rule.cluster for name, rule in models.items()},
                    tls={name: UpstreamTls(**tls.model_dump()) for name, tls in config.engine_tls.items()},
                    max_open_requests=config.away.max_requests_per_endpoint,
                ),
                ASSIGNMENT_TYPE: load_assignments(clusters, self._health.state),
            }
        ):
            self._metrics.ads_updated(ADS_TYPES[type_url])

    def _cache_cleared(self, key: EndpointKey) -> None:
        self.state.caches.history.clear(key)
        self._announcements.cleared(key)

    def _cache_config(self, key: EndpointKey, kv_tokens: int, _block_size: int) -> None:
        self.state.engines.told_kv_tokens(key, kv_tokens)
        ratios = [ratio for _, ratio in self.state.predictor.token_ratios()]
        tokens_per_byte = sum(ratios) / len(ratios) if ratios else TokensPerByte().ratio
        self.state.caches.history.set_capacity(
            key, capacity_blocks(kv_tokens, tokens_per_byte, self._configuration.current)
        )

    def _occupancy(self, key: EndpointKey, occupancy: Occupancy) -> None:
        self.state.engines.told_occupancy(key, occupancy.running, occupancy.waiting, occupancy.kv_usage_ratio)

    # Housekeeping.

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.state.advance(time.monotonic())
            if self._supervised and os.getppid() != self._supervisor:
                # At once and without clean-up: the sockets may be a successor's by now.
                _log.error("supervisor is gone")
                os._exit(1)
