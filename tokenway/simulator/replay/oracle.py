"""Oracles: they see the engines themselves and every request's real size, and play the next steps out.

Rules:
    1. An oracle decides at once, like a rival: what it shows is what knowledge alone can gain.
    2. It plays an engine's queue forward by the engine's own rules and step times, sequences in flight
       included; it does not know what will arrive.
    3. `work` times the request's own prefill time is added to its time to first token: what it costs those
       that come after. 0 is the selfish oracle.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import Final

from extproc.choosing.stateful import FleetView, StatefulPolicy
from tokenway.simulator.engine.profile import EngineProfile
from tokenway.simulator.replay.replica import QueuedPrompt, Replica, TrueState
from tokenway.simulator.replay.run import Truth

WORK: Final = (0, 1, 2, 4, 8)
"""Weights of the own work that are compared: `oracle`, `oracle_1`, ..."""

_TIE_S: Final = 1e-6
"""Costs closer than a microsecond are equal: the row that the draw has first is taken."""


class Oracle(StatefulPolicy):
    """Least true time to first token plus `work` times the own prefill.

    Args:
        truth: What it may know.
        work: >= 0.
    """

    __slots__ = ("_truth", "_work")

    def __init__(self, truth: Truth, work: float) -> None:
        self._truth = truth
        self._work = work

    def choose(self, view: FleetView) -> int:
        """The row of least cost."""
        live = self._truth.live[view.request.request_id]
        source, best, best_s = live.source, 0, float("inf")
        replicas = self._truth.replicas
        offset = int(view.rng.random() * len(replicas))
        for step in range(len(replicas)):
            row = (offset + step) % len(replicas)
            replica = replicas[row]
            cached = replica.cached_tokens(live.keys, source.prompt_tokens)
            prompt = QueuedPrompt(source.prompt_tokens, cached, source.output_tokens, view.now_s)
            cost_s = self._work * prefill_s(replica.profile, cached, source.prompt_tokens)
            if cost_s < best_s:
                cost_s += time_to_first_token(replica, prompt, view.now_s, best_s - cost_s)
            if cost_s < best_s - _TIE_S:
                best, best_s = row, cost_s
        return best


def prefill_s(profile: EngineProfile, cached_tokens: int, prompt_tokens: int) -> float:
    """Seconds of an otherwise idle engine to compute the rest of a prompt."""
    uncached = prompt_tokens - cached_tokens
    steps = -(-uncached // profile.max_num_batched_tokens)
    pairs = uncached * (cached_tokens + uncached / 2)
    each_ms = profile.a_ms + profile.e_ms_per_seq
    linear_ms = max(steps * profile.w0_ms, profile.b_ms_per_token * uncached)
    return (steps * each_ms + linear_ms + profile.c_ms_per_pair * pairs) / 1000.0


def time_to_first_token(
    replica: Replica, prompt: QueuedPrompt, now_s: float, limit_s: float = float("inf")
) -> float:
    """When a prompt submitted now would have its first token, seconds from now.

    Two things are simpler than in the engine: cached blocks count as idle, and decodes take blocks evenly.

    Args:
        replica: Looked at, not changed.
        prompt: Of the request; its `ready_s` is not looked at.
        now_s: The time.
        limit_s: Give up beyond this and return a time that is larger.
    """
    state, profile = replica.true_state(), replica.profile
    end_s = now_s + limit_s
    clock_s = max(state.free_s, now_s)
    play = _Play(profile, state)
    queue = [*state.queue, replace(prompt, ready_s=now_s + profile.alpha0_ms / 1000.0)]
    queue.reverse()
    while clock_s < end_s:
        head = queue[-1]
        if not play.entered and not play.decodes:
            clock_s = max(clock_s, head.ready_s)
        clock_s += play.step(queue, clock_s)
        if not queue:
            break
    return clock_s - now_s


class _Play:
    """The part of an engine that decides when prompts are computed."""

    __slots__ = ("_computed", "_context", "_ends", "_free_tokens", "_profile", "_step", "entered")

    def __init__(self, profile: EngineProfile, state: TrueState) -> None:
        self._profile = profile
        self._step = 0
        self._ends = [(left, context + left) for context, left in state.decodes]  # (last step, tokens then)
        heapify(self._ends)
        self._context = sum(context for context, _ in state.decodes)
        self._free_tokens = float(state.free_blocks * profile.block_size)
        self.entered = state.under_way
        self._computed = state.queue[0].computed_tokens if state.under_way else 0

    @property
    def decodes(self) -> int:
        """Sequences decoding."""
        return len(self._ends)

    def step(self, queue: list[QueuedPrompt], clock_s: float) -> float:
        """Play one step, or all up to the next end of a decode if there is no room for the next prompt.

        Args:
            queue: The next prompt last; those whose prefill this step ends are taken out.
            clock_s: Start of the step.

        Returns:
            Its duration in seconds.
        """
        profile, decodes = self._profile, len(self._ends)
        budget = profile.max_num_batched_tokens - decodes
        self._context += decodes
        self._free_tokens -= decodes
        tokens = sequences = decodes
        context, pairs = self._context, 0.0
        while queue and budget > 0:
            head = queue[-1]
            if not self.entered and not self._enter(head, clock_s, sequences):
                break
            chunk = min(budget, head.known_tokens - self._computed)
            pairs += chunk * (self._computed + chunk / 2)
            self._computed += chunk
            budget -= chunk
            tokens += chunk
            sequences += 1
            if self._computed == head.known_tokens:
                queue.pop()
                self.entered = False
                if head.output_tokens > 1:
                    last = self._step + head.output_tokens
                    heappush(self._ends, (last, head.known_tokens + head.output_tokens - 1))
                    self._context += head.known_tokens
                else:
                    self._free_tokens += head.known_tokens
        self._step += 1
        duration_s = profile.step_s(tokens, pairs, context, sequences)
        if tokens == decodes and queue[-1].ready_s <= clock_s:
            duration_s += self._skip()
        while self._ends and self._ends[0][0] <= self._step:
            held = heappop(self._ends)[1]
            self._context -= held
            self._free_tokens += held
        return duration_s

    def _enter(self, head: QueuedPrompt, clock_s: float, sequences: int) -> bool:
        """Let the next prompt in if it is its time and there is room for it."""
        if head.ready_s > clock_s or sequences >= self._profile.max_num_seqs:
            return False
        if head.known_tokens > self._free_tokens and self._ends:
            return False
        self._free_tokens -= head.known_tokens
        self._computed = head.computed_tokens
        self.entered = True
        return True

    def _skip(self) -> float:
        """There is no room for the next prompt: play on to the next end; returns the time it takes."""
        decodes = len(self._ends)
        steps = max(0, self._ends[0][0] - self._step) if self._ends else 0
        self._context += steps * decodes
        self._free_tokens -= steps * decodes
        self._step += steps
        return steps * self._profile.step_s(decodes, 0.0, self._context - steps * decodes // 2, decodes)
