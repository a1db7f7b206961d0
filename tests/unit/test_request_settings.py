"""What the configuration says of requests, as the request path takes it."""

from __future__ import annotations

from extproc.config.schema import Config
from extproc.routing.settings import HoldSettings
from extproc.server.request_settings import router_settings


def test_requests_wait_by_default_and_none_is_refused_for_it() -> None:
    """The defaults of both sides are the same; `enabled: false` sends each at once."""
    hold = router_settings(Config()).hold
    assert hold == HoldSettings()
    assert not HoldSettings().refuses
    switched = Config.model_validate({"holding": {"refuse": True, "max_s": 7, "fairness": False}})
    assert router_settings(switched).hold == HoldSettings(max_s=7, is_fair=False, refuses=True)
    off = Config.model_validate({"holding": {"enabled": False}})
    assert router_settings(off).hold is None
