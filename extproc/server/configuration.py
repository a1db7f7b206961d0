"""The configuration in force: read, watched, resolved again, handed on only when good as a whole."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

from extproc.config.loading import clusters_path, load_all
from extproc.config.reload import FileWatcher
from extproc.config.schema import Config
from extproc.discovery.clusters import ClusterSpec
from extproc.discovery.resolve import Resolution, ResolveError, resolve
from extproc.errors import ConfigError
from extproc.observing.metrics import Metrics

_log = logging.getLogger("tokenway.configuration")

RESOLVE_INTERVAL_S = 5.0
"""Host names are looked up again this often (AIGW's DNS interval)."""


class Configuration:
    """Keeps a configuration current.

    Args:
        path: tokenway.yaml, or a clusters.json for embedded defaults.
        metrics: Told of every reload.
        apply: Called with each configuration that is good, its addresses resolved; must not fail half-way.

    Raises:
        ConfigError: The configuration cannot be used.
    """

    def __init__(self, path: Path, metrics: Metrics, apply: Callable[[Config, Resolution], None]) -> None:
        self._path = path
        self._metrics = metrics
        self._apply = apply
        self.current, self._specs = load_all(path)
        self._watched = self._files(self.current)
        self._watcher = FileWatcher(self._watched, self._reload)
        self._resolution = Resolution({}, has_host_names=False)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Apply what was read and watch from now on.

        Raises:
            ResolveError: A host name cannot be resolved.
        """
        self._take(self.current, self._specs, await resolve(self._specs))
        self._reload()  # what changed between reading and watching
        self._watcher.start()
        self._spawn(self._resolve_again(), "resolve")

    async def stop(self) -> None:
        """Watch no more."""
        await self._watcher.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _files(self, config: Config) -> list[Path]:
        return (
            [self._path] if self._path.suffix == ".json" else [self._path, clusters_path(config, self._path)]
        )

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _reload(self) -> None:
        try:
            config, specs = load_all(self._path)
        except ConfigError as error:
            self._refuse(error.path, error.problems)
            return
        self._spawn(self._resolve_and_take(config, specs), "apply")

    async def _resolve_and_take(self, config: Config, specs: tuple[ClusterSpec, ...]) -> None:
        try:
            resolution = await resolve(specs)
        except ResolveError as error:
            self._refuse(str(self._files(config)[-1]), [str(error)])
            return
        self._take(config, specs, resolution)
        _log.info("configuration applied", extra={"file": str(self._path)})
        if self._files(config) != self._watched:  # another clusters_file
            await self._watcher.stop()
            self._watched = self._files(config)
            self._watcher = FileWatcher(self._watched, self._reload)
            self._watcher.start()

    def _take(self, config: Config, specs: tuple[ClusterSpec, ...], resolution: Resolution) -> None:
        self.current, self._specs, self._resolution = config, specs, resolution
        self._apply(config, resolution)
        for file in self._files(config):
            self._metrics.reloaded(file.name, time.time())

    def _refuse(self, file: str, problems: list[str]) -> None:
        self._metrics.reload_failed(Path(file).name)
        for problem in problems:
            _log.error("configuration refused", extra={"file": file, "problem": problem})

    async def _resolve_again(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_INTERVAL_S)
            if not self._resolution.has_host_names:
                continue
            try:
                resolution = await resolve(self._specs)
            except ResolveError as error:
                _log.warning("host names keep their addresses", extra={"problem": str(error)})
                continue
            if resolution != self._resolution:
                self._resolution = resolution
                self._apply(self.current, resolution)
