"""Load of every engine of every cluster, as callers report it request by request.

Rules:
    1. A request id counts at most once. Once its delete was seen no add of it counts any more, however the
       two were ordered or repeated, for as long as the id is remembered: every delete leaves a tombstone.
    2. A prompt delete that comes before its add is remembered as well: the add then brings no prompt.
    3. Clusters share nothing but the bounds: an address in two clusters is two engines.
    4. A request not ended or refreshed for `request_expiry_s` is ended. Every call first does what
       is due by its `now_s`, which never goes back.
    5. Everything is bounded by `Limits`. A new request or engine beyond them is refused with
       `CapacityError` and nothing is changed; memories of what ended make room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final

from metadata_center.errors import CapacityError
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.load.kinds import (
    NOTHING,
    PREFILL_TOKENS,
    Amounts,
    difference,
    of_leg,
    of_prefill,
    sum_of,
)
from metadata_center.load.ledger import Entry, Ledger, LedgerBounds
from metadata_center.types import RequestId, value

BYTES_PER_TOKEN: Final = 4
"""Of a prompt whose tokens were not counted: English text under current byte-pair vocabularies."""

_Name = tuple[str, str]
"""Cluster and address: what an engine goes by."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Lifetimes and bounds.

    Attributes:
        request_expiry_s: A request not deleted for so long is taken for lost, an ended one is forgotten,
            and an engine without news is no longer listed. AIGW's METADATA_CENTER_LOAD_REQ_EXPIRE, 660 s.
        cache_expiry_s: Since a prefix was last saved. AIGW's metadata center keeps it an hour.
        max_requests: In flight, all clusters together; as in the gateway's own load table.
        max_ended: Ended ids remembered; the oldest makes room. one measures 300 bytes.
            Enough for 300 requests per second over the whole expiry, or 1,000 over the last 200 s.
        max_endpoints: Engines with load, and engines with cached prefixes, all clusters together.
        max_blocks: Cached blocks of all engines; one measures 180 bytes over 64 engines, so about 0.4 GB.
        max_blocks_per_endpoint: 32 MiB of prompt text in AIGW's steps of 512 bytes, about 8 million tokens:
            more than any one engine's KV cache holds.
    """

    request_expiry_s: float = 660.0
    cache_expiry_s: float = 3600.0
    max_requests: int = 200_000
    max_ended: int = 200_000
    max_endpoints: int = MAX_ENDPOINTS
    max_blocks: int = 2_000_000
    max_blocks_per_endpoint: int = 65_536


@value
class EngineLoad:
    """One engine of a cluster, as a caller sees it.

    Attributes:
        address: As the caller named it: `ip` or `ip:port`, canonical.
        prompt_length: Sum over requests whose prompt was not deleted, in the unit the callers send.
        amounts: One number per kind of load, as gateways count it.
        updated_s: Time of the last call that changed it, on the clock of `now_s`.
    """

    address: str
    prompt_length: int
    amounts: Amounts
    updated_s: float

    def plus(self, amounts: Amounts, now_s: float) -> EngineLoad:
        """With what gateways have there; a prompt's length is then that of its tokens as bytes."""
        prompt_length = self.prompt_length + BYTES_PER_TOKEN * amounts[PREFILL_TOKENS]
        return EngineLoad(self.address, prompt_length, sum_of(self.amounts, amounts), now_s)


@dataclass(slots=True)
class _Engine:
    """An engine with load; the numbers are sums over its requests."""

    cluster: str
    address: str
    updated_s: float = 0.0
    prompt_length: int = 0
    amounts: Amounts = NOTHING


class _Engines:
    """Engines with load, by cluster and by address: the accounts of the ledger.

    Args:
        limits: Lifetimes and bounds.
    """

    def __init__(self, limits: Limits) -> None:
        self.changed: set[str] = set()
        """Addresses whose load has changed; some may have gone."""
        self.clusters: dict[str, dict[str, _Engine]] = {}
        self.addresses: dict[str, dict[str, _Engine]] = {}
        self._limits = limits
        self._engines: OrderedDict[_Name, _Engine] = OrderedDict()  # longest without news first

    def __len__(self) -> int:
        return len(self._engines)

    def place(self, name: _Name) -> _Engine:
        """The engine of that cluster and address."""
        engine = self._engines.get(name)
        if engine is not None:
            return engine
        if len(self._engines) >= self._limits.max_endpoints:
            raise CapacityError(f"{self._limits.max_endpoints} endpoints are known")
        cluster, address = name
        engine = self._engines[name] = _Engine(cluster, address)
        self.clusters.setdefault(cluster, {})[address] = engine
        self.addresses.setdefault(address, {})[cluster] = engine
        return engine

    def put(self, entry: Entry[Any, Any, _Engine]) -> None:
        """Add a request."""
        engine = entry.place
        engine.amounts = sum_of(engine.amounts, _counted(entry))
        if entry.prefill_held:
            engine.prompt_length += entry.prompt_length
        self.changed.add(engine.address)

    def take(self, entry: Entry[Any, Any, _Engine]) -> None:
        """Take off a request."""
        engine = entry.place
        engine.amounts = difference(engine.amounts, _counted(entry))
        if entry.prefill_held:
            engine.prompt_length -= entry.prompt_length
        self.changed.add(engine.address)

    def take_prefill(self, entry: Entry[Any, Any, _Engine]) -> None:
        """Take off a request's prompt."""
        engine = entry.place
        charged = of_leg(entry.prefill_tokens, entry.context_tokens, entry.generated_tokens)
        engine.amounts = difference(engine.amounts, of_prefill(charged))
        engine.prompt_length -= entry.prompt_length
        self.changed.add(engine.address)

    def touch(self, engine: _Engine, now_s: float) -> None:
        """There was news of it."""
        engine.updated_s = now_s
        self._engines.move_to_end((engine.cluster, engine.address))
        self.changed.add(engine.address)

    def advance(self, now_s: float) -> None:
        """Forget engines without news for `request_expiry_s`, which have no requests any more."""
        while self._engines:
            engine = next(iter(self._engines.values()))
            if engine.updated_s + self._limits.request_expiry_s > now_s:
                break
            del self._engines[engine.cluster, engine.address]
            _discard(self.clusters, engine.cluster, engine.address)
            _discard(self.addresses, engine.address, engine.cluster)


class ClusterLoads:
    """Requests in flight and their prompts, per engine of each cluster.

    The ledger is the gateway's as well; here it keeps a length in the caller's unit besides tokens, for
    engines named by callers.

    Args:
        limits: Lifetimes and bounds.
    """

    def __init__(self, limits: Limits) -> None:
        self._engines = _Engines(limits)
        self._ledger: Ledger[RequestId, _Name, _Engine] = Ledger(
            self._engines,
            LedgerBounds(
                lease_s=limits.request_expiry_s,
                tombstone_s=limits.request_expiry_s,
                max_tombstones=limits.max_ended,
                max_legs=limits.max_requests,
            ),
        )
        self.expired_requests = 0
        """Requests that time has ended so far."""

    @property
    def in_flight(self) -> int:
        """Requests counted now."""
        return len(self._ledger)

    @property
    def endpoints(self) -> int:
        """Engines listed now."""
        return len(self._engines)

    def add(
        self,
        request_id: RequestId,
        cluster: str,
        address: str,
        prompt_length: int,
        now_s: float,
        *,
        input_tokens: int | None = None,
    ) -> bool:
        """Count a request on an engine.

        Args:
            request_id: Unique over all clusters.
            cluster: Made known by its first engine.
            address: Made known by its first request.
            prompt_length: >= 0, in any unit that all callers of the cluster share.
            now_s: Monotonic seconds.
            input_tokens: >= 0; None is taken from the prompt length, as if that were bytes.

        Returns:
            False if it is counted already or was deleted before.

        Raises:
            CapacityError: Too many requests or engines; nothing was changed.
        """
        self.advance(now_s)
        if input_tokens is None:
            input_tokens = -(-prompt_length // BYTES_PER_TOKEN)
        added = self._ledger.charge(
            request_id, (cluster, address), input_tokens, input_tokens, now_s, prompt_length=prompt_length
        )
        if added:
            self._touch(request_id, now_s)
        return added

    def refresh(
        self,
        request_id: RequestId,
        now_s: float,
        *,
        input_tokens: int | None = None,
        generated_tokens: int | None = None,
    ) -> bool:
        """The request still runs: its expiry starts anew.

        Args:
            request_id: Whose.
            now_s: Monotonic seconds.
            input_tokens: As the engine counted them; None leaves them as they are.
            generated_tokens: So far; less than before is late news and changes nothing.

        Returns:
            False if it is not counted.
        """
        self.advance(now_s)
        entry = self._ledger.get(request_id)
        if entry is None:
            return False
        if generated_tokens is not None:
            generated_tokens = max(generated_tokens, entry.generated_tokens)
        self._ledger.refresh(request_id, now_s, generated_tokens, input_tokens)
        self._engines.touch(entry.place, now_s)
        return True

    def delete_prompt(self, request_id: RequestId, now_s: float) -> None:
        """The request's prompt is computed; its add may still be under way. Idempotent."""
        self.advance(now_s)
        if self._ledger.release_prefill(request_id):
            self._touch(request_id, now_s)
        else:
            self._ledger.bury_prefill(request_id, now_s)

    def delete(self, request_id: RequestId, now_s: float) -> None:
        """The request is over; its add may still be under way, or come again. Idempotent."""
        self.advance(now_s)
        entry = self._ledger.get(request_id)
        self._ledger.release(request_id, now_s)
        self._ledger.bury(request_id, now_s)
        if entry is not None:
            self._engines.touch(entry.place, now_s)

    def view(self, cluster: str, now_s: float) -> list[EngineLoad] | None:
        """Load of every engine heard of within `request_expiry_s`; None if the cluster has none."""
        self.advance(now_s)
        engines = self._engines.clusters.get(cluster)
        return None if engines is None else [_summed(engine.address, [engine]) for engine in engines.values()]

    def at(self, address: str) -> EngineLoad:
        """Load of an address over all clusters; zero, of no time, if it is not known."""
        return _summed(address, self._engines.addresses.get(address, {}).values())

    @property
    def has_changed(self) -> bool:
        """True if `take_changed` has any."""
        return bool(self._engines.changed)

    @property
    def addresses(self) -> Collection[str]:
        """Addresses of all engines, each once."""
        return self._engines.addresses.keys()

    def take_changed(self) -> set[str]:
        """Addresses whose load has changed since the last call; some may have gone."""
        changed, self._engines.changed = self._engines.changed, set()
        return changed

    def advance(self, now_s: float) -> None:
        """End what is due by `now_s`; O(1) when nothing is."""
        self.expired_requests += len(self._ledger.advance(now_s).requests)
        # A request's lease began no later than its engine's last news: such an engine has none left.
        self._engines.advance(now_s)

    def _touch(self, request_id: RequestId, now_s: float) -> None:
        entry = self._ledger.get(request_id)
        if entry is not None:
            self._engines.touch(entry.place, now_s)


def _counted(entry: Entry[Any, Any, _Engine]) -> Amounts:
    return of_leg(
        entry.prefill_tokens,
        entry.context_tokens,
        entry.generated_tokens,
        prefill_held=entry.prefill_held,
    )


def _summed(address: str, engines: Collection[_Engine]) -> EngineLoad:
    return EngineLoad(
        address,
        sum(engine.prompt_length for engine in engines),
        reduce(sum_of, (engine.amounts for engine in engines), NOTHING),
        max((engine.updated_s for engine in engines), default=0.0),
    )


def _discard(groups: dict[str, dict[str, _Engine]], group: str, member: str) -> None:
    del groups[group][member]
    if not groups[group]:
        del groups[group]
