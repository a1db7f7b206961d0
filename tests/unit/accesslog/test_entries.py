"""Envoy's access-log entries become values: endings distinguished, times and usage read, nonsense ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from extproc.accesslog.entries import failure_kind, translate
from extproc.accesslog.meanings import ended_how, refused_by_envoy
from extproc.accesslog.service import Dispatcher
from extproc.errors import Reason
from extproc.observing.metrics.collector import Metrics
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from extproc.values.evidence import FailureKind
from extproc.values.outcomes import Ended
from metadata_center.addresses import Address
from metadata_center.types import RequestId
from tests.conftest import OWNER, request_end

AT = Address("10.0.0.1", 8000)


def logged(
    log_type: int = pb.DownstreamEnd,
    *,
    status: int = 200,
    flags: tuple[str, ...] = (),
    details: str = "via_upstream",
    tags: dict[str, str] | None = None,
    address: str = "10.0.0.1",
    usage: dict[str, Any] | None = None,
) -> Any:
    """An entry as Envoy writes it with the shipped tags."""
    entry = pb.HTTPAccessLogEntry()
    common = entry.common_properties
    common.access_log_type = log_type
    common.custom_tags.update({"rid": "r", "owner": OWNER} if tags is None else tags)
    if address:
        common.upstream_remote_address.socket_address.address = address
        common.upstream_remote_address.socket_address.port_value = 8000
    for flag in flags:
        setattr(common.response_flags, flag, True)
    if usage is not None:
        common.metadata.filter_metadata["llm.usage"].update(usage)
    entry.response.response_code.value = status
    entry.response.response_code_details = details
    return entry


def ended(entry: Any) -> RequestEnd:
    """The entry, which must be an end."""
    value = translate(entry)
    assert isinstance(value, RequestEnd)
    return value


def test_an_end_is_read_whole() -> None:
    """Every value of an ending comes from its own field, in seconds, bytes and tokens."""
    entry = logged(
        flags=("downstream_connection_termination",),
        tags={"rid": "r", "owner": OWNER, "ttft_us": "250000", "gateway_us": "900"},
        usage={"prompt_tokens": 101, "completion_tokens": 20, "cached_tokens": 64},
    )
    common = entry.common_properties
    common.start_time.FromMilliseconds(1_700_000_000_250)
    common.duration.FromMilliseconds(1_500)
    common.time_to_first_upstream_tx_byte.FromMilliseconds(10)
    common.time_to_last_upstream_rx_byte.FromMilliseconds(1_260)
    common.upstream_request_attempt_count = 2
    entry.request.request_body_bytes = 11
    entry.response.response_body_bytes = 22
    assert translate(entry) == RequestEnd(
        request_id=RequestId("r"),
        owner=OWNER,
        address=AT,
        attempts=2,
        status=200,
        ended=Ended.CLIENT_ABORT,
        details="via_upstream",
        flags=("DC",),
        ttft_s=0.25,
        duration_s=1.5,
        stream_s=pytest.approx(1.0),  # type: ignore[arg-type]
        request_bytes=11,
        response_bytes=22,
        prompt_tokens=101,
        completion_tokens=20,
        cached_tokens=64,
    )


@pytest.mark.parametrize(
    ("status", "flags", "details", "expected"),
    [
        (200, (), "via_upstream", Ended.COMPLETED),
        (404, (), "via_upstream", Ended.COMPLETED),
        (429, ("upstream_retry_limit_exceeded",), "via_upstream", Ended.COMPLETED),
        (503, (), "via_upstream", Ended.UPSTREAM_ERROR),
        (503, ("no_healthy_upstream",), "no_healthy_upstream", Ended.UPSTREAM_ERROR),
        (503, ("upstream_connection_failure",), "upstream_reset_before", Ended.UPSTREAM_ERROR),
        (200, ("downstream_connection_termination",), "downstream_remote_disconnect", Ended.CLIENT_ABORT),
        (0, ("downstream_connection_termination",), "downstream_remote_disconnect", Ended.CLIENT_ABORT),
        (200, ("downstream_remote_reset",), "via_upstream", Ended.CLIENT_ABORT),
        (0, (), "", Ended.CLIENT_ABORT),
        (504, ("upstream_request_timeout",), "upstream_response_timeout", Ended.TIMEOUT),
        (200, ("stream_idle_timeout",), "stream_idle_timeout", Ended.TIMEOUT),
        (504, ("duration_timeout",), "max_duration_timeout", Ended.TIMEOUT),
        (200, ("upstream_connection_termination",), "upstream_reset_after", Ended.UPSTREAM_RESET),
        (200, ("upstream_remote_reset",), "upstream_reset_after", Ended.UPSTREAM_RESET),
        (200, ("upstream_protocol_error",), "upstream_reset_after", Ended.UPSTREAM_RESET),
        (500, (), "upstream_reset_after_response_started{x}", Ended.UPSTREAM_RESET),
        (400, (), "tokenway_invalid_json", Ended.REJECTED),
        (503, (), "tokenway_no_healthy_endpoint", Ended.REJECTED),
        (200, (), "tokenway_answer", Ended.COMPLETED),
    ],
)
def test_endings_are_kept_apart(status: int, flags: tuple[str, ...], details: str, expected: Ended) -> None:
    """Flags come before details, and those before the status."""
    assert ended(logged(status=status, flags=flags, details=details)).ended is expected


@pytest.mark.parametrize(
    ("status", "flags", "expected"),
    [
        (200, (), None),
        (404, (), None),
        (429, (), FailureKind.OVERLOADED),
        (0, ("downstream_connection_termination",), None),
        (503, (), FailureKind.SERVER_ERROR),
        (503, ("upstream_connection_failure",), FailureKind.CONNECT_TIMEOUT),
        (0, ("upstream_connection_termination",), FailureKind.RESET),
        (200, ("upstream_remote_reset",), FailureKind.RESET),
        (502, ("upstream_protocol_error",), FailureKind.RESET),
        (504, ("upstream_request_timeout",), FailureKind.FIRST_BYTE_TIMEOUT),
    ],
)
def test_only_what_says_something_bad_of_an_endpoint_is_a_failure(
    status: int, flags: tuple[str, ...], expected: FailureKind | None
) -> None:
    """What Envoy tries again elsewhere was a failure there; a client that left was none."""
    entry = logged(pb.UpstreamEnd, status=status, flags=flags)
    assert failure_kind(entry.common_properties, status) is expected
    assert translate(entry) == (
        None if expected is None else AttemptFailed(RequestId("r"), OWNER, AT, expected)
    )


@pytest.mark.parametrize(
    ("log_type", "expected"),
    [
        (pb.UpstreamPoolReady, AttemptStarted(RequestId("r"), OWNER, AT)),
        (pb.DownstreamPeriodic, RequestAlive(RequestId("r"), OWNER)),
        (pb.DownstreamStart, None),
        (pb.NotSet, None),
    ],
)
def test_each_kind_of_entry_is_its_own_value(log_type: int, expected: RequestEvent | None) -> None:
    """What was not asked for is no event."""
    assert translate(logged(log_type)) == expected


@pytest.mark.parametrize("log_type", [pb.UpstreamPoolReady, pb.UpstreamEnd])
def test_an_attempt_without_an_address_is_no_event(log_type: int) -> None:
    """An attempt that never reached a host says nothing about one."""
    assert translate(logged(log_type, status=503, address="")) is None


def test_an_end_needs_no_endpoint() -> None:
    """A request that was never sent upstream ends all the same."""
    entry = ended(logged(status=0, address=""))
    assert (entry.address, entry.ended) == (None, Ended.CLIENT_ABORT)


def test_ipv6_addresses_have_one_spelling() -> None:
    """However it is written, it is the address that the fleet has."""
    assert ended(logged(address="fd00:0::1")).address == Address("fd00::1", 8000)


@pytest.mark.parametrize("tags", [{}, {"rid": ""}, {"owner": OWNER}])
def test_an_entry_without_an_id_is_no_event(tags: dict[str, str]) -> None:
    """Nothing can be released without knowing whose it was."""
    assert translate(logged(tags=tags)) is None


@pytest.mark.parametrize("owner", [None, "", "-"])
def test_a_request_without_a_decision_has_no_owner(owner: str | None) -> None:
    """Envoy leaves the tag out or writes a dash for a header that is not there."""
    assert ended(logged(tags={"rid": "r"} | ({} if owner is None else {"owner": owner}))).owner is None


@pytest.mark.parametrize("tag", [None, "-", "", "x", "1.5"])
def test_times_that_did_not_happen_are_absent(tag: str | None) -> None:
    """A missing or unreadable time is None, and with it the length of the stream."""
    tags = {"rid": "r"} | ({} if tag is None else {"ttft_us": tag})
    entry = logged(tags=tags)
    entry.common_properties.time_to_last_upstream_rx_byte.seconds = 1
    value = ended(entry)
    assert value.ttft_s is None
    assert value.stream_s is None


@pytest.mark.parametrize("tag", ["-1", "86400000001", "9" * 400, "nan", "1e9"])
def test_times_that_no_request_takes_are_absent(tag: str) -> None:
    """A negative time to the first token, or one of more than a day, is none."""
    assert ended(logged(tags={"rid": "r", "ttft_us": tag})).ttft_s is None


@pytest.mark.parametrize(
    ("told", "ttft_s"),
    [
        (1_796_061_607_750_000, 0.25),  # sent at …605.9 + 1.6
        (1_796_061_607_500_000, 0.0),
        (1_796_061_607_499_998, None),
        (1_796_061_607_500_000 + 86_400_000_001, None),
        (0, None),
        (-1, None),
        ("x", None),
        (float("nan"), None),
        (float("inf"), None),
    ],
)
@pytest.mark.parametrize("attempts", [1, 3])
def test_a_script_tells_the_first_token_where_envoy_does_not(
    told: object, attempts: int, ttft_s: float | None
) -> None:
    """From when the attempt that was answered was sent, which Envoy says. A tag of Envoy's own goes first."""
    entry = logged(usage={"first_us": told})
    common = entry.common_properties
    common.upstream_request_attempt_count = attempts
    assert ended(entry).ttft_s is None, "nobody says when it was sent"
    common.start_time.seconds, common.start_time.nanos = 1_796_061_605, 900_000_000
    sent = common.time_to_first_upstream_tx_byte
    sent.seconds, sent.nanos = 1, 600_000_000
    assert ended(entry).ttft_s == (None if ttft_s is None else pytest.approx(ttft_s, abs=1e-6))
    common.custom_tags["ttft_us"] = "1000000"
    assert ended(entry).ttft_s == 1.0


@pytest.mark.parametrize(("seconds", "duration_s"), [(-(2**62), 0.0), (2**62, 86_400.0), (5, 5.0)])
def test_durations_are_within_a_day(seconds: int, duration_s: float) -> None:
    """Whatever a log says: sums of them stay finite and grow."""
    entry = logged()
    entry.common_properties.duration.seconds = seconds
    assert ended(entry).duration_s == duration_s


def test_a_stream_never_lasts_less_than_nothing() -> None:
    """Clocks that disagree by a little give zero; without the tokens it had, its length says nothing."""
    entry = logged(tags={"rid": "r", "ttft_us": "2000000"})
    entry.common_properties.time_to_last_upstream_rx_byte.seconds = 1
    assert ended(entry).stream_s is None
    usage = entry.common_properties.metadata.filter_metadata["llm.usage"]
    usage.fields["completion_tokens"].number_value = 2
    assert ended(entry).stream_s == 0.0


@pytest.mark.parametrize("count", [-1, 1e12, "7", None, True, float("nan"), float("inf")])
def test_counts_that_make_no_sense_are_absent(count: object) -> None:
    """Usage comes from the engine's JSON: negative, huge, textual or missing counts are no counts."""
    assert ended(logged(usage={"prompt_tokens": count, "completion_tokens": 0})).prompt_tokens is None
    assert ended(logged(usage={"prompt_tokens": count, "completion_tokens": 0})).completion_tokens == 0


def test_the_text_of_a_usage_object_is_read() -> None:
    """What Envoy found at the end of an answer, and in the beginning of a stream, is one usage."""
    usage = {"top": '{"output_tokens": 7}', "nested": '{"input_tokens": 36, "cache_read_input_tokens": 64}'}
    entry = ended(logged(usage=usage))
    assert (entry.prompt_tokens, entry.completion_tokens, entry.cached_tokens) == (100, 7, 64)
    assert entry.usage_unseen == ""
    entry = ended(logged(usage={"unseen": "encoded"}))
    assert (entry.prompt_tokens, entry.usage_unseen) == (None, "encoded")


def all_flags() -> Iterator[str]:
    """Names of the boolean response flags."""
    return (field.name for field in pb.ResponseFlags.DESCRIPTOR.fields if field.message_type is None)


@given(
    log_type=st.integers(0, 15),
    status=st.integers(0, 999),
    flags=st.sets(st.sampled_from(list(all_flags()))).map(tuple),
    tags=st.dictionaries(st.sampled_from(["rid", "owner", "ttft_us", "gateway_us"]), st.text()),
    details=st.text(),
)
def test_no_entry_is_too_strange(
    log_type: int, status: int, flags: tuple[str, ...], tags: dict[str, str], details: str
) -> None:
    """Any entry is a value or None: the log stream of a whole Envoy thread hangs on it."""
    value = translate(logged(log_type, status=status, flags=flags, tags=tags, details=details))
    assert value is None or value.request_id == tags["rid"]


class Dispatched:
    """Where a dispatcher's entries went."""

    def __init__(self, registry: CollectorRegistry, *, others: bool) -> None:
        self.others = others
        self.went: list[tuple[str, RequestEvent]] = []
        self.registry = registry
        self.dispatcher = Dispatcher(
            OWNER,
            lambda entry: self.went.append(("here", entry)),
            self.hand_over,
            lambda entry: self.went.append(("all", entry)),
            Metrics(self.registry, "test"),
        )

    def hand_over(self, owner: str, entry: RequestEvent) -> bool:
        """The bus."""
        if self.others:
            self.went.append((owner, entry))
        return self.others

    def count(self, name: str) -> float | None:
        """A counter."""
        return self.registry.get_sample_value(name)


@pytest.mark.parametrize(
    ("owner", "others", "expected"),
    [(OWNER, True, ["here"]), ("1.b", True, ["1.b"]), (None, True, ["here", "all"]), ("9.z", False, [])],
)
def test_an_entry_goes_to_the_worker_that_decided(
    registry: CollectorRegistry, owner: str | None, others: bool, expected: list[str]
) -> None:
    """Ours is applied, another's handed over, one without an owner sent to all, and a stranger's counted."""
    dispatched = Dispatched(registry, others=others)
    entry = request_end("r", owner=owner)
    dispatched.dispatcher.dispatch(entry)
    assert dispatched.went == [(where, entry) for where in expected]
    assert dispatched.count("tokenway_access_log_unmatched_total") == (0.0 if expected else 1.0)
    assert dispatched.count("tokenway_handovers_total") == float(expected == ["1.b"])


@pytest.mark.parametrize(
    ("owner", "status", "details", "expected"),
    [
        (None, 413, "request_payload_too_large", Reason.BODY_TOO_LARGE),
        (None, 408, "request_overall_timeout", Reason.BODY_TIMEOUT),
        (None, 431, "http1.trailers_too_large", Reason.INVALID_REQUEST),
        (None, 413, "tokenway_body_too_large", None),
        (None, 400, "lua_response", None),
        (None, 413, "via_upstream", None),
        (OWNER, 413, "request_payload_too_large", None),
        (None, 431, "header_mutation_result_exceeds_limit", None),
        (None, 0, "downstream_remote_disconnect", None),
        (None, 404, "cluster_not_found", None),
        (None, 413, "", None),
    ],
)
def test_what_envoy_refuses_by_itself(
    owner: str | None, status: int, details: str, expected: Reason | None
) -> None:
    """Before anybody decides: what Tokenway said, a script of ours or an engine, is counted elsewhere."""
    assert refused_by_envoy(owner, status, details) is expected


def test_a_decision_that_envoy_cannot_add_is_no_completed_request() -> None:
    """It reached no engine."""
    assert ended_how((), 431, "header_mutation_result_exceeds_limit") is Ended.REJECTED
