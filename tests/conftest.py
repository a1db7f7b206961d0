"""What tests of the request path share: a clock set by hand, randomness, one gateway without sockets."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any, TypeVar

import orjson
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import settings as hypothesis_settings
from prometheus_client import CollectorRegistry

from extproc.discovery.fleet import Fleet
from extproc.discovery.listed import Listed
from extproc.health.settings import HealthSettings
from extproc.health.states import Transition
from extproc.health.tracker import HealthTracker
from extproc.listeners import Listeners
from extproc.observing.ignored_headers import IgnoredHeaders
from extproc.observing.metrics.collector import Metrics
from extproc.observing.records import RecordRing
from extproc.protocol.bootstrap_dialect import BootstrapDialect
from extproc.request.rules import ModelRules, Rule, RuleTable
from extproc.routing.caches import Caches
from extproc.routing.endings import Endings
from extproc.routing.gateway import Gateway
from extproc.routing.homes import Homes
from extproc.routing.listeners import endings_of
from extproc.routing.router import Readers, Reserve, Router
from extproc.routing.settings import RouterSettings
from extproc.routing.state import EndingState, Outside, SchedulingState, make_routing_state
from extproc.routing.table import RoutingTable
from extproc.routing.waiting import Loop
from extproc.values.balancing import LoadBalancing
from extproc.values.deciding import Deciding, Now, Refusal
from extproc.values.decisions import DecisionRecord
from extproc.values.endings import AttemptFailed, AttemptStarted, Ending, RequestAlive, RequestEnd
from extproc.values.endpoints import Endpoint
from extproc.values.evidence import FailureKind
from extproc.values.exchange import RequestHeaders
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.inflight import Inflight
from extproc.values.outcomes import Ended
from extproc.values.pending import Pending
from extproc.values.placements import Decision
from metadata_center.addresses import Address
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.ledger import LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.store import LoadStore
from metadata_center.types import EndpointKey, RequestId, Waiter

# An example that takes long on a busy machine, or under coverage, is no failure.
hypothesis_settings.register_profile("house", deadline=None)
hypothesis_settings.load_profile("house")
T = TypeVar("T")

OWNER = "0.test"
DIALECT = BootstrapDialect(OWNER)
CLUSTER = "pool"
MODEL = "m"
CHAT = "/v1/chat/completions"
BLOCK_BYTES = 64
LEASE_S = 30.0
TOMBSTONE_S = 10.0
WALL_S = 1.7e9
"""Unix time at which every manual clock reads zero."""


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """SIGINT is ignored in what a script starts in the background, and by all that this starts in turn."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """What serves, run within a test, holds signals back at its end; later tests' processes inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ManualClock:
    """Monotonic seconds that pass only when advanced."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds

    def wall(self) -> float:
        """The same instant as Unix seconds."""
        return WALL_S + self.now_s


@dataclass(slots=True, eq=False)
class VirtualTimer:
    """A call of `VirtualLoop`."""

    due_s: float
    callback: Callable[[], object]
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Not any more."""
        self.is_cancelled = True


class Promise:
    """What became of something that is pending."""

    def __init__(self, pending: Pending[Any]) -> None:
        self._pending = pending
        self._results: list[Any] = []
        pending.then(self._results.append, self._results.append)

    def done(self) -> bool:
        """It has an outcome."""
        return self._pending.is_over

    def cancel(self) -> None:
        """No caller waits any more."""
        self._pending.cancel()

    def result(self) -> Any:
        """What it was given."""
        (result,) = self._results
        if isinstance(result, Exception):
            raise result
        return result


async def result_of(pending: Pending[T]) -> T:
    """Wait for what is pending; cancelled, it cancels that."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    pending.then(future.set_result, future.set_exception)
    try:
        return await future
    except asyncio.CancelledError:
        pending.cancel()
        raise


class VirtualLoop:
    """An event loop whose time passes when advanced; `extproc.routing.waiting.Loop`."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._made = 0

    def call_later(self, delay: float, callback: Callable[[], object], /) -> VirtualTimer:
        """Call in so many seconds."""
        timer = VirtualTimer(self.clock.now_s + delay, callback)
        self._made += 1
        heappush(self._timers, (timer.due_s, self._made, timer))
        return timer

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass, and make the calls that fall into it."""
        end_s = self.clock.now_s + seconds
        while self._timers and self._timers[0][0] <= end_s:
            due_s, _, timer = heappop(self._timers)
            self.clock.now_s = max(self.clock.now_s, due_s)
            if not timer.is_cancelled:
                timer.callback()
        self.clock.now_s = max(self.clock.now_s, end_s)


def endpoint(number: int, **changes: Any) -> Endpoint:
    """The replica of that number, in the one cluster there is."""
    at = Address(f"10.0.0.{number}", 8000)
    return replace(Endpoint(EndpointKey(f"uid/{number}"), CLUSTER, at), **changes)


def identities(destination: str) -> list[EndpointKey]:
    """The endpoints at the addresses that Envoy gets: made by `endpoint`."""
    addresses = map(Address.parse, destination.split(","))
    return [endpoint(int(address.host.rpartition(".")[2])).key for address in addresses]


def listed(one: Endpoint) -> Listed:
    """An endpoint as a source lists it."""
    return Listed(
        one.key,
        one.address,
        one.weight,
        one.labels,
        one.metadata,
        one.draining,
        one.rank,
        one.locality,
        one.ready,
    )


THREE = tuple(map(endpoint, range(3)))


def chat(prompt: str = "hi", **fields: Any) -> bytes:
    """A chat body of one user turn."""
    return orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": prompt}], **fields})


def request_line(request_id: str, path: str = CHAT, **headers: str) -> RequestHeaders:
    """Headers as Envoy sends them; underscores in names stand for dashes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return RequestHeaders("POST", path, {REQUEST_ID_HEADER: request_id, **named}, end_of_stream=False)


def request_end(request_id: str, **changes: Any) -> RequestEnd:
    """An answer of 200 that took 0.5 s, its first byte after 0.2 s; no usage, no endpoint unless given."""
    plain = RequestEnd(
        request_id=RequestId(request_id),
        owner=OWNER,
        address=None,
        attempts=1,
        status=200,
        ended=Ended.COMPLETED,
        details="via_upstream",
        flags=(),
        ttft_s=0.2,
        duration_s=0.5,
        stream_s=0.3,
        request_bytes=100,
        response_bytes=200,
        prompt_tokens=None,
        completion_tokens=None,
        cached_tokens=None,
    )
    return replace(plain, **changes)


def answer_of(decision: Decision, *, to_trailers: bool = False) -> Any:
    """The answer to a decision as Envoy reads it."""
    return pb.ProcessingResponse.FromString(DIALECT.decision(decision, to_trailers=to_trailers))


def decided(deciding: Deciding[Any]) -> Decision:
    """The decision that was made at once. Raises the error if it is a refusal."""
    if isinstance(deciding, Refusal):
        raise deciding.error
    assert isinstance(deciding, Now)
    assert isinstance(deciding.decision, Decision)
    return deciding.decision


@dataclass(slots=True)
class Rig:
    """One worker's request path without sockets: `Gateway` and `Endings` over a real ledger.

    Attributes:
        scheduling: What scheduling reads.
        ending: What endings change.
        freed: Called when room was freed.
        router: Decides.
        gateway: What the ext_proc loop talks to.
        ends: What the access log talks to.
        clock: The only time there is.
        registry: Holds this worker's metrics.
        configure: Makes these the endpoints of the cluster, as a source does.
        places: Where each endpoint there ever was is or was.
        fleet: All endpoints.
        counters: Where the load is counted.
        history: What is believed cached.
        transitions: Changes of health, in order.
        endings: Requests that ended, refused ones as well, in order.
        shared: What others were sent as cached where, in order.
    """

    scheduling: SchedulingState
    ending: EndingState
    freed: Listeners[[]]
    router: Router
    gateway: Gateway
    ends: Endings
    clock: ManualClock
    registry: CollectorRegistry
    configure: Callable[[Sequence[Endpoint]], None]
    places: dict[EndpointKey, Address]
    fleet: Fleet
    counters: Counters
    history: PrefixIndex
    transitions: list[Transition] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    shared: list[tuple[EndpointKey, list[int]]] = field(default_factory=list)

    def decide(self, request_id: str = "r", body: bytes | None = None, **headers: str) -> Decision:
        """Decide a chat request at once."""
        return decided(
            self.gateway.decide(request_line(request_id, **headers), chat() if body is None else body)
        )

    def record(self, request_id: str = "r") -> DecisionRecord:
        """The record of a decision."""
        record = self.scheduling.records.get(RequestId(request_id))
        assert record is not None
        return record

    def chosen(self, request_id: str = "r") -> EndpointKey:
        """Where the decision sent it."""
        key = self.record(request_id).chosen
        assert key is not None
        return key

    def end(self, request_id: str = "r", **changes: Any) -> None:
        """The request's last access-log entry arrives; by default it completed where it was sent.

        An `endpoint` is reported as its address, as Envoy does.
        """
        inflight = self.scheduling.running.get(RequestId(request_id))
        key = changes.pop("endpoint", None if inflight is None else inflight.endpoint)
        if key is not None:
            changes.setdefault("address", self.places[key])
        self.ends.take(request_end(request_id, **changes), self.clock())

    def started(self, request_id: str, to: EndpointKey) -> None:
        """Envoy dispatches a further attempt."""
        self.ends.take(AttemptStarted(RequestId(request_id), OWNER, self.places[to]), self.clock())

    def failed(
        self, request_id: str, at: EndpointKey, kind: FailureKind = FailureKind.CONNECT_FAILURE
    ) -> None:
        """An attempt failed."""
        self.ends.take(AttemptFailed(RequestId(request_id), OWNER, self.places[at], kind), self.clock())

    def alive(self, request_id: str) -> None:
        """Envoy says that the request still runs."""
        self.ends.take(RequestAlive(RequestId(request_id), OWNER), self.clock())

    def load(self, key: EndpointKey) -> tuple[int, int, int]:
        """Requests, prefill tokens, context tokens counted for an endpoint."""
        view = self.scheduling.load.view(self.scheduling.load.slots([key]))
        return int(view.requests[0]), int(view.prefill_tokens[0]), int(view.context_tokens[0])

    def metric(self, name: str, **labels: str) -> float:
        """A sample of this worker's metrics; 0 if there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0


def raise_it(error: Exception) -> None:
    """A listener of a test fails its test."""
    raise error


def build_rig(
    endpoints: Sequence[Endpoint] = THREE,
    *,
    models: Sequence[ModelRules] = (),
    load_balancing: LoadBalancing | None = None,
    settings: RouterSettings | None = None,
    health: HealthSettings | None = None,
    allowed_fields: frozenset[str] = frozenset(),
    seed: int = 1,
    reserve: Reserve | None = None,
    loop: Loop | None = None,
    readers: Readers | None = None,
    work_clock: Callable[[], float] | None = None,
    processes: Callable[[], int] = lambda: 1,
    tell_line: Callable[[Sequence[Waiter]], None] | None = None,
    max_requests: int = 200_000,
    load_of: Callable[[Counters, PrefixIndex], LoadStore] | None = None,
) -> Rig:
    """A worker's request path over `endpoints`, serving model `m`, in blocks of 64 bytes."""
    clock = loop.clock if isinstance(loop, VirtualLoop) else ManualClock()
    registry = CollectorRegistry()
    metrics = Metrics(registry, "test")
    shared: list[tuple[EndpointKey, list[int]]] = []
    freed, lost = Listeners[[]](), Listeners[[Inflight, float]]()
    counters, history = Counters(), PrefixIndex(1_000, 1_000)
    transitions: list[Transition] = []
    bounds = LedgerBounds(lease_s=LEASE_S, tombstone_s=TOMBSTONE_S, max_legs=max_requests)
    state = make_routing_state(
        load=LoadTable(counters, bounds) if load_of is None else load_of(counters, history),
        caches=Caches(history),
        health=HealthTracker(health or HealthSettings()),
        records=RecordRing(256),
        recorder=metrics,
        homes=Homes(),
        outside=Outside(
            share=lambda key, blocks: shared.append((key, list(blocks))),
            processes=processes,
            freed=freed.notify,
            on_lost=lost.notify,
            on_transition=transitions.append,
            tell_line=tell_line,
        ),
    )
    scheduling, ending, fleet = state.scheduling, state.ending, Fleet()
    served = models or [ModelRules(MODEL, (Rule(CLUSTER),), load_balancing=load_balancing or LoadBalancing())]

    table = RoutingTable(
        rules=RuleTable(served),
        clusters=fleet.clusters,
        models=[model.name for model in served],
        default_cluster=None,
        allowed_fields=allowed_fields,
        slots_of=scheduling.load.slots,
        loaded_unix_s=WALL_S,
    )
    places: dict[EndpointKey, Address] = {}

    def configure(members: Sequence[Endpoint]) -> None:
        places.update((member.key, member.address) for member in members)
        difference = fleet.replace("test", {CLUSTER: list(map(listed, members))})
        changed = {key: fleet.of(key) for key in difference.keys}
        scheduling.health.update(changed)
        scheduling.load.retain(fleet.keys)
        ending.endpoints.retain(fleet.keys)
        scheduling.caches.forget(key for key, endpoints in changed.items() if not endpoints)

    router = Router(
        scheduling,
        table,
        settings or RouterSettings(block_bytes=BLOCK_BYTES),
        random.Random(seed),
        clock,
        clock.wall,
        reserve,
        None if loop is None else lambda: loop,
        readers,
        work_clock,
    )
    if router.waiting is not None:
        freed.add(router.waiting.wake)
    endings: list[Ending] = []
    ends = endings_of(ending, fleet, [endings.append], raise_it)
    lost.add(ends.lost)
    gateway = Gateway(
        router,
        state.first_tokens,
        ending.stored,
        ends,
        metrics,
        router.decide,
        clock,
        clock.wall,
        IgnoredHeaders(metrics, clock).report,
    )
    configure(endpoints)
    metrics.configure(
        models=[model.name for model in served],
        clusters=[CLUSTER],
        endpoints=[member.key for member in endpoints],
    )
    return Rig(
        scheduling,
        ending,
        freed,
        router,
        gateway,
        ends,
        clock,
        registry,
        configure,
        places,
        fleet,
        counters,
        history,
        transitions,
        endings,
        shared,
    )


@pytest.fixture
def rng() -> random.Random:
    """Randomness that is the same in every run."""
    return random.Random(1)


@pytest.fixture
def registry() -> CollectorRegistry:
    """A metrics registry of the test's own."""
    return CollectorRegistry()


@pytest.fixture
def rig() -> Rig:
    """A worker's request path over three equal endpoints."""
    return build_rig()
