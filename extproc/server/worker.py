"""One worker process: builds everything, owns it, starts, drains and stops it."""

from __future__ import annotations

import asyncio
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

from extproc.accesslog.entries import Entry
from extproc.accesslog.service import AccessLog, Dispatcher
from extproc.config.schema import Config
from extproc.discovery.ads import AdsServer
from extproc.discovery.resolve import Resolution
from extproc.discovery.resources import ASSIGNMENT_TYPE, CLUSTER_TYPE, cluster_resources, load_assignments
from extproc.health.failures import FailureKind
from extproc.health.prober import Occupancy, Prober
from extproc.health.tracker import HealthState, HealthTracker, Transition
from extproc.observing.metrics import Metrics
from extproc.observing.records import RecordRing
from extproc.observing.request_log import MIN_KEY_CHARS, block_key
from extproc.observing.shared_metrics import Values, event_values, sharing_values
from extproc.predicting.predictor import Predictor
from extproc.predicting.tokens import TokensPerByte
from extproc.protocol.servicer import Processor
from extproc.protocol.wire import Answers
from extproc.request.rules import RuleTable
from extproc.routing.announced import Announced
from extproc.routing.caches import Caches
from extproc.routing.gateway import Gateway
from extproc.routing.outcomes import Outcomes
from extproc.routing.router import Router
from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.routing.state import State
from extproc.routing.table import RoutingTable
from extproc.server.admin import Admin
from extproc.server.announcements import Announcements
from extproc.server.bus import Bus
from extproc.server.configuration import Configuration
from extproc.server.sharing import member_of, transport_of
from extproc.server.status import Status
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.counters import Counters
from metadata_center.load import LoadTable
from metadata_center.prefix_index import PrefixIndex
from metadata_center.shared_counters import SharedCounters
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

DEFAULT_CLUSTER = "tokenway-default"
"""Where envoy/bootstrap.yaml sends what neither Tokenway nor a model name places."""

_MESSAGE_OVERHEAD_BYTES = 1024 * 1024
"""Room in a gRPC message beside the body: headers, metadata."""


def socket_path(run_dir: Path, index: int) -> Path:
    """The gRPC socket of a worker."""
    return run_dir / f"gw{index}.sock"


def admin_path(run_dir: Path, index: int) -> Path:
    """The admin socket of a worker, for its supervisor."""
    return run_dir / f"admin{index}.sock"


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


def model_clusters(config: Config) -> dict[str, str]:
    """Where Envoy sends each model by itself: the cluster of its default rule, or else of its first."""
    return {
        name: next((rule.cluster for rule in model.rules if not rule.headers), model.rules[0].cluster)
        for model_name, model in config.models.items()
        for name in (model_name, *model.aliases)
    }


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
        metrics = Metrics(self._registry, version("tokenway"))
        self._configuration = Configuration(path, metrics, self._apply)
        config = self._configuration.current
        self._owner = f"{index}.{secrets.token_hex(4)}"
        self._health = HealthTracker(config.health.settings())
        workers = config.server.workers if supervised else 1
        run_dir = Path(config.server.run_dir)
        counters = SharedCounters(run_dir / COUNTERS_FILE, index) if supervised else Counters()
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
        )
        self._bus = Bus(run_dir, index, workers, self._take, self._cached_elsewhere) if workers > 1 else None
        self._store_share = store.share
        self.state.share = self._share
        if self._sync is not None:
            self.state.load_age_s = self._sync.age_s
        if isinstance(store, SharedStore):
            self.state.placing = lambda: workers + store.peers.live_members
        else:
            self.state.placing = lambda: workers
        self._resolution = Resolution({}, has_host_names=False)
        self._default_cluster = config.default_cluster
        self._model_clusters = model_clusters(config)
        self._router = Router(
            self.state,
            self._table(config, self._resolution),
            self._router_settings(config),
            Answers(self._owner),
            random.Random(),
            time.monotonic,
            time.time,
            self._sync.reserve if self._sync is not None and config.metadata_center.reserve else None,
            asyncio.get_running_loop,
        )
        assert self._router.waiting is not None
        self._waiting = self._router.waiting
        self.state.freed = self._waiting.wake
        self._gateway = Gateway(self._router, self.state, time.monotonic, time.time)
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
        )
        metrics.watch(status.gauges)
        self._admin = Admin(self.state, status.metrics_text, status.endpoints_json, lambda: self.ready)
        self._ticker: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self.ready = False

    async def start(self) -> None:
        """Serve.

        Raises:
            ResolveError: A host name of the first configuration cannot be resolved.
            OSError: A socket cannot be opened.
        """
        await self._configuration.start()
        config = self._configuration.current
        run_dir = Path(config.server.run_dir)
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # noqa: ASYNC240 - once, at the start
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
            (self._processor.handlers(), self._access_log.handlers(), self._ads.handlers())
        )
        socket = socket_path(run_dir, self._index)
        socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{socket}")
        if self._index == 0:
            for address in config.server.listen:
                server.add_insecure_port(address)
        if self._bus is not None:
            await self._bus.start()
        await server.start()
        self._server = server
        self._prober.start()
        self._announcements.start()
        if self._sync is not None:
            self._sync.start()
        self._ticker = asyncio.create_task(self._tick(), name="tick")
        if self._supervised:
            await self._admin.start_unix(admin_path(run_dir, self._index))
        else:
            await self._admin.start_tcp(config.server.admin.address, config.server.admin.port)
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
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker])
        await self._configuration.stop()
        await self._prober.stop()
        await self._announcements.stop()
        if self._sync is not None:
            await self._sync.stop()
        if self._bus is not None:
            await self._bus.stop()
        await self._admin.stop()
        socket_path(Path(server_config.run_dir), self._index).unlink(missing_ok=True)
        _log.info("stopped")

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

    def _take(self, entry: Entry) -> None:
        self._outcomes.take(entry, time.monotonic())

    def _cached_elsewhere(self, endpoint: EndpointKey, blocks: list[int]) -> None:
        if self._health.state(endpoint) is not None:
            self.state.caches.history.record(endpoint, blocks)

    def _share(self, endpoint: EndpointKey, blocks: list[int]) -> None:
        """Tell the other workers and the other gateways what an endpoint has cached."""
        if self._bus is not None:
            self._bus.share(endpoint, blocks)
        self._store_share(endpoint, blocks)

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
            self.state.metrics.ejected(transition.key, ejection_cause(transition.reason))
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
        self._default_cluster = config.default_cluster
        self._model_clusters = model_clusters(config)
        self._health.settings = self._prober.settings = config.health.settings()
        keys = frozenset(endpoint.key for endpoint in resolution.endpoints)
        state = self.state
        state.configured_s = time.monotonic()
        state.health_changed_s = state.health_changed_s or state.configured_s
        self._router.table = table
        self._router.settings = self._router_settings(config)
        self._gateway.log_requests = config.logging.requests
        self._gateway.block_key = self._block_key(config)
        self._prober.set_endpoints(resolution.endpoints)
        state.load.retain(keys)
        state.endpoints.retain(keys)
        for key in before - keys:
            state.caches.history.remove(key)
            state.caches.running.forget(key)
            state.engines.forget(key)
        self._announcements.configure(config, resolution.clusters, self._path.parent)
        state.metrics.configure(models=config.models, clusters=resolution.clusters, endpoints=keys)
        logging.getLogger("tokenway").setLevel(config.logging.level.upper())
        self._publish()

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
        clusters = dict(self._resolution.clusters)
        default = self._default_cluster
        if default is not None:
            clusters[DEFAULT_CLUSTER] = clusters[default]
        for type_url in self._ads.publish(
            {
                CLUSTER_TYPE: cluster_resources(clusters, self._model_clusters),
                ASSIGNMENT_TYPE: load_assignments(clusters, self._health.state),
            }
        ):
            self.state.metrics.ads_updated(ADS_TYPES[type_url])

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
