"""A body read elsewhere gives the decision what the same body read here gives it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.request.blocks import block_hashes
from extproc.request.parse import parse
from extproc.request.reading import ReadOrder, read_body
from extproc.request.sanitize import force_usage, rewrite_model, sanitize
from extproc.request.structure import (
    LIGHT_BYTES,
    MAX_CONTAINERS,
    MAX_ELEMENTS,
    MAX_MEMBERS,
    Structure,
    check_structure,
    is_heavy,
    structure_of,
)

CHAT = "/v1/chat/completions"

values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.text(alphabet='a"\\[]{},:é\n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(alphabet='a"\\[{,:', max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)

BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (CHAT, {"messages": [{"role": "user", "content": "hi" * 900}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"audio_url": "a"}, "b", {"image_url": "c"}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": "é"}], "priority": 3, "stream": True}),
    ("/v1/completions", {"prompt": list(range(500)), "stream": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 3, "model\\": 1, "x": '"model":"m"'}),
    (
        "/v1/messages",
        {"messages": [{"role": "user", "content": "x"}], "system": "s", "kv_transfer_params": {}},
    ),
    ("/v1/responses", {"input": "x", "max_output_tokens": 7, "cache_salt": "s"}),
    ("/v1/embeddings", {"input": [[1, 2], [3]], "rid": "x"}),
)


@pytest.mark.parametrize("upstream", [None, "other"])
@pytest.mark.parametrize("usage_injection", [False, True])
@pytest.mark.parametrize(("path", "fields"), BODIES)
def test_what_is_read_elsewhere_is_what_is_read_here(
    path: str, fields: dict[str, Any], usage_injection: bool, upstream: str | None
) -> None:
    """The same request but for its body, the same hashes, and the same body to send."""
    body = orjson.dumps({"model": "m", **fields})
    limit = 8 * 64
    read = read_body(ReadOrder(path, frozenset({"rid"}), usage_injection, {"m"}, limit), body)
    here = parse(path, body)
    changed = bool(sanitize(here.body, frozenset({"rid"})))
    if usage_injection:
        changed |= force_usage(here.body, here.operation)
    if upstream is not None:
        changed |= rewrite_model(here.body, upstream)
    new_body = read.new_body(upstream)
    assert (new_body is not None) == changed
    if new_body is not None:
        assert orjson.loads(b"".join(new_body)) == here.body
    there = read.request
    for name in (
        "operation",
        "model",
        "stream",
        "prompt_tokens",
        "max_tokens",
        "cache_salt",
        "is_multimodal",
        "choices",
    ):
        assert getattr(there, name) == getattr(here, name)
    assert there.prompt_bytes == here.prompt_bytes
    assert not there.has_body
    assert block_hashes(there.prompt, 1, 64, 8, widths=there.widths) == block_hashes(
        here.prompt, 1, 64, 8, widths=here.widths
    )


def test_a_body_that_may_go_as_it_came_is_not_written_again() -> None:
    """Unless some rule of the model's name replaces it."""
    body = orjson.dumps({"model": "m", "prompt": "x"})
    read = read_body(ReadOrder("/v1/completions", frozenset(), False, frozenset(), 64), body)
    assert read.around_model is None
    assert read.new_body(None) is None


def counted(value: Any) -> tuple[int, int, int]:
    """Containers, members, and elements beyond the first, as decoded."""
    if isinstance(value, dict):
        inner = [counted(one) for one in value.values()]
        own = (1, len(value), max(0, len(value) - 1))
    elif isinstance(value, list):
        inner = [counted(one) for one in value]
        own = (1, 0, max(0, len(value) - 1))
    else:
        return 0, 0, 0
    one, two, three = (sum(column) for column in zip(own, *inner, strict=True))
    return one, two, three


@given(values, st.booleans())
def test_structure_is_counted_outside_strings(value: Any, indented: bool) -> None:
    """Quotes, escapes and brackets in strings do not count, wherever they are."""
    encoded = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indented else 0)
    assert structure_of(encoded) == Structure(*counted(value))


def test_structure_is_counted_across_pieces() -> None:
    """A string that begins in one piece and ends in the next is one."""
    text = "[{," * 500_000
    encoded = orjson.dumps([text, {"a": text}, []])
    assert structure_of(encoded) == Structure(3, 1, 2)


@pytest.mark.parametrize(
    ("unit", "number", "what"),
    [
        (b"[]", MAX_CONTAINERS + 1, "objects and lists"),
        (b"{}", MAX_CONTAINERS + 1, "objects and lists"),
        (b'{"a":[{}]}', MAX_CONTAINERS // 3 + 1, "objects and lists"),
        (b'{"a":1,"b":1,"c":1,"d":1,"e":1}', MAX_MEMBERS // 5 + 1, "members"),
        (b"1", MAX_ELEMENTS + 2, "elements"),
    ],
)
def test_a_body_of_too_many_pieces_is_refused(unit: bytes, number: int, what: str) -> None:
    """Before it is decoded, by what it would decode to; as many as allowed pass."""

    def body(number: int) -> bytes:
        return b'{"model":"m","x":[' + b",".join([unit] * number) + b"]}"

    with pytest.raises(RouterError, match=what) as raised:
        check_structure(body(number))
    assert (raised.value.reason, raised.value.status) == (Reason.BODY_TOO_LARGE, 413)
    check_structure(body(number - number // 50))


@pytest.mark.parametrize(
    ("fields", "heavy"),
    [
        ({"prompt": [100_000] * 1_000_000}, True),
        ({"messages": [{"role": "user", "content": "x" * 20_000_000}]}, True),
        ({"messages": [{"role": "user", "content": "f(x) { return [x], {} }\n" * 9}] * 2000}, False),
        ({"messages": [{"role": "user", "content": "(x, y) \\" * 60_000}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "ok"}]}] * 50_000}, True),
    ],
)
def test_what_agents_send_is_never_refused(fields: dict[str, Any], heavy: bool) -> None:
    """A million ids, media, code in many turns, and the smallest blocks that fill a context."""
    body = orjson.dumps({"model": "m", **fields})
    check_structure(body)
    assert is_heavy(body) is heavy
    assert is_heavy(memoryview(body)) is heavy


@given(st.sampled_from([b"[]", b"{}", b'"', b"\\", b'\\"', b",", b"x"]), st.integers(0, 3))
def test_any_bytes_are_counted(unit: bytes, more: int) -> None:
    """What is no JSON has some count or other, and is refused where it is decoded."""
    body = (unit * (LIGHT_BYTES * 2 // len(unit)))[: LIGHT_BYTES + more]
    assert is_heavy(memoryview(body)) is is_heavy(body)
    check_structure(body)
