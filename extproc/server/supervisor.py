"""Several workers as one gateway: started, restarted when they die, and spoken for on the admin port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
from aiohttp import web
from yarl import URL

from extproc.config.loading import load_all
from extproc.observing.metrics.merge import merge
from extproc.server.admin import (
    METRICS_TYPE,
    application,
    json_response,
    last_asked_for,
    refuse_last,
)
from extproc.server.modules import python_module
from extproc.server.run_dir import lock, prepare, run_dir
from extproc.server.worker import COUNTERS_FILE, admin_path
from metadata_center import shared_counters

_log = logging.getLogger("tokenway.supervisor")

RESTART_DELAY_S = 0.2
"""Between a worker's death and its successor; doubles up to `MAX_RESTART_DELAY_S` while it keeps dying."""

MAX_RESTART_DELAY_S = 10.0

STEADY_S = 30.0
"""A worker that lived this long starts over with `RESTART_DELAY_S`."""

_ASK_TIMEOUT = aiohttp.ClientTimeout(total=2.0)


@contextlib.contextmanager
def _hangup_held_back() -> Iterator[None]:
    """A process started in the block hears of SIGHUP once it unblocks it: the signal kills who is not ready.

    The mask is inherited. Ours is restored, and what was held back comes then. One block at a time.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Supervisor:
    """Owns the worker processes.

    Args:
        path: The configuration, read by each worker itself.

    Raises:
        ConfigError: The configuration cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._config, _ = load_all(path)
        self._run_dir = run_dir(self._config.server)
        self._lock = contextlib.ExitStack()
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._runner: web.AppRunner | None = None
        self._stopping = False
        self._spawning = asyncio.Lock()

    async def start(self) -> None:
        """Start all workers and the admin port.

        Raises:
            ConfigError: The run directory cannot be used.
            OSError: The admin port cannot be opened.
        """
        workers = self._config.server.workers
        prepare(self._run_dir)
        self._lock.enter_context(lock(self._run_dir))
        shared_counters.create(self._run_dir / COUNTERS_FILE, workers)
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(workers)]
        admin = self._config.server.admin
        app = application(self, admin.address)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, admin.address, admin.port).start()

    async def stop(self) -> None:
        """Drain all workers together, then leave."""
        self._stopping = True
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*self._keepers)
        if self._runner is not None:
            await self._runner.cleanup()
        self._lock.close()

    def reload(self) -> None:
        """Have all workers read the configuration and look host names up now."""
        for process in self._processes.values():
            if process.returncode is None:
                process.send_signal(signal.SIGHUP)

    async def _keep(self, index: int) -> None:
        delay_s = RESTART_DELAY_S
        loop = asyncio.get_running_loop()
        while not self._stopping:
            started_s = loop.time()
            async with self._spawning:
                with _hangup_held_back():
                    process = await asyncio.create_subprocess_exec(
                        *python_module("tokenway.cli.main", "worker", str(self._path), str(index))
                    )
            self._processes[index] = process
            status = await process.wait()
            if self._stopping:
                return
            delay_s = (
                RESTART_DELAY_S
                if loop.time() - started_s > STEADY_S
                else min(2 * delay_s, MAX_RESTART_DELAY_S)
            )
            _log.error("worker died", extra={"worker": index, "status": status, "restart_in_s": delay_s})
            await asyncio.sleep(delay_s)

    async def _ask(self, target: str) -> dict[int, tuple[int, bytes]]:
        """Status and body of every worker that answers."""

        async def one(index: int) -> tuple[int, bytes] | None:
            connector = aiohttp.UnixConnector(str(admin_path(self._run_dir, index)))
            try:
                async with (
                    aiohttp.ClientSession(connector=connector, timeout=_ASK_TIMEOUT) as session,
                    session.get(URL(f"http://worker{target}", encoded=True)) as response,
                ):
                    return response.status, await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError):
                return None

        indices = range(self._config.server.workers)
        answers = await asyncio.gather(*(one(index) for index in indices))
        return {index: answer for index, answer in zip(indices, answers, strict=True) if answer is not None}

    async def metrics(self, _: web.Request) -> web.Response:
        """The Prometheus exposition."""
        answers = await self._ask("/metrics")
        text = merge({index: body.decode() for index, (_, body) in answers.items()})
        return web.Response(body=text.encode(), headers={"content-type": METRICS_TYPE})

    async def healthz(self, _: web.Request) -> web.Response:
        """Alive, or there would be no answer."""
        return json_response({"status": "alive"})

    async def readyz(self, _: web.Request) -> web.Response:
        """200 while new requests are taken, else 503."""
        answers = await self._ask("/readyz")
        ready = sum(status == 200 for status, _ in answers.values())
        return json_response(
            {"status": "ready" if ready else "not ready", "workers_ready": ready}, 200 if ready else 503
        )

    async def endpoints(self, _: web.Request) -> web.Response:
        """What `tokenway top` shows."""
        answers = await self._ask("/endpoints")
        bodies = [orjson.loads(body) for status, body in answers.values() if status == 200]
        if not bodies:
            return json_response({"error": "no worker answers"}, 503)
        merged: dict[str, Any] = bodies[0]  # load is shared: each worker sees all of it
        merged["in_flight"] = sum(body["in_flight"] for body in bodies)
        merged["held"] = sum(body["held"] for body in bodies)
        merged["workers"] = len(bodies)
        for i, row in enumerate(merged["endpoints"]):
            for total in ("served_total", "failures_total"):
                row[total] = sum(
                    body["endpoints"][i][total]
                    for body in bodies
                    if i < len(body["endpoints"]) and body["endpoints"][i]["key"] == row["key"]
                )
        return json_response(merged)

    async def last(self, request: web.Request) -> web.Response:
        """The most recent decision records, newest first."""
        count = last_asked_for(request)
        if count is None:
            return refuse_last()
        answers = await self._ask(f"/explain?last={count}")
        bodies = [orjson.loads(body) for status, body in answers.values() if status == 200]
        if not bodies:
            return json_response({"error": "no worker answers"}, 503)
        records = [record for body in bodies for record in body["records"]]
        records.sort(key=lambda record: record["time_unix_s"], reverse=True)
        return json_response({"records": records[:count]})

    async def explain(self, request: web.Request) -> web.Response:
        """One decision record, or 404."""
        answers = await self._ask(f"/explain/{quote(request.match_info['request_id'], safe='')}")
        for status, body in answers.values():
            if status == 200:
                return web.Response(body=body, content_type="application/json")
        return json_response({"error": "no such request is held"}, 404)
