"""The admin port over real HTTP: which callers are answered, and what is asked wrongly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from extproc.admin.page import PageRequest, PageResponse, ProcessPage, json_answer
from extproc.admin.pages.endpoints import ENDPOINTS
from extproc.admin.pages.explain import LAST
from extproc.admin.table import PAGES
from extproc.observing.records import RecordRing
from extproc.server.listening.admin_answers import AllWorkers, OneWorker
from extproc.server.listening.admin_port import AdminPort, TcpPlace

pytestmark = pytest.mark.asyncio

PATHS = ("/metrics", "/healthz", "/readyz", "/endpoints", "/explain", "/explain/x", "/nothing")


class RoutingState:
    """What a worker that has decided nothing shows."""

    def __init__(self, *, ready: bool = True, in_flight: int = 0) -> None:
        self.records = RecordRing(10)
        self.ready = ready
        self.in_flight = in_flight

    def is_ready(self) -> bool:
        """As it was made."""
        return self.ready

    def metrics_pieces(self) -> Iterator[bytes]:
        """One sample."""
        yield b"# HELP in_flight Requests.\n"
        yield b"# TYPE in_flight gauge\nin_flight 1.0\n"

    def endpoints_json(self) -> dict[str, Any]:
        """No endpoints."""
        age_s = float(self.in_flight)
        return {
            "endpoints": [],
            "sources": {"istio": {"connected": age_s < 3, "age_s": age_s}},
            "store": None,
            "in_flight": self.in_flight,
            "held": 0,
            "workers": 1,
            "uptime_s": 1.0,
        }


@pytest.fixture
async def admin() -> AsyncIterator[AdminPort]:
    """An admin port on loopback over an empty state."""
    admin = AdminPort(PAGES, OneWorker(RoutingState()), TcpPlace("127.0.0.1", 0))
    await admin.start()
    yield admin
    await admin.stop()


async def status(admin: AdminPort, target: str, **headers: str) -> int:
    """Of one GET."""
    url = f"http://127.0.0.1:{admin.port}{target}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as reply:
        return reply.status


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        *(
            ("1", 200),
            ("500", 200),
            ("", 400),
            ("0", 400),
            ("501", 400),
            ("-1", 400),
            ("+1", 400),
            ("1.0", 400),
        ),
        *(("²", 400), ("١", 400), ("１", 400), ("9" * 5000, 400), ("1%00", 400), ("1_0", 400), (" 1", 400)),
    ],
)
async def test_number_of_records_is_a_number_or_refused(admin: AdminPort, last: str, expected: int) -> None:
    """What other scripts call a digit is none, and no number is too long to be refused."""
    assert await status(admin, f"/explain?last={last}") == expected


@pytest.mark.parametrize("path", PATHS)
async def test_web_pages_are_not_answered_whatever_they_ask(admin: AdminPort, path: str) -> None:
    """Neither by a name that was made to lead here, nor across sites."""
    assert await status(admin, path, host="evil.example") == 403
    assert await status(admin, path, origin="null") == 403
    assert await status(admin, path, **{"sec-fetch-site": "cross-site"}) == 403
    assert await status(admin, path) in (200, 404)


async def test_http_1_0_without_a_host_is_answered(admin: AdminPort) -> None:
    """As some health checks speak."""
    reader, writer = await asyncio.open_connection("127.0.0.1", admin.port)
    writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert (await reader.readline()).split()[1] == b"200"
    writer.close()


async def test_a_long_page_comes_whole_though_it_is_sent_in_pieces() -> None:
    """With its length, which HEAD says as well; requests go on between the pieces."""
    pieces = [b"# %04d\n" % number * 1000 for number in range(200)]

    class Long(RoutingState):
        def metrics_pieces(self) -> Iterator[bytes]:
            return iter(pieces)

    admin = AdminPort(PAGES, OneWorker(Long()), TcpPlace("127.0.0.1", 0))
    await admin.start()
    url = f"http://127.0.0.1:{admin.port}/metrics"
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as reply:
            assert await reply.read() == b"".join(pieces)
            assert reply.headers["content-length"] == str(sum(map(len, pieces)))
        async with session.head(url) as reply:
            assert reply.headers["content-length"] == str(sum(map(len, pieces)))
    await admin.stop()


async def test_unix_socket_is_the_supervisors_alone(tmp_path: Path) -> None:
    """It needs no guard but its mode, which is closed from the beginning."""
    path = tmp_path / "admin0.sock"
    path.write_text("left by a worker that was killed")
    admin = AdminPort(PAGES, OneWorker(RoutingState()), path)
    await admin.start()
    assert path.stat().st_mode & 0o077 == 0
    connector: Any = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://worker/healthz") as reply,
    ):
        assert reply.status == 200
    await admin.stop()


async def body(admin: AdminPort, target: str) -> tuple[int, Any]:
    """Status and body of one GET: JSON, or text."""
    url = f"http://127.0.0.1:{admin.port}{target}"
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        is_json = reply.headers["content-type"] == "application/json"
        return reply.status, await reply.json() if is_json else await reply.text()


async def test_a_supervisor_answers_out_of_all_workers(tmp_path: Path) -> None:
    """By the same table as a worker: one without an answer is left out, and all of them gone is said."""
    sockets = [tmp_path / f"admin{i}.sock" for i in range(3)]
    workers = [
        AdminPort(PAGES, OneWorker(RoutingState(ready=i == 0, in_flight=2 + i)), sockets[i]) for i in range(2)
    ]
    supervisor = AdminPort(PAGES, AllWorkers(sockets), TcpPlace("127.0.0.1", 0))
    for port in (*workers, supervisor):
        await port.start()
    assert await body(supervisor, "/readyz") == (200, {"status": "ready", "workers_ready": 1})
    code, endpoints = await body(supervisor, "/endpoints")
    assert (code, endpoints["in_flight"], endpoints["workers"]) == (200, 5, 2)
    assert endpoints["sources"] == {"istio": {"connected": False, "age_s": 3.0}}, "as the worst of them"
    assert await body(supervisor, "/explain?last=3") == (200, {"records": []})
    assert (await body(supervisor, "/explain?last=x"))[0] == 400
    assert (await body(supervisor, "/explain/a%2Fb"))[0] == 404
    code, text = await body(supervisor, "/metrics")
    assert code == 200
    assert text.count("in_flight{worker=") == 2
    for port in workers:
        await port.stop()
    assert await body(supervisor, "/healthz") == (200, {"status": "alive"})
    assert await body(supervisor, "/readyz") == (503, {"status": "not ready", "workers_ready": 0})
    assert (await body(supervisor, "/endpoints"))[0] == 503
    await supervisor.stop()


async def test_pages_are_found_by_path_and_method_alone() -> None:
    """No two rows of the table are for the same requests, and each that asks workers can merge them."""
    assert len({(page.method, page.path) for page in PAGES}) == len(PAGES)
    assert [page.path for page in PAGES if isinstance(page, ProcessPage)] == ["/healthz"]


async def test_the_newest_decisions_of_all_workers_though_the_clock_was_set_back() -> None:
    """Each worker's come newest first; an hour that comes twice does not put old ones before them."""
    hour_s, now_s = 3_600.0, 50_000.0
    answers = {
        0: json_answer(
            {"records": [{"time_unix_s": now_s + at_s} for at_s in (4.0, 2.0, hour_s, hour_s - 1)]}
        ),
        1: json_answer({"records": [{"time_unix_s": now_s + at_s} for at_s in (3.0, 1.0)]}),
    }
    request = PageRequest({}, {"last": "4"}, "/explain?last=4")
    records = orjson.loads(LAST.merge(request, answers).body)["records"]
    assert [record["time_unix_s"] - now_s for record in records] == [4.0, 3.0, 2.0, hour_s]


async def test_totals_of_all_workers_whatever_order_each_has_its_clusters_in() -> None:
    """A worker that started later heard of them in another one; an endpoint of two clusters counts once."""

    def page(served: dict[str, int], *keys: str) -> PageResponse:
        rows = [{"key": key, "served_total": served[key], "failures_total": 1} for key in keys]
        return json_answer({"endpoints": rows, "sources": {}, "store": None, "in_flight": 0, "held": 0})

    answers = {
        0: page({"a:1": 10, "b:1": 20}, "a:1", "b:1", "a:1"),
        1: page({"a:1": 3, "b:1": 4}, "b:1", "a:1", "a:1"),
        2: page({"a:1": 5}, "a:1"),
    }
    request = PageRequest({}, {}, "/endpoints")
    rows = orjson.loads(ENDPOINTS.merge(request, answers).body)["endpoints"]
    assert [(row["key"], row["served_total"], row["failures_total"]) for row in rows] == [
        ("a:1", 18, 3),
        ("b:1", 24, 2),
        ("a:1", 18, 3),
    ]


@pytest.mark.parametrize(
    ("of_workers", "merged"),
    [
        ([None, None], None),
        ([("joined", None, 0.0)] * 2, ("joined", None, 0.0, 0)),
        ([("joined", None, 0.0), ("lost", "a", 1.0), ("lost", "b", 2.0)], ("lost", "b", 2.0, 2)),
    ],
)
async def test_the_store_is_lost_to_the_worker_that_lost_it_first(
    of_workers: list[tuple[str, str | None, float] | None], merged: tuple[str, str | None, float, int] | None
) -> None:
    """And it is said at how many workers something is wrong."""
    names = ("state", "reason", "for_s", "workers")
    body = {"endpoints": [], "sources": {}, "in_flight": 0, "held": 0}
    answers = {
        worker: json_answer({**body, "store": store and dict(zip(names, store, strict=False))})
        for worker, store in enumerate(of_workers)
    }
    found = orjson.loads(ENDPOINTS.merge(PageRequest({}, {}, "/endpoints"), answers).body)["store"]
    assert found == (merged and dict(zip(names, merged, strict=True)))
