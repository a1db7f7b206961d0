"""Log lines: complete, parseable, and silent about content."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.config.schema import Config
from extproc.errors import Reason, RouterError
from extproc.observing.request_log import (
    REQUEST_LOGGER,
    WITHHELD,
    JsonFormatter,
    RequestLog,
    block_key,
    keyed_blocks,
    log_request_end,
)
from extproc.server.reloading.request_settings import block_key_of
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.decisions import DecisionRecord
from extproc.values.outcomes import Ended, Outcome
from extproc.values.requests import Operation
from metadata_center.types import EndpointKey, RequestId
from tests.request_lines import request_lines
from tests.unit.ended import ending, refusal, sent

CANARY = "sk-canary-7f3a"
RECORD = DecisionRecord(
    request_id=RequestId("r-1"),
    time_unix_s=1.0,
    data_age_s={},
    operation=Operation.CHAT,
    model="m",
    cluster="c",
    settings=LoadBalancing(algorithm=Algorithm.INFERENCE_LB),
    decision_us=41.26,
)
OUTCOME = Outcome(
    Ended.COMPLETED,
    1.5,
    EndpointKey("10.0.0.1:8000"),
    attempts=1,
    status=200,
    ttft_s=0.25,
    cached_tokens=32,
    predicted_ttft_s=0.2,
    response_flags=("UC", "URX"),
)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the request logger writes, formatted as in production."""
    with request_lines() as stream:
        yield stream


def formatted(**extra: object) -> str:
    """One line with these `extra=` keys."""
    logger = logging.getLogger("test")
    return JsonFormatter().format(
        logger.makeRecord("test", logging.INFO, "", 0, "event %d", (7,), None, extra=extra)
    )


def test_an_ended_request_leaves_one_line_with_its_numbers(written: io.StringIO) -> None:
    """One JSON line with a constant event and the request's identity, place, times and prediction."""
    log_request_end(RECORD, OUTCOME)
    (text,) = written.getvalue().splitlines()
    line = json.loads(text)
    expected = {
        "level": "INFO",
        "logger": "tokenway.request",
        "event": "request ended",
        "request_id": "r-1",
        "operation": "chat",
        "model": "m",
        "cluster": "c",
        "algorithm": "inference_lb",
        "endpoint": "10.0.0.1:8000",
        "outcome": "completed",
        "status": 200,
        "ttft_ms": 250.0,
        "predicted_ttft_ms": 200.0,
        "duration_ms": 1500.0,
        "cached_tokens": 32,
        "prompt_tokens": None,
        "decision_us": 41.3,
        "flags": "UC,URX",
        "rejected": None,
    }
    assert {key: line[key] for key in expected} == expected
    also = {"time", "upstream_model", "route", "stream", "chosen", "attempts", "details", "completion_tokens"}
    also |= {"predicted_cached_tokens", "request_bytes", "response_bytes", "held_ms", "held_for"}
    assert set(line) == set(expected) | also, "the keys are a closed list"


def test_a_rejected_request_is_logged_with_its_reason(written: io.StringIO) -> None:
    """A refusal appears with its code, before any model or endpoint was known."""
    refused = DecisionRecord(
        request_id=RequestId("r"), time_unix_s=1.0, data_age_s={}, rejected=Reason.INVALID_JSON
    )
    log_request_end(refused, Outcome(Ended.REJECTED, 0.001, status=400))
    line = json.loads(written.getvalue())
    assert (line["rejected"], line["outcome"], line["endpoint"]) == ("invalid_json", "rejected", None)


def test_long_text_is_cut(written: io.StringIO) -> None:
    """Neither a client's model name nor a peer's error text can fill the log."""
    long = DecisionRecord(request_id=RequestId("r"), time_unix_s=1.0, data_age_s={}, model="m" * 10_000)
    log_request_end(long, Outcome(Ended.UPSTREAM_RESET, 1.0, details="d" * 10_000))
    line = json.loads(written.getvalue())
    assert (line["model"], line["details"]) == ("m" * 256, "d" * 256)


def test_nothing_is_written_when_the_logger_is_off(written: io.StringIO) -> None:
    """Above INFO the request line does not exist."""
    logging.getLogger(REQUEST_LOGGER).setLevel(logging.WARNING)
    log_request_end(RECORD, OUTCOME)
    assert written.getvalue() == ""


@pytest.mark.parametrize(
    "name", ["prompt", "headers", "Authorization", "api_key", "cookie", "body", "token", "secret", "password"]
)
def test_values_under_names_of_secrets_are_withheld(name: str) -> None:
    """Whatever a call site passes as a prompt, a header or a credential does not reach the line."""
    text = formatted(**{name: {"x": CANARY}}, endpoint="e")
    assert CANARY not in text
    assert json.loads(text)[name] == WITHHELD
    assert json.loads(text)["endpoint"] == "e"


def test_an_exception_shows_type_and_stack_but_not_what_it_quotes() -> None:
    """Messages of foreign exceptions may quote a request, so only ours and the system's are shown."""
    try:
        try:
            raise KeyError(CANARY)
        except KeyError as exc:
            raise RouterError(Reason.INTERNAL, "the answer was lost") from exc
    except RouterError as exc:
        record = logging.LogRecord("test", logging.ERROR, "", 0, "failed", (), (type(exc), exc, None))
        text = JsonFormatter().format(record)
        record.exc_info = (type(exc), exc, exc.__traceback__)
        line = json.loads(JsonFormatter().format(record))
    assert CANARY not in text
    assert json.loads(text)["error"]["types"] == ["RouterError", "KeyError"]
    assert line["error"]["messages"] == ["the answer was lost"]
    assert line["error"]["stack"][-1].endswith(
        "test_an_exception_shows_type_and_stack_but_not_what_it_quotes"
    )


def test_a_circle_of_causes_ends() -> None:
    """An exception that is its own cause is shown up to the bound."""
    first, second = ValueError("a"), TypeError("b")
    first.__cause__, second.__cause__ = second, first
    record = logging.LogRecord("test", logging.ERROR, "", 0, "failed", (), (ValueError, first, None))
    assert len(json.loads(JsonFormatter().format(record))["error"]["types"]) == 8


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.builds(object),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.tuples(st.integers()), inner),
    max_leaves=6,
)


@given(json_values)
def test_any_value_gives_exactly_one_parseable_line(value: object) -> None:
    """No extra value (surrogate, huge integer, object, line break) breaks the one-object-per-line form."""
    text = formatted(value=value)
    assert "\n" not in text
    assert json.loads(text)["event"] == "event 7"


def test_objects_are_shown_by_type() -> None:
    """An object in an extra shows its type's name, never its repr, which could hold anything."""

    class Holder:
        def __repr__(self) -> str:
            return CANARY

    assert json.loads(formatted(value=Holder()))["value"] == "<Holder>"


def test_prompt_blocks_are_logged_only_under_a_key(written: io.StringIO) -> None:
    """With a key the line also has the prompt's length, the blocks' size and their keyed hashes."""
    record = replace(RECORD, prompt_bytes=1200, block_bytes=512)
    log_request_end(record, OUTCOME, [1, 2])
    log_request_end(record, OUTCOME, [1, 2], block_key(CANARY))
    plain, keyed = map(json.loads, written.getvalue().splitlines())
    assert "prompt_blocks" not in plain
    assert {key: keyed[key] for key in keyed.keys() - plain.keys()} == {
        "prompt_bytes": 1200,
        "block_bytes": 512,
        "prompt_blocks": keyed_blocks([1, 2], block_key(CANARY)),
    }
    assert CANARY not in written.getvalue()


def test_the_log_listens_to_endings_as_it_is_configured(written: io.StringIO) -> None:
    """On without blocks until it is configured otherwise; a refusal has no blocks to log."""
    log, request = RequestLog(), sent()
    log.ended(ending(request))
    log.configure(is_on=True, key=block_key(CANARY))
    log.ended(ending(request))
    log.ended(refusal())
    log.configure(is_on=False, key=None)
    log.ended(ending(request))
    plain, keyed, refused = map(json.loads, written.getvalue().splitlines())
    assert "prompt_blocks" not in plain
    assert keyed["prompt_blocks"] == keyed_blocks(request.blocks, block_key(CANARY))
    assert refused["prompt_blocks"] == []


def test_keyed_blocks_are_equal_where_key_and_block_are() -> None:
    """Two gateways of one secret agree; another secret shares nothing; a common beginning stays one."""
    one, other = block_key(CANARY), block_key(CANARY + "!")
    assert keyed_blocks([5, 6, 7], one)[:2] == keyed_blocks([5, 6, 8], one)[:2]
    assert keyed_blocks([7], one) != keyed_blocks([8], one)
    assert not set(keyed_blocks(range(100), one)) & set(keyed_blocks(range(100), other))
    assert not set(keyed_blocks(range(100), one)) & set(range(100))


def test_keyed_blocks_are_numbers_that_json_keeps_and_not_too_many() -> None:
    """At most 2,048 of 53 bits, whatever the prompt."""
    hashes = keyed_blocks(range(2**64 - 5_000, 2**64), block_key(CANARY))
    assert len(hashes) == 2048
    assert all(0 <= value < 2**53 for value in hashes)
    assert max(hashes) > 2**52


@pytest.mark.parametrize(
    ("on", "secret", "keyed"),
    [
        (True, CANARY + "-and-more", True),
        (True, "short", False),
        (True, None, False),
        (False, CANARY * 2, False),
    ],
)
def test_a_worker_logs_blocks_only_with_a_good_secret(
    monkeypatch: pytest.MonkeyPatch, on: bool, secret: str | None, keyed: bool
) -> None:
    """The option alone is not enough: without a secret of 16 characters the lines stay as they are."""
    monkeypatch.delenv("TOKENWAY_LOG_KEY", raising=False)
    if secret is not None:
        monkeypatch.setenv("TOKENWAY_LOG_KEY", secret)
    key = block_key_of(Config.model_validate({"logging": {"prompt_blocks": on}}))
    assert key == (block_key(secret) if keyed and secret else None)


@pytest.mark.parametrize(
    "text", ["\x9b2J", "\x7f", "\u202egnp.exe", "\u2028", "caf\u00e9 \x85", "\x1b[2J\n", "\ud800\x9b"]
)
def test_controls_are_escaped_and_read_back(text: str) -> None:
    """No terminal acts on a log line, whichever encoder wrote it, and a reader gets what was logged."""
    record = logging.LogRecord("tokenway.x", logging.INFO, "", 0, "event", (), None)
    record.__dict__["model"] = text
    line = JsonFormatter().format(record)
    assert not any(char in line for char in "\x7f\x85\x9b\u2028\u202e\x1b\n")
    assert json.loads(line)["model"] == text
