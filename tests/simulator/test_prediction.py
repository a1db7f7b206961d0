"""How well first tokens are foreseen, by the benchmark of it: virtual time, so equal on every machine."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from benchmarks.prediction import ALONE_GAP_S, Watched, batched_gap_s, foreseen, table, workload
from extproc.choosing.stateful import FleetView, PolicyRequest
from metadata_center.types import EndpointKey
from tokenway.simulator.policies.ours import LeastCompletion


@pytest.mark.parametrize("load", ["alone", "batched"])
def test_every_class_is_foreseen(load: str) -> None:
    """Misses, half hits and full hits: the median error is below 0.3, and the sums agree within a third."""
    profile = "llama8b-rtxpro6000"
    gap_s = ALONE_GAP_S if load == "alone" else batched_gap_s(profile)
    found = table(foreseen(profile, 600, gap_s, 1))
    assert sorted(found) == ["full", "half", "miss"]
    for kind, row in found.items():
        assert row["median_error"] < 0.3, (kind, row)
        assert 0.75 < row["total"] < 1.33, (kind, row)


def test_the_workload_is_what_it_says() -> None:
    """A third each: new prompts, prompts that begin like an earlier one, prompts sent before."""
    requests = workload(300, 1.0, Random(3)).requests[6:]
    ids = [{first for first, _ in request.runs} for request in requests]
    for number, request in enumerate(requests):
        before = set().union(*ids[:number])
        kind = number % 3
        if kind == 0:
            assert not ids[number] & before
        elif kind == 1 and number > 60:
            assert request.runs[0][0] in before | {0}
            assert request.runs[-1][0] not in before
        elif number > 60:
            assert any(request.runs == other.runs for other in requests[:number])


def test_what_is_learned_from_does_not_change_with_the_ledger() -> None:
    """The columns of a view belong to the caller and go on changing until the answer comes."""
    columns: dict[str, Any] = {
        name: [0, 0]
        for name in (
            *("requests", "prefilling", "prefill_tokens", "prompt_tokens", "context_tokens"),
            *("waiting", "running", "kv_usage", "scraped_s", "matched_blocks", "since_s"),
        )
    }
    view = FleetView(
        now_s=1.0,
        rng=Random(1),
        request=PolicyRequest(1, 1.0, 1000, [1, 2]),
        gateways=1,
        block_size=16,
        keys=(EndpointKey("a"), EndpointKey("b")),
        groups=["g", "g"],
        weights=[1.0, 1.0],
        kv_tokens=[100_000, 100_000],
        **columns,
    )
    for policy in (LeastCompletion(), Watched()):
        snapshot = policy.snapshot(view)
        before = repr(snapshot)
        for column in columns.values():
            column[0] += 7
        assert repr(snapshot) == before
