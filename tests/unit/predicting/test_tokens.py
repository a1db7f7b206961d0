"""Tokens per byte follow reported usage and cannot be led astray."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.predicting.tokens import TokensPerByte


@pytest.mark.parametrize(("prompt_bytes", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (4_000, 1_000)])
def test_four_bytes_make_a_token_at_first(prompt_bytes: int, tokens: int) -> None:
    """Before any usage the estimate is a quarter of the bytes, rounded up."""
    assert TokensPerByte().estimate(prompt_bytes) == tokens


def test_the_ratio_is_learned_from_few_requests() -> None:
    """Ten ordinary prompts bring the estimate within 2 % of their ratio."""
    rng = random.Random(1)
    ratio = TokensPerByte()
    for _ in range(10):
        prompt_bytes = rng.randint(2_000, 40_000)
        ratio.learn(prompt_bytes, prompt_bytes * 3 // 5)
    assert ratio.estimate(10_000) == pytest.approx(6_000, rel=0.02)


def test_long_prompts_weigh_by_their_bytes() -> None:
    """The ratio is that of sums: one long prompt counts for more than one short one."""
    ratio = TokensPerByte()
    ratio.learn(100_000, 20_000)
    ratio.learn(100, 100)
    assert ratio.ratio == pytest.approx(0.2, rel=0.02)


def test_a_changed_ratio_is_followed() -> None:
    """After 400 requests of another language the old one is forgotten."""
    ratio = TokensPerByte()
    for _ in range(500):
        ratio.learn(4_000, 1_000)
    for _ in range(400):
        ratio.learn(4_000, 2_000)
    assert ratio.ratio == pytest.approx(0.5, rel=0.02)


def test_media_do_not_make_text_dear() -> None:
    """A request with more tokens than bytes counts as one token per byte."""
    ratio = TokensPerByte()
    for _ in range(100):
        ratio.learn(10_000, 2_500)
    ratio.learn(64, 100_000)
    assert ratio.ratio == pytest.approx(0.25, rel=0.01)


def test_one_prompt_is_not_everybodys_estimate() -> None:
    """Megabytes of blanks, which make next to no tokens, move the estimate by a seventh at most."""
    ratio = TokensPerByte()
    for _ in range(200):
        ratio.learn(4_000, 1_000)
    ratio.learn(8_000_000, 8_000_000 // 64)
    assert ratio.estimate(4_000) >= 850
    for _ in range(100):
        ratio.learn(4_000, 1_000)
    assert ratio.estimate(4_000) == pytest.approx(1_000, rel=0.1)


def test_long_prompts_among_short_ones_are_learned_all_the_same() -> None:
    """Those ten times as long as the mean, the longest that there are, weigh by all of their bytes."""
    ratio = TokensPerByte()
    for _ in range(300):
        for _ in range(9):
            ratio.learn(1_000, 500)
        ratio.learn(19_000, 3_800)
    assert ratio.ratio == pytest.approx((9 * 500 + 3_800) / (9 * 1_000 + 19_000), rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)), max_size=50))
def test_the_ratio_stays_within_its_bounds(usage: list[tuple[int, int]]) -> None:
    """Whatever is reported, the ratio stays within 1/64 and 1 and the estimate positive."""
    ratio = TokensPerByte()
    for prompt_bytes, prompt_tokens in usage:
        ratio.learn(prompt_bytes, prompt_tokens)
    assert 1 / 64 <= ratio.ratio <= 1
    assert 1 <= ratio.estimate(1) <= 1
    assert ratio.estimate(64_000) >= 1_000


@pytest.mark.parametrize(("prompt_bytes", "prompt_tokens"), [(0, 5), (-1, 5), (5, 0), (5, -1)])
def test_counts_that_are_not_positive_are_refused(prompt_bytes: int, prompt_tokens: int) -> None:
    """Nothing is learned from a count of 0 or below."""
    ratio = TokensPerByte()
    with pytest.raises(ValueError):
        ratio.learn(prompt_bytes, prompt_tokens)
    assert ratio.ratio == 0.25
