"""The admin port over real HTTP: who is heard, and what is asked wrongly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest

from extproc.observing.records import RecordRing
from extproc.routing.state import State
from extproc.server.admin import Admin

pytestmark = pytest.mark.asyncio

PATHS = ("/metrics", "/healthz", "/readyz", "/endpoints", "/explain", "/explain/x", "/nothing")


class Books:
    """All that `/explain` reads of a worker's books."""

    records = RecordRing(10)


@pytest.fixture
async def admin() -> AsyncIterator[Admin]:
    """An admin port on loopback over empty books."""
    admin = Admin(cast("State", Books()), lambda: b"", dict, lambda: True)
    await admin.start_tcp("127.0.0.1", 0)
    yield admin
    await admin.stop()


async def status(admin: Admin, target: str, **headers: str) -> int:
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
async def test_number_of_records_is_a_number_or_refused(admin: Admin, last: str, expected: int) -> None:
    """What other scripts call a digit is none, and no number is too long to be refused."""
    assert await status(admin, f"/explain?last={last}") == expected


@pytest.mark.parametrize("path", PATHS)
async def test_web_pages_are_not_answered_whatever_they_ask(admin: Admin, path: str) -> None:
    """Neither by a name that was made to lead here, nor across sites."""
    assert await status(admin, path, host="evil.example") == 403
    assert await status(admin, path, origin="null") == 403
    assert await status(admin, path, **{"sec-fetch-site": "cross-site"}) == 403
    assert await status(admin, path) in (200, 404)


async def test_http_1_0_without_a_host_is_answered(admin: Admin) -> None:
    """As some health checks speak."""
    reader, writer = await asyncio.open_connection("127.0.0.1", admin.port)
    writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert (await reader.readline()).split()[1] == b"200"
    writer.close()


async def test_unix_socket_is_the_supervisors_alone(tmp_path: Path) -> None:
    """It needs no guard but its mode, which is closed from the beginning."""
    admin = Admin(cast("State", Books()), lambda: b"", dict, lambda: True)
    path = tmp_path / "admin0.sock"
    path.write_text("left by a worker that was killed")
    await admin.start_unix(path)
    assert path.stat().st_mode & 0o077 == 0
    connector: Any = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://worker/healthz") as reply,
    ):
        assert reply.status == 200
    await admin.stop()
