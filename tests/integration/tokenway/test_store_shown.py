"""`tokenway top` of a real gateway says what is wrong with the store, a real redis-server, and since when."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import pytest

from extproc.server.building import build_worker
from testbed.redis_server import RedisServer, running
from tests.contract.stores import DEADLINE_S
from tests.waiting import until
from tokenway.cli.top import top

Begin = Callable[[RedisServer], object]


def _say(*words: str) -> Begin:
    """A command that the server takes."""

    def say(server: RedisServer) -> None:
        assert not server.command(*words).startswith(b"-")

    return say


def _new_password(server: RedisServer) -> None:
    """All are cut off, and a new one is asked of them."""
    _restart(server)
    server.command("CONFIG", "SET", "requirepass", "s3cret")


def _restart(server: RedisServer) -> None:
    server.kill()
    server.start()


FAULTS: Final[dict[str, tuple[Begin, Begin, str]]] = {
    "killed": (RedisServer.kill, RedisServer.start, r"lost \d+ s ago: .*nobody listens there"),
    "hangs": (RedisServer.pause, RedisServer.resume, r"lost \d+ s ago: no answer within .*timeout_s"),
    "replica": (
        _say("REPLICAOF", "127.0.0.1", "1"),
        _say("REPLICAOF", "NO", "ONE"),
        r"takes nothing for \d+ s: .*\(the server is a replica: metadata_center.url is for the master",
    ),
    "full": (
        _say("CONFIG", "SET", "maxmemory", "1000"),
        _say("CONFIG", "SET", "maxmemory", "0"),
        r"takes nothing for \d+ s: .*raise maxmemory",
    ),
    "password": (
        _new_password,
        _restart,
        r"lost \d+ s ago: .*metadata_center.password_env",
    ),
}
"""How it begins and ends, and the line."""


@contextmanager
def configured(folder: Path, url: str | None) -> Iterator[Path]:
    """A configuration of one engine, which is away."""
    clusters = {"clusters": [{"name": "c", "endpoints": [{"address": "127.0.0.1", "port": 1}]}]}
    (folder / "clusters.json").write_text(json.dumps(clusters))
    store = {} if url is None else {"metadata_center": {"url": url, "timeout_s": 0.3, "lease_s": 3.0}}
    server = {"run_dir": str(folder / "run"), "admin": {"port": 0}}
    models = {"m": {"rules": [{"cluster": "c"}]}}
    path = folder / "tokenway.yaml"
    path.write_text(json.dumps({"version": 1, "server": server, "models": models, **store}))
    yield path


class Shown:
    """What `tokenway top` shows.

    Args:
        url: Of the admin port.
        capsys: Catches it.
    """

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._url = url
        self._capsys = capsys

    async def lines(self) -> list[str]:
        """Those about the store."""
        self._capsys.readouterr()
        assert await asyncio.to_thread(top, self._url, once=True, interval_s=1.0) == 0
        return [line for line in self._capsys.readouterr().out.splitlines() if line.startswith("store")]

    async def until(self, pattern: str | None) -> str:
        """Wait until there is one line, and this matches all of it; or none where there is no pattern."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                lines = await self.lines()
                if pattern is None and not lines:
                    return ""
                if pattern is not None and len(lines) == 1 and re.fullmatch(f"store   {pattern}.*", lines[0]):
                    return lines[0]
                await asyncio.sleep(0.05)


@asynccontextmanager
async def gateway(folder: Path, url: str | None, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Shown]:
    """One that serves, by its `top`."""
    with configured(folder, url) as path:
        worker = build_worker(path)
        await worker.start()
        try:
            yield Shown(f"http://127.0.0.1:{worker.admin_port}", capsys)
        finally:
            await worker.stop()


@pytest.mark.parametrize("fault", FAULTS)
async def test_top_says_what_is_wrong_with_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """One line while it lasts, none before and after, and no password."""
    begin, end, line = FAULTS[fault]
    with running(tmp_path / "redis") as server:
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        async with gateway(tmp_path, server.url, capsys) as shown:
            await until(lambda: server.command("DBSIZE") == b":2\r\n")
            assert await shown.lines() == []
            await asyncio.to_thread(begin, server)
            said = await shown.until(line)
            assert "s3cret" not in said
            await shown.until(line.replace(r"\d+", r"[1-9]\d*"))
            await asyncio.to_thread(end, server)
            await shown.until(None)


async def test_a_store_that_was_flushed_is_shown_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it is whole again."""
    with running(tmp_path / "redis") as server:
        async with gateway(tmp_path, server.url, capsys) as shown:
            await shown.until(None)
            await until(lambda: server.command("DBSIZE") == b":2\r\n")
            server.command("FLUSHALL")
            await shown.until(r"emptied \d+ s ago: flushed, evicted by maxmemory-policy")
            assert server.command("DBSIZE") == b":2\r\n"


async def test_a_store_that_was_never_there_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where there is none to be had there is no line."""
    with running(tmp_path / "redis") as server:
        server.kill()
        async with gateway(tmp_path, server.url, capsys) as shown:
            await shown.until(r"not joined for \d+ s: .*nobody listens there")
    async with gateway(tmp_path, None, capsys) as shown:
        assert await shown.lines() == []
