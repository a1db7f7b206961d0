"""Real files and a scripted resolver: what ends up in force, and what is said about the rest."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from extproc.config.schema import Config
from extproc.discovery import resolve
from extproc.discovery.resolution import Resolution
from extproc.errors import ConfigError
from extproc.observing.metrics.collector import Metrics
from extproc.server.reloading import configuration
from extproc.server.reloading.configuration import Configuration
from tests.waiting import until

pytestmark = pytest.mark.asyncio


class Names:
    """The records of a name server; names in `slow` do not answer."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}
        self.slow: dict[str, asyncio.Event] = {}

    async def look_up(self, names: Sequence[str], timeout_s: float) -> dict[str, list[str]]:
        """In place of `resolve._look_up`."""
        for name in names:
            if name in self.slow:
                await self.slow[name].wait()
        missing = {name: "no such name" for name in names if name not in self.records}
        if missing:
            raise resolve.ResolveError(missing)
        return {name: self.records[name] for name in names}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The name server, asked ten times a second."""
    names = Names()
    monkeypatch.setattr(resolve, "_look_up", names.look_up)
    monkeypatch.setattr(configuration, "RESOLVE_INTERVAL_S", 0.1)
    return names


class Rig:
    """Files in a folder and what was made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.applied: list[list[str]] = []
        self.configs: list[Config] = []

    def apply(self, config: Config, resolution: Resolution) -> None:
        """What the worker does."""
        self.configs.append(config)
        self.applied.append([endpoint.key for endpoint in resolution.endpoints])

    def clusters(self, *addresses: str, file: str = "clusters.json") -> None:
        """Replace a clusters file."""
        endpoints = [{"address": address, "port": 80} for address in addresses]
        self.put(file, json.dumps({"clusters": [{"name": "c", "endpoints": endpoints}]}))

    def put(self, file: str, text: str) -> None:
        """Replace a file in one step."""
        fresh = self.folder / "fresh"
        fresh.write_text(text)
        fresh.replace(self.folder / file)

    async def until(self, *addresses: str) -> None:
        """Wait until these are the endpoints in force."""
        keys = [f"[{address}]:80" if ":" in address else f"{address}:80" for address in addresses]
        await until(lambda: bool(self.applied) and self.applied[-1] == keys)


@asynccontextmanager
async def following(rig: Rig, file: str = "tokenway.yaml") -> AsyncIterator[Configuration]:
    """A started configuration."""
    current = Configuration(rig.folder / file, Metrics(CollectorRegistry(), "0"), rig.apply)
    await current.start()
    try:
        yield current
    finally:
        await current.stop()


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """A good pair of files with one literal address."""
    rig = Rig(tmp_path)
    rig.put("tokenway.yaml", "version: 1\n")
    rig.clusters("192.0.2.1")
    return rig


async def test_name_without_address_stops_neither_the_start_nor_others(names: Names, rig: Rig) -> None:
    """It has no endpoint until it has an address; then it has one."""
    names.records["good.svc"] = ["192.0.2.2"]
    rig.clusters("gone.svc", "good.svc", "192.0.2.1")
    async with following(rig) as current:
        assert rig.applied == [["192.0.2.2:80", "192.0.2.1:80"]]
        assert current.names() == {"gone.svc": False, "good.svc": True}
        names.records["good.svc"] = ["192.0.2.3"]
        await rig.until("192.0.2.3", "192.0.2.1")
        names.records["gone.svc"] = ["2001:db8::1", "192.0.2.4"]
        await rig.until("192.0.2.4", "2001:db8::1", "192.0.2.3", "192.0.2.1")
        del names.records["good.svc"]
        await until(lambda: not current.names()["good.svc"])
        assert rig.applied[-1][2] == "192.0.2.3:80"


@pytest.mark.parametrize(
    ("file", "least"), [("clusters.json", '{"clusters": []}'), ("tokenway.yaml", "version: 1")]
)
async def test_an_empty_file_is_told_what_would_be_accepted(
    rig: Rig, caplog: pytest.LogCaptureFixture, file: str, least: str
) -> None:
    """The words are those of the file that is empty, and following them mends it."""
    async with following(rig):
        rig.put(file, "")
        await until(lambda: bool(caplog.records))
        assert f"`{least}`" in vars(caplog.records[0])["problem"]
        applied = len(rig.applied)
        rig.put(file, least)
        await until(lambda: len(rig.applied) > applied)


async def test_failing_name_is_logged_once(names: Names, rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """However often it is asked; and once more when it answers."""
    caplog.set_level(logging.INFO, "tokenway.configuration")
    rig.clusters("gone.svc")
    async with following(rig):
        await asyncio.sleep(0.5)
        names.records["gone.svc"] = ["192.0.2.4"]
        await rig.until("192.0.2.4")
    assert caplog.messages == ["host name has no address", "host name has addresses again"]


async def test_hanging_name_delays_a_change_by_a_bounded_time(
    names: Names, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the change is in force then, and the answer is taken when it comes."""
    monkeypatch.setattr(configuration, "WAIT_S", 0.2)
    async with following(rig):
        names.slow["slow.svc"] = asyncio.Event()
        names.records["slow.svc"] = ["192.0.2.9"]
        rig.clusters("slow.svc", "192.0.2.2")
        await rig.until("192.0.2.2")
        names.slow["slow.svc"].set()
        await rig.until("192.0.2.9", "192.0.2.2")


async def test_both_files_edited_one_after_the_other(rig: Rig) -> None:
    """A rule on a cluster that no source lists yet is in force before the cluster is there."""
    async with following(rig) as current:
        rig.put("tokenway.yaml", "models: {m: {rules: [{cluster: late}]}}\n")
        await until(lambda: list(current.current.models) == ["m"])
        assert current.files() == {"tokenway.yaml": True, "clusters.json": True}
        rig.put(
            "clusters.json",
            '{"clusters": [{"name": "late", "endpoints": [{"address": "192.0.2.7", "port": 80}]}]}',
        )
        await rig.until("192.0.2.7")
        assert current.files() == {"tokenway.yaml": True, "clusters.json": True}


async def test_config_map_is_swapped(tmp_path: Path) -> None:
    """Kubernetes swaps `..data`; both files change at once, and a clusters file may be new."""
    for version, clusters_file in (("v1", "clusters.json"), ("v2", "blue.json")):
        rig = Rig(tmp_path / version)
        rig.folder.mkdir()
        rig.put("tokenway.yaml", f"clusters_file: {clusters_file}\n")
        rig.clusters(f"192.0.2.{version[1]}", file=clusters_file)
    (tmp_path / "..data").symlink_to("v1")
    for file in ("tokenway.yaml", "clusters.json", "blue.json"):
        (tmp_path / file).symlink_to(f"..data/{file}")
    rig = Rig(tmp_path)
    async with following(rig) as current:
        assert rig.applied == [["192.0.2.1:80"]]
        (tmp_path / "..data_tmp").symlink_to("v2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        await rig.until("192.0.2.2")
        assert current.files() == {"tokenway.yaml": True, "blue.json": True}


async def test_clusters_file_that_comes_later_is_taken(rig: Rig) -> None:
    """Mistyped, then made, then broken, then repaired, then left for another: each is seen."""
    async with following(rig) as current:
        rig.put("tokenway.yaml", "clusters_file: blue.json\n")
        await until(lambda: current.files() == {"tokenway.yaml": True, "blue.json": False})
        rig.clusters("192.0.2.5", file="blue.json")
        await rig.until("192.0.2.5")
        (rig.folder / "blue.json").write_text("{")
        await until(lambda: not current.files()["blue.json"])
        rig.clusters("192.0.2.6", file="blue.json")
        await rig.until("192.0.2.6")
        rig.put("tokenway.yaml", "version: 1\n")
        await rig.until("192.0.2.1")
        assert current.files() == {"tokenway.yaml": True, "clusters.json": True}
        rig.clusters("192.0.2.8", file="blue.json")
        await asyncio.sleep(0.8)
        assert rig.applied[-1] == ["192.0.2.1:80"]


@pytest.mark.parametrize("file", ["tokenway.yaml", "clusters.json"])
async def test_file_that_is_gone_is_reported_and_changes_nothing(rig: Rig, file: str) -> None:
    """Removed, a folder in its place, truncated: the last good one stays until it is back."""
    async with following(rig) as current:
        path = rig.folder / file
        text = path.read_text()
        path.unlink()
        await until(lambda: not current.files()[file])
        path.mkdir()
        await asyncio.sleep(0.6)
        assert not current.files()[file]
        path.rmdir()
        path.write_text("")
        await asyncio.sleep(0.6)
        assert not current.files()[file]
        assert len(rig.applied) == 1
        path.write_text(text)
        await until(lambda: all(current.files().values()))
        assert rig.applied[-1] == ["192.0.2.1:80"]


@pytest.mark.parametrize(
    "text",
    [
        "server: {listen: ['127.0.0.1:9000', '127.0.0.1:9000']}\n",
        "cache: {kv_events: {listen: {'tcp://gw:5557': 'tcp://*:10080'}}}\n",
    ],
)
async def test_sockets_that_collide_change_nothing(rig: Rig, text: str) -> None:
    """Neither a setting that waits for a restart nor one that would come into force at once."""
    async with following(rig) as current:
        rig.put("tokenway.yaml", text)
        await until(lambda: not current.files()["tokenway.yaml"])
        assert len(rig.configs) == 1
        assert current.current.server.listen == ()
        rig.put("tokenway.yaml", "version: 1\n")
        await until(lambda: current.files()["tokenway.yaml"])


async def test_reload_by_hand_reads_and_asks_at_once(
    names: Names, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are looked up, and the files read, though neither is due or changed."""
    monkeypatch.setattr(configuration, "RESOLVE_INTERVAL_S", 1000.0)
    names.records["a.svc"] = ["192.0.2.2"]
    rig.clusters("a.svc")
    async with following(rig) as current:
        names.records["a.svc"] = ["192.0.2.3"]
        before = len(rig.configs)
        current.reload()
        await asyncio.sleep(0)  # reading is one turn of the loop, and applying another
        assert len(rig.configs) == before + 1
        await rig.until("192.0.2.3")


async def test_start_refuses_what_cannot_be_used(rig: Rig) -> None:
    """There is no last good one to keep."""
    shutil.rmtree(rig.folder)
    with pytest.raises(ConfigError, match="No such file"):
        Configuration(rig.folder / "tokenway.yaml", Metrics(CollectorRegistry(), "0"), rig.apply)
