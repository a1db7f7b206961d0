"""Envoy's access-log entries as the values of `extproc.values.endings`.

The shipped bootstrap has each entry say all of it in one tag, which is read quickest (`lines`). An Envoy that
does not write the tag, for its bootstrap is of an earlier version or it is too old, is read field by field.

Source: envoy/data/accesslog/v3/accesslog.proto; the tags and filters of envoy/bootstrap.yaml.
"""

from __future__ import annotations

from envoy.data.accesslog.v3 import accesslog_pb2 as pb

from extproc.accesslog.answer_errors import ERROR_NAMESPACE, error_seen
from extproc.accesslog.lines import read_line
from extproc.accesslog.meanings import MAX_DURATION_S, ended_how, seconds_of
from extproc.accesslog.usage import UNKNOWN, read_usage
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from extproc.values.evidence import FailureKind
from metadata_center.addresses import Address
from metadata_center.types import RequestId

USAGE_NAMESPACE = "llm.usage"
LINE_TAG = "line"
"""The custom tag with the line."""

_SHORT_FLAGS = {
    "no_healthy_upstream": "UH",
    "upstream_request_timeout": "UT",
    "local_reset": "LR",
    "upstream_remote_reset": "UR",
    "upstream_connection_failure": "UF",
    "upstream_connection_termination": "UC",
    "upstream_overflow": "UO",
    "no_route_found": "NR",
    "downstream_connection_termination": "DC",
    "downstream_remote_reset": "DR",
    "upstream_retry_limit_exceeded": "URX",
    "stream_idle_timeout": "SI",
    "downstream_protocol_error": "DPE",
    "upstream_protocol_error": "UPE",
    "duration_timeout": "DT",
    "no_cluster_found": "NC",
    "overload_manager": "OM",
}
"""Envoy documentation, access logging, `%RESPONSE_FLAGS%`."""


def _address(common: pb.AccessLogCommon) -> Address | None:
    remote = common.upstream_remote_address.socket_address
    host = remote.address
    return Address.of(host, remote.port_value) if host else None


def _duration_s(duration: object) -> float:
    seconds: float = duration.seconds + duration.nanos / 1e9  # type: ignore[attr-defined]
    return max(0.0, min(MAX_DURATION_S, seconds))


def _is_refused(common: pb.AccessLogCommon) -> bool:
    """Of a connection that was not made: somebody said no. Envoy has no reason where it timed out."""
    return bool(common.upstream_transport_failure_reason)


def failure_kind(common: pb.AccessLogCommon, status: int) -> FailureKind | None:
    """What an attempt's flags and status say about its endpoint; None if nothing bad."""
    flags = common.response_flags
    if flags.upstream_connection_failure:
        return FailureKind.CONNECT_FAILURE if _is_refused(common) else FailureKind.CONNECT_TIMEOUT
    if flags.upstream_request_timeout:
        return FailureKind.FIRST_BYTE_TIMEOUT
    if flags.upstream_connection_termination or flags.upstream_remote_reset or flags.upstream_protocol_error:
        return FailureKind.RESET
    if status >= 500:
        return FailureKind.SERVER_ERROR
    return FailureKind.OVERLOADED if status == 429 else None


def _flags(common: pb.AccessLogCommon) -> tuple[str, ...]:
    return tuple(_SHORT_FLAGS.get(field.name, field.name) for field, _ in common.response_flags.ListFields())


def translate(entry: pb.HTTPAccessLogEntry) -> RequestEvent | None:
    """One entry as a value; None if it says nothing to us (no id, a kind we did not ask for)."""
    common = entry.common_properties
    tags = common.custom_tags
    line = tags.get(LINE_TAG)
    if line is not None:
        event = read_line(line, entry.response.response_headers.get("content-type"))
        if type(event) is not AttemptFailed or event.kind is not FailureKind.CONNECT_FAILURE:
            return event
        if _is_refused(common):
            return event
        return AttemptFailed(event.request_id, event.owner, event.address, FailureKind.CONNECT_TIMEOUT)
    request_id = RequestId(tags.get("rid", ""))
    if not request_id:
        return None
    owner = tags.get("owner") or None
    if owner == "-":
        owner = None
    log_type = common.access_log_type
    if log_type == pb.DownstreamEnd:
        return _request_end(entry, request_id, owner)
    address = _address(common)
    if log_type == pb.DownstreamPeriodic:
        return RequestAlive(request_id, owner)
    if address is None:
        return None
    if log_type == pb.UpstreamPoolReady:
        return AttemptStarted(request_id, owner, address)
    if log_type == pb.UpstreamEnd:
        kind = failure_kind(common, entry.response.response_code.value)
        return None if kind is None else AttemptFailed(request_id, owner, address, kind)
    return None


def _request_end(entry: pb.HTTPAccessLogEntry, request_id: RequestId, owner: str | None) -> RequestEnd:
    common = entry.common_properties
    response = entry.response
    status = response.response_code.value
    details = response.response_code_details
    flags = _flags(common) if common.HasField("response_flags") else ()
    ttft_s = seconds_of(common.custom_tags.get("ttft_us"))
    (prompt, completion, cached), unseen = UNKNOWN, ""
    metadata = common.metadata.filter_metadata
    if USAGE_NAMESPACE in metadata:
        fields = metadata[USAGE_NAMESPACE].fields
        if ttft_s is None:
            ttft_s = _scripted_ttft_s(common, fields)
        top, nested, unseen = _text(fields, "top"), _text(fields, "nested"), _text(fields, "unseen")
        if top or nested:
            prompt, completion, cached = read_usage(top, nested)
        else:  # an Envoy that still runs with the bootstrap of an earlier version writes numbers
            prompt = _count(fields, "prompt_tokens")
            completion = _count(fields, "completion_tokens")
            cached = _count(fields, "cached_tokens")
    error = None
    if ERROR_NAMESPACE in metadata:
        error = error_seen({name: _plain(field) for name, field in metadata[ERROR_NAMESPACE].fields.items()})
    stream_s = None
    if ttft_s is not None and completion is not None:
        first_s = ttft_s + _duration_s(common.time_to_first_upstream_tx_byte)
        stream_s = max(0.0, _duration_s(common.time_to_last_upstream_rx_byte) - first_s)
    return RequestEnd(
        request_id,
        owner,
        _address(common),
        common.upstream_request_attempt_count,
        status,
        ended_how(flags, status, details),
        details,
        flags,
        ttft_s,
        _duration_s(common.duration),
        stream_s,
        entry.request.request_body_bytes,
        response.response_body_bytes,
        prompt,
        completion,
        cached,
        unseen,
        error,
        response.response_headers.get("content-type"),
    )


def _text(fields: object, name: str) -> str:
    return fields[name].string_value if name in fields else ""  # type: ignore[index,operator]


def _scripted_ttft_s(common: pb.AccessLogCommon, fields: object) -> float | None:
    """Envoys before 1.37: a script wrote down when the answer's body began, by the clock of `start_time`.

    Envoy says of the attempt that was answered, the last one, when it was sent.
    """
    if "first_us" not in fields or not common.HasField("time_to_first_upstream_tx_byte"):  # type: ignore[operator]
        return None
    began_s: float = fields["first_us"].number_value / 1e6  # type: ignore[index]
    start, sent = common.start_time, common.time_to_first_upstream_tx_byte
    # The whole seconds first: a float has no room for them and nanoseconds.
    ttft_s = (began_s - start.seconds - sent.seconds) - (start.nanos + sent.nanos) / 1e9
    return ttft_s if 0.0 <= ttft_s <= MAX_DURATION_S else None


def _plain(field: object) -> str | float | None:
    """A string or a number of a metadata struct; None for anything else."""
    kind = field.WhichOneof("kind")  # type: ignore[attr-defined]
    if kind in ("string_value", "number_value"):
        plain: str | float = getattr(field, kind)
        return plain
    return None


def _count(fields: object, name: str) -> int | None:
    if name not in fields:  # type: ignore[operator]
        return None
    value = fields[name]  # type: ignore[index]
    number: float = value.number_value
    if 0 < number < 1e12:
        return int(number)
    return 0 if number == 0 and value.WhichOneof("kind") == "number_value" else None


def ended_unix_s(entry: pb.HTTPAccessLogEntry) -> float:
    """Wall clock at which the request of an entry ended, to show how late the entry is."""
    common = entry.common_properties
    start = common.start_time
    return float(start.seconds + start.nanos / 1e9) + _duration_s(common.duration)
