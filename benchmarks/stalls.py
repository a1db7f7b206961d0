"""Turns of Tokenway's event loop that hold up all other requests: how many, how long, and what they were at.

    make bench-stalls          (python -m benchmarks.stalls [--seconds S] [--callbacks])

A Tokenway behind an Envoy, with a hundred endpoints, streams chats at a steady rate while all else goes on:
scrapes of its metrics, /explain and /endpoints, reloads of clusters that come and go, prompts of 220 KB and
0.8 MB, JSON of 3 MB and forms of 25 MB. Every turn over 5 ms is taken from `tokenway_loop_stall_seconds`,
and what of it was processor time from `tokenway_loop_stall_cpu_seconds`: `own` is what took more than 5 ms of
that; `waiting` what other processes made long. On a virtual machine the host's pauses are in `own` as well:
`machine_pauses` are those that a loop that does nothing found meanwhile at the lowest priority, in `cpu_s` of
its own; what `own` has beyond as many per second of Tokenway's `cpu_s` is Tokenway's. `--callbacks` names the
callbacks that took more than 5 ms of processor time by themselves, and asks for it twice per callback.
Latencies of the chats are at the client. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import aiohttp

from benchmarks import processes
from benchmarks.setups import CLUSTER, SERVE, Setup, python_module, setup
from benchmarks.traffic import Client, open_loop, quantile, requests, run
from extproc.server.process import loop_turns
from testbed.processes import free_port
from tokenway.cli.serve import serve

ENDPOINTS: Final = 100
RATE_PER_S: Final = 100.0
WATCHED: Final = ("benchmarks.stalls", "serve")
SLOW: Final = "slow.txt"
_STALL: Final = re.compile(
    r'^tokenway_loop_stall_(cpu_)?seconds_(bucket|sum|count){cause="(\w+)"(?:,le="(\S+)")?} (\S+)$',
    re.MULTILINE,
)


def upload(num_bytes: int) -> bytes:
    """A form with a file of so many bytes, on the wire."""
    head = (
        '--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nbench\r\n'
        '--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    )
    body = head.encode() + b"\0" * num_bytes + b"\r\n--b--\r\n"
    return (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: 127.0.0.1:10000\r\n"
        b"content-type: multipart/form-data; boundary=b\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    )


async def measure(seconds: float, *, watched: bool) -> dict[str, Any]:
    """Figures of one run.

    Args:
        seconds: How long.
        watched: Callbacks are timed.
    """
    engine = free_port()
    every_address = "0.0.0.0"  # noqa: S104 - 127.0.x.y stand for a hundred engines
    with (
        tempfile.TemporaryDirectory(prefix="tws", ignore_cleanup_errors=True) as folder,
        python_module("benchmarks.traffic", every_address, str(engine)),
    ):
        command = WATCHED if watched else SERVE
        async with setup(
            "tokenway", Path(folder), [engine], first_chunk=True, endpoints=ENDPOINTS, serve=command
        ) as target:
            return await _run(target, _only(Path(folder)), seconds)


def _only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


async def _run(target: Setup, run_dir: Path, seconds: float) -> dict[str, Any]:
    admin = re.search(r"admin:\s*\n?\s*\{?\s*port:\s*(\d+)", (run_dir / "tokenway.yaml").read_text())
    assert admin is not None, "the set-up has an admin port"
    url = f"http://127.0.0.1:{admin[1]}"
    done: dict[str, int] = {}
    async with aiohttp.ClientSession() as session:

        async def get(path: str) -> str:
            async with session.get(url + path) as response:
                return await response.text()

        async def reload() -> None:
            _list(run_dir / "clusters.json", ENDPOINTS - done.get("reloads", 0) % 7)

        jobs = {
            "scrapes": _every(5.0, lambda: get("/metrics"), "scrapes", done),
            "explains": _every(3.0, lambda: get("/explain?last=200"), "explains", done),
            "endpoints": _every(2.0, lambda: get("/endpoints"), "endpoints", done),
            "reloads": _every(6.0, reload, "reloads", done),
        }
        for name, pause_s, message in (
            ("prompts of 220 KB", 0.3, requests(1, 220_000)[0]),
            ("prompts of 0.8 MB", 1.0, requests(1, 800_000)[0]),
            ("prompts of 3 MB", 2.5, requests(1, 3_000_000)[0]),
            ("forms of 25 MB", 7.0, upload(25_000_000)),
        ):
            jobs[name] = _asks(target.port, pause_s, message, name, done)
        before, slow_before = _stalls(await get("/metrics")), _slow(run_dir)
        cpu_before_s = target.cpu_s()
        looking = asyncio.create_task(_machine_pauses(seconds))
        tasks = [asyncio.create_task(job) for job in jobs.values()]
        try:
            chats = requests(64, 4096, stream_tokens=10)
            latencies_ms = await open_loop(target, chats, RATE_PER_S, seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        cpu_s = target.cpu_s() - cpu_before_s
        found = _stalls(await get("/metrics")) - before
    return {
        "own": found["other of cpu"] + found["gc of cpu"],
        "waiting": found["waiting"],
        "stalls": found,
        "callbacks": _slow(run_dir) - slow_before,
        "chats": len(latencies_ms),
        "chats_p50_ms": round(quantile(latencies_ms, 0.5), 2),
        "chats_p99_ms": round(quantile(latencies_ms, 0.99), 2),
        "done": done,
        "rss_mib": round(target.rss_mib(), 1),
        "cpu_s": round(cpu_s, 1),
        "machine_pauses": await looking,
    }


async def _machine_pauses(seconds: float) -> dict[str, Any]:
    """What `benchmarks.pauses` finds."""
    command = (sys.executable, "-m", "benchmarks.pauses", "--seconds", str(seconds))
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        said, _ = await child.communicate()
    except asyncio.CancelledError:
        child.kill()
        raise
    found: dict[str, Any] = json.loads(said)
    return found


def _stalls(metrics: str) -> Counter[str]:
    """How many by cause and up to how many seconds, and the sum of them in ms; by the clock, and of CPU."""
    found: Counter[str] = Counter()
    for cpu, kind, cause, bound, count in _STALL.findall(metrics):
        what = f"{cause} of cpu" if cpu else cause
        if kind == "bucket":
            found[f"{what} up to {bound} s"] = int(float(count))
        elif kind == "count":
            found[what] = int(float(count))
        else:
            found[f"{what} ms"] = round(float(count) * 1e3)
    return found


def _slow(run_dir: Path) -> Counter[str]:
    """Callbacks that took over 5 ms of processor time, where that was looked at."""
    path = run_dir / SLOW
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def _timed(path: Path) -> Callable[[asyncio.Handle], None]:
    """In place of `asyncio.Handle._run`: writes down which took long."""
    usual = asyncio.Handle._run  # noqa: SLF001 - what the loop calls

    def timed(handle: asyncio.Handle) -> None:
        began_s = time.thread_time()
        usual(handle)
        if time.thread_time() - began_s > loop_turns.STALL_S:
            with path.open("a") as log:
                log.write(_named(handle) + "\n")

    return timed


def _named(handle: asyncio.Handle) -> str:
    """What it calls. Its `repr` has what the call gets: 3 MB of a body took 10 ms of the turn to write."""
    call = handle._callback  # type: ignore[attr-defined]  # noqa: SLF001 - there is no other way
    if call is None:
        return "cancelled meanwhile"
    task = getattr(call, "__self__", None)
    if isinstance(task, asyncio.Task):
        return f"task {getattr(task.get_coro(), '__qualname__', '')}"
    return getattr(call, "__qualname__", None) or type(call).__qualname__


def _list(path: Path, count: int) -> None:
    """The first so many endpoints of those that there were at the start."""
    document = json.loads(path.read_text())
    (cluster,) = document["clusters"]
    port = cluster["endpoints"][0]["port"]
    cluster["endpoints"] = [{"address": f"127.0.0.{number + 1}", "port": port} for number in range(count)]
    assert cluster["name"] == CLUSTER
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document))
    new.replace(path)


async def _every(
    pause_s: float, work: Callable[[], Awaitable[object]], name: str, done: dict[str, int]
) -> None:
    while True:
        await asyncio.sleep(pause_s)
        with contextlib.suppress(OSError, aiohttp.ClientError):
            await work()
            done[name] = done.get(name, 0) + 1


async def _asks(port: int, pause_s: float, message: bytes, name: str, done: dict[str, int]) -> None:
    client = await Client.connect(port)

    async def ask() -> None:
        status = await client.ask(message)
        if status != 200:
            raise RuntimeError(f"{name}: status {status}")

    await _every(pause_s, ask, name, done)


def main() -> None:
    """Print the figures, or serve with callbacks timed."""
    if sys.argv[1:2] == ["serve"]:
        config = Path(sys.argv[2])
        with patch.object(asyncio.Handle, "_run", _timed(config.parent / SLOW)):
            sys.exit(serve(config))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--callbacks", action="store_true", help="name the callbacks that take long")
    options = parser.parse_args()
    figures = run(measure(options.seconds, watched=options.callbacks))
    figures["machine"] = {"cpu": processes.cpu_name(), "load_average": round(os.getloadavg()[0], 2)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
