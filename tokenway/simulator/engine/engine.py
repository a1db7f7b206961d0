"""One engine replica in virtual time: continuous batching with chunked prefill and prefix caching.

Rules:
    1. Time is an argument. A step is atomic: it is scheduled wholly at its start, its tokens exist at its
       end, and the next step starts no earlier.
    2. First come, first served. Decodes are scheduled first, then prefill chunks within what is left of the
       token budget; a waiting request enters only if its whole uncached prompt fits the pool.
    3. At least one token of a prompt is always computed, so `cached <= (n - 1) // block_size * block_size`.
    4. When a decode needs a block and there is none, the newest sequence gives up its blocks, goes back to
       the head of the queue and recomputes. The oldest sequence is never the victim: there is progress.
    5. A block is stored when its last token is computed, generated tokens included. The newest token of a
       sequence is never computed before the next step.
    6. Work per step is O(sequences + blocks touched), never O(tokens).
    7. With `async_scheduling` a busy engine composes each step while the one before runs: what arrives during
       a step enters the step after the next.

Source: vLLM 0.32 `vllm/v1/core/sched/scheduler.py`, behaviour as captured from a running engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tokenway.simulator.engine.prefix_cache import CacheEvent, PrefixCache
from tokenway.simulator.engine.profile import EngineProfile


class Rejection(StrEnum):
    """Why a request was not queued; the values are vLLM's metric labels."""

    QUEUED_REQUESTS = "max_num_queued_reqs"
    QUEUED_TOKENS = "max_num_queued_tokens"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What the engine needs to know about one request.

    Attributes:
        request_id: Unique among the live requests of this engine.
        prompt_tokens: Prompt length, > 0.
        output_tokens: Tokens to generate, > 0; the engine knows no other end.
        keys: Keys of the full blocks of prompt and output together, in order. It may end early: blocks
            without a key are computed but never shared.
        source: Carried through to `BlocksStored.source`; the engine never looks at it.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    keys: Sequence[int]
    source: Any = None


@dataclass(frozen=True, slots=True)
class Admission:
    """A request left the queue for the first time.

    Attributes:
        request_id: Which.
        cached_tokens: Prompt tokens found in the prefix cache.
    """

    request_id: str
    cached_tokens: int


@dataclass(slots=True)
class StepResult:
    """One step. Everything in it becomes true at `end_s`; the engine keeps no reference to it.

    Attributes:
        start_s: When it began.
        duration_s: How long it takes.
        scheduled_tokens: Tokens computed, decodes and prefill chunks together.
        admitted: Requests that were scheduled for the first time.
        first_tokens: Requests whose first output token this step made.
        tokens: Requests that got one token, `first_tokens` included.
        finished: Requests that got their last token; their blocks are released.
        preempted: Requests sent back to the queue.
        events: Cache events in order.
    """

    start_s: float
    duration_s: float = 0.0
    scheduled_tokens: int = 0
    admitted: list[Admission] = field(default_factory=list)
    first_tokens: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    events: tuple[CacheEvent, ...] = ()

    @property
    def end_s(self) -> float:
        """When its tokens exist."""
        return self.start_s + self.duration_s


@dataclass(slots=True, eq=False)
class _Sequence:
    """Private scheduling state of one request.

    `known` counts prompt and generated tokens, `computed` those with KV entries, `capacity` what `blocks` can
    hold, `stored` how many blocks are already findable. While decoding, `known == computed + 1`.
    """

    request: EngineRequest
    ready_s: float
    known: int
    left: int
    computed: int = 0
    capacity: int = 0
    stored: int = 0
    blocks: list[int] = field(default_factory=list)
    was_admitted: bool = False


class Engine:
    """A replica with the speed and size of `profile`."""

    def __init__(self, profile: EngineProfile) -> None:
        self.profile = profile
        self.cache = PrefixCache(profile.num_blocks)
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: list[_Sequence] = []
        self._decoding: list[_Sequence] = []
        self._live: dict[str, _Sequence] = {}
        self._waiting_tokens = 0
        self._busy_until_s = 0.0
        self._composed_s = 0.0  # when the step to come was composed, if the engine is busy
        # Head of the queue that did not fit, and the pool then: until one changes, trying again is futile.
        self._blocked: tuple[_Sequence, int] | None = None

    @property
    def num_running(self) -> int:
        """Sequences holding blocks."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def kv_usage_ratio(self) -> float:
        """Referenced blocks over all blocks; cached but idle blocks do not count."""
        return 1.0 - self.cache.num_unreferenced / self.cache.num_blocks

    def submit(self, request: EngineRequest, now_s: float) -> Rejection | None:
        """Queue a request.

        Args:
            request: Its keys are read, never copied; do not change them.
            now_s: Arrival time; must not run backwards.

        Returns:
            None if queued, else the limit that refused it.

        Raises:
            ValueError: The id is live, a length is not positive, or it could never fit the pool.
        """
        block_size = self.profile.block_size
        total = request.prompt_tokens + request.output_tokens
        if request.request_id in self._live:
            raise ValueError("request_id is live")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError("prompt_tokens and output_tokens must be positive")
        if -(-total // block_size) > self.cache.num_blocks:
            raise ValueError("prompt and output do not fit the KV cache")
        limits = self.profile
        if limits.max_num_queued_reqs is not None and len(self._waiting) >= limits.max_num_queued_reqs:
            return Rejection.QUEUED_REQUESTS
        queued = self._waiting_tokens + request.prompt_tokens
        if limits.max_num_queued_tokens is not None and queued > limits.max_num_queued_tokens:
            return Rejection.QUEUED_TOKENS
        ready_s = now_s + limits.alpha0_ms / 1000.0
        sequence = _Sequence(request, ready_s, request.prompt_tokens, request.output_tokens)
        self._live[request.request_id] = sequence
        self._waiting.append(sequence)
        self._waiting_tokens = queued
        return None

    def abort(self, request_id: str) -> bool:
        """Forget a request and release its blocks at once. False if it is not live."""
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return False
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            self._waiting_tokens -= sequence.known
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
        else:
            self._decoding.remove(sequence)
        self.cache.release(sequence.blocks)
        return True

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. False, and nothing changed, while any sequence is running.

        The event comes with the next step, as in vLLM.
        """
        return self.cache.clear()

    def next_step_due(self) -> float | None:
        """Earliest time at which `step` may be called, or None if there is nothing to do."""
        if self._decoding or self._prefilling:
            return self._busy_until_s
        if self._waiting:
            return max(self._busy_until_s, self._waiting[0].ready_s)
        return None

    def step(self, now_s: float, slowdown: float = 1.0) -> StepResult:
        """Schedule one step and account for all it computes.

        Args:
            now_s: Start of the step, at or after `next_step_due()`.
            slowdown: Factor on the duration, for a replica that is unwell.

        Raises:
            ValueError: No step is due by `now_s`.
        """
        due_s = self.next_step_due()
        if due_s is None or now_s < due_s:
            raise ValueError("no step is due")
        step = StepResult(now_s)
        if not self.profile.async_scheduling or not self.num_running:
            self._composed_s = now_s
        context_tokens = self._schedule_decodes(step)
        num_decodes = len(step.tokens)
        num_prefills, pairs = self._schedule_prefills(step)
        for request_id in step.finished:
            self.cache.release(self._live.pop(request_id).blocks)
        step.duration_s = slowdown * self.profile.step_s(
            step.scheduled_tokens, pairs, context_tokens, num_decodes + num_prefills
        )
        step.events = self.cache.drain_events()
        self._busy_until_s = step.end_s
        self._composed_s = now_s
        return step

    def _schedule_decodes(self, step: StepResult) -> int:
        """Advance every decode by one token; returns the context tokens read."""
        context_tokens = 0
        tokens, finished = step.tokens, step.finished
        # Preemption pops from the end of the list under iteration: a victim is never one already advanced.
        for sequence in self._decoding:
            if sequence.computed == sequence.capacity and not self._grow(sequence, step):
                break
            sequence.computed += 1
            sequence.known += 1
            sequence.left -= 1
            context_tokens += sequence.computed
            if sequence.computed == sequence.capacity:
                self._store(sequence)
            tokens.append(sequence.request.request_id)
            if not sequence.left:
                finished.append(sequence.request.request_id)
        if finished:
            self._decoding = [sequence for sequence in self._decoding if sequence.left]
        step.scheduled_tokens = len(tokens)
        return context_tokens

    def _grow(self, sequence: _Sequence, step: StepResult) -> bool:
        """Give a decode one more block, at the newest sequence's cost; False if that was itself."""
        while not self.cache.num_unreferenced:
            if self._preempt_newest(step) is sequence:
                return False
        sequence.blocks += self.cache.allocate(1)
        sequence.capacity += self.profile.block_size
        return True

    def _preempt_newest(self, step: StepResult) -> _Sequence:
        """Send the newest running sequence back to the head of the queue, without its blocks."""
        sequence = (self._prefilling or self._decoding).pop()
        self.cache.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.capacity = sequence.stored = 0
        self._waiting.appendleft(sequence)
        self._waiting_tokens += sequence.known
        step.preempted.append(sequence.request.request_id)
        return sequence

    def _schedule_prefills(self, step: StepResult) -> tuple[int, float]:
        """Continue prefills, then admit, within the token budget; returns (chunks, Σ n·(s + n/2))."""
        budget = self.profile.max_num_batched_tokens - step.scheduled_tokens
        num_chunks, pairs = 0, 0.0
        # A prefill stays unfinished only by exhausting the budget, so there is never more than one.
        while budget:
            if not self._prefilling and (step.preempted or not self._admit(step)):
                break
            sequence = self._prefilling[-1]
            num_tokens = min(budget, sequence.known - sequence.computed)
            if not self._reserve(sequence, num_tokens):
                self._preempt_newest(step)
                break
            pairs += num_tokens * (sequence.computed + num_tokens / 2)
            self._compute_chunk(sequence, num_tokens, step)
            budget -= num_tokens
            num_chunks += 1
        return num_chunks, pairs

    def _admit(self, step: StepResult) -> bool:
        """Move the head of the queue to prefilling if it is ready and fits; False if not."""
        profile, cache = self.profile, self.cache
        # No prefill is unfinished here, so every sequence of this step has its token in `step.tokens`.
        if not self._waiting or len(step.tokens) >= profile.max_num_seqs:
            return False
        sequence = self._waiting[0]
        unreferenced = cache.num_unreferenced
        if sequence.ready_s > self._composed_s or self._blocked == (sequence, unreferenced):
            return False
        block_size = profile.block_size
        blocks = cache.match(sequence.request.keys, (sequence.known - 1) // block_size)
        missing = -(-sequence.known // block_size) - len(blocks)
        if missing > unreferenced - cache.num_idle(blocks):
            self._blocked = (sequence, unreferenced)
            return False
        self._waiting.popleft()
        self._waiting_tokens -= sequence.known
        cache.acquire(blocks)
        sequence.blocks = blocks
        sequence.stored = len(blocks)
        sequence.computed = sequence.capacity = len(blocks) * block_size
        self._prefilling.append(sequence)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            step.admitted.append(Admission(sequence.request.request_id, sequence.computed))
        return True

    def _reserve(self, sequence: _Sequence, num_tokens: int) -> bool:
        """Extend a sequence's blocks to hold `num_tokens` more; False if the pool has too few."""
        block_size = self.profile.block_size
        missing = -(-(sequence.computed + num_tokens) // block_size) - len(sequence.blocks)
        if missing > self.cache.num_unreferenced:
            return False
        sequence.blocks += self.cache.allocate(missing)
        sequence.capacity = len(sequence.blocks) * block_size
        return True

    def _compute_chunk(self, sequence: _Sequence, num_tokens: int, step: StepResult) -> None:
        """Account for one prefill chunk; the last one makes a token and ends the prefill."""
        sequence.computed += num_tokens
        step.scheduled_tokens += num_tokens
        self._store(sequence)
        if sequence.computed < sequence.known:
            return
        self._prefilling.remove(sequence)
        request = sequence.request
        if sequence.left == request.output_tokens:
            step.first_tokens.append(request.request_id)
        step.tokens.append(request.request_id)
        sequence.known += 1
        sequence.left -= 1
        if sequence.left:
            self._decoding.append(sequence)
        else:
            step.finished.append(request.request_id)

    def _store(self, sequence: _Sequence) -> None:
        """Make the sequence's full blocks findable, as far as it has keys."""
        keys = sequence.request.keys
        stop = min(sequence.computed // self.profile.block_size, len(keys))
        if stop > sequence.stored:
            self.cache.store(sequence.blocks, keys, sequence.stored, stop, sequence.request.source)
            sequence.stored = stop
