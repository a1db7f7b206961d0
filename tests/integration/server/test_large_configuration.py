"""Large files are read beside the event loop; what was written last is in force at the end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from extproc.config import reload
from extproc.config.clusters import ClusterSpec
from extproc.config.loading import Settings, read_all
from extproc.config.reload import FileWatcher, Look
from extproc.config.schema import Config
from extproc.discovery.resolution import Resolution
from extproc.observing.metrics.collector import Metrics
from extproc.request.rules import ModelRules, RuleTable
from extproc.server.reloading import configuration, preparing
from extproc.server.reloading.configuration import QUICK_JSON_BYTES, QUICK_YAML_BYTES, Configuration
from extproc.server.reloading.preparing import MANY_MODELS, CompiledRules
from tests.waiting import until

pytestmark = pytest.mark.asyncio

WAIT_S = 20.0


class Gateway:
    """A configuration that is followed, with reading held up where it is not on the loop."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.applied: list[list[str]] = []
        self.read_in: list[bool] = []  # on the loop?
        self.goes_on = threading.Event()

        def reading(
            path: Path, read: Callable[[Path], str], settings: Settings
        ) -> tuple[Config, tuple[ClusterSpec, ...]]:
            is_on_loop = threading.current_thread() is threading.main_thread()
            found = read_all(path, read, settings)
            self.read_in.append(is_on_loop)
            if not is_on_loop:
                assert self.goes_on.wait(WAIT_S)
            return found

        self.put("10.0.0.1")
        (folder / "tokenway.yaml").write_text("version: 1\n")
        metrics = Metrics(CollectorRegistry(), "0")
        self.current = Configuration(folder / "tokenway.yaml", metrics, self.apply)
        monkeypatch.setattr(configuration, "read_all", reading)

    def apply(self, _: Config, resolution: Resolution) -> None:
        """What the worker does."""
        self.applied.append([endpoint.key for endpoint in resolution.endpoints])

    def put(self, *addresses: str, padding: int = 0) -> None:
        """Replace clusters.json, with as many blanks in it."""
        endpoints = [{"address": address, "port": 80} for address in addresses]
        text = json.dumps({"clusters": [{"name": "c", "endpoints": endpoints}]}) + " " * padding
        fresh = self.folder / "fresh"
        fresh.write_text(text)
        fresh.replace(self.folder / "clusters.json")

    async def until(self, *addresses: str) -> None:
        """Wait until these are in force."""
        keys = [f"{address}:80" for address in addresses]
        await until(lambda: bool(self.applied) and self.applied[-1] == keys)


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """Not started."""
    return Gateway(tmp_path, monkeypatch)


async def test_a_large_clusters_file_is_read_while_the_loop_goes_on(gateway: Gateway) -> None:
    """It stays as it was until all is read; edits meanwhile are one more reading, not one each."""
    await gateway.current.start()
    gateway.put("10.0.0.2", padding=QUICK_JSON_BYTES)
    await until(lambda: bool(gateway.read_in))
    assert gateway.applied[-1] == ["10.0.0.1:80"]
    for number in range(3, 8):
        gateway.put(f"10.0.0.{number}", padding=QUICK_JSON_BYTES)
        gateway.current.reload()
        await asyncio.sleep(0)
    assert gateway.read_in == [False]
    gateway.goes_on.set()
    await gateway.until("10.0.0.7")
    assert gateway.read_in == [False, False]
    assert ["10.0.0.3:80"] not in gateway.applied
    gateway.put("10.0.0.8")
    await gateway.until("10.0.0.8")
    assert gateway.read_in[2] is True, "small again"
    await gateway.current.stop()


async def test_rules_of_many_models_are_compiled_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are ready when the configuration comes into force, which swaps one table."""
    compiled_in: list[bool] = []  # on the loop?

    class Rules(RuleTable):
        """Notes where it is made."""

        def __init__(self, models: Iterable[ModelRules]) -> None:
            compiled_in.append(threading.current_thread() is threading.main_thread())
            super().__init__(models)

    monkeypatch.setattr(preparing, "RuleTable", Rules)
    rules, in_force = CompiledRules(), list[RuleTable]()

    def apply(config: Config, _: Resolution) -> None:
        in_force.append(rules.of(config))

    def put(count: int) -> None:
        models = "".join(f"  m{number}: {{rules: [{{cluster: c}}]}}\n" for number in range(count))
        (tmp_path / "tokenway.yaml").write_text(f"models:\n{models}")

    (tmp_path / "clusters.json").write_text('{"clusters": []}')
    put(2)
    followed = Configuration(
        tmp_path / "tokenway.yaml", Metrics(CollectorRegistry(), "0"), apply, preparations=[rules]
    )
    await followed.start()
    put(MANY_MODELS + 1)
    await until(lambda: len(in_force) == 2)
    assert compiled_in == [True, False]
    put(3)
    await until(lambda: len(in_force) == 3)
    assert compiled_in == [True, False, True], "few again"
    await followed.stop()


async def test_a_large_tokenway_yaml_is_read_while_the_loop_goes_on(gateway: Gateway) -> None:
    """YAML takes ten times as long as JSON, so less of it is large."""
    await gateway.current.start()
    (gateway.folder / "tokenway.yaml").write_text("load: {lease_s: 77}\n" + "#" * QUICK_YAML_BYTES)
    await until(lambda: bool(gateway.read_in))
    assert gateway.read_in == [False]
    gateway.goes_on.set()
    await until(lambda: gateway.current.current.load.lease_s == 77)
    await gateway.current.stop()


async def test_readings_without_end_leave_time_for_requests(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends SIGHUP again and again has what was written last in force, by few readings."""
    monkeypatch.setattr(configuration, "LEAST_BETWEEN_S", 2.0)
    await gateway.current.start()
    for number in range(2, 102):
        gateway.put(f"10.0.0.{number}")
        gateway.current.reload()
        await asyncio.sleep(0)
    assert len(gateway.read_in) < 5
    await gateway.until("10.0.0.101")
    assert len(gateway.read_in) < 10
    await gateway.current.stop()


async def test_a_reading_that_fails_leaves_the_next_one(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of memory for example: it is logged, and the next change is read."""
    await gateway.current.start()
    gateway.goes_on.set()

    def fail(_: Path) -> str:
        if threading.current_thread() is threading.main_thread():
            return "version: 1"
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(configuration, "read_file", fail)
        gateway.put("10.0.0.2", padding=QUICK_JSON_BYTES)
        await until(lambda: "configuration could not be read" in caplog.messages)
    gateway.put("10.0.0.3", padding=QUICK_JSON_BYTES)
    await gateway.until("10.0.0.3")
    await gateway.current.stop()


async def test_a_file_system_that_hangs_stops_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks are taken beside the loop, and of files that are watched no more they are void."""
    path, other = tmp_path / "a", tmp_path / "b"
    changes: list[int] = []
    path.write_text("a")
    watcher = FileWatcher([path], lambda: changes.append(1), interval_s=0.005)
    hangs, goes_on, look = threading.Event(), threading.Event(), reload.look

    def slow(path: Path, before: Look | None = None) -> Look:
        hangs.set()
        assert goes_on.wait(WAIT_S)
        return look(path, before)

    monkeypatch.setattr(reload, "look", slow)
    watcher.start()
    await until(hangs.is_set)
    path.write_text("another")
    watcher.watch({other: look(other)})
    goes_on.set()
    await asyncio.sleep(0.1)
    assert changes == []
    other.write_text("b")
    await until(lambda: bool(changes))
    await watcher.stop()
