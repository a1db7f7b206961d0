"""What readings of engines mean, and what of it an operator sees."""

import logging
from typing import Any, cast

import pytest

from extproc.config.schema import Config
from extproc.health.facts import Occupancy
from extproc.routing.engines import Engines
from extproc.server.engines.engine_news import EngineNews
from metadata_center.types import EndpointKey

KEY = EndpointKey("10.0.0.1:8000")


def test_a_configured_limit_that_an_engine_refutes_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """One line, not one for each reading; none for a process whose first reading shows the same again."""
    engines, elsewhere = Engines(), cast("Any", None)
    news = EngineNews(engines, elsewhere, elsewhere, elsewhere, Config())
    engines.configure(KEY, "vllm/", 64)
    with caplog.at_level(logging.WARNING, logger="tokenway.engines"):
        news.occupancy(KEY, Occupancy(64, 1, 0.5, started_s=100.0))
        assert not caplog.records
        for running in (65, 70, 3):
            news.occupancy(KEY, Occupancy(running, 0, 0.5, started_s=100.0))
        (record,) = caplog.records
        assert (record.__dict__["running"], record.__dict__["max_num_seqs"]) == (65, 64)
        news.occupancy(KEY, Occupancy(66, 0, 0.5, started_s=200.0))
    assert [each.__dict__["running"] for each in caplog.records] == [65]
