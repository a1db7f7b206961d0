"""Canonical text and its token boundaries, against tokenizing all of it."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from extproc.rendering.loading import load
from extproc.rendering.prompt_text import Rendering
from extproc.rendering.window import MAX_SPAN_BYTES, GivenTokens, Window

DATA = Path(__file__).parents[2] / "data" / "rendering"
ROOT = Path(__file__).parents[3]
FAMILIES = ("chatml", "llama3", "instruct", "parts")

words = st.sampled_from(
    [
        *(
            "the",
            "KV cache",
            "don't",
            "x = 1\n",
            "\n\n",
            "  ",
            "\t",
            "\n    y",
            "3.14",
            "1234567",
            "()",
            "{\n",
            "▁",
        ),
        *(
            "naïve",
            "e\u0301",
            "\u212b",
            "日本語の文。",
            "今天，天气",
            "مرحبا",
            "😀",
            "\u00a0",
            "\u2028",
            "\x1c",
            "ﬁ",
        ),
        *("<|im_end|>", "<|eot_id|>", "</s>", "<think>", "[INST]", "<|end|>", "<|end|> \n", "<0x0A>", "\r\n"),
        *("\u0338", "\u0301"),
    ]
)
texts = st.lists(words | st.just(" ") | st.text(max_size=3), max_size=30).map("".join)


@cache
def rendering(family: str) -> Rendering:
    """One of the small tokenizers."""
    return load(DATA / family)


@cache
def tokenizer(family: str) -> Tokenizer:
    """The same as the tokenizers package understands it, unchanged."""
    return Tokenizer.from_file(str(DATA / family / "tokenizer.json"))


def boundaries(family: str, ids: Sequence[int]) -> list[int]:
    """Byte offsets at which tokens begin or end."""
    pieces = rendering(family).vocabulary.pieces
    return list(accumulate((len(pieces[token_id]) for token_id in ids), initial=0))


def expected(ids: list[int], ends: list[int], start: int, end: int) -> list[int] | None:
    """What the whole tokenization says about a span."""
    left, right = bisect_left(ends, start), bisect_left(ends, end)
    return ids[left:right] if ends[left] == start and ends[right] == end else None


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30)
@given(text=texts)
def test_canonical_text_is_the_tokens_text(family: str, text: str) -> None:
    """What is normalized, prepended or swallowed by the tokenizer is so in canonical text."""
    ids = tokenizer(family).encode(text, add_special_tokens=False).ids
    try:
        canonical = rendering(family).canonical.of(text)
    except UnicodeEncodeError:  # lone surrogates do not come out of JSON
        return
    assert canonical == rendering(family).vocabulary.text_of(ids)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30)
@given(text=texts, cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_the_encoder_cuts_canonical_text_as_the_tokenizer_cuts_the_text(
    family: str, text: str, cuts: tuple[float, float]
) -> None:
    """Between any two places of a short text, boundary or not."""
    ids = tokenizer(family).encode(text, add_special_tokens=False).ids
    canonical = rendering(family).canonical.of(text)
    start, end = sorted(round(cut * len(canonical)) for cut in cuts)
    window = Window(rendering(family).encoder, canonical)
    assert window.tokens_between(0, len(canonical)) == ids
    assert window.tokens_between(start, end) == expected(ids, boundaries(family, ids), start, end)


def test_a_window_does_not_end_within_a_special_token() -> None:
    """Half of one reads as other tokens, with boundaries that the whole has not."""
    text = "theKV cache<|end|>"
    window = Window(rendering("parts").encoder, rendering("parts").canonical.of(text))
    assert window.tokens_between(0, 14) is None


@cache
def long_text(family: str) -> tuple[bytes, list[int], list[int]]:
    """Sources, documents and Chinese in one text: canonical, its ids, their boundaries."""
    files = [*sorted((ROOT / "metadata_center").glob("*.py")), *sorted((ROOT / "docs").glob("*.md"))]
    chinese = "今天的天气很好，我们去公园散步。你觉得怎么样？据说那里新开了一家咖啡馆，味道不错。" * 30
    text = "".join(path.read_text(encoding="utf-8")[:4000] for path in files) + chinese
    ids = tokenizer(family).encode(text, add_special_tokens=False).ids
    return rendering(family).canonical.of(text), ids, boundaries(family, ids)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50)
@given(data=st.data())
def test_a_window_of_a_long_text_says_what_all_of_it_says(family: str, data: st.DataObject) -> None:
    """Random spans of real text: half of them at boundaries, half of them anywhere."""
    text, ids, ends = long_text(family)
    if data.draw(st.booleans()):
        left = data.draw(st.integers(0, len(ends) - 1))
        start, end = ends[left], ends[min(left + data.draw(st.integers(0, 40)), len(ends) - 1)]
    else:
        start = data.draw(st.integers(0, len(text)))
        end = min(start + data.draw(st.integers(0, 160)), len(text))
    window = Window(rendering(family).encoder, text)
    assert window.tokens_between(start, end) == expected(ids, ends, start, end)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "unbroken", ["1234567890" * 120, "a" + " " * 900 + "b", "今天的天气很好我们去公园散步" * 60, "aGk9" * 300]
)
def test_texts_without_places_to_cut_are_cut_rightly_as_well(family: str, unbroken: str) -> None:
    """Long runs of digits, spaces, ideographs and Base64, at every boundary of their middle."""
    text = f"x {unbroken} y"
    ids = tokenizer(family).encode(text, add_special_tokens=False).ids
    ends = boundaries(family, ids)
    window = Window(rendering(family).encoder, rendering(family).canonical.of(text))
    for end in ends[len(ends) // 2 :][:8]:
        start = ends[len(ends) // 2 - 1]
        assert window.tokens_between(start, end) == expected(ids, ends, start, end)


def test_a_window_is_small() -> None:
    """What is tokenized does not grow with the text before and after the span."""
    encoder = rendering("chatml").encoder
    text = b"some words, and more of them\n" * 10_000
    assert 150_000 - encoder.start_before(text, 150_000) < 300
    assert encoder.end_after(text, 150_000) - 150_000 < 300


def test_a_window_begins_at_an_added_token_if_there_is_one() -> None:
    """The nearest before the span, or the one that the span begins in."""
    encoder = rendering("chatml").encoder
    text = b"a b c <|im_start|>user\nhello there"
    assert encoder.start_before(text, text.index(b"there")) == text.index(b"<|im")
    assert encoder.start_before(text, text.index(b"start")) == text.index(b"<|im")


@pytest.mark.parametrize("span", [(-1, 3), (3, 2), (0, 9), (9, 9)])
def test_spans_outside_the_text_have_no_tokens(span: tuple[int, int]) -> None:
    """They are answered, not raised."""
    assert Window(rendering("chatml").encoder, b"abcdefgh").tokens_between(*span) is None
    assert GivenTokens([1], [0, 8]).tokens_between(*span) is None


def test_spans_beyond_the_bound_are_not_looked_at() -> None:
    """A longer span would hold up the request path."""
    text = b"ab " * MAX_SPAN_BYTES
    window = Window(rendering("chatml").encoder, text)
    assert window.tokens_between(0, MAX_SPAN_BYTES + 1) is None
    assert window.tokens_between(0, 2) is not None


def test_text_that_is_not_utf8_has_no_boundaries() -> None:
    """Bytes that no text has are answered, not raised."""
    assert Window(rendering("llama3").encoder, b"ab\xff\xfe cd").tokens_between(0, 7) is None


def test_given_tokens_answer_from_the_ids() -> None:
    """However the tokenizer would have cut the same text."""
    tokens = GivenTokens([2, 0, 1], [1, 2, 3])  # bytes 0-3, 3-4, 4-6
    assert tokens.tokens_between(0, 6) == [2, 0, 1]
    assert tokens.tokens_between(3, 4) == [0]
    assert tokens.tokens_between(4, 4) == []
    assert tokens.tokens_between(1, 4) is None
    assert tokens.tokens_between(3, 5) is None
