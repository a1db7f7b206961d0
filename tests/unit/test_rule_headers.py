"""Which headers a rule may match."""

from __future__ import annotations

import pytest

from extproc.config.rule_headers import SECRET_HEADERS, never_arrives
from extproc.request.sanitize import STEERING_HEADERS


@pytest.mark.parametrize(
    "name",
    [
        *("user-agent", "accept", "accept-language", "content-type", "content-length", "x-forwarded-host"),
        *("x-stainless-lang", "x-tier", "referer", "x-envoy-external-address"),
        *(":scheme", ":authority", ":method", ":path"),
    ],
)
def test_what_envoy_can_forward_may_be_matched(name: str) -> None:
    """Whatever the shipped bootstrap withholds as noise is forwarded where a rule needs it."""
    assert never_arrives(name, ()) is None


@pytest.mark.parametrize(
    "name",
    [
        *(*SECRET_HEADERS, *STEERING_HEADERS, "host", "te", ":status", "x-tokenway-owner", "x-request-id"),
        "x-forwarded-for",
    ],
)
def test_what_never_arrives_is_named_with_something_to_do_instead(name: str) -> None:
    """No operator believes that such a rule works."""
    problem = never_arrives(name, ())
    assert problem is not None
    assert problem.startswith(f"`{name}` ")
    assert "accepted: " in problem


def test_steering_header_that_is_allowed_may_be_matched() -> None:
    """Envoy's edge then leaves it alone; a secret stays one."""
    assert never_arrives("x-session-token", ["x-session-token"]) is None
    assert never_arrives("cookie", ["cookie"]) is not None
