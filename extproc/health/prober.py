"""Asks every engine whether it is well, how full it is, and how large its cache is.

Rules:
    1. One loop starts due probes, oldest first, at most 64 at once and one per endpoint; when each
       is due, and how long it may take, is the tracker's decision. Endpoints that timed out before take
       half of the 64 at most, so that they do not keep the others from being probed. Those that are due
       together are spread over a nap, for a probe takes 0.2 to 0.4 ms to be sent.
    2. A probe is GET `settings.path`. Any failure of it is a failed probe, never an exception of the loop.
       A time-out while this process itself stood still proves nothing, and is no result; nor is a probe
       that could not be sent, for this process, or its machine, has no files or memory left. Whatever
       `/metrics` holds, it is a reading or none, never a lost probe.
    3. `/metrics` is read only after a good probe: the first one, before an ejected endpoint
       recovers, and every few seconds. An engine that says it sleeps does not recover.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from errno import ECONNREFUSED, EMFILE, ENFILE, ENOBUFS, ENOMEM
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import aiohttp

from extproc.health.facts import EngineFacts, Occupancy, engine_facts
from extproc.health.settings import HealthSettings
from extproc.health.states import HealthState, ProbeFailure, Transition
from extproc.health.tracker import HealthTracker
from extproc.values.choices import Rng
from extproc.values.endpoints import Endpoint
from metadata_center.addresses import Address
from metadata_center.types import EndpointKey

logger = logging.getLogger(__name__)

_MAX_PROBES = 64
"""Probes in flight; at the default time-out of 1 s that is 64 dead endpoints a second."""

_MAX_SLOW_PROBES = _MAX_PROBES // 2
"""Of those, to endpoints whose last probe timed out and that get longer."""

_SCRAPE_INTERVAL_S = 4.0
"""Between two readings of `/metrics`, at least: about once per probe at the default interval. Engines make
the page in some milliseconds, and between two of them the router's own ledger shows the load."""

_MAX_METRICS_BYTES = 4 * 1024 * 1024
"""Read of one `/metrics` answer; vLLM 0.32 was captured at 50 KB, adapters and ranks multiply it."""

_TICK_S = 0.25
"""Longest nap of the loop, and the time over which the probes that are due then are started: a probe may be
late by both. A twentieth of the default interval, each."""

_OWN_TROUBLE: Final = frozenset({EMFILE, ENFILE, ENOBUFS, ENOMEM})
"""Errors that say nothing of the endpoint that was to be probed."""

_QUIET_S: Final = 60.0
"""Between two lines of the log about probes that cannot be sent."""

_KEEP_ALIVE_S = 4.0
"""Idle connections older than this are not reused: vLLM closes them after 5.0 s (uvicorn's default)."""


class _NotSentError(Exception):
    """A probe could not be sent; says why."""


class Prober:
    """Probes all endpoints of a tracker. `start` and `stop` belong to the owner's event loop.

    Args:
        tracker: Fed with the results, and with what `update` is given.
        settings: The same as the tracker's.
        clock: Monotonic seconds, the tracker's `now_s`.
        rng: Spreads first probes over one interval.
        on_transition: Called for every state change a probe or `update` caused.
        on_cache_config: Called as (key, kv_tokens, block_size) after every reading that has them.
        on_cache_cleared: Called when an engine was found asleep: its cache is gone.
        on_occupancy: Called after every reading that shows how full the engine is.
        tls_of: What aiohttp gets with a request to an endpoint that speaks TLS; None for others.
    """

    def __init__(
        self,
        tracker: HealthTracker,
        settings: HealthSettings,
        *,
        clock: Callable[[], float],
        rng: Rng,
        on_transition: Callable[[Transition], None],
        on_cache_config: Callable[[EndpointKey, int, int], None],
        on_cache_cleared: Callable[[EndpointKey], None],
        on_occupancy: Callable[[EndpointKey, Occupancy], None],
        tls_of: Callable[[EndpointKey], Mapping[str, Any] | None] = lambda _: None,
    ) -> None:
        self._tracker = tracker
        self._settings = settings
        self._tls_of = tls_of
        self._clock = clock
        self._rng = rng
        self._on_transition = on_transition
        self._on_cache_config = on_cache_config
        self._on_cache_cleared = on_cache_cleared
        self._on_occupancy = on_occupancy
        self._addresses: dict[EndpointKey, Address] = {}
        self._first_probe_s: dict[EndpointKey, float] = {}
        self._scraped_s: dict[EndpointKey, float | None] = {}
        self._asleep: set[EndpointKey] = set()
        self._puzzling: set[EndpointKey] = set()
        self._raised: set[EndpointKey] = set()
        self._probes: dict[EndpointKey, asyncio.Task[None]] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._stood_still_s = self._quiet_until_s = float("-inf")

    def _base(self, key: EndpointKey) -> str:
        return f"{'https' if self._tls_of(key) else 'http'}://{self._addresses[key]}"

    def configure(self, settings: HealthSettings) -> None:
        """Go by these from now on, and have the tracker do so."""
        self._settings = settings
        self._tracker.configure(settings)

    def update(self, changed: Mapping[EndpointKey, Collection[Endpoint]]) -> None:
        """Endpoints came, changed or left; the tracker follows. Those that stay keep their history.

        Args:
            changed: What each of them is now, once per cluster that it serves; nothing if it left.
        """
        now_s = self._clock()
        for transition in self._tracker.update(changed, now_s):
            self._on_transition(transition)
        for key, endpoints in changed.items():
            if not endpoints:
                self._forget(key)
                continue
            self._addresses[key] = next(iter(endpoints)).address
            if key not in self._scraped_s:
                self._scraped_s[key] = None
                self._first_probe_s[key] = now_s + self._rng.random() * self._settings.interval_s

    def _forget(self, key: EndpointKey) -> None:
        self._addresses.pop(key, None)
        self._scraped_s.pop(key, None)
        self._first_probe_s.pop(key, None)
        self._asleep.discard(key)
        self._puzzling.discard(key)
        self._raised.discard(key)
        if key in self._probes:
            self._probes[key].cancel()

    def start(self) -> None:
        """Begin probing.

        Raises:
            RuntimeError: Already started.
        """
        if self._loop_task is not None:
            raise RuntimeError("the prober is already started")
        self._loop_task = asyncio.create_task(self._run(), name="prober")

    async def stop(self) -> None:
        """Cancel all probes and close all connections; returns when both are done. Idempotent."""
        task, self._loop_task = self._loop_task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        nap_s = min(_TICK_S, self._settings.recovery_interval_s / 4)
        # Probes further apart than connections live would only leave idle sockets at both ends.
        # No limit here: a probe that waited for a connection would time out and look like a failure.
        connector = (
            aiohttp.TCPConnector(limit=0, force_close=True)
            if self._settings.interval_s >= _KEEP_ALIVE_S
            else aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        )
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "tokenway-prober"},
            ) as session,
            asyncio.TaskGroup() as tasks,
        ):
            while True:
                due = self._due(self._clock())
                for key in due:
                    if key in self._scraped_s:  # it may have left meanwhile
                        task = tasks.create_task(self._probe(session, key))
                        self._probes[key] = task
                        task.add_done_callback(partial(self._finished, key))
                    await self._nap(nap_s / len(due))
                if not due:
                    await self._nap(nap_s)

    async def _nap(self, nap_s: float) -> None:
        began_s = self._clock()
        await asyncio.sleep(nap_s)
        if self._clock() - began_s - nap_s > self._settings.timeout_s / 2:
            self._stood_still_s = self._clock()

    def _due(self, now_s: float) -> list[EndpointKey]:
        """Keys to probe now, longest overdue first, as many as may start."""
        due: list[tuple[float, EndpointKey]] = []
        for key in self._scraped_s:
            due_s = self._tracker.next_probe_due(key)
            if due_s is not None and key not in self._probes:
                due_s = max(due_s, self._first_probe_s.get(key, due_s))
                if due_s <= now_s:
                    due.append((due_s, key))
        if not due:
            return []
        due.sort()
        may_start = _MAX_PROBES - len(self._probes)
        slow_may_start = _MAX_SLOW_PROBES - sum(map(self._is_slow, self._probes))
        keys: list[EndpointKey] = []
        for _, key in due:
            if len(keys) >= may_start:
                break
            if self._is_slow(key):
                if slow_may_start <= 0:
                    continue
                slow_may_start -= 1
            keys.append(key)
        return keys

    def _is_slow(self, key: EndpointKey) -> bool:
        return self._tracker.probe_timeout_s(key) > self._settings.timeout_s

    async def _probe(self, session: aiohttp.ClientSession, key: EndpointKey) -> None:
        began_s = self._clock()
        try:
            failure, how = await self._health(session, key, self._tracker.probe_timeout_s(key))
            took_s = self._clock() - began_s
            if how is ProbeFailure.TIMEOUT and self._stood_still_s >= began_s:
                return
            facts = await self._scrape(session, key) if failure is None and self._wants_scrape(key) else None
            if failure is None and facts is None and key in self._asleep:
                failure = "asleep when /metrics last answered"
            self._report(key, failure, how, facts, took_s)
        except _NotSentError as error:
            self._not_sent(key, str(error))
        except Exception as error:  # a bug here or in a callback must not end all probing
            # With its trace once; then a line each would be many a second for as long as the bug is there.
            level = logging.DEBUG if key in self._raised else logging.ERROR
            logger.log(level, "probe raised", extra={"endpoint": key}, exc_info=error)
            self._raised.add(key)
        else:
            self._raised.discard(key)

    def _not_sent(self, key: EndpointKey, why: str) -> None:
        """Rule 2: nothing is known of it, and it is asked again when one that failed would be."""
        now_s = self._clock()
        self._first_probe_s[key] = now_s + self._settings.recovery_interval_s
        if now_s >= self._quiet_until_s:
            self._quiet_until_s = now_s + _QUIET_S
            logger.error("probes cannot be sent", extra={"problem": why})

    def _finished(self, key: EndpointKey, _: asyncio.Task[None]) -> None:
        self._probes.pop(key, None)

    async def _health(
        self, session: aiohttp.ClientSession, key: EndpointKey, timeout_s: float
    ) -> tuple[str | None, ProbeFailure]:
        """One probe; None if it succeeded, else why not, and what kind of failure that is.

        Raises:
            _NotSentError: It could not be sent.
        """
        url = f"{self._base(key)}{self._settings.path}"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with session.get(
                url, allow_redirects=False, timeout=timeout, **(self._tls_of(key) or {})
            ) as response:
                if HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                    return None, ProbeFailure.OTHER
                return f"status {response.status}", ProbeFailure.OTHER
        except TimeoutError:
            return "timeout", ProbeFailure.TIMEOUT
        except aiohttp.ClientConnectorError as error:
            if error.errno in _OWN_TROUBLE:
                raise _NotSentError(error.strerror) from error
            is_refused = error.errno == ECONNREFUSED
            return type(error).__name__, ProbeFailure.REFUSED if is_refused else ProbeFailure.OTHER
        except Exception as error:  # aiohttp's, the system's, or what neither foresaw of an answer
            return type(error).__name__, ProbeFailure.OTHER

    async def _scrape(self, session: aiohttp.ClientSession, key: EndpointKey) -> EngineFacts | None:
        """Read `/metrics`; None if it could not be read, which is no failure of the endpoint.

        404 means an engine that has no metrics: no facts, and not asked again at once.
        """
        try:
            timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s)
            async with session.get(
                f"{self._base(key)}/metrics",
                allow_redirects=False,
                timeout=timeout,
                **(self._tls_of(key) or {}),
            ) as response:
                if response.status == HTTPStatus.NOT_FOUND:
                    return EngineFacts(None, None, is_asleep=False)
                if response.status != HTTPStatus.OK:
                    return None
                chunks, size = [], 0
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    if size > _MAX_METRICS_BYTES:
                        return None
                    chunks.append(chunk)
            facts = engine_facts(b"".join(chunks))
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None
        except Exception as error:  # whatever it sent that no code of ours or aiohttp's foresaw
            if key not in self._puzzling:
                self._puzzling.add(key)
                logger.warning(
                    "metrics cannot be read", extra={"endpoint": key, "error": type(error).__name__}
                )
            return None
        self._puzzling.discard(key)
        return facts

    def _wants_scrape(self, key: EndpointKey) -> bool:
        scraped_s = self._scraped_s[key]
        return (
            scraped_s is None
            or self._clock() - scraped_s >= _SCRAPE_INTERVAL_S
            or key in self._asleep
            or self._tracker.state(key) is HealthState.EJECTED
        )

    def _report(
        self,
        key: EndpointKey,
        failure: str | None,
        how: ProbeFailure,
        facts: EngineFacts | None,
        took_s: float,
    ) -> None:
        """Inform the tracker, then the callbacks: a raising callback leaves the health right."""
        now_s = self._clock()
        self._first_probe_s.pop(key, None)
        if failure is not None:
            transitions = self._tracker.probe_failed(key, now_s, failure, how)
        elif facts is not None and facts.is_asleep:
            transitions = self._tracker.engine_asleep(key, now_s)
        else:
            transitions = self._tracker.probe_succeeded(key, now_s, took_s)
        fell_asleep = False
        if facts is not None:
            self._scraped_s[key] = now_s
            fell_asleep = facts.is_asleep and key not in self._asleep
            (self._asleep.add if facts.is_asleep else self._asleep.discard)(key)
        for transition in transitions:
            self._on_transition(transition)
        if fell_asleep:
            self._on_cache_cleared(key)
        if facts is not None and facts.kv_tokens is not None and facts.block_size is not None:
            self._on_cache_config(key, facts.kv_tokens, facts.block_size)
        if facts is not None and facts.occupancy is not None:
            self._on_occupancy(key, facts.occupancy)
