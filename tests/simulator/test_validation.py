"""Playing measured runs again: reading, comparing and fitting, against runs whose truth is known."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import orjson
import pytest

from tokenway.simulator.engine.profile import PROFILES, EngineProfile
from tokenway.simulator.validation.comparing import compare, gauge_errors, halves
from tokenway.simulator.validation.datasheet import Card, Model, from_datasheet
from tokenway.simulator.validation.files import read_layers, read_meta, read_run, run_names
from tokenway.simulator.validation.fitting import deviations, fit
from tokenway.simulator.validation.measured import Load, MeasurementError, Run, Timing, measured_run
from tokenway.simulator.validation.playing import play

PLAIN = EngineProfile("plain", 1.0, 9.0, 0.1, 0.0, 0.0, 0.0, 0.0, 4096)


def _row(arrival: float, prompt: int, output: int, **changes: Any) -> dict[str, Any]:
    """A request of 100 ms to its first and 10 ms to each further token, on an engine clock 50 s ahead."""
    row = {"input_toks": prompt, "output_toks": output, "arrival_time": arrival, "queued_ts": arrival + 50.0}
    times = {"first_token_ts": arrival + 50.1, "last_token_ts": arrival + 50.1 + 0.01 * (output - 1)}
    return row | times | changes


def _loads(rng: Random, requests: int, gap_s: float) -> list[Load]:
    arrival_s, loads = 0.0, []
    for _ in range(requests):
        arrival_s += rng.expovariate(1.0 / gap_s)
        loads.append(Load(arrival_s, rng.randint(20, 800), rng.randint(2, 80)))
    return loads


def test_the_two_clocks_are_joined_at_the_quickest_request() -> None:
    """Only the difference between requests is known: the one queued soonest was queued as it arrived."""
    run = measured_run([_row(1000.0, 10, 3), _row(1002.0, 10, 1, queued_ts=1052.5)])
    assert [timing.arrival_s for timing in run.timings] == [0.0, 2.0]
    assert run.timings[0].ttft_s == pytest.approx(0.1)
    assert run.timings[0].tpot_s == pytest.approx(0.01)
    assert run.timings[1].tpot_s is None


def test_requests_are_put_in_the_order_of_arrival_with_their_keys() -> None:
    """A file need not be sorted; keys belong to its positions."""
    run = measured_run([_row(5.0, 7, 2), _row(4.0, 8, 2)], keys={0: (1, 2)})
    assert [(load.arrival_s, load.prompt_tokens, load.keys) for load in run.loads] == [
        (0.0, 8, ()),
        (1.0, 7, (1, 2)),
    ]


@pytest.mark.parametrize("rows", [[], [{"input_toks": 1}], [_row(0.0, 1, 1, queued_ts=None)]])
def test_a_run_without_times_is_refused(rows: list[dict[str, Any]]) -> None:
    """No request, a missing field or one that is no number."""
    with pytest.raises(MeasurementError):
        measured_run(rows)


def test_a_lone_request_takes_what_the_step_model_says() -> None:
    """One step of 200 tokens (1 + 20 ms), then 3 of one token (1 + 9 ms each)."""
    run = play(PLAIN, [Load(0.5, 200, 4)])
    (timing,) = run.timings
    assert timing.ttft_s == pytest.approx(0.021)
    assert timing.last_s == pytest.approx(0.5 + 0.021 + 0.030)


def test_known_keys_shorten_the_second_prompt() -> None:
    """A prompt whose blocks the engine holds is computed from there on."""
    keys = tuple(range(12))
    first, second = play(PLAIN, [Load(0.0, 200, 1, keys), Load(1.0, 200, 1, keys)]).timings
    assert first.ttft_s == pytest.approx(0.021)
    assert second.ttft_s == pytest.approx(0.010)


def test_ranks_share_the_load_and_their_gauges_are_summed() -> None:
    """Two requests at once run on two ranks, each as if it were alone."""
    loads = [Load(0.0, 200, 150), Load(0.0, 200, 150)]
    alone = play(PLAIN, loads[:1])
    both = play(PLAIN, loads, ranks=2)
    assert [timing.last_s for timing in both.timings] == [alone.timings[0].last_s] * 2
    assert (both.gauges[0].running, both.gauges[0].waiting) == (2, 0)
    assert both.gauges[0].kv_usage == pytest.approx(alone.gauges[0].kv_usage)


def test_a_full_queue_is_no_run() -> None:
    """A profile that refuses requests cannot repeat a run in which all were answered."""
    with pytest.raises(ValueError, match="queue of plain is full"):
        play(replace(PLAIN, max_num_queued_reqs=1), [Load(0.0, 9, 9)] * 3)


def test_composing_a_step_ahead_costs_what_arrives_during_one_a_step() -> None:
    """The other's decode steps take 10 ms: what arrives in the middle of one waits 5 ms, or 15."""
    loads = [Load(0.0, 10, 60), Load(0.105, 10, 2)]
    waits = [play(replace(PLAIN, async_scheduling=ahead), loads).timings[1].ttft_s for ahead in (False, True)]
    assert waits[0] == pytest.approx(0.005 + 0.010)
    assert waits[1] == pytest.approx(0.005 + 0.010 + 0.010)


def test_composing_ahead_costs_nothing_on_an_idle_engine() -> None:
    """No step is composed of nothing."""
    (timing,) = play(replace(PLAIN, async_scheduling=True), [Load(0.0, 10, 1)]).timings
    assert timing.ttft_s == pytest.approx(0.010)


def test_a_comparison_gives_errors_of_means_and_quantiles() -> None:
    """Everything twice as slow: every error is +100 %, and no distribution overlaps."""
    loads = tuple(Load(float(at), 10, 11) for at in range(10))
    real = tuple(Timing(float(at), at + 0.1, at + 0.2, 11) for at in range(10))
    slow = tuple(Timing(float(at), at + 0.2, at + 0.4, 11) for at in range(10))
    found = compare(Run(loads, real, ()), Run(loads, slow, ()), range(10))
    for spread in (found.ttft_s, found.tpot_s, found.e2e_s):
        assert spread.errors == pytest.approx((1.0,) * 4)
        assert spread.distance == 1.0
    assert orjson.loads(orjson.dumps(found.document()))["ttft_s"]["errors"] == [1.0] * 4


def test_equal_runs_are_at_no_distance() -> None:
    """A run compared with itself, gauges included."""
    run = play(PLAIN, _loads(Random(1), 20, 0.1))
    found = compare(run, run, range(20))
    assert (found.ttft_s.distance, found.tpot_s.errors) == (0.0, (0.0,) * 4)
    assert all(distance == 0.0 for _, distance in gauge_errors(run, run).values())


def test_halves_split_the_time_not_the_requests() -> None:
    """Three early requests and one late one are three and one."""
    timings = tuple(Timing(at, at + 1, at + 1, 1) for at in (0.0, 1.0, 2.0, 10.0))
    assert halves(Run((), timings, ())) == ([0, 1, 2], [3])


def test_a_fit_finds_the_speed_that_made_the_run() -> None:
    """From constants off by 40 %, half of the requests are enough to foretell the others within 3 %."""
    truth = EngineProfile("truth", 1.0, 10.0, 0.08, 1e-6, 1e-4, 0.02, 0.0, 65_536, max_num_seqs=16)
    loads = _loads(Random(2), 60, 0.05)
    run = play(truth, loads)
    start = replace(truth, w0_ms=6.0, b_ms_per_token=0.12, d_ms_per_context_token=2e-4)
    first, second = halves(run)
    found = fit(start, run, first)
    assert found.error < found.begun / 5
    later = compare(run, play(found.profile, run.loads), second)
    assert abs(later.ttft_s.errors[0]) < 0.03
    assert abs(later.tpot_s.errors[0]) < 0.03


def test_a_fit_leaves_what_a_run_does_not_show() -> None:
    """Prompts too short for attention to matter say nothing of its cost: the start's value stays."""
    truth = EngineProfile("truth", 1.0, 10.0, 0.08, 1e-9, 1e-4, 0.02, 0.0, 65_536)
    run = play(truth, [Load(0.1 * at, 16, 8) for at in range(20)])
    start = replace(truth, w0_ms=12.0)
    found = fit(start, run, range(20), constants=("w0_ms", "c_ms_per_pair"))
    assert found.profile.c_ms_per_pair == pytest.approx(start.c_ms_per_pair, rel=1e-3)
    assert found.profile.w0_ms == pytest.approx(10.0, rel=0.02)


def test_deviations_are_shares_of_the_measured_means() -> None:
    """TTFT of 0.1 and 0.3 s played as 0.2 and 0.3 s: off by half of the mean, and by nothing."""
    loads = (Load(0.0, 1, 1), Load(0.0, 1, 1))
    real, ours = (
        Run(loads, tuple(Timing(0.0, first, first, 1) for first in firsts), ())
        for firsts in ((0.1, 0.3), (0.2, 0.3))
    )
    assert deviations(real, ours, range(2)) == pytest.approx(np.array([0.5, 0.0]))


def test_a_data_sheet_gives_the_roofline() -> None:
    """1 GB read at 100 GB/s is 10 ms; a token of 3e9 parameters at 60 % of 1e13 FLOP/s is 1 ms."""
    card, model = Card(1e11, 1e13, 24e9), Model(2e9, 1e9, 3e9, 1e5, 1e5)
    profile = from_datasheet("x", card, model)
    assert profile.w0_ms == pytest.approx(10.0)
    assert profile.b_ms_per_token == pytest.approx(1.0)
    assert profile.d_ms_per_context_token == pytest.approx(1e-3)
    assert profile.kv_tokens == int((0.9 * 24e9 - 2e9 - 2e9) / 1e5)
    assert from_datasheet("x", card, model, kv_tokens=4096).kv_tokens == 4096


def test_a_folder_of_runs_is_read_with_its_gauges_and_tokens(tmp_path: Path) -> None:
    """Requests, gauges, meta data, and block keys where the token counts are those of the run."""
    (tmp_path / "a_requests.jsonl").write_bytes(
        b"".join(orjson.dumps(_row(float(at), 32, 16)) + b"\n" for at in range(2))
    )
    (tmp_path / "a_timeseries.csv").write_text("t,running,waiting,kv_cache_pct\n1.0,2,1,50.0\n")
    (tmp_path / "a_meta.json").write_text('{"model": "m"}')
    tokens = tmp_path / "tokens.jsonl.gz"
    ids = [
        {"input_tok_ids": [1] * 32, "output_tok_ids": [2] * 16},
        {"input_tok_ids": [1], "output_tok_ids": [2]},
    ]
    tokens.write_bytes(gzip.compress(b"".join(orjson.dumps(line) + b"\n" for line in ids)))
    assert run_names(tmp_path) == ["a"]
    assert read_meta(tmp_path, "a") == {"model": "m"}
    run = read_run(tmp_path, "a", tokens, 16)
    assert [len(load.keys) for load in run.loads] == [3, 0]
    assert (run.gauges[0].running, run.gauges[0].kv_usage) == (2.0, 0.5)
    (tmp_path / "a_timeseries.csv").unlink()
    assert read_run(tmp_path, "a", None, 16).gauges == ()


@pytest.mark.parametrize("line", ["no JSON", "[]", "{}"])
def test_a_bad_file_is_named(tmp_path: Path, line: str) -> None:
    """The error says which file is not of the form expected."""
    (tmp_path / "a_requests.jsonl").write_text(line + "\n")
    with pytest.raises(MeasurementError, match="a_requests"):
        read_run(tmp_path, "a", None, 16)


@pytest.mark.parametrize("name", ["llama8b-rtx4090", "llama8b-rtxpro6000"])
def test_fitted_profiles_compose_their_steps_ahead(name: str) -> None:
    """As the engines did that they were fitted to; those from published figures do not."""
    assert PROFILES[name].async_scheduling
    assert not PROFILES["llama8b-h100"].async_scheduling


def test_a_step_is_the_sum_of_its_kernels(tmp_path: Path) -> None:
    """Layers count as often as there are, embedding and norm once, the head for one token."""
    path = tmp_path / "layers.csv.gz"
    names = {"embedding": 1, "attn": 10, "up_proj": 20, "final_layernorm": 2, "lm_head": 5}
    rows = [
        f"{name},{tokens},0,1,{1_000_000 * ms * tokens}" for tokens in (1, 4) for name, ms in names.items()
    ]
    path.write_bytes(
        gzip.compress("\n".join(["layer_name,input,kv_cache,tp_size,latency(ns)", *rows]).encode())
    )
    assert read_layers(path, 3) == pytest.approx({1: 1 + 2 + 5 + 3 * 30, 4: 4 + 8 + 5 + 3 * 120})
    path.write_bytes(gzip.compress(b"layer_name,input\nattn,1\n"))
    with pytest.raises(MeasurementError, match="layers"):
        read_layers(path, 3)
