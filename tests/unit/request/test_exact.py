"""Whole numbers beyond 64 bits stay what they are in a body that is written anew."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.request.exact import written_anew
from extproc.request.reading import ReadOrder, read_body


def rename(fields: dict[str, Any]) -> None:
    """An edit."""
    fields["model"] = "new"


def anew(body: bytes) -> bytes:
    """The body written anew under another name."""
    fields = orjson.loads(body)
    rename(fields)
    return written_anew(fields, body, rename)


LARGE = 2**64
SMALL = -(2**63) - 1
DIGITS = str(LARGE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (DIGITS, DIGITS),
        (str(SMALL), str(SMALL)),
        (str(LARGE - 1), str(LARGE - 1)),
        (str(SMALL + 1), str(SMALL + 1)),
        (f"[{DIGITS},\t-{DIGITS}]", f"[{DIGITS},-{DIGITS}]"),
        (f'"{DIGITS}"', f'"{DIGITS}"'),
        (f'", {DIGITS},"', f'", {DIGITS},"'),
        (f'"\\",{DIGITS}"', f'"\\",{DIGITS}"'),
        (f'{{"{DIGITS}":{{"a":{DIGITS}}}}}', f'{{"{DIGITS}":{{"a":{DIGITS}}}}}'),
        ("9" * 300, "9" * 300),
        (f"{DIGITS}.5", repr(float(f"{DIGITS}.5"))),
        (f"{DIGITS}e2", repr(float(f"{DIGITS}e2"))),
        (f"1.{DIGITS}", repr(float(f"1.{DIGITS}"))),
        (f"1e-{DIGITS}", "0.0"),
    ],
)
def test_numbers_of_any_length(before: str, after: str) -> None:
    """Those beyond 64 bits digit by digit, others as orjson writes them, texts as texts."""
    body = f'{{"model":"old","x":{before},"y":{DIGITS}}}'.encode()
    expected = f'{{"model":"new","x":{after},"y":{DIGITS}}}'.encode()
    assert anew(body) == expected


def test_identifiers_in_texts_cost_no_second_reading() -> None:
    """They are long, and no numbers; a number of 64 bits is none that orjson rounds."""

    def refuse(_: object) -> None:
        raise AssertionError("read again")

    body = f'{{"model":"old","user":"{DIGITS}","seed":{LARGE - 1},"x":1.5}}'.encode()
    fields = orjson.loads(body)
    assert written_anew(fields, body, refuse) == body


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.recursive(
            st.integers() | st.text(alphabet='0123456789,:[]"\\ -') | st.booleans() | st.none(),
            lambda inner: (
                st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
            ),
        ),
    ),
    st.lists(st.integers(min_value=-(10**40), max_value=10**40)),
    st.sampled_from([None, 1]),
)
def test_what_is_written_is_what_came(fields: dict[str, Any], numbers: list[int], indent: int | None) -> None:
    """But for the edit."""
    body = json.dumps({**fields, "numbers": numbers}, indent=indent).encode()
    assert json.loads(anew(body)) == {**fields, "numbers": numbers, "model": "new"}


@pytest.mark.parametrize("rewritten", [(), ("old",)])
def test_a_body_that_is_read_elsewhere(rewritten: tuple[str, ...]) -> None:
    """Changed for its name alone, or for what was taken out."""
    fields = {"model": "old", "priority": 1, "seed": LARGE, "prompt": "hi"}
    order = ReadOrder("/v1/completions", frozenset(), False, rewritten, 1000)
    pieces = read_body(order, json.dumps(fields).encode()).new_body("new" if rewritten else None)
    assert pieces is not None
    expected = {"model": "new" if rewritten else "old", "seed": LARGE, "prompt": "hi"}
    assert json.loads(b"".join(pieces)) == expected
