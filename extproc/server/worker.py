"""The life of one worker process: it starts, serves, drains and stops. What it is made of: `building.py`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum

from extproc.server.parts import Parts

_log = logging.getLogger("tokenway.worker")


class Stage(StrEnum):
    """Where in its life a worker is; it never goes back."""

    BUILT = "built"
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class Life:
    """The stage of a worker, for those of its parts that show it."""

    def __init__(self) -> None:
        self.stage = Stage.BUILT

    def enter(self, stage: Stage) -> None:
        """A later stage begins."""
        self.stage = stage

    def is_ready(self) -> bool:
        """True while new requests are taken."""
        return self.stage is Stage.SERVING


class Worker:
    """A whole gateway, or one of several processes of one.

    Args:
        life: Its stage, moved on here alone.
        parts: What it is made of.
        drain: Takes no new work and returns when what runs has ended, or had its time.
        reload: Reads the configuration and looks host names up.
        admin_port: The TCP port of the admin surface once it is started, 0 if it has none.
        facts: Its name and where it listens, for the log.
    """

    def __init__(
        self,
        life: Life,
        parts: Parts,
        drain: Callable[[], Awaitable[None]],
        reload: Callable[[], None],
        admin_port: Callable[[], int],
        facts: Mapping[str, str],
    ) -> None:
        self._life = life
        self._parts = parts
        self._drain = drain
        self._reload = reload
        self._admin_port = admin_port
        self._facts = facts

    @property
    def stage(self) -> Stage:
        """Where in its life it is."""
        return self._life.stage

    @property
    def admin_port(self) -> int:
        """The TCP port the admin surface got, 0 if it has none."""
        return self._admin_port()

    async def start(self) -> None:
        """Serve.

        Raises:
            ConfigError: The run directory cannot be used.
            OSError: A socket cannot be opened.
            StoppedWhileStarting: `stop` came meanwhile, or before.
        """
        if self._life.stage is Stage.BUILT:
            self._life.enter(Stage.STARTING)
        try:
            await self._parts.start()
        except BaseException:
            self._life.enter(Stage.STOPPED)
            raise
        self._life.enter(Stage.SERVING)
        _log.info("serving", extra=dict(self._facts))

    async def stop(self) -> None:
        """Drain: no new work, let running requests end and be reported, then close everything. Idempotent."""
        if self._life.stage is Stage.SERVING:
            self._life.enter(Stage.DRAINING)
            try:
                await self._drain()
            finally:
                await self._close()
        elif self._life.stage in (Stage.BUILT, Stage.STARTING):
            await self._close()

    def reload(self) -> None:
        """Read the configuration and look host names up now; a worker that drains still follows."""
        if self._life.stage in (Stage.SERVING, Stage.DRAINING):
            self._reload()

    async def _close(self) -> None:
        await self._parts.stop()
        self._life.enter(Stage.STOPPED)
        _log.info("stopped")
