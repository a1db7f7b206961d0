"""Endpoints from the Kubernetes API as a live source: a task for each collection that is watched.

Rules:
    1. `Reflector` decides how a collection is kept, and `View` what it means. Here are their hands: requests,
       pauses, the fleet.
    2. What one message of a watch brings is reported at once; what came together is reported together.
    3. A failure is logged once when it begins and once when it ends.
    4. A bug in one collection ends no other, and is tried again as a failure is.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from extproc.config.schema import Config
from extproc.config.sections.kubernetes import KubernetesDiscovery
from extproc.discovery.kubernetes.kinds import Collection
from extproc.discovery.kubernetes.messages import MalformedMessageError, event_of
from extproc.discovery.kubernetes.reflector import (
    Failure,
    ListPage,
    Pause,
    Reflector,
    Watch,
)
from extproc.discovery.kubernetes.view import View, reader_of
from extproc.discovery.live import Report, SourceStatus
from extproc.server.sources.kubernetes_api import ApiFailure, KubernetesApi, access_of, own_namespace
from extproc.values.pool_policies import PoolPolicies
from metadata_center.backoff import Rng

_log = logging.getLogger("tokenway.kubernetes")

KUBERNETES: Final = "kubernetes"
"""What the fleet, the log and the metrics call this source."""

Sleep = Callable[[float], Awaitable[None]]


class KubernetesSource:
    """What one worker hears of the Kubernetes API; a `LiveSource`.

    Args:
        view: What is wanted, and what it means.
        api: Where it is asked.
        report: Called with what clusters have.
        on_policies: Called with what is said of the pool's requests when that is another.
        clock: Monotonic seconds.
        rng: Source of jitter.
        sleep: Waits for so many seconds.
    """

    name: Final = KUBERNETES

    def __init__(
        self,
        view: View,
        api: KubernetesApi,
        report: Report,
        on_policies: Callable[[PoolPolicies], None],
        clock: Callable[[], float],
        rng: Rng,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._view = view
        self._api = api
        self._report = report
        self._on_policies = on_policies
        self._clock = clock
        self._rng = rng
        self._sleep = sleep
        self._kept: dict[Collection, _Kept] = {}
        self._whole = asyncio.Event()
        self._started_s = clock()
        self._updates = 0
        self._rejects = 0
        self._policies = PoolPolicies()

    def follow(self, config: Config) -> None:
        """What is wanted is settled at the start: no rule changes it."""

    def foresee(self, config: Config | None) -> None:
        """See `follow`."""

    def is_heard(self) -> bool:
        """See `LiveSource`."""
        return True

    async def start(self) -> None:
        """Begin."""
        self._started_s = self._clock()
        self._reconcile()

    async def first_state(self) -> None:
        """Return when all clusters have been reported once."""
        await self._whole.wait()

    async def stop(self) -> None:
        """End. Idempotent."""
        tasks = [kept.task for kept in self._kept.values()]
        self._kept.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._api.close()

    def status(self) -> SourceStatus:
        """Now. Kinds that are missing, and may be, are in sync."""
        now_s = self._clock()
        reflectors = [kept.reflector for kept in self._kept.values() if not kept.reflector.is_absent]
        ages_s = [one.age_s(now_s) for one in reflectors]
        since_start_s = now_s - self._started_s
        return SourceStatus(
            is_connected=bool(reflectors) and all(one.is_watching for one in reflectors),
            age_s=max((since_start_s if age_s is None else age_s for age_s in ages_s), default=since_start_s),
            updates=self._updates,
            rejects=self._rejects,
        )

    def _reconcile(self) -> None:
        """Watch what is wanted and nothing else."""
        wanted = self._view.wanted()
        for collection in self._kept.keys() - set(wanted):
            self._kept.pop(collection).task.cancel()
        for collection in wanted:
            if collection not in self._kept:
                kind = collection.kind
                reflector: Reflector[Any] = Reflector(
                    reader_of(kind), self._rng, is_optional=kind.is_optional
                )
                task = asyncio.create_task(self._keep(collection, reflector), name=str(collection))
                self._kept[collection] = _Kept(reflector, task)

    async def _keep(self, collection: Collection, reflector: Reflector[Any]) -> None:
        problem: str | None = None
        while True:
            try:
                await self._step(collection, reflector)
            except ApiFailure as error:
                self._heard(collection, reflector, reflector.failed(error.failure, self._clock()))
            except Exception as error:
                _log.exception("a collection cannot be followed", extra={"collection": str(collection)})
                reflector.failed(Failure(None, type(error).__name__), self._clock())
            problem = _report(collection, problem, reflector)

    async def _step(self, collection: Collection, reflector: Reflector[Any]) -> None:
        match reflector.next():
            case Pause(seconds=seconds):
                await self._sleep(seconds)
            case ListPage() as step:
                page = await self._api.page(collection, step)
                self._heard(collection, reflector, reflector.listed(page, self._clock()))
            case Watch() as step:
                await self._watch(collection, reflector, step)

    async def _watch(self, collection: Collection, reflector: Reflector[Any], step: Watch) -> None:
        async with self._api.watch(collection, step) as chunks:
            reflector.opened(self._clock())
            async for lines in chunks:
                delta: dict[str, Any] = {}
                for line in lines:
                    delta.update(self._event(reflector, line))
                    if not reflector.is_watching:
                        break
                self._heard(collection, reflector, delta)
                if not reflector.is_watching:
                    return
        reflector.ended(self._clock())

    def _event(self, reflector: Reflector[Any], line: bytes) -> Mapping[str, Any]:
        try:
            return reflector.take(event_of(line), self._clock())
        except MalformedMessageError as error:
            self._rejects += 1
            return reflector.garbled(str(error), self._clock())

    def _heard(self, collection: Collection, reflector: Reflector[Any], delta: Mapping[str, Any]) -> None:
        """Report what a difference of a collection makes of clusters."""
        self._view.update(collection, delta, is_listed=reflector.is_synced)
        changes = self._view.changes()
        if changes:
            self._updates += 1
            self._report(changes)
        if self._view.policies != self._policies:
            self._policies = self._view.policies
            self._on_policies(self._policies)
        if self._view.is_whole:
            self._whole.set()
        self._reconcile()


def kubernetes_source(
    settings: KubernetesDiscovery, base: Path, report: Report, on_policies: Callable[[PoolPolicies], None]
) -> KubernetesSource:
    """The source that the configuration asks for.

    Args:
        settings: Of the start.
        base: Folder of the configuration.
        report: See `KubernetesSource`.
        on_policies: Likewise.

    Raises:
        ConfigError: The kubeconfig cannot be used, or this is no pod.
    """
    access = access_of(settings.kubeconfig, settings.context, base)
    if not access.is_verified:
        _log.warning("the certificate of the Kubernetes API is not checked: its kubeconfig says so")
    view = View(settings, own_namespace(access))
    api = KubernetesApi(access, time.monotonic)
    return KubernetesSource(view, api, report, on_policies, time.monotonic, random.Random())


class _Kept:
    """A collection that is watched."""

    def __init__(self, reflector: Reflector[Any], task: asyncio.Task[None]) -> None:
        self.reflector = reflector
        self.task = task


def _report(collection: Collection, before: str | None, reflector: Reflector[Any]) -> str | None:
    """Log what fails or works again; what fails in the same way is not news."""
    now = reflector.problem
    if now == before:
        return now
    extra = {"collection": str(collection)}
    if now is None:
        _log.info("the Kubernetes API answers again", extra=extra)
    elif reflector.is_absent:
        _log.info("an optional kind is not there", extra={**extra, "cause": now})
    else:
        _log.warning("the Kubernetes API does not answer as it should", extra={**extra, "cause": now})
    return now
