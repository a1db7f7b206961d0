"""Refusals as the clients of each API parse them."""

from __future__ import annotations

import orjson
import pytest

from extproc.errors import Reason, RouterError, Shape, whole_retry_s
from extproc.protocol.machine import Finish, SendImmediate, Stream
from extproc.values.exchange import AnswerAtOnce, LineVerdict, RefuseAtOnce, RequestHeaders

KINDS = {
    Reason.INVALID_JSON: "invalid_request_error",
    Reason.INVALID_REQUEST: "invalid_request_error",
    Reason.MISSING_MODEL: "invalid_request_error",
    Reason.EMPTY_MESSAGES: "invalid_request_error",
    Reason.MODEL_NOT_FOUND: "not_found_error",
    Reason.ROUTE_NOT_FOUND: "not_found_error",
    Reason.UNKNOWN_PATH: "not_found_error",
    Reason.METHOD_NOT_ALLOWED: "invalid_request_error",
    Reason.BODY_TOO_LARGE: "request_too_large",
    Reason.BODY_TIMEOUT: "invalid_request_error",
    Reason.UNSUPPORTED_ENCODING: "invalid_request_error",
    Reason.OVERLOADED: "rate_limit_error",
    Reason.NO_HEALTHY_ENDPOINT: "overloaded_error",
    Reason.CLUSTER_NOT_LISTED: "overloaded_error",
    Reason.READERS_BUSY: "overloaded_error",
    Reason.SHUTTING_DOWN: "overloaded_error",
    Reason.INTERNAL: "api_error",
}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/", "/v1/messages?beta=true"])
@pytest.mark.parametrize("below", ["", "/count_tokens", "/batches/msgbatch_1/results?limit=5"])
def test_messages_and_what_is_below_is_anthropics(path: str, below: str) -> None:
    """Whether there is such an operation or not."""
    assert Shape.of(path.rstrip("/").partition("?")[0] + below) is Shape.ANTHROPIC
    assert Shape.of(path) is Shape.ANTHROPIC


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/responses", "/v1/messagesque", "/v1/message", "/", "", "/V1/MESSAGES"],
)
def test_all_else_is_openais(path: str) -> None:
    """Another path is another API, however alike its name."""
    assert Shape.of(path) is Shape.OPENAI


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_has_anthropics_type(reason: Reason) -> None:
    """Every refusal there is, with the message and the request's id, and nothing of OpenAI's."""
    error = RouterError(reason, "No.", param="body")
    assert orjson.loads(error.body(Shape.ANTHROPIC, "r1")) == {
        "type": "error",
        "error": {"type": KINDS[reason], "message": "No."},
        "request_id": "r1",
    }
    assert orjson.loads(error.body()).keys() == {"error"}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_the_machine_refuses_in_the_shape_of_the_path(path: str) -> None:
    """By the request line alone, as well as after the body."""
    error = RouterError(Reason.METHOD_NOT_ALLOWED, "No.")
    headers = RequestHeaders("GET", path, {"x-tokenway-request-id": "r1"}, end_of_stream=True)

    def judge(_: RequestHeaders) -> LineVerdict:
        return RefuseAtOnce(error)

    send, end = Stream(judge).receive_headers(headers)
    assert send == SendImmediate(405, error.body(Shape.of(path), "r1"), "tokenway_method_not_allowed", error)
    assert end == Finish()


def test_an_answer_of_ours_has_no_shape() -> None:
    """What is no refusal passes as it is."""
    headers = RequestHeaders("GET", "/v1/messages", {}, end_of_stream=True)
    send, _ = Stream(lambda _: AnswerAtOnce(200, b"{}")).receive_headers(headers)
    assert send == SendImmediate(200, b"{}", "tokenway_answer")


@pytest.mark.parametrize(
    ("foreseen_s", "said_s"),
    [(-1.0, 1), (0.0, 1), (1, 1), (1.01, 2), (119.5, 120), (3_555.0, 120), (float("inf"), 120)],
)
def test_any_refusal_asks_for_whole_seconds_that_clients_heed(foreseen_s: float, said_s: int) -> None:
    """Whoever refuses: 1 to 120."""
    error = RouterError(Reason.OVERLOADED, "Busy.", retry_after_s=foreseen_s)
    assert error.retry_after_s == whole_retry_s(foreseen_s) == said_s
