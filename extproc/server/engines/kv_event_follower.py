"""Follows the KV events of all engines that publish them and whose tokenizer is known.

Rules:
    1. It is not configured which engines announce. Each engine of a model with a tokenizer is asked for its
       publishers; one that has any is asked to tokenize samples, and if it agrees with the model's files it
       is followed.
    2. An endpoint announces from then on while every publisher of it is in sync. If what it cached before is
       beyond replay, the longer of its KV events and of history speaks; while a publisher is behind or
       away, history alone does, at once and by itself.
    3. An engine that comes back from being unreachable may be another one: it is asked everything again. If
       it now names no publishers, or does not agree with the model's files, it is followed no longer and
       what it announced is forgotten.
    4. A failure of any of this costs accuracy, never a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson

from extproc.config.schema import Config
from extproc.config.sections.engines import KvEvents
from extproc.rendering.check import CheckedRendering, check_engine
from extproc.rendering.loading import load
from extproc.rendering.prompt_text import Rendering
from extproc.rendering.vocabulary import UnsupportedTemplate, UnsupportedTokenizer
from extproc.routing.event_caches import EventCaches, ModelText
from extproc.values.endpoints import Endpoint
from metadata_center.addresses import Address
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.cache_map.holders import Replica
from metadata_center.errors import CapacityError
from metadata_center.kv_events.claims import refused
from metadata_center.kv_events.errors import DiscoveryError
from metadata_center.kv_events.events import Batch
from metadata_center.kv_events.sequencing import SyncState
from metadata_center.kv_events.sources import Source, configured, discover
from metadata_center.kv_events.statistics import SubscriberStats
from metadata_center.types import EndpointKey

if TYPE_CHECKING:
    from metadata_center.kv_events.subscriber import KvEventSubscriber

_log = logging.getLogger("tokenway.kv_events")

EVENTS_METADATA: Final = "kv-events"
"""Endpoint metadata: address of an engine that cannot be asked for it (SGLang's `--kv-events-config`)."""

REPLAY_METADATA: Final = "kv-events-replay"
"""Endpoint metadata: its replay address."""

RANKS_METADATA: Final = "kv-events-ranks"
"""Endpoint metadata: its data-parallel ranks; each has the next port."""

_FIRST_RETRY_S: Final = 1.0
"""An engine that is being started is asked again soon; the pause doubles up to the configured interval."""

_SWEEP_RUNS: Final = 256
_SWEEP_INTERVAL_S: Final = 0.05
"""Blocks of engines that left are taken away at 5,000 runs a second, about a millisecond at a time."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What is to be known of an endpoint before it is followed.

    Attributes:
        address: Where it is.
        metadata: What the operator wrote of its events.
        space: Its model's tokenizer folder and template variables.
        model: Name that the engine serves the model under.
    """

    address: Address
    metadata: Mapping[str, str]
    space: str
    model: str


@dataclass(frozen=True, slots=True)
class _Serving:
    """That a cluster serves a model.

    Attributes:
        rank: Of all that are configured, the first counts.
        space: As `_Known.space`.
        model: As `_Known.model`; empty if no name of the model itself is known.
    """

    rank: int
    space: str
    model: str


class KvEventFollower:
    """Follows all engines for one worker.

    Args:
        caches: Filled from events.
        event_caches: Gets which endpoints announce, and how prompts become text.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
        tls_of: What aiohttp gets with a request to an endpoint that speaks TLS; None for others.
    """

    def __init__(
        self,
        caches: CacheMap,
        event_caches: EventCaches,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        tls_of: Callable[[EndpointKey], Mapping[str, Any] | None] = lambda _: None,
    ) -> None:
        self._caches = caches
        self._event_caches = event_caches
        self._wall_clock = wall_clock
        self._settings = KvEvents()
        self._tls_of = tls_of
        self._clock = clock
        self._subscriber: KvEventSubscriber | None = None
        self._renderings: dict[str, Rendering] = {}
        self._models: dict[str, str] = {}
        self._serving: dict[str, list[_Serving]] = {}
        self._endpoints: dict[EndpointKey, tuple[Endpoint, ...]] = {}
        self._known: dict[EndpointKey, _Known] = {}
        self._inquiries: dict[EndpointKey, asyncio.Task[None]] = {}
        self._problems: dict[EndpointKey, str] = {}
        self._verdicts: dict[EndpointKey, CheckedRendering] = {}
        self._sources: dict[EndpointKey, tuple[Source, ...]] = {}
        self._replicas: dict[Source, Replica] = {}
        self._refusals: dict[EndpointKey, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._configuring: asyncio.Task[None] | None = None

    @property
    def stats(self) -> SubscriberStats:
        """Counts of the subscriber."""
        if self._subscriber is None:
            return SubscriberStats(sources=dict.fromkeys(SyncState, 0))
        return self._subscriber.stats

    def start(self) -> None:
        """Begin; endpoints may be configured before or after."""
        self._session = aiohttp.ClientSession()
        self._spawn(self._sweep(), "kv-events-sweep")
        for key in self._known:
            self._ask(key)

    async def stop(self) -> None:
        """End everything."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._subscriber is not None:
            await self._subscriber.stop()
        if self._session is not None:
            await self._session.close()

    def configure(self, config: Config, base: Path) -> None:
        """Follow engines as this configuration says; those that stay are not disturbed.

        Args:
            config: Names models, their clusters and tokenizers.
            base: Tokenizer folders are relative to it.
        """
        self._settings = config.cache.kv_events
        if self._configuring is not None:
            self._configuring.cancel()
        self._configuring = self._spawn(self._configure(config, base), "kv-events-load")

    def update(self, changed: Mapping[EndpointKey, Collection[Endpoint]]) -> None:
        """Endpoints came, changed or left; the others are not disturbed.

        Args:
            changed: What each of them is now, once per cluster that it serves; nothing if it left.
        """
        for key, endpoints in changed.items():
            if endpoints:
                self._endpoints[key] = tuple(endpoints)
            else:
                self._endpoints.pop(key, None)
        self._follow_changed(changed)

    def came_back(self, endpoint: EndpointKey) -> None:
        """An engine answers again after it did not: it may be another one."""
        if self._subscriber is not None:
            self._subscriber.verify(endpoint)
        if endpoint in self._known:
            self._ask(endpoint)

    def cleared(self, key: EndpointKey) -> None:
        """The engine said that it dropped its whole cache: nothing that it announced so far counts.

        To be called as soon as that is known: what it stored since then and already announced is forgotten
        as well. An endpoint that is not followed is left alone.
        """
        for source in self._sources.get(key, ()):
            self._clear(source)

    # What engines are there, and how their prompts become text.

    async def _configure(self, config: Config, base: Path) -> None:
        serving: dict[str, list[_Serving]] = {}
        models: dict[str, str] = {}
        rank = 0
        if config.cache.kv_events.enabled:
            for name, model in config.models.items():
                if model.tokenizer is None:
                    continue
                folder, variables = base / model.tokenizer, dict(model.chat_template_kwargs)
                space = str(folder) + (orjson.dumps(variables).decode() if variables else "")
                if not await self._load(space, folder, variables):
                    continue
                models[name] = space
                for rule in model.rules:
                    served = (rule.model or name) if rule.lora is None else (rule.model or "")
                    serving.setdefault(rule.cluster, []).append(_Serving(rank, space, served))
                    rank += 1
        self._models, self._serving = models, serving
        self._follow_changed({*self._known, *self._endpoints})
        self._publish()

    def _follow_changed(self, keys: Iterable[EndpointKey]) -> None:
        """Ask those of these endpoints of which something else is to be known than before."""
        gone: list[EndpointKey] = []
        renamed: list[EndpointKey] = []
        to_ask: list[EndpointKey] = []
        for key in keys:
            before, known = self._known.get(key), self._wanted(key)
            if known == before:
                continue
            if known is None:
                self._forget(key)
                gone.append(key)
                del self._known[key]
                continue
            self._known[key] = known
            to_ask.append(key)
            # What was announced as text of another tokenizer, or of other template variables, is not found
            # again; what another engine announced at the address before is not there.
            if before is not None and (before.space, before.address) != (known.space, known.address):
                renamed.append(key)
        self._unfollow([*gone, *renamed])
        for key in to_ask:
            self._ask(key)

    def _wanted(self, key: EndpointKey) -> _Known | None:
        """What is to be known of an endpoint; None if no model that it serves is to be followed."""
        endpoints = self._endpoints.get(key, ())
        serving = [one for endpoint in endpoints for one in self._serving.get(endpoint.cluster, ())]
        if not serving:
            return None
        first = min(serving, key=lambda one: (not one.model, one.rank))
        endpoint = endpoints[0]
        return _Known(endpoint.address, endpoint.metadata, first.space, first.model)

    async def _load(self, space: str, folder: Path, variables: dict[str, Any]) -> bool:
        """Read a tokenizer once; False, and the reason in the log, if it is of no use."""
        if space not in self._renderings:
            try:
                self._renderings[space] = await asyncio.to_thread(load, folder, variables)
                # ZeroMQ, 2 MiB: only what has a tokenizer can be followed.
                await asyncio.to_thread(import_module, "metadata_center.kv_events.subscriber")
            except (UnsupportedTokenizer, UnsupportedTemplate) as error:
                _log.error("tokenizer not usable", extra={"folder": str(folder), "problem": str(error)})
                return False
        return True

    def _forget(self, key: EndpointKey) -> None:
        """Ask no more, and know nothing of the answers."""
        inquiry = self._inquiries.pop(key, None)
        if inquiry is not None:
            inquiry.cancel()
        self._problems.pop(key, None)
        self._verdicts.pop(key, None)

    # Each engine is asked until it answers, and from time to time while it does not publish.

    def _ask(self, key: EndpointKey) -> None:
        before = self._inquiries.get(key)
        if before is not None:
            before.cancel()
        if self._session is not None:
            self._inquiries[key] = self._spawn(self._ask_until_known(key, self._session), f"kv-events-{key}")

    async def _ask_until_known(self, key: EndpointKey, session: aiohttp.ClientSession) -> None:
        pause_s = _FIRST_RETRY_S
        while True:
            known = self._known[key]
            try:
                problem = await self._learn(key, known, session)
            except Exception as error:  # whatever an engine answered that no code foresaw: asked again later
                problem = f"its answers: {type(error).__name__}"
            if problem is None:
                self._problems.pop(key, None)
                return
            if self._problems.get(key) != problem:
                self._problems[key] = problem
                _log.info("endpoint does not announce", extra={"endpoint": key, "reason": problem})
            await asyncio.sleep(pause_s)
            pause_s = min(2.0 * pause_s, self._settings.discovery_interval_s)

    async def _learn(self, key: EndpointKey, known: _Known, session: aiohttp.ClientSession) -> str | None:
        """Find out all about one engine and follow it; otherwise why not."""
        try:
            sources = await self._sources_of(key, known, session)
        except (DiscoveryError, ValueError) as error:
            return f"sources: {error}"
        if not sources:
            self._unfollow([key])
            return "it publishes no events"
        tls = self._tls_of(key)
        verdict = await check_engine(
            session,
            f"{'https' if tls else 'http'}://{known.address}",
            known.model,
            self._renderings[known.space],
            self._wall_clock(),
            tls=tls,
        )
        before = self._verdicts.get(key)
        if before is None or before.reasons != verdict.reasons:
            for reason in verdict.reasons:
                _log.warning("engine and tokenizer files disagree", extra={"endpoint": key, "reason": reason})
        self._verdicts[key] = verdict
        if not verdict.ok:
            self._unfollow([key])
            return "it does not agree with the tokenizer files"
        if self._sources.get(key) != sources:
            self._sources[key] = sources
            self._follow()
        self._publish()
        return None

    async def _sources_of(
        self, key: EndpointKey, known: _Known, session: aiohttp.ClientSession
    ) -> tuple[Source, ...]:
        written = known.metadata.get(EVENTS_METADATA)
        if written is None:
            listen, tls = self._settings.listen, self._tls_of(key)
            return tuple(await discover(session, key, known.address, listen=listen, tls=tls))
        return tuple(
            configured(
                key,
                known.address,
                written,
                known.metadata.get(REPLAY_METADATA),
                ranks=int(known.metadata.get(RANKS_METADATA, "1")),
            )
        )

    def _follow(self) -> None:
        """Bring replicas and the subscriber's sources in line with what is known."""
        refusals = refused(self._sources, self._replicas.keys())
        for key, problem in refusals.items():
            if self._refusals.get(key) != problem:
                _log.error("endpoint not followed", extra={"endpoint": key, "problem": problem})
        self._refusals = refusals
        followed = {key: sources for key, sources in self._sources.items() if key not in refusals}
        wanted = {source for sources in followed.values() for source in sources}
        for source in self._replicas.keys() - wanted:
            # Here, because the subscriber's clear of what it removes finds no replica any more.
            self._caches.clear(self._replicas.pop(source))
        for key, sources in followed.items():
            new = [source for source in sources if source not in self._replicas]
            space, vocabulary = self._known[key].space, self._verdicts[key].rendering.vocabulary
            try:
                for source in new:
                    self._replicas[source] = self._caches.attach(key, source.rank, space, vocabulary.pieces)
            except CapacityError as error:
                _log.error("endpoint not followed", extra={"endpoint": key, "problem": str(error)})
                wanted.difference_update(sources)
        try:
            if wanted or self._subscriber is not None:
                self._subscribed().set_sources(wanted)
        except ValueError as error:
            _log.error("endpoints not followed", extra={"problem": str(error)})

    def _unfollow(self, keys: Iterable[EndpointKey]) -> None:
        """Follow these no longer, forget what they announced, and leave them to history."""
        followed = [key for key in keys if self._sources.pop(key, None) is not None]
        if not followed:
            return
        self._follow()
        for key in followed:
            self._caches.remove(key)
        self._publish()

    def _subscribed(self) -> KvEventSubscriber:
        """Made with the first source, which a model with a tokenizer has alone (`_load`)."""
        if self._subscriber is None:
            from metadata_center.kv_events.subscriber import KvEventSubscriber  # as `_load` did already

            self._subscriber = KvEventSubscriber(
                on_batch=self._batch, on_clear=self._clear, on_state=self._state_changed, clock=self._clock
            )
            self._subscriber.start()
        return self._subscriber

    # What the subscriber reports.

    def _batch(self, source: Source, batch: Batch) -> None:
        replica = self._replicas.get(source)
        if replica is not None:
            self._caches.apply(replica, batch)

    def _clear(self, source: Source) -> None:
        replica = self._replicas.get(source)
        if replica is not None:
            self._caches.clear(replica)

    def _state_changed(self, source: Source, state: SyncState) -> None:
        _log.info(
            "event source changed",
            extra={"endpoint": source.endpoint, "rank": source.rank, "state": state.value},
        )
        self._publish()

    def _publish(self) -> None:
        """Work out which endpoints announce, and what of each model's rendering all of those agree with."""
        announcing: list[EndpointKey] = []
        incomplete: list[EndpointKey] = []
        agreed: dict[str, Rendering] = {}
        for key, sources in self._sources.items():
            states = {self._subscribed().state(source) for source in sources}
            if states <= {SyncState.IN_SYNC, SyncState.INCOMPLETE}:
                (incomplete if SyncState.INCOMPLETE in states else announcing).append(key)
                space, own = self._known[key].space, self._verdicts[key].rendering
                before = agreed.setdefault(space, own)
                agreed[space] = before.restricted(own.features, tokens_agree=own.tokens_agree)
        self._event_caches.set_models(
            {
                model: ModelText(space, agreed[space])
                for model, space in self._models.items()
                if space in agreed
            }
        )
        self._event_caches.set_announcing(announcing, incomplete)

    async def _sweep(self) -> None:
        while True:
            has_more = self._caches.sweep(_SWEEP_RUNS)
            await asyncio.sleep(_SWEEP_INTERVAL_S if has_more else 1.0)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("following KV events", exc_info=error)
