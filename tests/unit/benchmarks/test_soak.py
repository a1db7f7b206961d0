"""What the long run looks at in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import ENVOY_RUNNING, FAULTS, RUNNING, envoy_sums, growth_mib, sums


def test_memory_grows_from_the_second_quarter_to_the_last() -> None:
    """The first quarter fills what is bounded, and one high sample is no growth."""
    assert growth_mib([0.0] * 4 + [100.0] * 4 + [150.0] * 4 + [100.0, 104.0, 104.0, 500.0]) == pytest.approx(
        4.0
    )


def test_values_are_summed_over_labels_and_absent_ones_are_nothing() -> None:
    """Counters by their name with `_total`."""
    text = '# TYPE a gauge\na{x="1"} 2\na{x="2"} 3\n# TYPE b counter\nb_total{x="1"} 4\n'
    assert sums(text, ("a", "b_total", "c")) == {"a": 5.0, "b_total": 4.0, "c": 0.0}


def test_what_must_be_nothing_is_what_tokenway_counts() -> None:
    """A metric of another name would always be 0."""
    table = (Path(__file__).parents[3] / "docs/metrics.md").read_text()  # that it has all is tested with it
    assert all(f"| `{name}` |" in table for name in (*RUNNING, *FAULTS))


def test_streams_to_tokenway_that_last_for_ever_are_no_requests() -> None:
    """Those of access log and discovery, and the question itself."""
    stats = """\
cluster.tokenway-als.upstream_rq_active: 1
cluster.tokenway-xds.upstream_rq_active: 1
cluster.tokenway-extproc.upstream_rq_active: 2
http.admin.downstream_rq_active: 1
http.ingress.downstream_rq_active: 3
"""
    assert envoy_sums(stats) == dict(zip(ENVOY_RUNNING, (3.0, 2.0, 0.0), strict=True))
