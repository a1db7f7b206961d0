"""What the benchmark of Envoy's pieces leaves out and computes."""

from __future__ import annotations

import pytest
import yaml

from benchmarks.envoy_pieces import PIECES, SHIPPED, manager, phases, table
from benchmarks.setups import envoy_config


@pytest.mark.parametrize("name", PIECES)
def test_each_piece_is_there_to_be_left_out(name: str) -> None:
    """A piece that the bootstrap no longer has would measure as free; the router stays."""
    text = envoy_config("floor", 1, 2, "/gw0.sock", [3])
    document = yaml.safe_load(text)
    PIECES[name](document)
    assert document != yaml.safe_load(text)
    assert manager(document)["http_filters"][-1]["name"] == "envoy.filters.http.router"


def test_what_a_piece_costs_is_the_median_of_differences_within_rounds() -> None:
    """Not the difference of medians; the dearest comes first."""
    found = {
        SHIPPED: {"JSON": [100.0, 300.0, 120.0]},
        "cheap": {"JSON": [99.0, 298.0, 117.0]},
        "dear": {"JSON": [90.0, 280.0, 105.0]},
    }
    assert table(found, ["JSON"]).splitlines()[2:] == [
        "| as shipped | 100 | |",
        "| dear | 90 | +15 (+12..+18) |",
        "| cheap | 99 | +2 (+2..+2) |",
    ]


def test_sizes_replace_what_is_sent() -> None:
    """JSON alone then."""
    assert [phase.name for phase in phases([1000, 2000])] == ["JSON of 1,000 bytes", "JSON of 2,000 bytes"]
    assert len(phases([])) == 2
