"""Several workers as one gateway: started, restarted when they die, and spoken for on the admin port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from extproc.admin.table import PAGES
from extproc.config.loading import NO_SETTINGS, Settings, load_all
from extproc.server.listening.admin_answers import AllWorkers
from extproc.server.listening.admin_port import AdminPort, TcpPlace
from extproc.server.listening.metrics_ports import metrics_ports
from extproc.server.listening.rpc_server import check_free
from extproc.server.listening.run_dir import Residence, admin_path, counters_path, home_of, prepare
from extproc.server.listening.socket_watch import Kept, SocketWatch
from extproc.server.parts import Part, Parts
from extproc.server.process.modules import python_module
from metadata_center import signals
from metadata_center.load import shared_counters

_log = logging.getLogger("tokenway.supervisor")

RESTART_DELAY_S = 0.2
"""Between a worker's death and its successor; doubles up to `MAX_RESTART_DELAY_S` while it keeps dying."""

MAX_RESTART_DELAY_S = 10.0

STEADY_S = 30.0
"""A worker that lived this long starts over with `RESTART_DELAY_S`."""


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process started in the block gets these signals once it unblocks them: before, one would kill it.

    The mask is inherited. Ours is restored, and what was held back comes then. One block at a time.
    """
    before = signals.hold_back()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Supervisor:
    """Owns the worker processes.

    Args:
        path: The configuration, read by each worker itself.
        settings: What goes before what it says.

    Raises:
        ConfigError: The configuration cannot be used.
    """

    def __init__(self, path: Path, settings: Settings = NO_SETTINGS) -> None:
        self._path = path
        self._settings = json.dumps(dict(settings))
        config, _ = load_all(path, settings)
        folder, workers = home_of(config, path), config.server.workers
        self._workers = range(workers)
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._spawning = asyncio.Lock()
        self._counters = contextlib.ExitStack()
        self._counters_fd = -1
        residence = Residence(folder, is_alone=True)
        watch = SocketWatch(partial(prepare, folder), lambda: not self._stopping.is_set())
        watch.keep([Kept(residence.lock_path, residence.renew)])
        sockets = [admin_path(folder, index) for index in self._workers]
        place = TcpPlace(config.server.admin.address, config.server.admin.port)
        answering = AllWorkers(sockets)
        admin = AdminPort(PAGES, answering, place)
        picker = config.endpoint_picker
        listened = config.server.listen
        if picker is not None:
            listened = (*listened, *picker.listen, *picker.health_listen)
        self._parts = Parts(
            [
                Part("residence", residence.start, residence.stop),
                Part("counters", lambda: self._make_counters(counters_path(folder)), self._counters.close),
                Part("addresses", lambda: check_free(listened)),
                Part("admin", admin.start, admin.stop),  # it shows workers that drain
                *metrics_ports(config, answering),
                Part("workers", self._start_workers, self._stop_workers),
                Part("lock", watch.start, watch.stop),
            ]
        )

    async def start(self) -> None:
        """Start the admin port and all workers.

        Raises:
            ConfigError: The run directory cannot be used.
            OSError: The admin port cannot be opened.
            StoppedWhileStarting: `stop` came meanwhile, or before.
        """
        await self._parts.start()

    async def stop(self) -> None:
        """Drain all workers together, then leave. Idempotent."""
        await self._parts.stop()

    def reload(self) -> None:
        """Have all workers read the configuration and look host names up now."""
        for process in self._processes.values():
            if process.returncode is None:
                process.send_signal(signal.SIGHUP)

    def _make_counters(self, path: Path) -> None:
        """Workers get them by a descriptor: one that is restarted finds them whatever became of the file."""
        shared_counters.create(path, len(self._workers))
        self._counters_fd = self._counters.enter_context(shared_counters.open_file(path))

    def _start_workers(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(index)) for index in self._workers]

    async def _stop_workers(self) -> None:
        self._stopping.set()
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*self._keepers)

    async def _keep(self, index: int) -> None:
        delay_s = RESTART_DELAY_S
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            started_s = loop.time()
            async with self._spawning:
                with _signals_held_back():
                    counters = str(self._counters_fd)
                    words = ("worker", str(self._path), str(index), self._settings, counters)
                    process = await asyncio.create_subprocess_exec(
                        *python_module("tokenway.cli.main", *words), pass_fds=(self._counters_fd,)
                    )
            self._processes[index] = process
            if self._stopping.is_set():  # it came while the process was made
                process.terminate()
            status = await process.wait()
            if self._stopping.is_set():
                return
            delay_s = (
                RESTART_DELAY_S
                if loop.time() - started_s > STEADY_S
                else min(2 * delay_s, MAX_RESTART_DELAY_S)
            )
            _log.error("worker died", extra={"worker": index, "status": status, "restart_in_s": delay_s})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()
