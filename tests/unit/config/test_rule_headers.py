"""Which headers a rule may match."""

from __future__ import annotations

import json
from typing import Any

import pytest

from extproc.config.loading import parse
from extproc.config.rule_headers import SECRET_HEADERS, Edge, never_arrives, never_said
from extproc.errors import ConfigError
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
        *("x-forwarded-for", "x_team", "x-forwarded-client-cert"),
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


def test_other_edges_have_other_rules() -> None:
    """Istio's gateways say the client's certificate; what a foreign gateway refuses is not known here."""
    assert never_arrives("x-forwarded-client-cert", (), Edge.ISTIO) is None
    assert never_arrives("x_team", (), Edge.ISTIO) is not None
    assert never_arrives("x_team", (), Edge.FOREIGN) is None
    assert never_arrives("cookie", (), Edge.FOREIGN) is not None


@pytest.mark.parametrize("value", ["a ", " a", "\ta", " ", "a\nb", "a\rb", "a\x1fb", "a\x7f"])
def test_a_value_that_no_header_has_is_refused(value: str) -> None:
    """Envoy takes blanks off its ends; controls make a request malformed."""
    assert "accepted: " in (never_said(value) or "")


@pytest.mark.parametrize("value", ["", "a", "a b", "a\tb", "grün", "\U0001f642", '"a"', "a,b"])
def test_a_value_that_a_header_may_have_is_taken(value: str) -> None:
    """Whatever else there is, other alphabets included."""
    assert never_said(value) is None


def test_they_are_named_by_their_place() -> None:
    """Model, rule and header; behind an endpoint picker's gateway a name may have an underscore."""
    headers = {"x_team": "a", "x-b": "b "}
    rules: list[dict[str, Any]] = [{"cluster": "a"}, {"cluster": "a", "headers": headers}]
    config = {"models": {"m": {"rules": rules}}}
    with pytest.raises(ConfigError) as refused:
        parse(json.dumps(config), "tokenway.yaml")
    assert [problem.partition("; ")[0] for problem in refused.value.problems] == [
        "line 1: models.m.rules[1].headers: `x_team` has Envoy refuse the request, for its underscore",
        "line 1: models.m.rules[1].headers.x-b: a value with blanks at its ends, which no header has",
    ]
    rules[1]["headers"] = {"x_team": "a"}
    parse(json.dumps({**config, "endpoint_picker": {"listen": ["127.0.0.1:9002"]}}), "tokenway.yaml")
