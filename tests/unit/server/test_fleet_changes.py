"""What one change of the fleet re-applies: the endpoint concerned, and its cluster at Envoy; not the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from extproc.choosing.max_num_seqs import SURE_VISITS, LimitSource
from extproc.config.schema import Config
from extproc.discovery.fleet import Fleet
from extproc.discovery.listed import Listed
from extproc.discovery.resolution import Resolution
from extproc.health.settings import HealthSettings
from extproc.health.tracker import HealthTracker
from extproc.observing.metrics.collector import Metrics
from extproc.observing.records import RecordRing
from extproc.routing.caches import Caches
from extproc.routing.homes import Homes
from extproc.routing.state import Outside, RoutingState, make_routing_state
from extproc.server.reloading.applying import Owners
from extproc.server.reloading.fleet_changes import FleetChanges
from extproc.values.endpoints import Endpoint
from metadata_center.addresses import Address
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import MAX_ENDPOINTS, Counters
from metadata_center.load.ledger import LedgerBounds
from metadata_center.load.table import LoadTable
from metadata_center.types import Charge, EndpointKey, RequestId

CLUSTERS, MEMBERS = 10, 100


class Noting:
    """In place of prober, event followers and publisher: which endpoints and clusters each gets."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what came so far."""
        self.probed: list[EndpointKey] = []
        self.followed: list[EndpointKey] = []
        self.published: list[str] = []
        self.lists_published = 0

    def probe(self, changed: Mapping[EndpointKey, Collection[Endpoint]]) -> None:
        """See `Prober.update`."""
        self.probed += changed

    def follow(self, changed: Mapping[EndpointKey, Collection[Endpoint]]) -> None:
        """See `KvEventFollower.update`."""
        self.followed += changed

    def publish(self, clusters: Iterable[str], *, came_or_went: bool = False) -> None:
        """See `Publisher.update`."""
        self.published += clusters
        self.lists_published += came_or_went


class Follower:
    """An object of one method `update`."""

    def __init__(self, update: Callable[..., None]) -> None:
        self.update: Any = update
        self.configure: Any = lambda _config: None
        self.departed: Any = lambda _endpoints: None


def listed(cluster: int, member: int, **changes: Any) -> Listed:
    """One of a thousand replicas."""
    number = cluster * MEMBERS + member
    address = Address(f"10.1.{number // 250}.{number % 250 + 1}", 8000)
    return Listed(f"uid/{number}", **{"address": address, **changes})


def whole(**changed: Mapping[str, Any]) -> dict[str, list[Listed]]:
    """All of them; `changed` by number, as `n17`."""
    return {
        f"c{cluster}": [
            listed(cluster, member, **changed.get(f"n{cluster * MEMBERS + member}", {}))
            for member in range(MEMBERS)
        ]
        for cluster in range(CLUSTERS)
    }


def followers(fleet: Fleet, noting: Noting) -> tuple[RoutingState, FleetChanges]:
    """The state of a fleet, and what keeps it in step with it."""
    metrics = Metrics(CollectorRegistry(), "test")
    state = make_routing_state(
        load=LoadTable(Counters(), LedgerBounds(lease_s=60.0, tombstone_s=60.0)),
        caches=Caches(PrefixIndex(1_000, 1_000)),
        health=HealthTracker(HealthSettings()),
        records=RecordRing(8),
        recorder=metrics,
        homes=Homes(),
        outside=Outside(),
    )
    changes = FleetChanges(
        fleet,
        state,
        Follower(noting.probe),  # type: ignore[arg-type]
        Follower(noting.follow),  # type: ignore[arg-type]
        Follower(noting.publish),  # type: ignore[arg-type]
        metrics,
        lambda: 1.0,
    )
    changes.configure(Config())
    changes.publish()
    return state, changes


@pytest.mark.parametrize(
    "change",
    [{"weight": 3}, {"draining": True}, {"labels": {"pool": "x"}}, {"address": Address("10.9.9.9", 8000)}],
    ids=["weight", "draining", "labels", "address"],
)
def test_a_change_of_one_endpoint_re_applies_one(change: dict[str, Any]) -> None:
    """Of a thousand in ten clusters: one is probed and followed anew, one cluster is published."""
    fleet, noting = Fleet(), Noting()
    state, changes = followers(fleet, noting)
    changes.apply(fleet.replace("file", whole()))
    assert len(noting.probed) == len(noting.followed) == CLUSTERS * MEMBERS
    assert (sorted(set(noting.published)), noting.lists_published) == (sorted(whole()), 1)

    key, other = EndpointKey("uid/317"), EndpointKey("uid/318")
    for each in (key, other):
        state.scheduling.engines.observe_kv_tokens(each, 1000)
    noting.clear()
    changes.apply(fleet.replace("file", whole(n317=change)))
    moved = "address" in change
    assert noting.probed == noting.followed + [key] * moved
    assert noting.followed == [key]
    assert set(state.scheduling.engines.kv_tokens) == {other} | ({key} if not moved else set())
    assert (noting.published, noting.lists_published) == (["c3"], 0)

    noting.clear()
    changes.apply(fleet.replace("file", whole(n317=change)))
    assert (noting.probed, noting.followed, noting.published) == ([], [], [])


def test_what_the_source_says_of_limits_on_sequences_is_known() -> None:
    """By label, until it is taken away; text that is no number says nothing; a moved endpoint is anew."""
    fleet, noting = Fleet(), Noting()
    state, changes = followers(fleet, noting)
    engines, key = state.scheduling.engines, EndpointKey("uid/0")

    def limits(text: str | None, **moved: Any) -> tuple[int, LimitSource]:
        labels = {} if text is None else {"max_num_seqs": text}
        changes.apply(fleet.replace("file", {"c0": [listed(0, 0, labels=labels, **moved)]}))
        return engines.sequence_limit(key)

    assert limits("128") == (128, LimitSource.CONFIGURED)
    for text in ("", "-1", "many", "1e3", "65537", "\u0661", "0"):
        assert limits(text) == (0, LimitSource.UNKNOWN)
    assert limits("64") == (64, LimitSource.CONFIGURED)
    engines.observe_occupancy(key, 65, 0, 0.1)
    assert engines.sequence_limit(key) == (0, LimitSource.UNKNOWN)
    assert limits("64", address=Address("10.9.9.9", 8000)) == (64, LimitSource.CONFIGURED)
    assert limits(None) == (0, LimitSource.UNKNOWN)


def test_endpoints_of_a_cluster_on_the_same_hardware_are_alike() -> None:
    """What one shows of its limit is likely for the other, not for one on other hardware, nor elsewhere."""
    fleet, noting = Fleet(), Noting()
    state, changes = followers(fleet, noting)
    engines = state.scheduling.engines
    h100, a100 = ({"hardware": name} for name in ("h100", "a100"))
    members = [listed(0, 0, labels=h100), listed(0, 1, labels=h100), listed(0, 2, labels=a100)]
    changes.apply(fleet.replace("file", {"c0": members, "c1": [listed(1, 0, labels=h100)]}))
    for number in range(SURE_VISITS):
        engines.observe_occupancy(EndpointKey("uid/0"), 128, 1, 0.5, None, float(number))
    keys = tuple(EndpointKey(f"uid/{number}") for number in (0, 1, 2, MEMBERS))
    assert engines.max_num_seqs(keys) == (128, 128, 0, 0)
    changes.apply(fleet.replace("file", {"c0": members[1:]}))
    assert engines.max_num_seqs(keys) == (0, 128, 0, 0)


def test_what_requests_showed_of_endpoints_that_left_is_forgotten() -> None:
    """New replicas for ever: state hold those that are there, whatever ran on those that left."""
    fleet, noting = Fleet(), Noting()
    state, changes = followers(fleet, noting)
    running, engines = state.scheduling.caches.running, state.scheduling.engines
    for generation in range(50):
        changes.apply(fleet.replace("file", {"c0": [listed(0, generation)]}))
        if generation:
            left = EndpointKey(f"uid/{generation - 1}")  # a retry went there, and is over
            run = running.add(left, [generation])
            assert run is not None
            running.remove(left, run)
            engines.observe_kv_tokens(left, 1)
    changes.apply(fleet.replace("file", {"c0": [listed(0, 99)]}))
    assert engines.kv_tokens == {}
    assert running._running == {}
    assert state.scheduling.load.slots(fleet.keys)


def test_endpoints_beyond_the_bound_are_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Those that are there can all be counted; a line says how many are not, and when none is any more."""
    fleet = Fleet()
    state, changes = followers(fleet, Noting())
    replicas = [
        Listed(f"uid/{i}", Address(f"10.2.{i // 250}.{i % 250}", 8000)) for i in range(MAX_ENDPOINTS + 7)
    ]
    with caplog.at_level(logging.INFO, "tokenway.fleet"):
        changes.apply(fleet.replace("control plane", {"c": replicas}))
        assert [record.__dict__["left_out"] for record in caplog.records] == [7]
        assert [str(endpoint.key) for endpoint in fleet.clusters["c"]] == [
            one.key for one in replicas[:MAX_ENDPOINTS]
        ]
        assert len(state.scheduling.load.slots(fleet.keys)) == MAX_ENDPOINTS
        changes.apply(fleet.replace("control plane", {"c": replicas[7:]}))
    assert [(record.levelname, record.__dict__["left_out"]) for record in caplog.records] == [
        ("WARNING", 7),
        ("INFO", 0),
    ]
    assert [str(endpoint.key) for endpoint in fleet.clusters["c"]] == [one.key for one in replicas[7:]]
    assert len(state.scheduling.load.slots(fleet.keys)) == MAX_ENDPOINTS


def test_a_full_gateway_takes_replicas_for_those_that_left_with_requests_running() -> None:
    """All of them are replaced, each with a request in flight: the new ones are counted, and so are those."""
    fleet = Fleet()
    state, changes = followers(fleet, Noting())
    load = state.scheduling.load
    former, present = (
        [
            Listed(f"uid/{tens}/{i}", Address(f"10.{tens}.{i // 250}.{i % 250}", 8000))
            for i in range(MAX_ENDPOINTS)
        ]
        for tens in (1, 2)
    )
    changes.apply(fleet.replace("control plane", {"c": former}))
    keys = [endpoint.key for endpoint in fleet.clusters["c"]]
    load.slots(keys)
    for number, key in enumerate(keys):
        assert load.charge(Charge(RequestId(str(number)), key, 10, 20), 0.0, None)
    changes.apply(fleet.replace("control plane", {"c": present}))
    assert len(load.slots(fleet.keys)) == MAX_ENDPOINTS
    assert list(load.view(load.slots(keys)).requests) == [1] * MAX_ENDPOINTS
    for number in range(MAX_ENDPOINTS):
        assert load.release(RequestId(str(number)), 1.0)
    load.retain(fleet.keys)
    assert list(load.view(load.slots(fleet.keys)).requests) == [0] * MAX_ENDPOINTS


def test_a_cluster_is_missing_only_when_the_files_are_applied_without_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A start names clusters before it lists them: that is no reason to warn anybody."""
    owners = Owners()
    _, changes = followers(owners.fleet, Noting())
    owners.add(changes.configure)
    owners.changes.add(changes.apply)
    owners.settled.add(changes.find_missing)
    config = Config(default_cluster="c0")
    there = {"c0": (listed(0, 0),)}
    with caplog.at_level(logging.INFO, "tokenway.fleet"):
        owners.apply(config, Resolution(there))
        assert caplog.messages == []
        assert changes.named == {"c0": True}
        owners.apply(config, Resolution({}))
        owners.apply(config, Resolution({}))
        assert caplog.messages == ["no source lists a cluster that is named"]
        assert changes.named == {"c0": False}
        owners.apply(config, Resolution(there))
    assert caplog.messages[1:] == ["a source lists a cluster now"]
