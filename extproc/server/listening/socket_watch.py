"""Notices that names of a gateway's Unix sockets lead to them no more, and has them made anew.

A cleaner of temporary files, or a hand, empties `server.run_dir` under a gateway that runs. Connections that
are there go on. No new one comes, so Envoy finds nobody at its next look, a second later, and serves without
Tokenway; a worker that starts anew does not find the others.

Rules:
    1. What counts is where a name leads, not what is there: the file that was made is known by its number.
    2. What is gone is made anew, and the folder before. What another process has put in its place is left
       alone, and said once.
    3. Looks are taken in a thread, of one `stat` per name: a file system that hangs stops no request.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from extproc.errors import ConfigError
from extproc.server.listening.rpc_server import RpcServer
from extproc.server.listening.run_dir import Identity, identity_of

_log = logging.getLogger("tokenway.run_dir")

LOOK_S: Final = 1.0
"""Between looks; as often as Envoy looks."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that is to stay.

    Attributes:
        path: Its name.
        renew: Makes it anew where there is none. May raise OSError or ConfigError.
    """

    path: Path
    renew: Callable[[], Awaitable[None] | None]


def kept_of(server: RpcServer) -> list[Kept]:
    """The Unix sockets of a server."""
    return [Kept(path, partial(server.renew, path)) for path in server.sockets()]


class SocketWatch:
    """Watches over names; a part of a process.

    Args:
        prepare: Makes the folder of the gateway ours, if need be. May raise ConfigError.
        is_on: False while the process lets go of its sockets by itself.

    Attributes:
        renewals: Files that were made anew so far.
        are_in_place: All names lead to what was made, at the last look.
    """

    def __init__(self, prepare: Callable[[], None], is_on: Callable[[], bool]) -> None:
        self._prepare = prepare
        self._is_on = is_on
        self._kept: list[Kept] = []
        self._made: dict[Path, Identity | None] = {}
        self._said: dict[Path, str] = {}
        self._task: asyncio.Task[None] | None = None
        self.renewals = 0
        self.are_in_place = True

    def keep(self, kept: Iterable[Kept]) -> None:
        """Watch over these as well, made anew in this order; before the start."""
        self._kept += kept

    def start(self) -> None:
        """All is made: watch from now on."""
        self._made = self._look()
        self._task = asyncio.create_task(self._watch(), name="sockets")

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _look(self) -> dict[Path, Identity | None]:
        return {each.path: identity_of(each.path) for each in self._kept}

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            found = await asyncio.to_thread(self._look)
            if not self._is_on():
                continue
            for each in self._kept:
                if found[each.path] == self._made[each.path]:
                    self._said.pop(each.path, None)
                elif found[each.path] is None:
                    await self._renew(each)
                else:
                    self._say(each.path, "another process has put a file in its place")
            self.are_in_place = not self._said

    async def _renew(self, each: Kept) -> None:
        try:
            self._prepare()
            result = each.renew()
            if inspect.isawaitable(result):
                await result
        except (OSError, ConfigError) as error:
            problem = error.problems[0] if isinstance(error, ConfigError) else error.strerror or str(error)
            self._say(each.path, problem)
            return
        self._made[each.path] = identity_of(each.path)
        self._said.pop(each.path, None)
        self.renewals += 1
        _log.error("a file of the gateway was taken away; it is made anew", extra={"file": str(each.path)})

    def _say(self, path: Path, problem: str) -> None:
        if self._said.get(path) != problem:
            self._said[path] = problem
            extra = {"file": str(path), "problem": problem, "do": "restart Tokenway with a folder of its own"}
            _log.error("a file of the gateway was taken away, and new connections do not come", extra=extra)
