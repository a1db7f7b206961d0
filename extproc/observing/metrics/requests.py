"""Series of requests that ended: how, how long they took, how many tokens they had."""

from __future__ import annotations

from extproc.errors import Reason
from extproc.observing.metrics.family import Family, MetricType, closed, doubling
from extproc.values.control import ControlHeader, Flaw

# OpenTelemetry semantic conventions for generative AI, "Metrics", `gen_ai.client.token.usage`: 4^0 .. 4^13.
_TOKEN_BUCKETS = tuple(float(4**power) for power in range(14))
# Same page, `gen_ai.server.request.duration` (10 ms .. 82 s), doubled three more times: long generations.
_DURATION_BUCKETS = tuple(round(bound, 2) for bound in doubling(0.01, 17))
# Same page, `gen_ai.server.time_to_first_token` ends at 10 s; a queue in front of a cold prefill is longer.
_OTEL_TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
_TTFT_BUCKETS = (*_OTEL_TTFT_BUCKETS, 20.0, 40.0, 60.0, 120.0)
# Same page, `gen_ai.server.time_per_output_token`.
_TPOT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

_GEN_AI = ("gen_ai_request_model", "gen_ai_operation_name")

STATUS_CLASSES = {None: "none", 1: "1xx", 2: "2xx", 3: "3xx", 4: "4xx", 5: "5xx"}
"""The first digit of a status, or None where the client saw none, to the label value."""

TOKEN_USAGE = Family(
    "gen_ai_client_token_usage",
    MetricType.HISTOGRAM,
    "Tokens of one answered request as its engine counted them, by type: `input` (the prompt), `output`, "
    "and `cached`, the part of `input` taken from the prefix cache.",
    ("gen_ai_token_type", *_GEN_AI),
    _TOKEN_BUCKETS,
)
REQUEST_DURATION = Family(
    "gen_ai_server_request_duration_seconds",
    MetricType.HISTOGRAM,
    "From the first byte of the request to the last byte of the answer, as Envoy saw it; `error_type` is "
    "empty for a completed request, else how it ended.",
    (*_GEN_AI, "error_type"),
    _DURATION_BUCKETS,
)
TIME_TO_FIRST_TOKEN = Family(
    "gen_ai_server_time_to_first_token_seconds",
    MetricType.HISTOGRAM,
    "From the request, the time it was held and attempts that failed included, to the first token of a "
    "streamed, completed answer.",
    _GEN_AI,
    _TTFT_BUCKETS,
)
TIME_PER_OUTPUT_TOKEN = Family(
    "gen_ai_server_time_per_output_token_seconds",
    MetricType.HISTOGRAM,
    "Mean time between output tokens after the first, of a streamed, completed answer; where it has several "
    "choices, between those of one.",
    _GEN_AI,
    _TPOT_BUCKETS,
)
REQUESTS = Family(
    "tokenway_requests_total",
    MetricType.COUNTER,
    "Requests that ended, by the class of the status the client saw (`none`: it saw none) and how.",
    ("model", "status_class", "outcome"),
)
REJECTIONS = Family(
    "tokenway_rejections_total",
    MetricType.COUNTER,
    "Requests the gateway refused itself, Tokenway or its Envoy (a body too large, too slow), by error code.",
    ("reason",),
    start=closed(Reason),
)
IGNORED_HEADERS = Family(
    "tokenway_headers_ignored_total",
    MetricType.COUNTER,
    "Control headers of requests that said nothing: `malformed`, or the name of an objective that is "
    "`unknown` here.",
    ("header", "reason"),
    start=(
        *((str(control), str(Flaw.MALFORMED)) for control in ControlHeader),
        (str(ControlHeader.OBJECTIVE), str(Flaw.UNKNOWN)),
    ),
)

FAMILIES: tuple[Family, ...] = (
    TOKEN_USAGE,
    REQUEST_DURATION,
    TIME_TO_FIRST_TOKEN,
    TIME_PER_OUTPUT_TOKEN,
    REQUESTS,
    REJECTIONS,
    IGNORED_HEADERS,
)
