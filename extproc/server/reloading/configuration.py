"""The configuration in force: files and host names watched, what `discovery.following` decides carried out.

Rules:
    1. All decisions are `Following`'s. Here are its eyes (files, the resolver, the clock) and its hands.
    2. Watched are the files that the last reading needed, good or not: a clusters file that is missing is
       taken when it comes. So are certificates for engines: their rotation is a reload.
    3. What a configuration needs is prepared off the loop before it is applied; a later reading takes its
       place.
    4. Files that take milliseconds are read on the loop. Larger ones are read in a thread, one reading at a
       time: requests go on, and what is asked for meanwhile is read once afterwards. So it is where readings
       are asked for faster than every `LEAST_BETWEEN_S`, as by signals without end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from extproc.config.engine_files import EngineFiles
from extproc.config.loading import NO_SETTINGS, Settings, read_all, read_file
from extproc.config.notation import read_yaml
from extproc.config.reload import FileWatcher, Look, look
from extproc.config.schema import Config
from extproc.discovery.following import (
    Apply,
    Effect,
    Following,
    Introduce,
    LookUp,
    NameAnswers,
    NameFailed,
    Refused,
    Version,
)
from extproc.discovery.resolution import Literals, Resolution, literals
from extproc.discovery.resolve import ResolveError, addresses_of
from extproc.errors import ConfigError
from extproc.observing.metrics.collector import Metrics
from extproc.server.envoys.acknowledging import MOST_WAIT_S
from extproc.server.reloading.preparing import Preparation

_log = logging.getLogger("tokenway.configuration")

RESOLVE_INTERVAL_S = 5.0
"""Host names are looked up again this often (AIGW's DNS interval)."""

WAIT_S = 1.2
"""A change waits this long for names that are new; with two looks at the files it is in force within 2 s."""

LOOK_UP_S = 30.0
"""Bound on a look-up: glibc asks three name servers twice, 5 s each (resolv.conf(5)). Nothing waits for it:
an answer that comes late is taken when it comes."""


QUICK_YAML_BYTES = 8 * 1024
"""Largest tokenway.yaml that is read on the loop: some 10 ms."""

QUICK_JSON_BYTES = 64 * 1024
"""Largest clusters file that is read on the loop: some 10 ms, six hundred endpoints."""


LEAST_BETWEEN_S = 0.2
"""Between two readings: of the time of the loop they take a twentieth at most."""


class _NotQuick(Exception):  # noqa: N818 - no error
    """A file is too large to be read on the loop."""


class Configuration:
    """Keeps a configuration current.

    Args:
        path: tokenway.yaml, or a clusters.json for embedded defaults.
        metrics: Count every reload.
        apply: Called with each configuration that is good, its addresses resolved; must not fail half-way.
        settings: What goes before what the file says.
        preparations: What a configuration needs before it is applied; the first one has it.
        introduce: Called before with all but the first, and its number; it is to call `introduced` or
            `spurned` later. Without it nothing is waited for.

    Raises:
        ConfigError: The configuration cannot be used.
    """

    def __init__(
        self,
        path: Path,
        metrics: Metrics,
        apply: Callable[[Config, Resolution], None],
        settings: Settings = NO_SETTINGS,
        preparations: Sequence[Preparation] = (),
        introduce: Callable[[int, Config, Resolution], None] | None = None,
    ) -> None:
        self._path = path
        self._introduce = introduce
        self._settings = settings
        self._metrics = metrics
        self._apply = apply
        self._preparations = tuple(preparations)
        self._following = Following(interval_s=RESOLVE_INTERVAL_S, wait_s=WAIT_S, introduce_s=MOST_WAIT_S)
        self._looks: dict[Path, Look] = {}
        self._literals: Literals = {}
        self._engine_files = EngineFiles()
        self._first = self._latest = self._read(is_first=True, is_on_loop=False)
        if isinstance(self._first, Refused):
            raise ConfigError(self._first.path, list(self._first.problems))
        self.current = self._first.config
        self._watcher = FileWatcher(self._watched(), self.reload)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._applied: asyncio.Future[None] | None = None
        self._slow_reading: asyncio.Task[None] | None = None
        self._is_asked_again = False
        self._read_s = float("-inf")
        self._later: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Apply what was read, with the host names that resolve within `WAIT_S`; follow from now on."""
        self._applied = asyncio.get_running_loop().create_future()
        self._carry_out(self._following.read(self._first, time.monotonic()))
        await self._applied
        self._watcher.start()

    async def stop(self) -> None:
        """Follow no more."""
        await self._watcher.stop()
        for timer in (self._timer, self._later):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reload(self) -> None:
        """Read the files now; look all host names up and apply what differs in the next turn of the loop.

        Large files are read in a thread, and what differs is applied when they are. A reading that is asked
        for soon after another comes when `LEAST_BETWEEN_S` are over.
        """
        if self._applied is None or not self._applied.done():
            return  # the start reads them
        if self._slow_reading is not None:
            self._is_asked_again = True
            return
        if self._later is not None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._read_s + LEAST_BETWEEN_S:
            self._later = loop.call_at(self._read_s + LEAST_BETWEEN_S, self._reload_later)
            return
        self._read_s = loop.time()
        try:
            self._take(self._read(is_first=False, is_on_loop=True))
        except _NotQuick:
            self._slow_reading = asyncio.create_task(self._read_slowly(), name="configuration")
            self._keep(self._slow_reading)

    def _reload_later(self) -> None:
        self._later = None
        self.reload()

    async def _read_slowly(self) -> None:
        try:
            self._is_asked_again = True
            while self._is_asked_again:
                self._is_asked_again = False
                self._take(await asyncio.to_thread(self._read, is_first=False, is_on_loop=False))
        except Exception:
            _log.exception("configuration could not be read")
        finally:
            self._slow_reading = None

    def _take(self, reading: Version | Refused) -> None:
        self._latest = reading
        self._watcher.watch(self._watched())
        needed = [] if isinstance(reading, Refused) else self._needed(reading.config)
        if needed and isinstance(reading, Version):
            self._keep(asyncio.create_task(self._prepared(needed, reading), name="preparation"))
        else:
            # To read a hundred endpoints takes as long as to apply them: requests go on in between.
            asyncio.get_running_loop().call_soon(self._follow, reading)

    def _needed(self, config: Config) -> list[Preparation]:
        return [each for each in self._preparations if each.is_needed(config)]

    async def _prepared(self, needed: Sequence[Preparation], reading: Version) -> None:
        for each in needed:
            await asyncio.to_thread(each.prepare, reading.config)
        if self._latest is reading:
            self._follow(reading)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _follow(self, reading: Version | Refused) -> None:
        now_s = time.monotonic()
        self._carry_out([*self._following.read(reading, now_s), *self._following.ask_again(now_s)])

    def introduced(self, generation: int) -> None:
        """Envoy has what this configuration brings."""
        self._carry_out(self._following.introduced(generation))

    def spurned(self, generation: int, problems: Sequence[str]) -> None:
        """Envoy refuses what it brings: it does not come into force."""
        self._carry_out(self._following.spurned(generation, problems))

    def files(self) -> dict[str, bool]:
        """Each file that the last reading needed, without directory: is it good?"""
        return self._following.files()

    def names(self) -> dict[str, bool]:
        """Each host name in use: did its last look-up give an address?"""
        return self._following.names()

    def _read(self, *, is_first: bool, is_on_loop: bool) -> Version | Refused:
        """Read the files, and keep what their paths led to before.

        Raises:
            _NotQuick: The loop would wait for it; nothing has changed.
        """
        looks: dict[Path, Look] = {}
        texts: dict[Path, str] = {}

        def read(path: Path) -> str:
            if is_on_loop and _size(path) > (
                QUICK_JSON_BYTES if path.suffix == ".json" else QUICK_YAML_BYTES
            ):
                raise _NotQuick
            looks[path] = look(path)
            problem = looks[path].problem
            if problem is not None:
                raise ConfigError(str(path), [f"cannot be read: {problem}"])
            text = read_file(path)
            if not text.strip() and not is_first:
                # A new installation may begin with nothing; one in use is being written just now.
                least = (
                    '`{"clusters": []}`' if path != self._path or path.suffix == ".json" else "`version: 1`"
                )
                raise ConfigError(str(path), [f"the file is empty; accepted: at least {least}"])
            texts[path] = text
            return text

        try:
            config, clusters = read_all(self._path, read, self._settings)
            problems = self._engine_files.read(config)
            if problems:
                path = str(self._path)
                raise ConfigError(path, read_yaml(texts[self._path], path).located(problems))
        except ConfigError as error:
            if len(looks) == 1:  # it does not say which clusters file: the one before
                looks = {**self._looks, **looks}
            self._looks = looks
            return Refused(error.path, tuple(error.problems), Path(error.path).name, _names(looks))
        self._looks = looks
        self._literals = literals(clusters, self._literals)
        return Version(self._engine_files.filled(config), clusters, _names(looks), self._literals)

    def _watched(self) -> dict[Path, Look]:
        return {**self._engine_files.looks, **self._looks}

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        due = deque(effects)
        while due:
            effect = due.popleft()
            match effect:
                case Introduce():
                    brought = effect.generation, effect.version.config, effect.resolution
                    if self._introduce is None:
                        due += self._following.introduced(effect.generation)
                    else:
                        self._introduce(*brought)
                case Apply():
                    self._put_in_force(effect)
                case LookUp():
                    self._keep(asyncio.create_task(self._look_up(effect), name="look-up"))
                case Refused():
                    self._metrics.reload_failed(effect.file)
                    for problem in effect.problems:
                        _log.error("configuration refused", extra={"file": effect.path, "problem": problem})
                case NameFailed():
                    extra = {"host": effect.name, "cause": effect.cause, "kept": list(effect.kept)}
                    _log.warning("host name has no address", extra=extra)
                case NameAnswers():
                    extra = {"host": effect.name, "addresses": list(effect.addresses)}
                    _log.info("host name has addresses again", extra=extra)
        self._wake()

    def _put_in_force(self, effect: Apply) -> None:
        config = effect.version.config
        self.current = config
        assert self._applied is not None
        is_start = not self._applied.done()
        try:
            self._apply(config, effect.resolution)
        except Exception as error:
            if is_start:
                self._applied.set_exception(error)
                return
            _log.exception("configuration could not be applied")
            return
        if effect.is_new:
            for file in effect.version.files:
                self._metrics.reloaded(file, time.time())
        if is_start:
            self._applied.set_result(None)
        elif effect.is_new:
            extra = {"file": str(self._path), "generation": effect.generation}
            _log.info("configuration applied", extra=extra)

    def _wake(self) -> None:
        """Be called when time alone changes something."""
        if self._timer is not None:
            self._timer.cancel()
        next_s = self._following.next_s()
        if next_s is not None:
            delay_s = max(0.0, next_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._advance)

    def _advance(self) -> None:
        self._carry_out(self._following.advance(time.monotonic()))

    async def _look_up(self, question: LookUp) -> None:
        following = self._following
        name, number = question.name, question.number
        try:
            addresses = await addresses_of(name, LOOK_UP_S)
        except ResolveError as error:
            cause = error.failures.get(name, str(error))
            effects = following.failed(name, number, cause, time.monotonic())
        except Exception as error:
            _log.exception("look-up failed")
            effects = following.failed(name, number, type(error).__name__, time.monotonic())
        else:
            effects = following.answered(name, number, addresses, time.monotonic())
        self._carry_out(effects)


def _size(path: Path) -> int:
    """In bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # a NUL in the name
        return 0


def _names(looks: dict[Path, Look]) -> tuple[str, ...]:
    return tuple(path.name for path in looks)
