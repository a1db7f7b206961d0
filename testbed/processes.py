"""Programs as child processes, and what they answer: for whatever runs several of them together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[1]

START_TIMEOUT_S = 120.0
"""A Python process imports for 2 s on an idle core; two busy cores may need several times that."""

SETTLE_TIMEOUT_S = 30.0
"""Envoy flushes its access log every 10 ms; the rest is room for a busy machine."""


def free_port() -> int:
    """A TCP port of loopback on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def envoy_binary() -> Path:
    """The real Envoy: `TOKENWAY_ENVOY`, or the one in the repository's tools folder."""
    named = os.environ.get("TOKENWAY_ENVOY")
    return Path(named) if named else REPOSITORY / ".tools/envoy/envoy/_bin/envoy"


def free_ports(count: int) -> list[int]:
    """So many of them, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Subprocess:
    """One child, leader of its own process group, with its output in a file."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self.log = log

    @classmethod
    async def start(cls, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Self:
        """Start `argv` in the repository root; `env` comes on top of our own environment."""
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdout=output,
                stderr=output,
                cwd=REPOSITORY,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def pid(self) -> int:
        """Of the group's leader."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """True until it ended."""
        return self._process.returncode is None

    def children(self) -> list[int]:
        """Process ids of its direct children."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the leader alone."""
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        async with asyncio.timeout(START_TIMEOUT_S):
            return await self._process.wait()

    async def kill(self) -> None:
        """Kill the whole group at once; harmless if it is gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()


async def get(url: str) -> bytes:
    """The body of a GET that succeeds."""
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as reply:
        assert reply.status == 200, f"{url}: {reply.status}"
        return await reply.read()


async def get_json(url: str) -> dict[str, Any]:
    """The JSON object of a GET that succeeds."""
    decoded: dict[str, Any] = json.loads(await get(url))
    return decoded


async def answers(process: Subprocess, url: str, accept: Callable[[bytes], bool] = lambda _: True) -> None:
    """Wait until `url` answers 200 with an accepted body, for as long as the process lives."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        with suppress(aiohttp.ClientError, TimeoutError, AssertionError):
            if accept(await get(url)):
                return
        tail = process.log.read_text(errors="replace")[-2000:]
        assert process.is_running, f"ended before {url} answered:\n{tail}"
        assert time.monotonic() < deadline_s, f"{url} does not answer as it should:\n{tail}"
        await asyncio.sleep(0.05)


async def eventually(
    read: Callable[[], Awaitable[T]], accept: Callable[[T], bool], timeout_s: float = SETTLE_TIMEOUT_S
) -> T:
    """The first reading that is accepted.

    Raises:
        AssertionError: None was within `timeout_s`; shows the last one.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = await read()
        if accept(value):
            return value
        assert time.monotonic() < deadline_s, f"still {value!r} after {timeout_s} s"
        await asyncio.sleep(0.02)
