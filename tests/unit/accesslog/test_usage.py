"""One definition of prompt, cached and output tokens, whatever API reports them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.accesslog.usage import MAX_TOKENS, UNKNOWN, Usage, read_usage

VLLM = {
    "prompt_tokens": 100,
    "total_tokens": 107,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 64, "created_cache_tokens": None, "multimodal_tokens": None},
    "completion_tokens_details": None,
}
"""vLLM 0.32, chat and completions."""


def read(top: object, nested: object = None) -> Usage:
    """What these objects report; None for one that was not there."""
    return read_usage("" if top is None else json.dumps(top), "" if nested is None else json.dumps(nested))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("indent", ["", " ", "  "])
def test_an_object_over_several_lines_of_an_event(end: str, indent: str) -> None:
    """It comes with the name of the field that each line begins with."""
    text = json.dumps(VLLM, indent=1).replace("\n", f"{end}data:{indent}")
    assert read_usage(text) == Usage(100, 7, 64)
    assert read_usage("", text) == Usage(100, 7, 64)
    assert read_usage(text.replace("}", "")) == UNKNOWN


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (VLLM, Usage(100, 7, 64)),
        ({**VLLM, "prompt_tokens_details": None}, Usage(100, 7, None)),
        ({"prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0}, Usage(8, 0, None)),
        ({"prompt_tokens": 8, "total_tokens": 8}, Usage(8, None, None)),
        ({"total_tokens": 8}, Usage(8, None, None)),
        (
            {
                "input_tokens": 100,
                "input_tokens_details": {"cached_tokens": 64},
                "output_tokens": 7,
                "output_tokens_details": {"reasoning_tokens": 3},
                "total_tokens": 107,
            },
            Usage(100, 7, 64),
        ),
        (
            {"input_tokens": 100, "input_tokens_details": None, "output_tokens": 7, "total_tokens": 107},
            Usage(100, 7, None),
        ),
        ({"input_tokens": 36, "output_tokens": 7}, Usage(36, 7, None)),
        ({"input_tokens": 36, "cache_read_input_tokens": 64, "output_tokens": 7}, Usage(100, 7, 64)),
        (
            {
                "input_tokens": 26,
                "cache_creation_input_tokens": 10,
                "cache_read_input_tokens": 64,
                "output_tokens": 7,
            },
            Usage(100, 7, 64),
        ),
        (
            {"input_tokens": 90, "cache_creation_input_tokens": 10, "cache_read_input_tokens": None},
            Usage(100, None, None),
        ),
        ({"input_tokens": 0, "cache_read_input_tokens": 64, "output_tokens": 1}, Usage(64, 1, 64)),
        ({"prompt_tokens": 100, "cached_tokens": 64, "completion_tokens": 1}, Usage(100, 1, 64)),
        ({"prompt_tokens": 100, "cache_read_input_tokens": 64}, Usage(100, None, 64)),
        ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 64}}, Usage(10, None, 10)),
        ({"prompt_tokens_details": {"cached_tokens": 64}}, UNKNOWN),
        ({"type": "duration", "seconds": 3}, UNKNOWN),
        ({}, UNKNOWN),
        ([1], UNKNOWN),
    ],
)
def test_each_api_reports_the_same_three_numbers(fields: object, expected: Usage) -> None:
    """The prompt with what was cached of it, the output, and the cached part."""
    assert read(fields) == expected
    assert read(None, fields) == expected


@pytest.mark.parametrize(
    ("start", "delta", "expected"),
    [
        # vLLM 0.32: what was cached is known at the end only
        (
            {"input_tokens": 100, "output_tokens": 0},
            {"input_tokens": 36, "cache_read_input_tokens": 64, "output_tokens": 7},
            Usage(100, 7, 64),
        ),
        # the API's own description
        (
            {"input_tokens": 36, "cache_read_input_tokens": 64, "cache_creation_input_tokens": 0},
            {"output_tokens": 7},
            Usage(100, 7, 64),
        ),
        (
            {"input_tokens": 36, "cache_read_input_tokens": 64},
            {"input_tokens": 36, "output_tokens": 7},
            Usage(100, 7, 64),
        ),
        (
            {"input_tokens": 36, "cache_read_input_tokens": 64},
            {"input_tokens": 36, "cache_read_input_tokens": None, "output_tokens": 7},
            Usage(100, 7, 64),
        ),
        # counted whole at first, the cached part of it reported later
        (
            {"input_tokens": 100, "output_tokens": 1},
            {"cache_read_input_tokens": 64, "output_tokens": 7},
            Usage(100, 7, 64),
        ),
        # counted anew
        (
            {"input_tokens": 36, "cache_read_input_tokens": 64},
            {"input_tokens": 120, "output_tokens": 7},
            Usage(120, 7, None),
        ),
        ({"input_tokens": 100}, None, Usage(100, None, None)),
        ({"input_tokens": 100}, {}, Usage(100, None, None)),
        ({"prompt_tokens": 1, "completion_tokens": 1}, VLLM, Usage(100, 7, 64)),
    ],
)
def test_a_stream_that_reports_it_twice(start: object, delta: object, expected: Usage) -> None:
    """`message_start` and `message_delta` are one usage; no token is counted twice."""
    assert read(delta, start) == expected


@pytest.mark.parametrize("count", [-1, MAX_TOKENS, 1e300, "7", None, True, [], {}, 2**70])
def test_counts_that_make_no_sense_are_absent(count: object) -> None:
    """Negative, huge, textual or missing counts are no counts, and spoil no other."""
    assert read({"prompt_tokens": count, "completion_tokens": 5}) == Usage(None, 5, None)
    assert read({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": count}}) == Usage(
        5, None, None
    )
    assert read({"input_tokens": 5, "cache_creation_input_tokens": count}) == Usage(5, None, None)


@pytest.mark.parametrize("text", ["{", "null", "NaN", '{"prompt_tokens":NaN}', "\x00", '{"a":' * 5000])
def test_what_is_no_json_reports_nothing(text: str) -> None:
    """Envoy cut the text out of an answer without understanding it."""
    assert read_usage(text) == UNKNOWN
    assert read_usage("", text) == UNKNOWN


_COUNTS = st.one_of(st.integers(-5, 10**13), st.floats(), st.text(max_size=2), st.none(), st.booleans())
_NAMES = st.sampled_from(
    [
        "prompt_tokens",
        "input_tokens",
        "completion_tokens",
        "output_tokens",
        "total_tokens",
        "cached_tokens",
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
    ]
)
_DETAILS = st.dictionaries(st.just("cached_tokens"), _COUNTS)
_OBJECTS = st.builds(
    lambda counts, details: counts | details,
    st.dictionaries(_NAMES, _COUNTS),
    st.dictionaries(
        st.sampled_from(["prompt_tokens_details", "input_tokens_details"]), st.one_of(_DETAILS, _COUNTS)
    ),
)


@given(_OBJECTS, st.none() | _OBJECTS)
def test_the_cached_tokens_are_a_part_of_the_prompt(
    top: dict[str, Any], nested: dict[str, Any] | None
) -> None:
    """Whatever an engine says, the numbers are counts, and no more is cached than there is."""
    usage = read(top, nested)
    assert all(count is None or (type(count) is int and count >= 0) for count in usage)
    if usage.cached_tokens is not None:
        assert usage.prompt_tokens is not None
        assert usage.cached_tokens <= usage.prompt_tokens
