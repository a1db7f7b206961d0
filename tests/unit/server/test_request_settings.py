"""What the configuration says of requests, as the request path takes it."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.config.schema import Config
from extproc.routing.settings import HoldSettings
from extproc.server.reloading.request_settings import router_settings


def test_requests_wait_by_default_and_none_is_refused_for_it() -> None:
    """The defaults of both sides are the same."""
    hold = router_settings(Config()).hold
    assert hold == HoldSettings()
    assert not HoldSettings().refuses
    switched = Config.model_validate({"holding": {"refuse": True, "max_s": 7, "fairness": False}})
    assert router_settings(switched).hold == HoldSettings(max_s=7, is_fair=False, refuses=True)


@pytest.mark.parametrize(
    "sections",
    [{}, {"server": {"workers": 2}}, {"metadata_center": {"url": "redis://10.0.0.5:6379/0"}}],
    ids=["by-itself", "workers", "gateways"],
)
def test_requests_wait_unless_that_is_switched_off_whoever_else_sends_to_the_same_endpoints(
    sections: dict[str, Any],
) -> None:
    """Several keep one order; nothing said, and null, are the default."""
    for holding, holds in (({}, True), ({"enabled": True}, True), ({"enabled": False}, False)):
        config = Config.model_validate({**sections, "holding": holding})
        assert (router_settings(config).hold is not None) is holds
