"""The line of text in Envoy's access-log entries, as the values of `extproc.values.endings`.

A field of a protobuf message takes some 100 ns to read and an entry has fifty; a line is split in 400.

Rules:
    1. The fields of a line are those of `FIELDS`, in that order; envoy/bootstrap.yaml has Envoy write them.
    2. What an engine can put something into comes last, and nothing that is counted comes after it.
    3. Any text gives a value or None. A line of another version than ours, with fewer fields, gives None.

Source: Envoy documentation, "Access logging", command operators.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import orjson

from extproc.accesslog.answer_errors import error_seen
from extproc.accesslog.meanings import ended_how, seconds_of
from extproc.accesslog.usage import UNKNOWN, read_usage
from extproc.values.endings import AttemptFailed, AttemptStarted, RequestAlive, RequestEnd, RequestEvent
from extproc.values.evidence import FailureKind
from metadata_center.addresses import Address
from metadata_center.types import RequestId

SEPARATOR: Final = "\x1f"
"""Between fields; no header and no valid JSON has it."""

FIELDS: Final = (
    "%ACCESS_LOG_TYPE%",
    "%REQ(X-TOKENWAY-REQUEST-ID)%",
    "%REQ(:TOKENWAY-OWNER)%",
    "%UPSTREAM_HOST%",
    "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "%RESPONSE_CODE%",
    "%RESPONSE_FLAGS%",
    "%COMMON_DURATION(US_TX_BEG:US_RX_BODY_BEG:us)%",
    "%COMMON_DURATION(US_RX_BODY_BEG:US_RX_END:us)%",
    "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%",
    "%DURATION%",
    "%BYTES_RECEIVED%",
    "%BYTES_SENT%",
    "%RESPONSE_CODE_DETAILS%",
    "%DYNAMIC_METADATA(llm.error)%",
    "%DYNAMIC_METADATA(llm.usage:unseen)%",
    "%DYNAMIC_METADATA(llm.usage:top)%",
    "%DYNAMIC_METADATA(llm.usage:nested)%",
)

_NUM_FIELDS: Final = len(FIELDS)
_NONE: Final = "-"
"""What Envoy writes where there is nothing."""

_MAX_DIGITS: Final = 18


def read_line(line: str, content_type: str | None) -> RequestEvent | None:
    """One entry as a value; None if it says nothing to us (no id, a kind we did not ask for).

    Args:
        line: As Envoy wrote it.
        content_type: Of the answer, which may hold any byte and is no part of a text; None if it has none.
    """
    fields = line.split(SEPARATOR, _NUM_FIELDS - 1)
    if len(fields) != _NUM_FIELDS:
        return None
    kind, request_id = fields[0], RequestId(fields[1])
    if not request_id or request_id == _NONE:
        return None
    owner = None if fields[2] in (_NONE, "") else fields[2]
    if kind == "DownstreamEnd":
        return _request_end(request_id, owner, fields, content_type)
    if kind == "DownstreamPeriodic":
        return RequestAlive(request_id, owner)
    address = _address(fields[3])
    if address is None:
        return None
    if kind == "UpstreamPoolReady":
        return AttemptStarted(request_id, owner, address)
    if kind == "UpstreamEnd":
        failed = _failure(fields[6], _number(fields[5]))
        return None if failed is None else AttemptFailed(request_id, owner, address, failed)
    return None


def _request_end(
    request_id: RequestId, owner: str | None, fields: list[str], content_type: str | None
) -> RequestEnd:
    _, _, _, at, attempts, code, flagged, ttft, stream, duration, duration_ms, received, sent = fields[:13]
    details, error, unseen, top, nested = fields[13:]
    flags = () if flagged == _NONE else tuple(flagged.split(","))
    status = _number(code)
    ttft_s = seconds_of(ttft)
    duration_s = seconds_of(duration)
    if duration_s is None:  # what the client did not wait for has no end of it
        duration_s = seconds_of(f"{duration_ms}000") or 0.0
    usage = UNKNOWN
    if top != _NONE or nested != _NONE:
        usage = read_usage("" if top == _NONE else top, "" if nested == _NONE else nested)
    stream_s = None if ttft_s is None or usage.completion_tokens is None else seconds_of(stream)
    return RequestEnd(
        request_id,
        owner,
        _address(at),
        _number(attempts),
        status,
        ended_how(flags, status, "" if details == _NONE else details),
        "" if details == _NONE else details,
        flags,
        ttft_s,
        duration_s,
        stream_s,
        _number(received),
        _number(sent),
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        "" if unseen == _NONE else unseen,
        None if error == _NONE else _error(error),
        content_type,
    )


@lru_cache(maxsize=4096)
def _address(text: str) -> Address | None:
    """An endpoint as Envoy writes it; None for what is none."""
    try:
        return Address.parse(text)
    except ValueError:
        return None


def _number(text: str) -> int:
    """A count; 0 for what is none."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else 0


def _error(text: str) -> str | None:
    """What was seen of an error, by the JSON that Envoy writes of its metadata."""
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return error_seen(fields) if type(fields) is dict else None


def _failure(flags: str, status: int) -> FailureKind | None:
    """What an attempt's flags and status say about its endpoint; None if nothing bad."""
    if flags != _NONE:
        reported = flags.split(",")
        if "UF" in reported:
            return FailureKind.CONNECT_FAILURE
        if "UT" in reported:
            return FailureKind.FIRST_BYTE_TIMEOUT
        if "UC" in reported or "UR" in reported or "UPE" in reported:
            return FailureKind.RESET
    if status >= 500:
        return FailureKind.SERVER_ERROR
    return FailureKind.OVERLOADED if status == 429 else None
