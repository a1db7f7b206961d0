"""Control headers that say nothing: each is counted, few are logged."""

from __future__ import annotations

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from prometheus_client import CollectorRegistry

from extproc.config.loading import parse
from extproc.errors import ConfigError
from extproc.observing.ignored_headers import MAX_NAMES, QUIET_S, IgnoredHeaders
from extproc.observing.metrics.collector import Metrics
from extproc.protocol import wire
from extproc.values.control import ControlHeader, Flaw, Ignored
from tests.conftest import build_rig, endpoint

HEADER = "x-llm-d-inference-objective"
COUNTED = "tokenway_headers_ignored_total"


def unknown(name: str) -> tuple[Ignored, ...]:
    """Of a request whose objective nobody knows."""
    return (Ignored(ControlHeader.OBJECTIVE, Flaw.UNKNOWN, HEADER, name),)


MALFORMED = (Ignored(ControlHeader.FAIRNESS_ID, Flaw.MALFORMED, "x-llm-d-inference-fairness-id"),)


class Reports:
    """Ignored headers and the time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.headers = IgnoredHeaders(Metrics(self.registry, "test"), lambda: self.now_s)

    def counted(self, header: str, reason: str) -> float | None:
        """So far."""
        return self.registry.get_sample_value(COUNTED, {"header": header, "reason": reason})


@pytest.fixture
def reports() -> Reports:
    """None was reported."""
    return Reports()


def test_each_is_counted_from_0(reports: Reports) -> None:
    """By what it was to say and why it does not."""
    assert reports.counted("objective", "unknown") == reports.counted("slo_tpot_ms", "malformed") == 0.0
    for _ in range(3):
        reports.headers.report((*unknown("no"), *MALFORMED))
    assert reports.counted("objective", "unknown") == reports.counted("fairness_id", "malformed") == 3.0


def test_a_name_is_logged_once_a_minute(reports: Reports, caplog: pytest.LogCaptureFixture) -> None:
    """Each by itself."""
    for now_s in (0.0, 1.0, QUIET_S - 0.1, QUIET_S, QUIET_S + 1.0):
        reports.now_s = now_s
        reports.headers.report(unknown("one"))
        reports.headers.report((*unknown("two"), *MALFORMED))
    said = [(record.__dict__["sent_as"], record.__dict__.get("objective")) for record in caplog.records]
    each = [(HEADER, "one"), (HEADER, "two"), ("x-llm-d-inference-fairness-id", None)]
    assert said == each * 2
    assert set(caplog.messages) == {"a request header says nothing"}


def test_names_that_clients_make_up_fill_no_log(reports: Reports, caplog: pytest.LogCaptureFixture) -> None:
    """So many a minute; others are counted alone, until the minute is over."""
    for number in range(MAX_NAMES + 10):
        reports.headers.report(unknown(f"name-{number}"))
    assert len(caplog.records) == MAX_NAMES
    assert reports.counted("objective", "unknown") == MAX_NAMES + 10
    reports.now_s = QUIET_S
    reports.headers.report(unknown("late"))
    assert len(caplog.records) == MAX_NAMES + 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    [({}, 0.0), ({"x-slo-ttft-ms": "900"}, 0.0), ({"x-slo-ttft-ms": "soon", "x-slo-tpot-ms": "20"}, 1.0)],
)
def test_limits_behind_our_own_envoy_count_alike(headers: dict[str, str], expected: float) -> None:
    """They are read there, too."""
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
    for name, value in {":method": "POST", ":path": "/v1/chat/completions", **headers}.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    rig = build_rig([endpoint(0)])
    rig.gateway.judge(wire.request_headers(message))
    labels = {"header": "slo_ttft_ms", "reason": "malformed"}
    assert rig.registry.get_sample_value(COUNTED, labels) == expected


def test_an_objective_that_no_header_can_name_is_refused() -> None:
    """It would never be found."""
    listen = "endpoint_picker: {listen: ['127.0.0.1:9002'], objectives: {%s: -1}}"
    assert parse(listen % "batch-2.low", "x").endpoint_picker is not None
    with pytest.raises(ConfigError, match="no request can name the objective `Batch_Low`"):
        parse(listen % "Batch_Low", "x")
