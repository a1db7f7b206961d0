"""What a choice among endpoints looks at, and what it says.

Columns over candidates are plain Python sequences, not arrays: over the usual handful of endpoints a list is
several times quicker than numpy, and over a thousand no slower (docs/adr/0006).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from metadata_center.types import EndpointKey, value


class Rng(Protocol):
    """The only randomness a decision may use; `random.Random` satisfies it."""

    def random(self) -> float:
        """Uniform float in [0, 1)."""
        ...


@value
class Learned:
    """What `least_completion` has learned, as one decision takes it.

    Attributes:
        prefill_prices_s: In the order of `extproc.predicting.ttft.TtftPrices`.
        followers_per_s: Requests that come to one endpoint while a second of backlog is worked off.
        decode_tokens: Seconds of TTFT that a second of time per output token is worth at its limit.
        rate_per_s: Requests that come to one endpoint.
        row_prices_s: Prices of each row, where rows differ in more than their weight; else empty.
        tpot_limit_s: The request's limit on the time per output token.
        place_s: What a place at an engine is worth to whom it is best for, see `extproc.choosing.places`.
        recomputed_ratio: Of the prompt tokens that engines compute, those that one of them computed before,
            0..1, see `extproc.choosing.displacing`.
    """

    prefill_prices_s: tuple[float, ...]
    followers_per_s: float
    decode_tokens: float
    rate_per_s: float = 0.0
    row_prices_s: Sequence[tuple[float, ...]] = ()
    tpot_limit_s: float = 0.1
    place_s: float = 0.0
    recomputed_ratio: float = 0.0


@value
class Snapshot:
    """What one decision looks at: one row per candidate, all columns of length n.

    Attributes:
        keys: Candidate endpoints, distinct.
        requests: In-flight requests.
        prefill_tokens: Uncached prompt tokens charged but not yet known to be prefilled.
        context_tokens: Prompt tokens of all in-flight requests (KV in use).
        matched_blocks: Longest contiguous cached prefix, 0..num_blocks.
        num_blocks: Length of this request's prompt in the same unit: blocks of ours where routing history is
            the only view of the caches, tokens where engines announce them.
        weights: Relative capacity, > 0.
        prefilling: Requests not known to be prefilled. This and all that follows is for `least_completion`.
        cached_tokens: Prompt tokens believed cached.
        steps_s: Predicted time per output token.
        kv_tokens: Size of the KV cache; 0 where it is unknown.
        prompt_tokens: Length of this request's prompt.
        output_tokens: Usual length of an answer.
        learned: Prices and traffic; None where another policy chooses.
        held_s: Work of all requests that wait at this gateway for these endpoints, in seconds.
        ahead_s: Work of those that go before this one, at the endpoint each waits for; empty if none waits.
        max_num_seqs: Most sequences that the engine runs at once, see `extproc.choosing.max_num_seqs`; 0
            where it is unknown, empty if it is unknown everywhere.
        kv_used: Tokens of the KV cache that running requests hold, as the engine says; None where it does not
            say, empty if none does. Without it the ledger is taken, which counts shared prompts several
            times.
        under_way_s: For how long the endpoint has been at the prefill at the head of its queue: since a
            prefill last ended there, or since the first was sent; 0 where none is. Empty if unknown.
        sunk_ratios: Of each row's own prefill, the share that is computed there sooner or later whatever is
            decided, 0..1, see `extproc.choosing.sunk`; empty if it is 0 everywhere.
        owed: What each row is owed in this turn, see `extproc.choosing.rotation`; for `round_robin` alone.
    """

    keys: tuple[EndpointKey, ...]
    requests: Sequence[int]
    prefill_tokens: Sequence[int]
    context_tokens: Sequence[int]
    matched_blocks: Sequence[int]
    num_blocks: int
    weights: Sequence[float]
    prefilling: Sequence[int] = ()
    cached_tokens: Sequence[int] = ()
    steps_s: Sequence[float] = ()
    kv_tokens: Sequence[int] = ()
    prompt_tokens: int = 0
    output_tokens: float = 0.0
    learned: Learned | None = None
    held_s: float = 0.0
    ahead_s: Sequence[float] = ()
    max_num_seqs: Sequence[int] = ()
    kv_used: Sequence[int | None] = ()
    under_way_s: Sequence[float] = ()
    sunk_ratios: Sequence[float] = ()
    owed: Sequence[float] = ()


@value
class Choice:
    """The outcome of a policy over one `Snapshot`.

    Attributes:
        order: Row indices, best first: the chosen endpoint, then fallbacks. Never empty, distinct.
        scores: Higher is better, one per row; None for policies without scores.
        candidates: How many of the best rows the pick was made among.
    """

    order: tuple[int, ...]
    scores: Sequence[float] | None
    candidates: int
