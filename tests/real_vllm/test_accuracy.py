"""What the figures count, and what the installer refuses; needs no engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from testbed.vllm.environment.install import cuda_needs
from tests.real_vllm.accuracy import cached_summary, equal_ratio, foreseen, ttft_summary


def _record(predicted: int | None, reported: int | None, **outcome: Any) -> dict[str, Any]:
    return {
        "request_id": "r",
        "model": "tiny",
        "outcome": {
            "attempts": 1,
            "prompt_tokens": 100,
            "predicted_cached_tokens": predicted,
            "cached_tokens": reported,
            "predicted_ttft_s": 0.2,
            "ttft_s": 0.1,
            **outcome,
        },
    }


def test_cached_tokens_are_compared_request_by_request() -> None:
    """Equal ones, ones over and ones under are counted, among all requests and among those with a hit."""
    rows = foreseen([_record(0, 0), _record(64, 64), _record(96, 64), _record(0, 32)])
    assert equal_ratio(rows) == 0.5
    assert cached_summary(rows) == {
        "requests": 4,
        "equal_ratio": 0.5,
        "hits": 3,
        "equal_ratio_of_hits": 0.3333,
        "over": 1,
        "under": 1,
        "mean_absolute_error_tokens": 16.0,
    }


@pytest.mark.parametrize(
    "record",
    [
        {"request_id": "r", "model": "tiny", "outcome": None},
        _record(0, 0, attempts=2),
        _record(None, 0),
        _record(0, None),
        _record(0, 0, prompt_tokens=None),
    ],
    ids=["running", "retried", "no prediction", "no cached tokens", "no usage"],
)
def test_requests_without_both_sides_are_left_out(record: dict[str, Any]) -> None:
    """A record that cannot be compared is no row, and no rows give no figures."""
    assert foreseen([record]) == []
    assert equal_ratio([]) == 0.0
    assert cached_summary([])["mean_absolute_error_tokens"] is None
    assert ttft_summary([]) == {"requests": 0}


def test_errors_of_ttft_are_relative_to_what_was_measured() -> None:
    """Predicted 0.2 s against 0.1 s is an error of 1 and a bias of 100 ms; whole answers have neither."""
    rows = foreseen([_record(0, 0), _record(0, 0), _record(0, 0, ttft_s=None)])
    summary = ttft_summary(rows)
    assert summary["requests"] == 2
    assert (summary["median_relative_error"], summary["bias_ms"]) == (1.0, 100.0)


@pytest.mark.parametrize(
    ("requires", "needs"),
    [
        (None, []),
        (["filelock", "sympy>=1.13", 'nvidia-thing; extra == "video"'], []),
        (["filelock", 'nvidia-cublas==13.1; platform_system == "Linux"'], ["nvidia-cublas==13.1"]),
        (["cuda-bindings<14"], ["cuda-bindings<14"]),
    ],
    ids=["nothing", "cpu", "cuda libraries", "cuda bindings"],
)
def test_a_torch_that_needs_cuda_is_recognised(requires: list[str] | None, needs: list[str]) -> None:
    """Of what pip would install, requirements that only CUDA builds have are found; optional ones are not."""
    metadata = {} if requires is None else {"requires_dist": requires}
    found = cuda_needs(json.dumps({"install": [{"metadata": metadata}]}))
    assert [requirement.partition(";")[0] for requirement in found] == needs
