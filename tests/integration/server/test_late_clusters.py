"""Endpoints that come to clusters to which rules lead, and Envoys that have them or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.config.schema import Config
from extproc.discovery.listed import Listed
from extproc.discovery.resolution import Resolution
from extproc.server.envoys.acknowledging import MOST_WAIT_S
from extproc.values.endpoints import Endpoint
from extproc.xds.ads import RECONNECT_S
from metadata_center.addresses import Address
from tests.waiting import until
from tests.workers_and_envoys import Envoy, Wire, Worker, settled

OLD = Listed("10.0.0.1:80", Address("10.0.0.1", 80))


def started(worker: Worker) -> Worker:
    """It serves `old`; another rule names `far`, which nobody lists."""
    models = {name: {"rules": [{"cluster": name}]} for name in ("old", "far")}
    worker.owners.apply(Config.model_validate({"models": models}), Resolution({"old": (OLD,)}))
    worker.late.start()
    return worker


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    """One alone."""
    worker = started(Worker())
    yield worker
    worker.stop()


@pytest.fixture
async def pair() -> AsyncIterator[list[Worker]]:
    """Two workers of one gateway."""
    workers = [started(Worker(wire)) for wire in Wire.pair()]
    yield workers
    for one in workers:
        one.stop()


def lists(worker: Worker, count: int | None, cluster: str = "far") -> None:
    """A source lists so many endpoints of a cluster; None: no such cluster."""
    if count is None:
        worker.owners.report("mesh", {cluster: None})
        return
    hosts = [f"10.0.1.{number}" for number in range(count)]
    worker.owners.report("mesh", {cluster: [Listed(f"{host}:80", Address(host, 80)) for host in hosts]})


def seen(worker: Worker, cluster: str = "far") -> int | None:
    """How many endpoints of it requests see; None: no such cluster."""
    endpoints: tuple[Endpoint, ...] | None = worker.owners.routable.clusters.get(cluster)  # type: ignore[assignment]
    return None if endpoints is None else len(endpoints)


async def silent(worker: Worker) -> Envoy:
    """An Envoy that has all that there is, and answers to nothing from now on."""
    envoy = Envoy(worker.ads)
    await settled()
    envoy.answers = envoy.takes_endpoints = False
    return envoy


@pytest.mark.asyncio
async def test_a_cluster_is_seen_once_it_is_acknowledged(worker: Worker) -> None:
    """Envoy has it before; whoever keeps pools of it hears that it is there."""
    envoy = await silent(worker)
    lists(worker, 2)
    await settled()
    assert "far" in envoy.has
    assert seen(worker) is None
    envoy.acknowledge()
    await settled()
    assert seen(worker) is None, "it has the cluster and not its endpoints"
    envoy.acknowledge_endpoints()
    await settled()
    assert seen(worker) == 2
    assert worker.shown == [{"far"}]


@pytest.mark.asyncio
async def test_without_an_envoy_it_is_seen_in_the_same_turn(worker: Worker) -> None:
    """Or where Envoys take no clusters from here."""
    lists(worker, 1)
    assert seen(worker) == 1


@pytest.mark.asyncio
async def test_the_first_endpoints_of_a_cluster_that_envoy_has(worker: Worker) -> None:
    """They are seen once Envoy has them, and so are those that follow."""
    envoy = Envoy(worker.ads)
    lists(worker, 0)
    await settled()
    assert envoy.serves["far"] == 0
    assert seen(worker) == 0
    envoy.takes_endpoints = False
    lists(worker, 1)
    await settled()
    assert seen(worker) == 0
    envoy.acknowledge_endpoints()
    await settled()
    assert seen(worker) == 1
    lists(worker, 2)
    await settled()
    assert seen(worker) == 1
    envoy.acknowledge_endpoints()
    await settled()
    assert seen(worker) == 2


def swaps(worker: Worker, *numbers: int) -> None:
    """A source lists these endpoints of `old`."""
    hosts = [f"10.0.0.{number}" for number in numbers]
    worker.owners.report("mesh", {"old": [Listed(f"{host}:80", Address(host, 80)) for host in hosts]})


def chosen_from(worker: Worker) -> list[int]:
    """The numbers of the endpoints of `old` that requests see."""
    return [int(one.key.split(":")[0].rpartition(".")[2]) for one in worker.owners.routable.clusters["old"]]


@pytest.fixture
async def meshed() -> AsyncIterator[list[Worker]]:
    """Two workers; a source lists endpoints 1 and 2 of `old`, which no file does."""
    workers = [Worker(wire) for wire in Wire.pair()]
    for one in workers:
        config = Config.model_validate({"models": {"old": {"rules": [{"cluster": "old"}]}}})
        one.owners.apply(config, Resolution({}))
        swaps(one, 1, 2)
        one.late.start()
    yield workers
    for one in workers:
        one.stop()


@pytest.mark.asyncio
async def test_all_endpoints_are_replaced(meshed: list[Worker]) -> None:
    """Requests see the former ones until Envoy has the others; for a while it has both, then these alone."""
    worker, other = meshed
    envoy = await silent(worker)
    swaps(other, 3)
    await settled()
    assert chosen_from(other) == [1, 2], "Envoy's worker does not know it yet"
    swaps(worker, 3)
    await settled()
    assert chosen_from(worker) == chosen_from(other) == [1, 2]
    envoy.acknowledge_endpoints()
    await settled()
    assert chosen_from(worker) == chosen_from(other) == [3]
    assert [one.key for one in worker.owners.fleet.endpoints] == ["10.0.0.3:80"]
    envoy.acknowledge_endpoints()
    assert envoy.serves == {"old": 3}, "what was decided a moment ago finds them"


@pytest.mark.asyncio
async def test_a_later_word_counts_while_endpoints_are_replaced(meshed: list[Worker]) -> None:
    """What was to go and is listed again stays; what came and is not listed any more never is seen."""
    worker, other = meshed
    envoy = await silent(worker)
    for numbers in ((3,), (2, 4)):
        for one in (worker, other):
            swaps(one, *numbers)
        await settled()
    assert chosen_from(worker) == [2, 1], "until 4 is there"
    for _ in range(2):
        envoy.acknowledge_endpoints()
        await settled()
    assert chosen_from(worker) == chosen_from(other) == [2, 4]


@pytest.mark.asyncio
async def test_all_endpoints_are_replaced_where_no_envoy_is_ours(meshed: list[Worker]) -> None:
    """Nothing is waited for but the other worker's word, however little that knows."""
    worker, _ = meshed
    swaps(worker, 3)
    await settled()
    assert chosen_from(worker) == [3]


@pytest.mark.asyncio
async def test_a_worker_alone_without_envoys_replaces_all_in_one_turn(worker: Worker) -> None:
    """By the files as well."""
    models = {name: {"rules": [{"cluster": name}]} for name in ("old", "far")}
    other = Listed("10.0.0.2:80", Address("10.0.0.2", 80))
    worker.owners.apply(Config.model_validate({"models": models}), Resolution({"old": (other,)}))
    assert chosen_from(worker) == [2]
    assert worker.owners.fleet.listed("files") == {"old": (other,)}


@pytest.mark.asyncio
async def test_all_endpoints_are_replaced_and_an_envoy_never_answers(
    meshed: list[Worker], caplog: pytest.LogCaptureFixture
) -> None:
    """Then the former ones go all the same, and the log names the cluster."""
    worker, _ = meshed
    await silent(worker)
    swaps(worker, 3)
    await settled()
    assert chosen_from(worker) == [1, 2]
    worker.now_s += MOST_WAIT_S
    await until(lambda: chosen_from(worker) == [3])
    (record,) = caplog.records
    assert vars(record)["clusters"] == ["old"]


@pytest.mark.asyncio
async def test_endpoints_that_are_replaced_are_not_kept_once_all_are_ejected(meshed: list[Worker]) -> None:
    """By waiting for Envoy nothing is won then."""
    worker, _ = meshed
    await silent(worker)
    swaps(worker, 3)
    worker.ejected |= {"10.0.0.1:80"}
    worker.acknowledgements.look_soon()
    await settled()
    assert chosen_from(worker) == [1, 2]
    worker.ejected |= {"10.0.0.2:80"}
    worker.acknowledgements.look_soon()
    await settled()
    assert chosen_from(worker) == [3]
    worker.ejected |= {"10.0.0.3:80"}
    swaps(worker, 3, 4)
    assert chosen_from(worker) == [3, 4]


@pytest.mark.asyncio
async def test_a_worker_that_goes_is_not_waited_for(meshed: list[Worker]) -> None:
    """The Envoy that it has is expected elsewhere."""
    worker, other = meshed
    await silent(other)
    swaps(worker, 3)
    await settled()
    assert chosen_from(worker) == [1, 2]
    assert worker.wire is not None
    worker.wire.away.notify(other.wire.index)  # type: ignore[union-attr]
    await settled()
    assert chosen_from(worker) == [3]


@pytest.mark.asyncio
async def test_what_no_rule_names_is_seen_at_once(worker: Worker) -> None:
    """A configuration that names it later waits by itself."""
    await silent(worker)
    lists(worker, 1, "spare")
    assert seen(worker, "spare") == 1


@pytest.mark.asyncio
async def test_an_envoy_that_never_answers_is_waited_for_so_long(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """Then requests see it all the same, and the log names the cluster."""
    await silent(worker)
    lists(worker, 1)
    await settled()
    worker.now_s += MOST_WAIT_S
    await until(lambda: seen(worker) == 1)
    (record,) = caplog.records
    assert record.message == "an Envoy has not acknowledged clusters that requests go to now"
    assert vars(record)["clusters"] == ["far"]


@pytest.mark.asyncio
async def test_what_envoy_refuses_is_not_waited_for(worker: Worker) -> None:
    """It will not have it."""
    envoy = await silent(worker)
    lists(worker, 1)
    await settled()
    envoy.refuse("far: no")
    await settled()
    assert seen(worker) == 1


@pytest.mark.asyncio
async def test_a_cluster_that_goes_while_it_is_hidden(worker: Worker) -> None:
    """It is not seen, not by the answer that was waited for either; and hidden when it comes again."""
    envoy = await silent(worker)
    lists(worker, 1)
    await settled()
    lists(worker, None)
    envoy.acknowledge()
    envoy.acknowledge_endpoints()
    await settled()
    assert seen(worker) is None
    envoy.leave()
    Envoy(worker.ads, ["old"], answers=False)
    lists(worker, 1)
    await settled()
    assert seen(worker) is None


@pytest.mark.asyncio
@pytest.mark.parametrize("before", [None, 0])
async def test_an_envoy_reconnects_meanwhile(worker: Worker, before: int | None) -> None:
    """It is expected back, and counts by what it says then; if it does not come, it counts no more."""
    lists(worker, before)
    envoy = await silent(worker)
    envoy.leave()
    lists(worker, 1)
    await settled()
    assert seen(worker) == before
    again = Envoy(worker.ads, ["old"] if before is None else ["old", "far"], answers=False)
    again.takes_endpoints = False
    await settled()
    assert seen(worker) == before
    again.leave()
    worker.now_s += RECONNECT_S
    await until(lambda: seen(worker) == 1)


@pytest.mark.asyncio
async def test_what_was_introduced_is_not_hidden(worker: Worker) -> None:
    """A configuration that comes into force brings it, though Envoy said nothing in time."""
    await silent(worker)
    worker.rename("new")
    await settled()
    assert seen(worker, "new") is None
    worker.time_is_over()
    assert seen(worker, "new") == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("before", [None, 0])
async def test_another_workers_envoy_gets_it_later(pair: list[Worker], before: int | None) -> None:
    """Both see it once that Envoy has it, of a cluster without endpoints as well."""
    envoy = Envoy(pair[0].ads)
    if before is not None:
        for one in pair:
            lists(one, before)
    await settled()
    envoy.answers = envoy.takes_endpoints = False
    lists(pair[1], 1)
    await settled()
    assert seen(pair[1]) == before
    lists(pair[0], 1)
    await settled()
    assert [seen(one) for one in pair] == [before, before]
    envoy.acknowledge()
    envoy.acknowledge_endpoints()
    await settled()
    envoy.acknowledge_endpoints()
    await settled()
    assert [seen(one) for one in pair] == [1, 1]


@pytest.mark.asyncio
async def test_a_worker_that_does_not_answer(pair: list[Worker], caplog: pytest.LogCaptureFixture) -> None:
    """It may be the one that Envoy is connected to; the log names it."""
    assert pair[1].wire is not None
    pair[1].wire.is_cut = True
    lists(pair[0], 1)
    await settled()
    assert seen(pair[0]) is None
    pair[0].now_s += MOST_WAIT_S
    await until(lambda: seen(pair[0]) == 1)
    (record,) = caplog.records
    assert vars(record)["silent_workers"] == [1]


@pytest.mark.asyncio
async def test_a_worker_that_starts_waits_for_first_endpoints(pair: list[Worker]) -> None:
    """It was told of them, and the other one, whose Envoy has the cluster without endpoints, not yet."""
    envoy = Envoy(pair[0].ads)
    lists(pair[0], 0)
    await settled()
    lists(pair[1], 1)
    starting = asyncio.create_task(pair[1].introductions.catch_up(pair[1].owners.led_to))
    await settled()
    assert not starting.done()
    lists(pair[0], 1)
    await asyncio.wait_for(starting, MOST_WAIT_S / 2)
    assert envoy.serves["far"] == 1


@pytest.mark.asyncio
async def test_two_at_once_of_one_worker(pair: list[Worker]) -> None:
    """Other workers answer each of its questions."""
    for one in pair:
        lists(one, 0, "old")
    envoy = await silent(pair[0])
    for one in pair:
        lists(one, 1)
    await settled()
    for one in pair:
        one.owners.report("mesh", {"old": [OLD]})
    await settled()
    for _ in range(2):
        envoy.acknowledge()
        envoy.acknowledge_endpoints()
        await settled()
    assert [seen(one) for one in pair] == [1, 1]


LISTED: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "empty": (),
    "first": (1,),
    "second": (2,),
    "both": (1, 2),
    "third": (3,),
}
STEPS = st.sampled_from([*LISTED, "acknowledge", "endpoints", "connect", "leave", "half a second"])


@example(
    ["first", "none", *["half a second"] * 5, "both", "half a second"]
)  # it comes again, and has all its time
@example(["first", "half a second", "empty", *["half a second"] * 3, "both", *["half a second"] * 2])
@example(["first", "acknowledge", "endpoints", "second", "third", "first", "endpoints", "third"])
@given(st.lists(STEPS, max_size=25))
def test_requests_see_no_endpoint_before_all_envoys_have_it(steps: list[str]) -> None:
    """Whatever is listed, said and broken in whatever order; or not for longer than is waited."""
    asyncio.run(_run(steps))


async def _run(steps: list[str]) -> None:
    worker = started(Worker())
    envoys = [await silent(worker)]
    hidden_since: dict[str, float] = {}
    wanted: set[str] = set()
    for step in steps:
        before = hosts_of(worker.owners.routable.clusters)
        if step in LISTED:
            numbers = LISTED[step]
            far = [f"10.0.1.{number}" for number in numbers or ()]
            wanted = set(far)
            endpoints = [Listed(f"{host}:80", Address(host, 80)) for host in far]
            worker.owners.report("mesh", {"far": None if numbers is None else endpoints})
        elif step == "acknowledge":
            for envoy in envoys:
                envoy.acknowledge()
        elif step == "endpoints":
            for envoy in envoys:
                envoy.acknowledge_endpoints()
        elif step == "connect":
            envoys.append(Envoy(worker.ads, answers=False))
            envoys[-1].takes_endpoints = False
        elif step == "leave" and envoys:
            envoys.pop().leave()
        elif step == "half a second":
            worker.now_s += 0.5
            worker.acknowledgements.look_soon()
        await settled()
        seen_now, there = hosts_of(worker.owners.routable.clusters), hosts_of(worker.owners.fleet.clusters)
        for host in seen_now - before:
            waited_s = worker.now_s - hidden_since.get(host, worker.now_s)
            assert waited_s >= MOST_WAIT_S or all(host in envoy.places.get("far", ()) for envoy in envoys)
        hidden = there - seen_now
        hidden_since = {host: hidden_since.get(host, worker.now_s) for host in hidden}
        assert all(worker.now_s - since_s <= MOST_WAIT_S for since_s in hidden_since.values())
        assert seen_now <= there
        assert wanted <= there
        assert hidden or there == wanted, "what was to go has gone"
        assert seen_now or not (before and wanted), "there is no gap"
    worker.stop()


def hosts_of(clusters: Mapping[str, Sequence[Endpoint]]) -> set[str]:
    """Where endpoints of `far` are."""
    return {endpoint.address.host for endpoint in clusters.get("far", ())}
