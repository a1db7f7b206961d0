"""`tokenway serve`: the gateway, one process or several."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from extproc.config.loading import NO_SETTINGS, Settings, load_all
from extproc.listeners import Listeners
from extproc.observing.log_writer import lines_lost, log_handler
from extproc.observing.noise import AcceptFaults, is_news
from extproc.observing.request_log import JsonFormatter
from extproc.server.envoys.cluster_encoder import ClusterEncoder
from extproc.server.parts import StoppedWhileStarting
from extproc.server.process.loop_turns import watched_loop
from extproc.server.process.trimming import trim
from extproc.server.supervisor import Supervisor
from extproc.server.worker import Worker
from metadata_center import signals
from metadata_center.load.shared_counters import path_of

if TYPE_CHECKING:
    from extproc.server.building import Stalls

_log = logging.getLogger("tokenway")

GC_THRESHOLDS = (500, 1, 50_000)
"""Of `gc.set_threshold`. A collection looks at all that survived since the one before and at what each of it
refers to, and nothing else goes on meanwhile. Over a hundred endpoints 500 objects are 20 decisions, whose
columns refer to 20,000 numbers: 0.2 ms, and up to five times as much on a machine that is wanted by others.
What a request leaves is in no cycle (tests/unit/server/test_cycles.py), so collections are seldom: the
youngest come after some twenty requests more than were let go, the second generation after three of them, and
the third, which has all that the caches hold, after 75 million objects. What is in cycles is asyncio's, one
for each connection that is closed."""


def serve(path: Path, settings: Settings = NO_SETTINGS, encoder: ClusterEncoder | None = None) -> int:
    """Run until SIGTERM or SIGINT; SIGHUP reads the configuration now.

    Args:
        path: The configuration.
        settings: What goes before what it says.
        encoder: Makes what Envoy is told of clusters; None for one that starts now.

    Raises:
        ConfigError: The configuration, or the run directory, cannot be used.
        OSError: A socket cannot be opened.
    """
    encoder = encoder or ClusterEncoder()
    config, _ = load_all(path, settings)
    log = log_handler()
    if config.server.workers > 1:
        encoder.close()
        return _run(Supervisor(path, settings), log)
    from extproc.server.building import build_worker  # 10 MiB that a supervisor does without

    stalls: Stalls = Listeners()
    worker = build_worker(
        path,
        stalls=stalls,
        settings=settings,
        encode=encoder.encode,
        log_lines_lost=partial(lines_lost, log),
    )
    return _run(worker, log, stalls)


def serve_worker(
    path: Path, index: int, settings: Settings, encoder: ClusterEncoder, counters: int | None
) -> int:
    """Run one of several workers; raises as `serve`.

    Args:
        path: As for `serve`.
        index: Which.
        settings: As for `serve`.
        encoder: As for `serve`.
        counters: A descriptor of the shared counters; None if they are to be found in the run directory.
    """
    from extproc.server.building import build_worker  # as above

    stalls: Stalls = Listeners()
    log = log_handler()
    worker = build_worker(
        path,
        index=index,
        supervised=True,
        stalls=stalls,
        settings=settings,
        encode=encoder.encode,
        log_lines_lost=partial(lines_lost, log),
        counters=None if counters is None else path_of(counters),
    )
    return _run(worker, log, stalls)


def _run(server: Worker | Supervisor, handler: logging.Handler, stalls: Stalls | None = None) -> int:
    handler.setFormatter(JsonFormatter())
    handler.addFilter(is_news)
    handler.addFilter(AcceptFaults(time.monotonic))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    gc.collect()  # of what importing left; from here on nobody may be kept waiting for it
    gc.disable()
    make_loop = None if stalls is None else lambda: watched_loop(stalls.notify)
    with asyncio.Runner(loop_factory=make_loop) as runner:
        try:
            runner.run(_until_signalled(server))
        finally:
            signals.hold_back()  # the handlers go with the loop
    return 0


async def _until_signalled(server: Worker | Supervisor) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # a process without a handler ends by them without a word
        loop.add_signal_handler(
            number, partial(_log.warning, "signal ignored", extra={"signal": number.name})
        )
    signals.release()
    starting = asyncio.create_task(server.start())
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        await server.stop()
    try:
        await starting
    except StoppedWhileStarting:
        return
    # What was built so far lives until the end: no collection need look at it, now or later.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()
    trim()  # of what starting took and left free: 3 MiB
    await stop
    await server.stop()
