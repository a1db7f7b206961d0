"""The lines of Envoy's access log become the values that its fields become; any text gives one or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2
from hypothesis import given
from hypothesis import strategies as st

from extproc.accesslog.entries import LINE_TAG, translate
from extproc.accesslog.lines import FIELDS, SEPARATOR, read_line
from extproc.server.envoys.bootstrap import template
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from extproc.values.evidence import FailureKind
from extproc.values.outcomes import Ended
from metadata_center.addresses import Address
from metadata_center.types import RequestId
from tests.conftest import OWNER
from tests.unit.log_lines import NAMES, PLAIN, line

AT = Address("10.0.0.1", 8000)


def ended(**changes: str) -> RequestEnd:
    """The line, which must be an end."""
    value = read_line(line(**changes), None)
    assert isinstance(value, RequestEnd)
    return value


def test_envoy_writes_the_lines_that_are_read() -> None:
    """Both loggers of the shipped bootstrap write every field, in the order in which they are read."""
    manager = template()["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    router = manager["http_filters"][-1]["typed_config"]
    loggers = [*manager["access_log"], *router["upstream_log"]]
    tags = [each["typed_config"]["common_config"]["custom_tags"] for each in loggers]
    assert [[tag["value"] for tag in each if tag["tag"] == LINE_TAG] for each in tags] == [
        [SEPARATOR.join(FIELDS)]
    ] * 2
    assert len(FIELDS) == len(NAMES)


def test_an_end_is_read_whole() -> None:
    """Every value of an ending comes from its own field, in seconds, bytes and tokens."""
    usage = '{"prompt_tokens":101,"completion_tokens":20,"prompt_tokens_details":{"cached_tokens":64}}'
    assert ended(
        attempts="2",
        flags="DC,UT",
        ttft_us="250000",
        stream_us="1000000",
        top=usage,
        duration_us="1500000",
        content_type="text/event-stream",
        error='{"seen":"1","code":429.0}',
    ) == RequestEnd(
        request_id=RequestId("r"),
        owner=OWNER,
        address=AT,
        attempts=2,
        status=200,
        ended=Ended.CLIENT_ABORT,
        details="via_upstream",
        flags=("DC", "UT"),
        ttft_s=0.25,
        duration_s=1.5,
        stream_s=1.0,
        request_bytes=11,
        response_bytes=22,
        prompt_tokens=101,
        completion_tokens=20,
        cached_tokens=64,
        error="429",
    )


def test_what_did_not_happen_is_absent() -> None:
    """A request that nobody decided and that was never sent upstream ends all the same."""
    value = ended(owner="-", address="-", attempts="0", status="0", details="-", duration_us="-")
    assert (value.owner, value.address, value.attempts, value.status) == (None, None, 0, 0)
    assert (value.ended, value.details, value.flags) == (Ended.CLIENT_ABORT, "", ())
    assert (value.ttft_s, value.stream_s, value.prompt_tokens) == (None, None, None)
    assert (value.error, value.usage_unseen) == (None, "")
    assert value.duration_s == 0.5  # a client that left has no last byte


def test_a_stream_without_tokens_has_no_length() -> None:
    """How long it took says nothing without the tokens that it had."""
    assert ended(ttft_us="1", stream_us="2").stream_s is None
    assert ended(ttft_us="-", stream_us="2", top='{"completion_tokens":2}').stream_s is None


@pytest.mark.parametrize(
    ("status", "flags", "details", "expected"),
    [
        ("200", "-", "via_upstream", Ended.COMPLETED),
        ("503", "UH", "no_healthy_upstream", Ended.UPSTREAM_ERROR),
        ("504", "UT", "upstream_response_timeout", Ended.TIMEOUT),
        ("200", "UC", "upstream_reset_after", Ended.UPSTREAM_RESET),
        ("500", "-", "upstream_reset_after_response_started{x}", Ended.UPSTREAM_RESET),
        ("400", "-", "tokenway_invalid_json", Ended.REJECTED),
        ("200", "-", "tokenway_answer", Ended.COMPLETED),
    ],
)
def test_endings_are_told_apart(status: str, flags: str, details: str, expected: Ended) -> None:
    """As by the fields of an entry."""
    assert ended(status=status, flags=flags, details=details).ended is expected


@pytest.mark.parametrize(
    ("status", "flags", "expected"),
    [
        ("200", "-", None),
        ("404", "-", None),
        ("429", "-", FailureKind.OVERLOADED),
        ("0", "DC", None),
        ("503", "-", FailureKind.SERVER_ERROR),
        ("503", "UF,URX", FailureKind.CONNECT_FAILURE),
        ("0", "UC", FailureKind.RESET),
        ("200", "UR", FailureKind.RESET),
        ("502", "UPE", FailureKind.RESET),
        ("504", "UT", FailureKind.FIRST_BYTE_TIMEOUT),
    ],
)
def test_only_what_says_something_bad_of_an_endpoint_is_a_failure(
    status: str, flags: str, expected: FailureKind | None
) -> None:
    """What Envoy tries again elsewhere was a failure there; a client that left was none."""
    value = read_line(line(kind="UpstreamEnd", status=status, flags=flags), None)
    assert value == (None if expected is None else AttemptFailed(RequestId("r"), OWNER, AT, expected))


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("delayed connect error: Connection refused", FailureKind.CONNECT_FAILURE),
        (
            "TLS_error:|268435703:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER",
            FailureKind.CONNECT_FAILURE,
        ),
        ("", FailureKind.CONNECT_TIMEOUT),
    ],
)
def test_a_connection_that_was_refused_is_no_time_out(reason: str, expected: FailureKind) -> None:
    """Envoy says why a connection was not made, unless nobody said so in time."""
    entry = accesslog_pb2.HTTPAccessLogEntry()
    common = entry.common_properties
    common.access_log_type = accesslog_pb2.UpstreamEnd
    common.custom_tags.update({"rid": "r", "owner": OWNER})
    common.upstream_remote_address.socket_address.address = AT.host
    common.upstream_remote_address.socket_address.port_value = AT.port
    common.response_flags.upstream_connection_failure = True
    common.upstream_transport_failure_reason = reason
    assert translate(entry) == AttemptFailed(RequestId("r"), OWNER, AT, expected)
    common.custom_tags[LINE_TAG] = line(kind="UpstreamEnd", status="503", flags="UF,URX")
    assert translate(entry) == AttemptFailed(RequestId("r"), OWNER, AT, expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "UpstreamPoolReady"}, AttemptStarted(RequestId("r"), OWNER, AT)),
        ({"kind": "UpstreamPoolReady", "address": "-"}, None),
        ({"kind": "UpstreamEnd", "status": "503", "address": "-"}, None),
        ({"kind": "DownstreamPeriodic"}, RequestAlive(RequestId("r"), OWNER)),
        ({"kind": "DownstreamStart"}, None),
        ({"rid": "-"}, None),
        ({"rid": ""}, None),
    ],
)
def test_each_kind_of_entry_is_its_own_value(changes: dict[str, str], expected: RequestEvent | None) -> None:
    """What was not asked for, or is nobody's, tells nothing."""
    assert read_line(line(**changes), None) == expected


def test_ipv6_addresses_have_one_spelling() -> None:
    """However it is written, it is the address that the fleet has."""
    assert ended(address="[fd00:0::1]:8000").address == Address("fd00::1", 8000)


@pytest.mark.parametrize("ttft_us", ["-1", "86400000001", "9" * 400, "nan", "1e9", "", "x", "1.5"])
def test_times_that_no_request_takes_are_absent(ttft_us: str) -> None:
    """A negative time to the first token, one of more than a day, or none."""
    assert ended(ttft_us=ttft_us).ttft_s is None


def test_usage_is_read_in_both_places() -> None:
    """What Envoy found at the end of an answer, and in the beginning of a stream, is one usage."""
    value = ended(top='{"output_tokens": 7}', nested='{"input_tokens": 36, "cache_read_input_tokens": 64}')
    assert (value.prompt_tokens, value.completion_tokens, value.cached_tokens) == (100, 7, 64)
    assert ended(unseen="encoded").usage_unseen == "encoded"


def test_an_engine_changes_nothing_but_what_is_its_own() -> None:
    """Whatever it writes into its usage object, nothing that Envoy counts is another."""
    forged = SEPARATOR.join(["{}", *PLAIN.values()])
    value = ended(top=forged)
    assert value == ended(top="{}")


def test_a_line_of_another_version_tells_nothing() -> None:
    """One with fewer fields than ours."""
    assert read_line(line().rpartition(SEPARATOR)[0], None) is None


@given(st.lists(st.text(), min_size=len(NAMES), max_size=len(NAMES)), st.sampled_from(["", "DownstreamEnd"]))
def test_no_line_is_too_strange(fields: list[str], kind: str) -> None:
    """Any text is a value or None."""
    fields[0] = kind or fields[0]
    value = read_line(SEPARATOR.join(fields), None)
    assert value is None or value.request_id


@given(**{name: st.text(max_size=8) for name in NAMES if name not in ("kind", "rid")})
def test_no_end_is_too_strange(**fields: str) -> None:
    """Nor is any end, whatever is in the other fields."""
    assert isinstance(read_line(line(**fields), None), RequestEnd)


def test_an_entry_with_a_line_is_read_by_it() -> None:
    """Whatever its other fields say; its content type comes from the header that Envoy made text of."""
    entry = accesslog_pb2.HTTPAccessLogEntry()
    entry.common_properties.custom_tags.update({"rid": "another", "line": line()})
    entry.response.response_headers["content-type"] = "text/event-stream"
    assert translate(entry) == replace(ended(), content_type="text/event-stream")
