"""A configuration with new clusters, and Envoys that acknowledge them, refuse them, go, or say nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from envoy.service.discovery.v3 import discovery_pb2 as pb

from extproc.server.envoys.acknowledging import MOST_WAIT_S
from extproc.server.reloading import introducing
from extproc.transport.seam import Message, joined
from extproc.xds.ads import RECONNECT_S
from extproc.xds.type_urls import ASSIGNMENT_TYPE, CLUSTER_TYPE
from tests.waiting import until
from tests.workers_and_envoys import Envoy, Wire, Worker, configured, settled

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    """One alone, which serves the cluster `old`."""
    worker = Worker()
    worker.start("old")
    yield worker
    worker.stop()


@pytest.fixture
async def pair() -> AsyncIterator[list[Worker]]:
    """Two workers of one gateway, which serve the cluster `old`."""
    workers = [Worker(wire) for wire in Wire.pair()]
    for one in workers:
        one.start("old")
    yield workers
    for one in workers:
        one.stop()


async def waited_for(worker: Worker) -> Envoy:
    """An Envoy that has `old` and has not answered to `new` yet."""
    envoy = Envoy(worker.ads)
    await settled()
    envoy.answers = False
    worker.rename("new")
    await settled()
    return envoy


async def test_without_an_envoy_nothing_is_waited_for(worker: Worker) -> None:
    """Nobody is there to send requests to a cluster that it does not have."""
    worker.rename("new")
    await settled()
    assert worker.in_force == "new"


async def test_a_renamed_cluster_is_in_force_once_it_is_acknowledged(worker: Worker) -> None:
    """Envoy has both until then, and both for a while after."""
    envoy = await waited_for(worker)
    assert worker.in_force == "old"
    assert envoy.has == {"old", "new", "model:m", "model:"}
    envoy.acknowledge()
    await settled()
    assert worker.in_force == "new"
    assert envoy.has == {"old", "new", "model:m", "model:"}


async def test_what_brings_no_cluster_waits_for_nothing(worker: Worker) -> None:
    """An Envoy that never answers delays no other change, and none back to what it has."""
    Envoy(worker.ads, answers=False)
    worker.rename("old", signals={"timeout_s": 5})
    await settled()
    assert worker.owners._read is worker.asked[1][0]


async def test_all_envoys_count(worker: Worker) -> None:
    """The slowest of them says when."""
    envoys = [Envoy(worker.ads) for _ in range(3)]
    await settled()
    for envoy in envoys:
        envoy.answers = False
    worker.rename("new")
    for envoy in envoys:
        await settled()
        assert worker.in_force == "old"
        envoy.acknowledge()
    await settled()
    assert worker.in_force == "new"


async def test_a_client_that_takes_no_clusters_does_not_count(worker: Worker) -> None:
    """It asks for endpoints alone."""
    envoy = Envoy(worker.ads)
    other = worker.ads.open(envoy)
    request = pb.DeltaDiscoveryRequest(type_url=ASSIGNMENT_TYPE, resource_names_subscribe=["old"])
    other.on_message(request.SerializeToString())
    await settled()
    worker.rename("new")
    await settled()
    assert worker.in_force == "new"


def led_elsewhere(worker: Worker) -> None:
    """The one rule leads to `far`, which a source lists that is not the files; they list `old` as before."""
    worker._generation += 1
    config, resolution = configured("old")
    config = config.model_copy(update={"models": configured("far")[0].models})
    worker.asked[worker._generation] = config, resolution
    worker.owners.introduce(worker._generation, config, resolution)


async def test_a_source_is_asked_for_a_cluster_before_a_rule_leads_there(worker: Worker) -> None:
    """And what it lists has to be in Envoy, too."""
    worker.source.lists = "far"
    envoy = Envoy(worker.ads)
    await settled()
    envoy.answers = False
    led_elsewhere(worker)
    await settled()
    assert worker.owners._read is not worker.asked[1][0]
    worker.source.say()
    await until(lambda: "far" in envoy.has)
    assert worker.owners._read is not worker.asked[1][0]
    envoy.acknowledge()
    await until(lambda: worker.owners._read is worker.asked[1][0])


async def test_a_source_that_says_nothing_is_waited_for_so_long(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the configuration is in force all the same, and the log names the cluster."""
    worker.source.lists = "far"
    led_elsewhere(worker)
    await settled()
    assert worker.owners._read is not worker.asked[1][0]
    worker.time_is_over()
    assert worker.owners._read is worker.asked[1][0]
    (record,) = caplog.records
    assert record.message == "a source has not said what it lists of clusters that are named now"
    assert vars(record)["clusters"] == ["far"]


async def test_a_source_is_asked_no_more_for_what_envoy_refuses(worker: Worker) -> None:
    """The rule does not lead there."""
    envoy = await waited_for(worker)
    assert worker.source.asked is worker.asked[1][0]
    envoy.refuse("new: no")
    await settled()
    assert worker.source.asked is None


async def test_swapped_back_while_it_waits(worker: Worker) -> None:
    """What is in force stays so, and what was introduced never is; it may be introduced again."""
    envoy = await waited_for(worker)
    worker.rename("old")
    await settled()
    envoy.acknowledge()
    await settled()
    assert worker.in_force == "old"
    worker.rename("new")
    await settled()
    assert worker.in_force == "new", "it lingers, so Envoy has it"


async def test_a_second_reload_while_one_waits(worker: Worker) -> None:
    """The second alone comes into force, once its own cluster is acknowledged."""
    envoy = Envoy(worker.ads)
    await settled()
    envoy.answers = False
    worker.rename("first")
    await settled()
    worker.rename("second")
    await settled()
    (nonce_of_first,) = [nonce for nonce, names in envoy.owed.items() if names == ["first"]]
    of_second = {nonce: names for nonce, names in envoy.owed.items() if nonce != nonce_of_first}
    envoy.owed = {nonce_of_first: ["first"]}
    envoy.acknowledge()
    await settled()
    assert worker.in_force == "old"
    envoy.owed = of_second
    envoy.acknowledge()
    await settled()
    assert worker.in_force == "second"


async def test_a_refused_cluster_does_not_come_into_force(worker: Worker) -> None:
    """Envoy's words are passed on, the cluster leaves at once, and the next attempt is one."""
    envoy = Envoy(worker.ads)
    await settled()
    envoy.answers = False
    for attempt in (1, 2):
        worker.rename("new")
        await settled()
        assert "new" in envoy.has
        envoy.refuse("Error adding/updating cluster(s) new: Invalid path: /nowhere/ca.pem")
        await settled()
        assert worker.in_force == "old"
        assert len(worker.spurned) == attempt
        assert "`new`" in worker.spurned[-1]
        assert "/nowhere/ca.pem" in worker.spurned[-1]
        assert envoy.has == {"old", "model:m", "model:"}
        envoy.acknowledge()
    worker.rename("new")
    await settled()
    envoy.acknowledge()
    await settled()
    assert worker.in_force == "new"


async def test_a_refusal_of_another_cluster_spurns_nothing(worker: Worker) -> None:
    """Of one response Envoy takes what it does not name, and to what it names no rule leads."""
    envoy = Envoy(worker.ads)
    await settled()
    envoy.answers = False
    worker.rename("new", "spare")
    await settled()
    envoy.refuse("Error adding/updating cluster(s) spare: no")
    await settled()
    assert worker.in_force == "new"
    assert worker.spurned == []


async def test_one_of_several_envoys_refuses(worker: Worker) -> None:
    """What the others have does not help its requests."""
    good, bad = Envoy(worker.ads), Envoy(worker.ads)
    await settled()
    bad.answers = False
    worker.rename("new")
    await settled()
    bad.refuse("new: no")
    await settled()
    assert worker.in_force == "old"
    assert "new" not in good.has


async def test_an_envoy_that_never_answers_is_waited_for_so_long(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the configuration is in force all the same, and the log names the cluster."""
    await waited_for(worker)
    worker.time_is_over()
    assert worker.in_force == "new"
    (record,) = caplog.records
    assert record.message == "an Envoy has not acknowledged clusters that requests go to now"
    assert vars(record)["clusters"] == ["new"]


async def test_an_envoy_reconnects_while_one_waits(worker: Worker) -> None:
    """Between its streams it is expected back, and on its new one it says what it has."""
    envoy = Envoy(worker.ads)
    await settled()
    envoy.leave()
    worker.rename("new")
    await settled()
    assert worker.in_force == "old"
    again = Envoy(worker.ads, ["old"], answers=False)
    await settled()
    assert worker.in_force == "old"
    again.acknowledge()
    await settled()
    assert worker.in_force == "new"
    again.leave()
    Envoy(worker.ads, ["old", "new", "model:m"], answers=False)
    worker.rename("old")
    await settled()
    assert worker.in_force == "old"


async def test_an_envoy_that_does_not_come_back_is_forgotten(worker: Worker) -> None:
    """Its stream ended and none has come for longer than Envoy pauses."""
    envoy = Envoy(worker.ads)
    await settled()
    envoy.leave()
    worker.rename("new")
    await settled()
    assert worker.in_force == "old"
    worker.now_s += RECONNECT_S
    async with asyncio.timeout(10):
        while worker.in_force != "new":  # noqa: ASYNC110 - it looks by itself
            await asyncio.sleep(0.01)


async def test_an_envoy_of_a_worker_that_died_is_expected(pair: list[Worker]) -> None:
    """It may come here, with what it had: until it has what is asked for, nobody is told that all have it."""
    dies, stays = pair
    assert not dies.acknowledgements.word(dies.acknowledgements.ask({"old"})).lacked
    stays.ads.expect(1)
    assert stays.ads.has_envoys
    assert stays.ads.word({"old", "new"}).lacked == {"old", "new"}
    assert stays.ads.num_envoys == 0, "it would be expected for ever by workers that tell each other"
    envoy = Envoy(stays.ads, ["old"], answers=False)
    assert stays.ads.num_envoys == 1
    assert stays.ads.word({"old", "new"}).lacked == {"new"}
    envoy.leave()
    assert stays.ads.num_envoys == 1, "it may come back, and this worker knows what it had"


async def test_an_envoy_of_a_worker_that_died_goes_elsewhere(pair: list[Worker]) -> None:
    """A third one has it: that one is asked."""
    stays = pair[1]
    stays.ads.expect(2)
    stays.ads.found(1)
    assert stays.ads.word({"new"}).lacked == {"new"}
    stays.ads.found(1)
    assert not stays.ads.word({"new"}).lacked
    stays.ads.expect(1)
    stays.now_s += RECONNECT_S
    assert not stays.ads.word({"new"}).lacked, "it has had its time"


@pytest.mark.parametrize("comes_back", [True, False], ids=["Envoy comes here", "Envoy stays away"])
async def test_a_worker_that_starts_waits_for_the_envoy_of_the_one_that_died(
    pair: list[Worker], comes_back: bool
) -> None:
    """No worker has one when it asks."""
    starts, stays = pair
    starts.start("new")
    stays.start("new")
    stays.ads.expect(1)
    catching_up = asyncio.create_task(starts.introductions.catch_up(lambda: frozenset({"new"})))
    await asyncio.sleep(0.1)
    assert not catching_up.done()
    if comes_back:
        Envoy(stays.ads, ["old"])
    else:
        stays.now_s += RECONNECT_S
    await asyncio.wait_for(catching_up, 2)


async def test_tls_of_a_new_cluster_comes_with_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is introduced as it will be: Envoy is sent it once, and the one that goes is not changed before."""
    heard: list[tuple[str, bool]] = []
    envoy = Envoy(worker.ads)
    tls = {"ca_file": "/ca.pem", "server_name": "engines"}
    worker.rename("first", engine_tls={"first": tls})
    await settled()
    assert worker.in_force == "first"
    plain = envoy.send

    def listen(message: Message, done: Callable[[], None] | None = None) -> None:
        response = pb.DeltaDiscoveryResponse.FromString(bytes(joined(message)))
        if response.type_url == CLUSTER_TYPE:
            heard.extend((one.name, b"/ca.pem" in one.resource.value) for one in response.resources)
        plain(message, done)

    monkeypatch.setattr(envoy, "send", listen)
    worker.rename("second", engine_tls={"second": tls})
    await settled()
    assert worker.in_force == "second"
    of_engines = [each for each in heard if not each[0].startswith(("model:", "engine_tls:"))]
    assert of_engines == [("second", True)]


@pytest.mark.parametrize("first", [0, 1])
async def test_envoy_is_connected_to_another_worker(pair: list[Worker], first: int) -> None:
    """Whoever reads the files first, both decide by them only once the one Envoy has the cluster."""
    envoy = Envoy(pair[0].ads)
    await settled()
    envoy.answers = False
    pair[first].rename("new")
    await settled()
    assert [one.in_force for one in pair] == ["old", "old"]
    pair[1 - first].rename("new")
    await settled()
    assert [one.in_force for one in pair] == ["old", "old"]
    envoy.acknowledge()
    await settled()
    assert [one.in_force for one in pair] == ["new", "new"]


@pytest.mark.parametrize("first", [0, 1])
async def test_envoy_of_another_worker_refuses(pair: list[Worker], first: int) -> None:
    """No worker goes by the configuration, whichever reads it first, before or after the refusal."""
    envoy = Envoy(pair[0].ads)
    await settled()
    envoy.answers = False
    pair[first].rename("new")
    await settled()
    if first == 1:
        pair[0].rename("new")
        await settled()
    envoy.refuse("new: no")
    await settled()
    if first == 0:
        pair[1].rename("new")
        await settled()
    assert [one.in_force for one in pair] == ["old", "old"]
    assert [len(one.spurned) for one in pair] == [1, 1]


async def test_a_worker_that_does_not_answer_is_waited_for(pair: list[Worker]) -> None:
    """It may be the one that Envoy is connected to."""
    pair[1].wire.is_cut = True  # type: ignore[union-attr]
    pair[0].rename("new")
    await settled()
    assert pair[0].in_force == "old"
    pair[0].time_is_over()
    assert pair[0].in_force == "new"


async def test_a_worker_that_is_gone_is_not_waited_for(pair: list[Worker]) -> None:
    """Neither where it is known to be, nor where it goes meanwhile; its Envoys are, if it had some."""
    wire = pair[0].wire
    assert wire is not None
    wire.is_away = True
    pair[0].rename("second")
    await settled()
    assert pair[0].in_force == "second"
    wire.is_away, wire.is_cut = False, True
    pair[0].rename("third")
    await settled()
    assert pair[0].in_force == "second"
    pair[0].ads.expect(1)
    wire.away.notify(1)
    await settled()
    assert pair[0].in_force == "second"
    pair[0].ads.found(1)
    await settled()
    assert pair[0].in_force == "third"


async def test_a_worker_that_comes_meanwhile_is_asked(pair: list[Worker]) -> None:
    """Its Envoy may be the one that does not have the cluster yet."""
    wire, envoy = pair[0].wire, Envoy(pair[0].ads, ["old"], answers=False)
    assert wire is not None
    wire.is_away = True
    pair[0].rename("new")
    await settled()
    wire.is_away = False
    other = Envoy(pair[1].ads, ["old"], answers=False)
    wire.came.notify(1)
    envoy.acknowledge()
    await settled()
    assert pair[0].in_force == "old"
    pair[1].rename("new")
    await settled()
    other.acknowledge()
    await settled()
    assert [one.in_force for one in pair] == ["new", "new"]


async def test_a_worker_that_starts_waits_for_the_envoy_of_another(pair: list[Worker]) -> None:
    """It read files that the other has not read yet, and whose cluster that one's Envoy does not have."""
    envoy = Envoy(pair[0].ads)
    await settled()
    envoy.answers = False
    pair[1].start("new")
    starting = asyncio.create_task(pair[1].introductions.catch_up(pair[1].owners.led_to))
    await settled()
    assert not starting.done()
    pair[0].rename("new")
    await until(lambda: "new" in envoy.has)
    assert not starting.done()
    envoy.acknowledge()
    async with asyncio.timeout(MOST_WAIT_S / 2):
        await starting
    assert pair[0].in_force == "new"


async def test_an_answer_waits_until_the_worker_that_starts_can_be_reached(pair: list[Worker]) -> None:
    """It connects to the others before they connect to it."""
    Envoy(pair[0].ads)
    await settled()
    wire = pair[1].wire
    wire.is_deaf = True  # type: ignore[union-attr]
    starting = asyncio.create_task(pair[1].introductions.catch_up(pair[1].owners.led_to))
    await settled()
    assert not starting.done()
    wire.is_deaf = False  # type: ignore[union-attr]
    async with asyncio.timeout(MOST_WAIT_S / 2):
        await starting


async def test_a_worker_that_starts_alone_waits_for_nobody(pair: list[Worker]) -> None:
    """The others are not there yet, or not any more."""
    pair[1].wire.is_cut = True  # type: ignore[union-attr]
    async with asyncio.timeout(MOST_WAIT_S / 2):
        await pair[1].introductions.catch_up(pair[1].owners.led_to)


async def test_a_worker_that_starts_waits_so_long_for_a_silent_one(
    pair: list[Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then it serves, and the log says so."""
    monkeypatch.setattr(introducing, "MOST_WAIT_S", 0.05)
    Envoy(pair[0].ads)
    await settled()
    pair[1].start("new")
    await pair[1].introductions.catch_up(pair[1].owners.led_to)
    (record,) = caplog.records
    assert record.message == "starting before other workers' Envoys are known to have its clusters"
    assert vars(record)["silent_workers"] == [0]
