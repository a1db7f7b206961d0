"""What others say in types that nobody expects is read or refused, alike in both builds.

Compiled code takes no argument of another type than its annotation, a TypeError, where the interpreter
goes on. So what comes from outside goes through here in every type that its wire has, to where it is used.
`make test-compiled` runs the same tests on the other build.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.accesslog.lines import read_line
from extproc.accesslog.usage import MAX_TOKENS, read_usage
from extproc.config.loading import parse as parse_config
from extproc.errors import ConfigError, RouterError
from extproc.health.facts import engine_facts
from extproc.observing.explain import to_json, verdict
from extproc.request.parse import INFERENCE_PATHS
from extproc.routing.engines import Engines
from extproc.server.reloading.request_settings import router_settings
from metadata_center.load.counters import Counters
from metadata_center.sharing.lines import heard
from metadata_center.sharing.messages import MessageError, decode
from metadata_center.types import EndpointKey
from tests.conftest import MODEL, OWNER, build_rig, decided, endpoint, request_line
from tests.unit.log_lines import line

KEY = endpoint(0).key

NUMBERS = [
    *(0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**25, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 3.0, -2.5, 1e18, 1e19, 1e300, 5e-324),
]
SIMPLE = [None, True, False, *NUMBERS, "", "1", "1.5", "text", "é", "\x00", "true", "nan"]
ODD = st.recursive(
    st.sampled_from(SIMPLE),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "id", "function", "name", "url", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)

PART = {"type": "text", "text": "hi", "cache_control": None, "image_url": {"url": "data:image/png;base64,AA"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TURN = {"role": "user", "content": [PART], "tool_calls": [CALL], "name": "n", "reasoning_content": "r"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}, "strict": True}}
BODY: dict[str, Any] = {
    "model": MODEL,
    "stream": False,
    "messages": [TURN, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "input": [TURN, {"type": "function_call_output", "call_id": "c", "output": [PART]}],
    "prompt": [1, 2, 3],
    "query": "q",
    "documents": ["a", {"text": "b"}],
    "text_1": "a",
    "text_2": ["b"],
    "data": None,
    "system": [PART],
    "instructions": "be brief",
    "tools": [TOOL],
    "reasoning": {"effort": "low"},
    "reasoning_effort": "low",
    "chat_template": None,
    "chat_template_kwargs": {"a": 1},
    "add_special_tokens": None,
    "add_generation_prompt": None,
    "continue_final_message": None,
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "max_output_tokens": 5,
    "cache_salt": "s",
    "stream_options": {"include_usage": False},
    "vllm_xargs": {"kv_transfer_params": {}},
    "priority": 1,
    "previous_response_id": "resp_1",
    "conversation": {"id": "c"},
    "n": 1,
    "user": "u",
}


def paths_into(value: Any, here: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Of every value within one."""
    found = [here] if here else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        found += paths_into(each, (*here, name))
    return found


def with_odd(value: Any, odd: Mapping[tuple[str | int, ...], Any], here: tuple[str | int, ...] = ()) -> Any:
    """A copy with other values at some paths."""
    if here in odd:
        return odd[here]
    if isinstance(value, dict):
        return {name: with_odd(each, odd, (*here, name)) for name, each in value.items()}
    if isinstance(value, list):
        return [with_odd(each, odd, (*here, number)) for number, each in enumerate(value)]
    return value


BODIES = st.dictionaries(st.sampled_from(paths_into(BODY)), ODD, max_size=4).map(
    lambda odd: json.dumps(with_odd(BODY, odd)).encode()
)
"""With integers of any size, which orjson would not write."""


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(INFERENCE_PATHS), body=BODIES, stream=st.booleans())
def test_a_body_is_decided_or_refused(path: str, body: bytes, stream: bool) -> None:
    """Through reading, cleaning, the choice, its record and its end."""
    rig = build_rig()
    form = {"content_type": "multipart/form-data; boundary=b"} if "audio" in path else {}
    try:
        decision = decided(rig.gateway.decide(request_line("r", path, **form), body))
    except RouterError:
        return
    assert decision.plan.endpoints
    rig.gateway.first_token("r", late=stream)
    rig.end("r")
    assert rig.load(rig.chosen()) == (0, 0, 0)


COUNT = st.sampled_from([*SIMPLE, [], {}, [1], {"cached_tokens": 1.0}])
USAGE = st.dictionaries(
    st.sampled_from(
        [
            *("prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens"),
            *("cached_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
            *("prompt_tokens_details", "input_tokens_details"),
        ]
    ),
    COUNT | st.dictionaries(st.just("cached_tokens"), COUNT),
).map(json.dumps)


@settings(max_examples=300, deadline=None)
@given(
    top=USAGE | st.just("-"),
    nested=USAGE | st.just("-"),
    error=st.just("-") | ODD.map(json.dumps),
    numbers=st.dictionaries(
        st.sampled_from(["attempts", "status", "ttft_us", "stream_us", "duration_us", "received", "sent"]),
        st.sampled_from(["-", "", "0", "1", "-1", "1.5", "1e3", "nan", "inf", "9" * 30, "٣", "0x1", " 1"]),
    ),
)
def test_an_end_is_learned_from(top: str, nested: str, error: str, numbers: dict[str, str]) -> None:
    """Whatever an engine counted and Envoy wrote: every count is an integer within bounds, or unknown."""
    assert all(
        each is None or (type(each) is int and 0 <= each < 3 * MAX_TOKENS) for each in read_usage(top, nested)
    )
    rig = build_rig()
    decided(rig.gateway.decide(request_line("r"), json.dumps(BODY).encode()))
    event = read_line(line(rid="r", owner=OWNER, top=top, nested=nested, error=error, **numbers), None)
    if event is not None:
        rig.ends.take(event, rig.clock())
    rig.decide("next")


METRICS = (
    "vllm:num_requests_running{{}} {}\nvllm:num_requests_waiting{{}} {}\nvllm:kv_cache_usage_perc{{}} {}\n"
    "vllm:prompt_tokens_total{{}} {}\nprocess_start_time_seconds {}\n"
    'vllm:cache_config_info{{block_size="{}",num_gpu_blocks="{}"}} {}\n'
)
SAMPLE = st.sampled_from(
    [
        "0",
        "1",
        "3",
        "-1",
        "0.5",
        "1e3",
        "1E6",
        "1e300",
        "NaN",
        "+Inf",
        "-Inf",
        "",
        "x",
        "1_000",
        "٣",
        "9" * 40,
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(*[SAMPLE] * 8), min_size=1, max_size=4))
def test_readings_of_an_engine_are_kept(pages: list[tuple[str, ...]]) -> None:
    """Whatever its page of metrics says: its limit is an integer, and others stay as they are."""
    engines = Engines()
    engines.configure(KEY, "vllm/", 0)
    for page in pages:
        facts = engine_facts(METRICS.format(*page).encode())
        if facts.kv_tokens is not None:
            engines.observe_kv_tokens(KEY, facts.kv_tokens)
        if facts.occupancy is not None:
            said = facts.occupancy
            engines.observe_occupancy(
                KEY, said.running, said.waiting, said.kv_usage_ratio, said.started_s, said.prompt_tokens
            )
    assert type(engines.sequence_limit(KEY)[0]) is int


WIRE = st.recursive(
    st.sampled_from(
        [None, True, 0, 1, -1, 2**53, 2**64 - 1, 0.5, 1.0, float("inf"), "", str(KEY), b"", bytes(16)]
    ),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    sequence=WIRE,
    amounts=st.lists(WIRE, max_size=6),
    full=WIRE,
    lease_s=WIRE,
    blocks=WIRE,
    row=WIRE,
    work=WIRE,
)
def test_a_message_of_another_gateway_is_counted_or_refused(
    sequence: Any, amounts: list[Any], full: Any, lease_s: Any, blocks: Any, row: Any, work: Any
) -> None:
    """MessagePack of any types in the place of an update's fields."""
    for rows in ([[KEY, *amounts]], row):
        message = [1, f"{OWNER}/0/x", sequence, rows, full, lease_s, blocks, False, work]
        try:
            update = decode(msgspec.msgpack.encode(message))
            lines = heard(update.line or (), 1.0)
        except MessageError:
            continue
        counters = Counters()
        others = {each.endpoint: each.amounts for each in update.rows}
        counters.add_others(lambda key, others=others: others.get(key, (0,) * 5))  # type: ignore[misc]
        slots = counters.slots([EndpointKey(KEY)])
        for key, said in others.items():
            counters.set_others(key, said)
        assert all(int(column[0]) >= 0 for column in counters.totals(slots))
        assert counters.decoding(KEY) <= 2**53
        rig = build_rig()
        for chain in update.blocks:
            rig.history.record(chain.endpoint, chain.blocks())
        assert type(lines) is list


@pytest.mark.parametrize(
    "number", ["1", "2.0", "1e0", "true", "'1'", "0x1", "1_0", ".inf", ".nan", "null", "[1]"]
)
@pytest.mark.parametrize(
    "setting",
    [
        "signals: {{timeout_s: {}}}",
        "signals: {{first_byte_timeout_s: {}}}",
        "holding: {{max_s: {}}}",
        "holding: {{max_requests: {}}}",
        "request: {{block_bytes: 6{}}}",
        "signals: {{first_chunk: {}}}",
        "holding: {{enabled: {}}}",
        "holding: {{fairness: {}}}",
    ],
)
def test_a_setting_is_used_or_refused(setting: str, number: str) -> None:
    """YAML has many ways to write a number."""
    text = setting.format(number)
    try:
        config = parse_config(text, "tokenway.yaml")
    except ConfigError:
        return
    rig = build_rig(settings=router_settings(config))
    assert decided(rig.gateway.decide(request_line("r"), json.dumps(BODY).encode())).plan.endpoints


def as_jq_writes(value: Any) -> Any:
    """JSON whose whole numbers have no point, as several tools leave it."""
    if isinstance(value, dict):
        return {name: as_jq_writes(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_jq_writes(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize("num_endpoints", [3, 64], ids=["loop", "arrays"])
def test_a_record_that_a_tool_has_written_anew_is_explained(num_endpoints: int) -> None:
    """`tokenway explain FILE` makes the decision again."""
    rig = build_rig([endpoint(number) for number in range(num_endpoints)])
    for number in range(5):
        rig.decide(f"r{number}", json.dumps(BODY).encode())
        record = as_jq_writes(to_json(rig.record(f"r{number}")))
        assert verdict(record) == "recomputed: same choice"
