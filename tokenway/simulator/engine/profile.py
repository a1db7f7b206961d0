"""How fast one engine replica is and how much it holds.

Rules:
    1. A profile is a value: the engine reads it and never changes it.
    2. Durations are milliseconds here, as in the sources; the engine speaks seconds everywhere else.

The step model is `a + max(w0, b·T) + Σ c·n·(s + n/2) + d·Σ ctx + e·batch`: a constant, the larger of
reading the weights and computing `T` tokens, the quadratic part of prefill attention (chunk `n` behind `s`
tokens of context), reading the KV cache of the decodes, and a cost per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Step-time constants and limits of one replica.

    Attributes:
        name: How the command line calls it.
        a_ms: Constant part of every step.
        w0_ms: Floor of a step: reading all weights once.
        b_ms_per_token: Linear layers, per scheduled token.
        c_ms_per_pair: Prefill attention, per (token, earlier token) pair.
        d_ms_per_context_token: Decode attention, per context token read.
        e_ms_per_seq: Sampling and bookkeeping, per scheduled sequence.
        alpha0_ms: Front-end latency between arrival and being schedulable.
        kv_tokens: KV cache capacity.
        block_size: Tokens per KV block.
        max_num_batched_tokens: Token budget of one step.
        max_num_seqs: Most sequences running at once.
        max_num_queued_reqs: Most requests waiting before arrivals are rejected, or None for no limit.
        max_num_queued_tokens: Most prompt tokens waiting, or None for no limit.
        async_scheduling: A step is composed while the one before runs (vLLM's default since 0.14).

    Raises:
        ValueError: A limit is not positive, or a step could not hold one token of every sequence.
    """

    name: str
    a_ms: float
    w0_ms: float
    b_ms_per_token: float
    c_ms_per_pair: float
    d_ms_per_context_token: float
    e_ms_per_seq: float
    alpha0_ms: float
    kv_tokens: int
    block_size: int = 16  # vLLM's default on CUDA
    max_num_batched_tokens: int = 2048  # the chunk both calibrations of the constants used
    max_num_seqs: int = 128  # as above
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.kv_tokens < self.block_size:
            raise ValueError("kv_tokens must hold at least one block of at least one token")
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError("max_num_seqs must be in 1..max_num_batched_tokens")

    @property
    def num_blocks(self) -> int:
        """KV blocks in the pool."""
        return self.kv_tokens // self.block_size

    def step_s(self, num_tokens: int, prefill_pairs: float, context_tokens: int, num_seqs: int) -> float:
        """Duration of one step in seconds.

        Args:
            num_tokens: Scheduled tokens, decodes and prefill chunks together.
            prefill_pairs: Σ n·(s + n/2) over the prefill chunks.
            context_tokens: Σ context length over the decodes.
            num_seqs: Sequences with at least one scheduled token.
        """
        return (
            self.a_ms
            + max(self.w0_ms, self.b_ms_per_token * num_tokens)
            + self.c_ms_per_pair * prefill_pairs
            + self.d_ms_per_context_token * context_tokens
            + self.e_ms_per_seq * num_seqs
        ) / 1000.0


# b and c of the 8B/H100 row: published prefill throughput, and FLOPs at 40 % utilisation; d: 131,072 B of KV
# per token over 3.35 TB/s with 1.2-1.95 x overhead. A100 scales c and d by peak FLOPs and bandwidth; 70B adds
# all-reduce. The split of the constant between a and w0, e, and alpha0 within 5-10 ms are choices, not
# measurements. kv_tokens is what stays of the card's memory beside the weights.
PROFILES: dict[str, EngineProfile] = {
    profile.name: profile
    for profile in (
        EngineProfile("llama8b-h100", 1.0, 7.0, 0.022, 1.3e-6, 6e-5, 0.010, 5.0, 467_000),
        EngineProfile("llama8b-a100", 1.5, 10.0, 0.060, 3e-6, 1.0e-4, 0.015, 7.5, 467_000),
        EngineProfile("llama70b-4xh100", 2.5, 14.0, 0.060, 8e-7, 3.8e-5, 0.020, 10.0, 2_050_000),
        # Fitted to the first half of measured runs (vLLM 0.19, bf16): within 2 % on the second. What one run
        # cannot distinguish (a from w0, e from d) is only good in sum.
        EngineProfile(
            "llama8b-rtx4090",
            *(1.0, 17.4, 0.106, 7.4e-6, 1.29e-4, 0.020, 3.0, 41_392),
            max_num_seqs=256,
            async_scheduling=True,
        ),
        EngineProfile(
            "llama8b-rtxpro6000",
            *(1.2, 12.5, 0.046, 2.1e-6, 7.8e-5, 0.033, 3.0, 566_711),
            async_scheduling=True,
        ),
        # 8B/H100 speed with a cache so small that a handful of long conversations evict each other.
        EngineProfile("demo", 1.0, 7.0, 0.022, 1.3e-6, 6e-5, 0.010, 5.0, 65_536),
    )
}
