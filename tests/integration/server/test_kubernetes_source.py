"""The Kubernetes source against a fake of the API, for what is hard to provoke at a real one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from extproc.config.sections.kubernetes import KubernetesDiscovery
from extproc.discovery.fleet import Fleet
from extproc.discovery.kubernetes.access import Access
from extproc.discovery.kubernetes.view import View
from extproc.discovery.listed import Listed
from extproc.server.sources import kubernetes_api
from extproc.server.sources.kubernetes_api import KubernetesApi
from extproc.server.sources.kubernetes_source import KUBERNETES, KubernetesSource
from extproc.values.pool_policies import PoolPolicies
from metadata_center.tokens import MALFORMED
from testbed.fake_kubernetes import FakeKubernetes

PODS = "/api/v1/namespaces/models/pods"
POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/models/inferencepools"
OBJECTIVES = "/apis/llm-d.ai/v1alpha2/namespaces/models/inferenceobjectives"
OPTIONAL = [
    f"/apis/{group}/v1alpha2/namespaces/models/{plural}"
    for group in ("llm-d.ai", "inference.networking.x-k8s.io")
    for plural in ("inferenceobjectives", "inferencemodelrewrites")
]
DEADLINE_S = 10.0


def pod(number: int, app: str = "llama", **changes: Any) -> dict[str, Any]:
    """A pod that is ready."""
    return {
        "metadata": {
            "name": f"p{number}",
            "namespace": "models",
            "uid": f"u{number}",
            "labels": {"app": app},
        },
        "status": {
            "phase": "Running",
            "podIP": f"10.0.{number // 250}.{number % 250}",
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    } | changes


def pool(app: str = "llama") -> dict[str, Any]:
    """The pool."""
    return {
        "metadata": {"name": "llama", "namespace": "models"},
        "spec": {"selector": {"matchLabels": {"app": app}}, "targetPorts": [{"number": 8000}]},
    }


class Clock:
    """Seconds that pass when a test says so; whoever sleeps is woken then."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.sleepers = 0
        self._moved = asyncio.Event()

    def __call__(self) -> float:
        """Now."""
        return self.now_s

    def move(self, seconds: float) -> None:
        """Time passes."""
        self.now_s += seconds
        self._moved.set()
        self._moved = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        """Until so much time has passed."""
        until_s = self.now_s + seconds
        self.sleepers += 1
        try:
            while self.now_s < until_s:
                await self._moved.wait()
        finally:
            self.sleepers -= 1


async def quick(seconds: float) -> None:
    """Sleep, but not for as long: order matters here, time does not."""
    await asyncio.sleep(seconds / 100)


class Site:
    """A source, the fleet that it feeds, and the fake that it asks."""

    def __init__(self, api: FakeKubernetes, access: Access, clock: Callable[[], float], sleep: Any) -> None:
        self.api = api
        self.fleet = Fleet()
        self.heard: list[dict[str, list[str]]] = []
        self.policies: list[PoolPolicies] = []
        self._changed = asyncio.Event()
        settings = KubernetesDiscovery.model_validate({"pool": {"name": "llama"}})
        self.source = KubernetesSource(
            View(settings, "models"),
            KubernetesApi(access, clock),
            self._tell,
            self.policies.append,
            clock,
            random.Random(1),
            sleep,
        )

    def _tell(self, clusters: Mapping[str, Sequence[Listed] | None]) -> None:
        self.fleet.update(KUBERNETES, clusters)
        self.heard.append({name: [each.key for each in listed or ()] for name, listed in clusters.items()})
        self._changed.set()

    def hosts(self, *, ready: bool = True) -> list[str]:
        """Where the pool's endpoints are that may be chosen, or all."""
        return sorted(
            each.address.host for each in self.fleet.clusters.get("llama", ()) if each.ready >= ready
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what was told makes it true."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def running(
    api: FakeKubernetes,
    access: Access | None = None,
    clock: Callable[[], float] | None = None,
    sleep: Any = quick,
) -> AsyncIterator[Site]:
    """A source that runs."""
    clock = clock or asyncio.get_running_loop().time
    site = Site(api, access or Access(api.url), clock, sleep)
    try:
        await site.source.start()
        yield site
    finally:
        await site.source.stop()


@pytest.fixture
async def api() -> AsyncIterator[FakeKubernetes]:
    """A fake with a pool of three pods, and no optional kinds."""
    one = FakeKubernetes(page_most=2)
    await one.start()
    one.missing.update(dict.fromkeys(OPTIONAL, 404))
    one.put(POOLS, pool())
    for number in (1, 2, 3):
        one.put(PODS, pod(number))
    one.put(PODS, pod(9, "other"))
    try:
        yield one
    finally:
        await one.stop()


def asked_for(api: FakeKubernetes, path: str, *, watches: bool = False) -> list[dict[str, str]]:
    """Queries of what was asked of a path."""
    return [query for where, query in api.requests if where == path and ("watch" in query) is watches]


async def test_pages_then_a_watch_of_the_version_of_the_list(api: FakeKubernetes) -> None:
    """Rules 1 to 3 on the wire: limit, continue, ListMeta's version, bookmarks, a bounded watch."""
    async with running(api) as site:
        await asyncio.wait_for(site.source.first_state(), DEADLINE_S)
        assert site.hosts() == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
        assert len(site.heard) == 1, "told once, whole"
        await asyncio.wait_for(api.watched(2), DEADLINE_S)
        first, second = asked_for(api, PODS)
        assert (first["limit"], first["labelSelector"]) == ("500", "app=llama")
        assert "continue" not in first
        assert second["continue"]
        (watch,) = asked_for(api, PODS, watches=True)
        assert watch["resourceVersion"] == "1005"
        assert watch["allowWatchBookmarks"] == "true"
        assert 300 <= int(watch["timeoutSeconds"]) <= 600
        api.put(PODS, pod(4))
        await site.until(lambda: "10.0.0.4" in site.hosts())
        api.put(PODS, pod(4, "other"))
        await site.until(lambda: "10.0.0.4" not in site.hosts())
        api.delete(PODS, "p1")
        await site.until(lambda: site.hosts() == ["10.0.0.2", "10.0.0.3"])


async def test_a_watch_goes_on_from_its_last_word(api: FakeKubernetes) -> None:
    """Rule 5: cut off, it misses nothing and lists nothing; a bookmark moves it on as well."""
    async with running(api) as site:
        await asyncio.wait_for(api.watched(2), DEADLINE_S)
        lists = len(asked_for(api, PODS))
        api.put(POOLS, {**pool(), "metadata": {"name": "other"}})
        api.bookmark()
        api.cut()
        api.put(PODS, pod(5))
        await site.until(lambda: "10.0.0.5" in site.hosts())
        assert asked_for(api, PODS, watches=True)[-1]["resourceVersion"] == "1006"
        assert len(asked_for(api, PODS)) == lists


@pytest.mark.parametrize("form", ["status", "event"])
async def test_410_in_both_forms(api: FakeKubernetes, form: str) -> None:
    """Rule 4: what went meanwhile is gone, what stayed was never away."""
    async with running(api) as site:
        await asyncio.wait_for(api.watched(2), DEADLINE_S)
        told = len(site.heard)
        if form == "status":
            api.cut()
        api.delete(PODS, "p2")
        api.put(PODS, pod(7))
        api.compact()
        if form == "event":
            api.expire()
        await site.until(lambda: site.hosts() == ["10.0.0.1", "10.0.0.3", "10.0.0.7"])
        stayed = {site.heard[0]["llama"][0], site.heard[0]["llama"][2]}
        assert all(stayed <= set(each["llama"]) for each in site.heard[told:])


async def test_a_page_whose_token_expired(api: FakeKubernetes) -> None:
    """The list begins anew, and counts as a whole."""
    api.refuse[False].extend([(200, {})] * 0)
    original = api._list
    calls = 0

    def forgetting(path: str, query: dict[str, str]) -> Any:
        nonlocal calls
        if path == PODS:
            calls += 1
            if calls == 2:
                api.compact()
        return original(path, query)

    api._list = forgetting  # type: ignore[method-assign]
    async with running(api) as site:
        await site.until(lambda: len(site.hosts()) == 3)
        assert [bool(query.get("continue")) for query in asked_for(api, PODS)] == [False, True, False, True]


async def test_a_token_that_is_refused_is_read_again(api: FakeKubernetes, tmp_path: Path) -> None:
    """Rule 6: projected tokens are renewed in their file; and the old one is used until then."""
    file = tmp_path / "token"
    file.write_text("first\n")
    api.tokens = {"first"}
    async with running(api, Access(api.url, token_file=str(file))) as site:
        await asyncio.wait_for(api.watched(2), DEADLINE_S)
        api.tokens = {"second"}
        file.write_text("second\n")
        api.cut()
        api.put(PODS, pod(6))
        await site.until(lambda: "10.0.0.6" in site.hosts())


async def test_a_token_is_read_again_each_minute(api: FakeKubernetes, tmp_path: Path) -> None:
    """Before it expires, that is."""
    file, clock = tmp_path / "token", Clock()
    file.write_text("first")
    access = Access(api.url, token_file=str(file))
    client = KubernetesApi(access, clock)
    assert client._headers() == {"Authorization": "Bearer first"}
    file.write_text("second")
    clock.move(kubernetes_api.TOKEN_S - 1)
    assert client._headers() == {"Authorization": "Bearer first"}
    clock.move(1)
    assert client._headers() == {"Authorization": "Bearer second"}


def causes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why the API does not answer, by collection."""
    return [vars(record)["cause"] for record in caplog.records if "cause" in vars(record)]


async def test_credentials_that_are_gone_are_a_failure_like_any_other(
    api: FakeKubernetes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The source waits for them, and the log says once which file is wrong, and never what is in it."""
    file = tmp_path / "token"
    async with running(api, Access(api.url, token_file=str(file))) as site:
        for wrong in (f"{file}: No such file or directory", f"{file}: {MALFORMED}"):
            async with asyncio.timeout(DEADLINE_S):
                while f"credentials cannot be read: {wrong}" not in causes(caplog):  # noqa: ASYNC110 - a log
                    await asyncio.sleep(0.01)
            file.write_text("s3cret\ns3cret\n")
        assert not [record for record in caplog.records if record.exc_info]
        assert api.requests == []
        file.write_text("\ufefft\n")
        await site.until(lambda: len(site.hosts()) == 3)


async def test_optional_kinds_may_be_missing_and_come_later(api: FakeKubernetes) -> None:
    """Rule 7: 404 and 403 hold nothing up; once they are there they count."""
    api.missing[OBJECTIVES] = 403
    async with running(api) as site:
        await asyncio.wait_for(site.source.first_state(), DEADLINE_S)
        await asyncio.wait_for(api.watched(2), DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S):
            while not site.source.status().is_connected:  # noqa: ASYNC110 - until it has heard that it may watch
                await asyncio.sleep(0.01)
        del api.missing[OBJECTIVES]
        api.put(
            OBJECTIVES,
            {"metadata": {"name": "urgent"}, "spec": {"poolRef": {"name": "llama"}, "priority": 4}},
        )
        await asyncio.wait_for(api.watched(3), DEADLINE_S)
        assert site.policies[-1].priorities == {"urgent": 4}


async def test_a_pool_kind_that_is_not_installed_is_waited_for(api: FakeKubernetes) -> None:
    """It does not crash, and nothing is told until it is known."""
    api.missing[POOLS] = 404
    async with running(api) as site:
        await asyncio.wait_for(api.asked(8), DEADLINE_S)
        assert site.heard == []
        assert not site.source.status().is_connected
        del api.missing[POOLS]
        await site.until(lambda: len(site.hosts()) == 3)


async def test_the_server_is_away_for_a_minute(api: FakeKubernetes) -> None:
    """Rule 8: nothing is told and all stays; the age grows; afterwards only what changed is told."""
    clock = Clock()
    async with running(api, clock=clock, sleep=clock.sleep) as site:
        await asyncio.wait_for(api.watched(2), DEADLINE_S)
        before, told = site.hosts(), len(site.heard)
        assert site.source.status().age_s == 0.0
        await api.stop()
        for _ in range(60):
            clock.move(1.0)
            await asyncio.sleep(0.01)
        status = site.source.status()
        assert not status.is_connected
        assert 55.0 <= status.age_s <= 61.0
        assert site.hosts() == before
        assert len(site.heard) == told
        api.put(PODS, pod(8))
        await api.start()
        async with asyncio.timeout(DEADLINE_S):
            while api.num_watches < 2:
                clock.move(1.0)
                await asyncio.sleep(0.01)
        await site.until(lambda: "10.0.0.8" in site.hosts())
        assert site.source.status().age_s == 0.0
        kept = set(site.heard[0]["llama"])
        assert all(kept <= set(each["llama"]) for each in site.heard), "no flap"


async def test_an_answer_beyond_its_bound_is_asked_for_in_smaller_pages(
    api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects may be large; all of them are read all the same."""
    monkeypatch.setattr(kubernetes_api, "MAX_PAGE_BYTES", 6000)
    api._page_most = 500
    for number in range(20, 60):
        api.put(PODS, pod(number))
    async with running(api) as site:
        await site.until(lambda: len(site.hosts()) == 43)
        limits = [int(query["limit"]) for query in asked_for(api, PODS)]
        assert limits[0] == 500
        assert limits[-1] < 40


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"type":"ADDED","object":{}}', b"x" * 70_000])
async def test_a_watch_that_tells_nonsense_is_listed_anew(
    api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    """An event that nobody understands, or that never ends, loses none of the others."""
    monkeypatch.setattr(kubernetes_api, "MAX_LINE_BYTES", 65_536)
    async with running(api) as site:
        await asyncio.wait_for(api.watched(2), DEADLINE_S)
        api.send(line)
        api.put(PODS, pod(5))
        await site.until(lambda: "10.0.0.5" in site.hosts())
        api.delete(PODS, "p5")
        await site.until(lambda: "10.0.0.5" not in site.hosts())


async def test_objects_of_no_sense_are_left_out(api: FakeKubernetes) -> None:
    """Names and labels that nobody may have, pods without anything."""
    oddities: list[dict[str, Any]] = [
        {"metadata": {"name": "\x1b[2J"}},
        {"metadata": {"name": "x" * 5000, "uid": "u"}},
        {"metadata": {"name": "q"}, "status": []},
        pod(77, status={"phase": "Running", "podIP": "not an address", "conditions": 7}),
    ]
    for number, odd in enumerate(oddities):
        odd["metadata"]["labels"] = {"app": "llama", "n": str(number)}
        api.put(PODS, odd)
    async with running(api) as site:
        await asyncio.wait_for(site.source.first_state(), DEADLINE_S)
        assert site.hosts() == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
        api.put(PODS, pod(5))
        await site.until(lambda: "10.0.0.5" in site.hosts())


async def test_a_server_that_is_overloaded_is_given_the_time_it_asks_for(api: FakeKubernetes) -> None:
    """429 with `Retry-After`; then all goes on."""
    api.refuse[False].append((429, {"Retry-After": "30"}))
    clock = Clock()
    async with running(api, clock=clock, sleep=clock.sleep) as site:
        async with asyncio.timeout(DEADLINE_S):
            while clock.sleepers < 5:  # noqa: ASYNC110 - the pool and four optional kinds
                await asyncio.sleep(0.01)
        clock.move(29.0)
        await asyncio.sleep(0.05)
        assert len(asked_for(api, POOLS)) + len(asked_for(api, PODS)) <= 1
        clock.move(40.0)
        await site.until(lambda: len(site.hosts()) == 3)


async def test_thousands_of_pods(api: FakeKubernetes) -> None:
    """A list of many pages, and a change of each pod."""
    api._page_most = 500
    for number in range(10, 2010):
        api.put(PODS, pod(number))
    async with running(api) as site:
        await site.until(lambda: len(site.fleet.clusters.get("llama", ())) == 2003)
        assert len(asked_for(api, PODS)) == 5
        await asyncio.wait_for(api.watched(2), DEADLINE_S)
        for number in range(10, 2010):
            api.put(PODS, pod(number, status={"phase": "Failed"}))
        async with asyncio.timeout(60):
            await site.until(lambda: len(site.fleet.clusters["llama"]) == 3)
