"""The benchmark's conversations: text that has exactly the tokens and the blocks that the trace says."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from tokenizers import Tokenizer, models

from benchmarks.conversations import (
    BLOCK_TOKENS,
    MAX_PROMPT_TOKENS,
    OUTPUT_TOKENS,
    PREFIX_TOKENS,
    REST_ARRIVALS,
    conversations,
    one_token_words,
    prompts,
)
from testbed.tokenizer_folder import write_tokenizer
from tokenway.simulator.replay.trace import Trace, num_blocks, shared_blocks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A real byte-level BPE."""
    return Tokenizer.from_file(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Enough requests for conversations of many turns."""
    return conversations(Random("trace"), 600)


def test_equal_draws_make_equal_traces(trace: Trace) -> None:
    """The trace depends on its seed and on nothing else; a shorter one is the beginning of a longer one."""
    assert conversations(Random("trace"), 600) == trace
    assert conversations(Random("trace"), 50).requests == trace.requests[:50]
    assert conversations(Random("other"), 600) != trace


def test_requests_keep_to_the_bounds(trace: Trace) -> None:
    """Prompts and answers are as long as documented, and ids cover all of each prompt and nothing else."""
    for request in trace.requests:
        assert PREFIX_TOKENS[1] < request.prompt_tokens <= MAX_PROMPT_TOKENS
        assert OUTPUT_TOKENS[0] <= request.output_tokens <= OUTPUT_TOKENS[1]
        assert request.keyed_tokens == request.prompt_tokens
        assert 0 <= num_blocks(request.runs) * BLOCK_TOKENS - request.prompt_tokens < BLOCK_TOKENS
        assert request.after is None


def test_one_request_comes_per_second_on_average(trace: Trace) -> None:
    """Arrivals are in order, and their pauses are a Poisson process': as far spread as they are long."""
    times = [request.arrival_s for request in trace.requests]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(pauses) / len(pauses)
    spread = (sum((pause - mean) ** 2 for pause in pauses) / len(pauses)) ** 0.5
    assert min(pauses) >= 0.0
    assert mean == pytest.approx(1.0, rel=0.15)
    assert spread == pytest.approx(mean, rel=0.2)


def test_a_turn_holds_the_whole_turn_before_and_comes_later(trace: Trace) -> None:
    """Every turn begins with all whole blocks of the one before it, which had time to be answered."""
    turns: dict[str | None, list[int]] = {}
    for index, request in enumerate(trace.requests):
        turns.setdefault(request.session, []).append(index)
    followed = 0
    for indices in turns.values():
        for earlier, later in pairwise(indices):
            one, other = trace.requests[earlier], trace.requests[later]
            assert later - earlier >= REST_ARRIVALS
            assert other.prompt_tokens > one.prompt_tokens
            assert shared_blocks(one.runs, other.runs) == num_blocks(one.runs)
            followed += 1
    assert followed > len(trace.requests) / 2


def test_prompts_have_the_tokens_and_share_the_blocks_of_the_trace(
    trace: Trace, tokenizer: Tokenizer
) -> None:
    """Cut by a real tokenizer, prompts are as long as the trace says and alike as far as it says."""
    first = Trace(trace.name, trace.block_tokens, trace.requests[:60])
    cut = [tokenizer.encode(text).ids for text in prompts(first, one_token_words(tokenizer))]
    assert [len(ids) for ids in cut] == [request.prompt_tokens for request in first.requests]
    for index, (ids, request) in enumerate(zip(cut, first.requests, strict=True)):
        for other_ids, other in zip(cut[:index], first.requests[:index], strict=True):
            alike = min(shared_blocks(request.runs, other.runs) * BLOCK_TOKENS, len(ids), len(other_ids))
            assert ids[:alike] == other_ids[:alike]
            assert ids[alike : alike + 16] != other_ids[alike : alike + 16] or alike == len(other_ids)


def test_a_tokenizer_without_words_is_refused() -> None:
    """Prompts cannot be made of nothing; the message says how few words there were."""
    with pytest.raises(ValueError, match="only 0 plain words"):
        one_token_words(Tokenizer(models.BPE()))
