"""Conversations as a workload that real engines and `tokenway.simulator.replay` serve alike, token for token.

Rules:
    1. Equal draws make equal traces; requests come as a Poisson process of one per second, to be scaled.
    2. A conversation follows a script: what its later turns hold as answers stands in the trace, not in what
       an engine said. So prompts do not depend on which engine answered the turn before, nor on when, and all
       set-ups are asked the very same; an answer's own KV blocks are never asked for again.
    3. Block id `i` of the trace is always the same `BLOCK_TOKENS` words, each of them one token: a prompt has
       exactly as many tokens as the trace says, and shares exactly the blocks that the trace says.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, islice
from random import Random
from typing import Final

from tokenizers import Tokenizer

from tokenway.simulator.replay.draws import Draws
from tokenway.simulator.replay.trace import Runs, Trace, TraceRequest

BLOCK_TOKENS: Final = 64
"""As in `tokenway.simulator.replay.generators`: four engine blocks."""

TENANTS: Final = 16
"""System prompts, the first of them popular (Zipf): four per engine, so that none is for one engine alone."""

PREFIX_TOKENS: Final = (2_048, 1_024, 6_144)
"""Median, least and most of a system prompt, that of `multi_tenant`."""

TURN_TOKENS: Final = (1_200, 256, 8_192)
"""Of what a turn adds: the last answer, the new question, and what was looked up for it."""

MAX_PROMPT_TOKENS: Final = 16_384
"""A conversation that would grow beyond ends; the longest prompt takes an H100 half a second."""

OUTPUT_TOKENS: Final = (16, 48)
"""Least and most of an answer, evenly: short, because every token costs the two cores of a small machine."""

CONTINUED_RATIO: Final = 0.7
"""Of the requests, if a conversation has rested long enough: some three turns each."""

REST_ARRIVALS: Final = 24
"""Arrivals between two turns of a conversation, at least: 5 s at five a second, as in `multi_tenant`."""

SIGMA: Final = 0.8
"""Spread of lengths, that of `tokenway.simulator.replay.generators`."""


@dataclass(slots=True)
class _Talk:
    tenant: Runs
    tenant_tokens: int
    first_id: int
    tokens: int
    rested_at: int
    name: str


def conversations(rng: Draws, requests: int) -> Trace:
    """Conversations of several turns behind system prompts of tenants, all arrivals known beforehand.

    Args:
        rng: Draws everything.
        requests: How many, > 0; one per second on average.
    """
    next_id = 0

    def take(tokens: int) -> int:
        nonlocal next_id
        first, next_id = next_id, next_id + -(-tokens // BLOCK_TOKENS)
        return first

    tenants: list[tuple[Runs, int]] = []
    for _ in range(TENANTS):
        blocks = _length(rng, *PREFIX_TOKENS) // BLOCK_TOKENS
        tenants.append((((take(blocks * BLOCK_TOKENS), blocks),), blocks * BLOCK_TOKENS))
    popularity = list(accumulate(1.0 / (rank + 1) for rank in range(TENANTS)))
    talks: list[_Talk] = []
    made: list[TraceRequest] = []
    now_s = 0.0
    for index in range(requests):
        now_s += rng.expovariate(1.0)
        new_tokens = _length(rng, *TURN_TOKENS)
        rested = [
            talk
            for talk in talks
            if talk.rested_at <= index and talk.tokens + new_tokens <= MAX_PROMPT_TOKENS
        ]
        if rested and rng.random() < CONTINUED_RATIO:
            talk = rested[int(rng.random() * len(rested))]
        else:
            tenant, tokens = tenants[
                bisect(popularity, rng.random() * popularity[-1], hi=len(popularity) - 1)
            ]
            talk = _Talk(tenant, tokens, take(MAX_PROMPT_TOKENS), tokens, 0, f"talk-{index}")
            talks.append(talk)
        talk.tokens += new_tokens
        talk.rested_at = index + REST_ARRIVALS
        own = -(-(talk.tokens - talk.tenant_tokens) // BLOCK_TOKENS)
        least, most = OUTPUT_TOKENS
        made.append(
            TraceRequest(
                arrival_s=now_s,
                prompt_tokens=talk.tokens,
                output_tokens=least + int(rng.random() * (most - least + 1)),
                runs=(*talk.tenant, (talk.first_id, own)),
                keyed_tokens=talk.tokens,
                session=talk.name,
            )
        )
    return Trace("conversations", BLOCK_TOKENS, tuple(made))


def _length(rng: Draws, median: int, least: int, most: int) -> int:
    return max(least, min(most, round(rng.lognormvariate(0.0, SIGMA) * median)))


def one_token_words(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Entries that are a blank and lower-case letters, sorted: any row of them is cut into exactly them.

    A byte-level BPE cuts before each blank, and it cuts what is an entry into that entry alone; the latter is
    tried with each.

    Raises:
        ValueError: There are fewer than 64, too few to distinguish blocks by any few words.
    """
    found = []
    for index in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([index])
        letters = text[1:]
        is_word = text[:1] == " " and letters.isascii() and letters.isalpha() and letters.islower()
        if is_word and tokenizer.encode(text).ids == [index]:
            found.append(text)
    if len(found) < 64:
        raise ValueError(f"the tokenizer has only {len(found)} plain words of one token")
    return tuple(sorted(found))


def prompts(trace: Trace, words: Sequence[str]) -> list[str]:
    """The text of every request's prompt, in the order of the trace.

    Args:
        trace: Its blocks are `BLOCK_TOKENS` long, its ids cover all of each prompt.
        words: Each of them one token wherever it stands.
    """

    @cache
    def block(number: int) -> tuple[str, ...]:
        return tuple(Random(number).choices(words, k=BLOCK_TOKENS))

    texts = []
    for request in trace.requests:
        ids = chain.from_iterable(range(first, first + count) for first, count in request.runs)
        all_words = chain.from_iterable(block(number) for number in ids)
        texts.append("".join(islice(all_words, request.prompt_tokens)))
    return texts
