"""What one decision looks at, of ledger, caches and learned prices: the same for gateway and replayer.

Rules:
    1. What follows from the columns given is computed here and nowhere else: pace, KV cache in use, traffic.
    2. `least_completion` alone needs the engines' columns and the traffic; other policies leave them empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from extproc.choosing import arrays
from extproc.choosing.completion import DECODE_TOKENS, TPOT_LIMIT_S
from extproc.predicting.priced_terms import CEILING_S
from extproc.predicting.prices import priced_tpot_s
from extproc.predicting.tpot import FLOOR_S, TOKENS
from extproc.predicting.traffic import Traffic
from extproc.values.by_kind import ByKind
from extproc.values.choices import Learned, Snapshot
from extproc.values.prices import Prices
from metadata_center.types import MANY_ROWS, EndpointKey, value


@value
class Load:
    """RoutingState of the candidates; one value per row.

    Attributes:
        requests: In flight.
        prefilling: Of these, not known to be prefilled.
        prefill_tokens: Uncached tokens of those.
        context_tokens: Prompt tokens of all in flight.
    """

    requests: Sequence[int]
    prefilling: Sequence[int]
    prefill_tokens: Sequence[int]
    context_tokens: Sequence[int]


@value
class Prompt:
    """The request's prompt, and how much of it each candidate has.

    Attributes:
        tokens: Its length.
        cached_tokens: Of it believed cached, one per row.
        matched: The same in units of `num_units`, one per row.
        num_units: Its length in blocks, or in tokens where engines announce their caches.
        sunk_ratios: See `Snapshot`.
    """

    tokens: int
    cached_tokens: Sequence[int]
    matched: Sequence[int]
    num_units: int
    sunk_ratios: Sequence[float] = ()


@value
class Engines:
    """What is known of the candidates' engines.

    Attributes:
        kv_tokens: Size of the KV cache, one per row, 0 where it is unknown; empty if it is everywhere.
        max_num_seqs: See `Snapshot`.
        distinct_ratios: Of the prompt tokens in flight, the share that is there once; one per row.
        under_way_s: See `Snapshot`.
    """

    kv_tokens: Sequence[int] = ()
    max_num_seqs: Sequence[int] = ()
    distinct_ratios: Sequence[float] = ()
    under_way_s: Sequence[float] = ()


@value
class Demand:
    """What is asked of the candidates.

    Attributes:
        traffic: Seen so far.
        now_s: The time.
        endpoints: How many take what was placed here, > 0; with several gateways this one's share.
        decode_tokens: See `decode_limits_of`.
        tpot_limit_s: See there, > 0.
    """

    traffic: Traffic
    now_s: float
    endpoints: float
    decode_tokens: float = DECODE_TOKENS
    tpot_limit_s: float = TPOT_LIMIT_S


def plain_snapshot(
    keys: tuple[EndpointKey, ...],
    weights: Sequence[float],
    load: Load,
    prompt: Prompt,
    prices: Sequence[Prices],
    output_tokens: float,
) -> Snapshot:
    """What policies of terms look at.

    Args:
        keys: Candidates, at least one.
        weights: Relative capacity, > 0, one per key.
        load: Theirs.
        prompt: The request's.
        prices: One for all rows, or one per row.
        output_tokens: Usual length of an answer.
    """
    return Snapshot(
        keys=keys,
        requests=load.requests,
        prefill_tokens=load.prefill_tokens,
        context_tokens=load.context_tokens,
        matched_blocks=prompt.matched,
        num_blocks=prompt.num_units,
        weights=weights,
        prefilling=load.prefilling,
        cached_tokens=prompt.cached_tokens,
        prompt_tokens=prompt.tokens,
        output_tokens=output_tokens,
        learned=Learned(prices[0].ttft_prices_s, 0.0, DECODE_TOKENS, 0.0, _row_prices_s(prices)),
    )


def completion_snapshot(
    keys: tuple[EndpointKey, ...],
    weights: Sequence[float],
    load: Load,
    prompt: Prompt,
    prices: Sequence[Prices],
    engines: Engines,
    demand: Demand,
) -> Snapshot:
    """What `least_completion` looks at; arguments as for `plain_snapshot`."""
    traffic, now_s, endpoints = demand.traffic, demand.now_s, demand.endpoints
    output_tokens = traffic.output_tokens
    followers_per_s, rate_per_s = traffic.paces_per_s(now_s, endpoints)
    return Snapshot(
        keys=keys,
        requests=load.requests,
        prefill_tokens=load.prefill_tokens,
        context_tokens=load.context_tokens,
        matched_blocks=prompt.matched,
        num_blocks=prompt.num_units,
        weights=weights,
        prefilling=load.prefilling,
        cached_tokens=prompt.cached_tokens,
        steps_s=steps_s(prices, weights, load, prompt.tokens, output_tokens),
        kv_tokens=engines.kv_tokens,
        prompt_tokens=prompt.tokens,
        output_tokens=output_tokens,
        learned=Learned(
            prices[0].ttft_prices_s,
            followers_per_s,
            demand.decode_tokens,
            rate_per_s,
            _row_prices_s(prices),
            demand.tpot_limit_s,
            traffic.place_s,
            traffic.recomputed_ratio,
        ),
        max_num_seqs=engines.max_num_seqs,
        kv_used=kv_used(load, engines, output_tokens),
        under_way_s=engines.under_way_s,
        sunk_ratios=prompt.sunk_ratios,
    )


def steps_s(
    prices: Sequence[Prices], weights: Sequence[float], load: Load, prompt_tokens: int, output_tokens: float
) -> Sequence[float]:
    """Time per output token of each row with the request there; of what decodes, half an answer is read.

    Args:
        prices: One for all rows, or one per row.
        weights: One per row.
        load: One per row.
        prompt_tokens: Of the request.
        output_tokens: Usual length of an answer.
    """
    half_tokens = output_tokens / 2
    if len(prices) == 1 and not prices[0].tpot_thresholds:
        if len(weights) < MANY_ROWS:
            return _plain_steps_s(prices[0], weights, load, prompt_tokens, half_tokens)
        columns = load.requests, load.prefilling, load.context_tokens
        return arrays.steps_s(prices[0].tpot_prices_s[0], weights, *columns, prompt_tokens, half_tokens)
    if isinstance(prices, ByKind) and not any(each.tpot_thresholds for each in prices.each):
        of_rows = arrays.of_rows([each.tpot_prices_s[0] for each in prices.each], prices.rows)
        columns = load.requests, load.prefilling, load.context_tokens
        return arrays.steps_s(of_rows, weights, *columns, prompt_tokens, half_tokens)
    row_prices = prices if len(prices) > 1 else repeat(prices[0], len(weights))
    return [
        priced_tpot_s(
            each, requests + 1, context + prompt_tokens + max(0, requests - prefilling) * half_tokens
        )
        / weight
        for each, weight, requests, prefilling, context in zip(
            row_prices, weights, load.requests, load.prefilling, load.context_tokens, strict=True
        )
    ]


def _plain_steps_s(
    prices: Prices, weights: Sequence[float], load: Load, prompt_tokens: int, half_tokens: float
) -> list[float]:
    """`steps_s` at one set of prices of one segment, to the last bit, without a call for each row."""
    ((per_request, per_context, base),) = prices.tpot_prices_s
    found = []
    for weight, requests, prefilling, context in zip(
        weights, load.requests, load.prefilling, load.context_tokens, strict=True
    ):
        read = 0.0 + context + prompt_tokens
        if requests > prefilling:
            read += (requests - prefilling) * half_tokens
        step_s = per_request * (requests + 1) + per_context * (read / TOKENS) + base
        found.append((FLOOR_S if step_s < FLOOR_S else CEILING_S if step_s > CEILING_S else step_s) / weight)
    return found


def batch_of(snapshot: Snapshot, row: int) -> tuple[int, float]:
    """Requests, and KV tokens that they read in each step, with the request on one row: as in `steps_s`."""
    requests, prefilling = snapshot.requests[row], snapshot.prefilling[row]
    decoding = max(0, requests - prefilling)
    context = snapshot.context_tokens[row] + snapshot.prompt_tokens + decoding * (snapshot.output_tokens / 2)
    return requests + 1, context


def row_step_s(prices: Sequence[Prices], snapshot: Snapshot, row: int) -> float:
    """`steps_s` of one row of a snapshot that has none."""
    batch, context = batch_of(snapshot, row)
    return priced_tpot_s(prices[row if len(prices) > 1 else 0], batch, context) / snapshot.weights[row]


def _row_prices_s(prices: Sequence[Prices]) -> Sequence[tuple[float, ...]]:
    if isinstance(prices, ByKind):
        return ByKind(tuple(each.ttft_prices_s for each in prices.each), prices.rows)
    return tuple(each.ttft_prices_s for each in prices) if len(prices) > 1 else ()


def kv_used(load: Load, engines: Engines, output_tokens: float) -> Sequence[int]:
    """Tokens of KV cache that what is computed of the requests in flight takes: what prompts share, once.

    Of a running request half an answer is there. Empty if nothing is known of any cache's size.
    """
    if not engines.kv_tokens:
        return ()
    half_tokens = output_tokens / 2
    if len(load.requests) >= MANY_ROWS:
        columns = load.requests, load.prefilling, load.prefill_tokens, load.context_tokens
        return arrays.kv_used(engines.distinct_ratios, *columns, half_tokens)
    return [
        int(max(0.0, context * ratio - pending) + max(0, requests - prefilling) * half_tokens)
        for ratio, context, pending, requests, prefilling in zip(
            engines.distinct_ratios,
            load.context_tokens,
            load.prefill_tokens,
            load.requests,
            load.prefilling,
            strict=True,
        )
    ]
