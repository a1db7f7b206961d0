"""Several workers as one gateway: started, restarted when they die, and spoken for on the admin port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

from extproc.admin.table import PAGES
from extproc.config.loading import load_all
from extproc.server.admin_answers import AllWorkers
from extproc.server.admin_port import AdminPort, TcpPlace
from extproc.server.modules import python_module
from extproc.server.run_dir import lock, prepare, run_dir
from extproc.server.worker import COUNTERS_FILE, admin_path
from metadata_center.load import shared_counters

_log = logging.getLogger("tokenway.supervisor")

RESTART_DELAY_S = 0.2
"""Between a worker's death and its successor; doubles up to `MAX_RESTART_DELAY_S` while it keeps dying."""

MAX_RESTART_DELAY_S = 10.0

STEADY_S = 30.0
"""A worker that lived this long starts over with `RESTART_DELAY_S`."""


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
        sockets = [admin_path(self._run_dir, index) for index in range(self._config.server.workers)]
        admin = self._config.server.admin
        self._admin = AdminPort(PAGES, AllWorkers(sockets), TcpPlace(admin.address, admin.port))
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
        await self._admin.start()

    async def stop(self) -> None:
        """Drain all workers together, then leave."""
        self._stopping = True
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*self._keepers)
        await self._admin.stop()
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
