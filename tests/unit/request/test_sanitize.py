"""What is taken out of a body, what stays, and the gateway's own edits."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.request.sanitize import (
    STEERING_FIELDS,
    STEERING_HEADERS,
    STEERING_XARGS,
    encode,
    force_usage,
    rewrite_model,
    sanitize,
)
from extproc.values.requests import Operation

NOTHING: frozenset[str] = frozenset()
QUALIFIED_XARGS = tuple(f"vllm_xargs.{key}" for key in STEERING_XARGS)
HARMLESS = ("model", "messages", "cache_salt", "extra_key", "session_id", "seed", "Priority")


def nested(levels: int) -> list[Any]:
    """Lists in lists, `levels` deep."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize("name", STEERING_FIELDS)
def test_a_steering_field_is_removed_unless_allowed(name: str) -> None:
    """Each steering field goes and is named; allowed by name, it stays."""
    body = {"model": "m", name: 1}
    assert sanitize(body, frozenset({name})) == ()
    assert body == {"model": "m", name: 1}
    assert sanitize(body, NOTHING) == (name,)
    assert body == {"model": "m"}


@pytest.mark.parametrize("key", STEERING_XARGS)
def test_a_steering_extra_argument_is_removed_unless_allowed(key: str) -> None:
    """`vllm_xargs` is no side door; its other keys stay."""
    body = {"vllm_xargs": {key: "x", "mine": 1}}
    assert sanitize(body, frozenset({f"vllm_xargs.{key}"})) == ()
    assert sanitize(body, frozenset({key})) == (f"vllm_xargs.{key}",)
    assert body == {"vllm_xargs": {"mine": 1}}


@pytest.mark.parametrize("xargs", [None, 3, "kv_transfer_params", ["kv_transfer_params"], {}])
def test_extra_arguments_of_any_type_pass(xargs: object) -> None:
    """A `vllm_xargs` that holds nothing to remove is the engine's to judge."""
    body = {"vllm_xargs": xargs}
    assert sanitize(body, NOTHING) == ()
    assert body == {"vllm_xargs": xargs}


def test_names_are_reported_in_table_order() -> None:
    """The report does not depend on the order the client wrote the fields in."""
    body = {"vllm_xargs": {"kv_cache_report_mode": "full"}, "rid": "r", "priority": -9}
    assert sanitize(body, NOTHING) == ("priority", "rid", "vllm_xargs.kv_cache_report_mode")


@given(
    st.dictionaries(st.sampled_from(STEERING_FIELDS + HARMLESS), st.integers()),
    st.dictionaries(st.sampled_from((*STEERING_XARGS, "mine")), st.integers()),
    st.frozensets(st.sampled_from(STEERING_FIELDS + QUALIFIED_XARGS)),
)
def test_exactly_the_steering_fields_not_allowed_disappear(
    fields: dict[str, Any], xargs: dict[str, Any], allowed: frozenset[str]
) -> None:
    """What is reported is what is gone, all of it steering and not allowed; the rest is untouched."""
    body = {**fields, "vllm_xargs": xargs}
    before = copy.deepcopy(body)
    removed = sanitize(body, allowed)
    present = set(fields) | {f"vllm_xargs.{key}" for key in before["vllm_xargs"]}
    assert set(removed) == (present & {*STEERING_FIELDS, *QUALIFIED_XARGS}) - allowed
    assert len(removed) == len(set(removed))
    for name in removed:
        del (before["vllm_xargs"] if "." in name else before)[name.removeprefix("vllm_xargs.")]
    assert body == before
    assert sanitize(body, allowed) == ()


def test_steering_headers_are_distinct_and_lower_case() -> None:
    """Envoy names headers in lower case, so the table must."""
    assert len(set(STEERING_HEADERS)) == len(STEERING_HEADERS)
    assert all(name == name.lower().strip() for name in STEERING_HEADERS)


def test_rewriting_the_model_says_whether_it_changed() -> None:
    """The body then asks for the new name and nothing else differs."""
    body = {"model": "alias", "n": 1}
    assert rewrite_model(body, "real") is True
    assert rewrite_model(body, "real") is False
    assert body == {"model": "real", "n": 1}


@pytest.mark.parametrize(
    ("operation", "body", "changed", "options"),
    [
        (Operation.CHAT, {"stream": True}, True, {"include_usage": True}),
        (Operation.TEXT_COMPLETION, {"stream": True, "stream_options": None}, True, {"include_usage": True}),
        (
            Operation.CHAT,
            {"stream": True, "stream_options": {"include_usage": False, "continuous_usage_stats": True}},
            True,
            {"include_usage": True, "continuous_usage_stats": True},
        ),
        (
            Operation.CHAT,
            {"stream": True, "stream_options": {"include_usage": True}},
            False,
            {"include_usage": True},
        ),
        (Operation.CHAT, {"stream": True, "stream_options": "yes"}, False, "yes"),
        (Operation.CHAT, {"stream": False}, False, None),
        (Operation.CHAT, {}, False, None),
        (Operation.RESPONSES, {"stream": True}, False, None),
        (Operation.MESSAGES, {"stream": True}, False, None),
    ],
)
def test_usage_is_forced_only_where_it_would_not_come(
    operation: Operation, body: dict[str, Any], changed: bool, options: object
) -> None:
    """Streamed chat and text completions get `include_usage`; other options are kept."""
    assert force_usage(body, operation) is changed
    assert body.get("stream_options") == options


def test_encoding_keeps_the_order_of_keys() -> None:
    """The engine sees the fields in the order the client wrote them."""
    assert encode({"b": 1, "a": "é"}) == '{"b":1,"a":"é"}'.encode()


def test_encoding_refuses_what_it_cannot_write() -> None:
    """254 levels are written; what orjson can read but not write is the client's fault, by name."""
    assert encode(nested(254)) == b"[" * 254 + b"]" * 254
    with pytest.raises(RouterError) as raised:
        encode(orjson.loads(b"[" * 255 + b"]" * 255), "tools")
    assert (raised.value.reason, raised.value.param) == (Reason.INVALID_REQUEST, "tools")
