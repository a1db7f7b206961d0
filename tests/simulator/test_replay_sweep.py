"""Summaries, sweeps, the knee, the table, the pictures and the command."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from tokenway.cli.main import main
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.replay.fleet import Fleet, Member
from tokenway.simulator.replay.generators import sample
from tokenway.simulator.replay.lineup import Entrant, parse_lineup
from tokenway.simulator.replay.outcome import Replayed, Served
from tokenway.simulator.replay.report import document, markdown
from tokenway.simulator.replay.settings import RunSettings
from tokenway.simulator.replay.summary import RunResult, Slo, summarise
from tokenway.simulator.replay.sweep import KNEE_PRECISION, Job, find_knee, full_speed, run_all, run_job
from tokenway.simulator.replay.trace import Trace, TraceRequest

FLEET: Fleet = (Member(PROFILES["llama8b-h100"]),) * 2


def _served(index: int, arrived_s: float, ttft_s: float | None, tpot_s: float = 0.01, **more: Any) -> Served:
    first_s = None if ttft_s is None else arrived_s + ttft_s
    end_s = arrived_s if first_s is None else first_s + 10 * tpot_s
    sent_s = None if first_s is None else arrived_s
    return Served(index, arrived_s, sent_s, None if first_s is None else 0, first_s, end_s, 100, 11, **more)


def test_a_summary_of_five_requests_by_hand() -> None:
    """Two good, one late, one slow, one refused, over ten seconds of arrivals; one more in the warm-up."""
    outcome = Replayed(
        served=[
            _served(0, 1.0, 99.0),
            _served(1, 10.0, 1.0, cached_tokens=60, best_tokens=50),
            _served(2, 12.0, 2.0, cached_tokens=10, best_tokens=50),
            _served(3, 14.0, 3.0, decisions=2),
            _served(4, 16.0, 2.0, tpot_s=0.2),
            _served(5, 20.0, None),
        ],
        computed_tokens=[Counter({10: 30}), Counter({10: 10})],
    )
    limits: list[tuple[float | None, float | None]] = [(None, None)] * 6
    summary = summarise(outcome, limits, Slo(2.5, 0.1), 5.0)
    assert (summary.requests, summary.offered_rps, summary.goodput_rps) == (5, 0.5, 0.2)
    assert summary.good_ratio == 0.4
    assert summary.shed_ratio == pytest.approx(0.2)
    assert (summary.ttft_mean_s, summary.ttft_p50_s) == (2.0, 2.0)
    assert summary.tpot_mean_s == pytest.approx((3 * 0.01 + 0.2) / 4)
    assert summary.e2e_mean_s == pytest.approx((1.1 + 2.1 + 3.1 + 4.0) / 4)
    assert (summary.hit_ratio, summary.wasted_ratio) == (70 / 400, 40 / 400)
    assert summary.load_spread == 1.5
    assert (summary.held_ratio, summary.hold_mean_s) == (0.2, 0.0)
    own = summarise(outcome, [*limits[:3], (3.5, None), *limits[4:]], Slo(2.5, 0.1), 5.0)
    assert own.good_ratio == 0.6


def test_a_run_without_answers_has_no_latencies() -> None:
    """Everything refused is not an error."""
    summary = summarise(
        Replayed(served=[_served(0, 1.0, None)], computed_tokens=[Counter()]), [(None, None)], Slo(), 0.0
    )
    assert (summary.ttft_mean_s, summary.tpot_p99_s, summary.shed_ratio) == (None, None, 1.0)


def _job(spec: str, speed: float = 1.0, seed: int = 0, requests: int = 40) -> Job:
    trace = sample(Random(seed), requests)
    return Job(Entrant(spec, spec), trace, FLEET, RunSettings(speed=speed), seed, Slo())


@pytest.fixture(scope="module")
def one() -> RunResult:
    """Any result."""
    return run_job(_job("random", requests=20))


def test_equal_jobs_have_equal_results_and_other_seeds_others() -> None:
    """Everything but the cost of decisions repeats."""
    jobs = [_job("lmetric", seed=seed) for seed in (1, 1, 2)]
    one, again, other = run_all(jobs, None, lambda _: None)
    assert (one.summary, one.ttft_quantiles_s, one.heat) == (
        again.summary,
        again.ttft_quantiles_s,
        again.heat,
    )
    assert one.summary != other.summary


def test_speed_raises_the_rate() -> None:
    """Twice the speed is twice the requests per second."""
    slow, fast = run_all([_job("random"), _job("random", 2.0)], None, lambda _: None)
    assert fast.summary.offered_rps == pytest.approx(2 * slow.summary.offered_rps)


def test_the_first_guess_of_the_knee_is_the_prefill_alone() -> None:
    """One request of a second's work every second keeps one engine busy at speed 1."""
    requests = tuple(TraceRequest(float(second), 31_500, 1) for second in range(101))
    one: Fleet = (Member(PROFILES["llama8b-h100"]),)
    assert full_speed(Trace("t", 64, requests), one) == pytest.approx(0.7, abs=0.1)
    assert full_speed(Trace("t", 64, requests), one * 3) == pytest.approx(
        3 * full_speed(Trace("t", 64, requests), one)
    )


class Pretended(Executor):
    """Runs nothing: each policy is good up to a speed of its own, and half good beyond; waits rise."""

    def __init__(self, limits: dict[str, float], like: RunResult) -> None:
        self._limits = limits
        self._like = like
        self.runs = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The result at once."""
        (job,) = args
        limit, speed = self._limits[job.entrant.name], job.settings.speed
        good_ratio = 0.95 if speed <= limit else 0.5
        summary = replace(self._like.summary, good_ratio=good_ratio, ttft_mean_s=speed if limit else 1.0)
        future: Future[Any] = Future()
        future.set_result(replace(self._like, summary=summary))
        self.runs += 1
        return future


@pytest.mark.parametrize("knee", [0.02, 0.9, 1.0, 7.0, 300.0])
def test_the_knee_is_where_the_best_of_its_policies_ceases_to_be_good(knee: float, one: RunResult) -> None:
    """Found from far off on either side, to within its precision, in a bounded number of runs."""
    executor = Pretended({"random": knee / 3, "lmetric": knee}, one)
    found = find_knee(lambda speed: [_job("random", speed), _job("lmetric", speed)], 1.0, executor)
    assert found.missing is None
    assert knee / KNEE_PRECISION <= found.speed <= knee
    assert executor.runs <= 96


def test_where_slower_is_the_same_and_never_good_there_is_no_knee(one: RunResult) -> None:
    """Nobody waits for anybody: four speeds say so, and none slower is tried."""
    executor = Pretended({"random": 0.0}, one)
    found = find_knee(lambda speed: [_job("random", speed)], 1.0, executor)
    assert found.missing is not None
    assert (found.speed, executor.runs) == (0.35, 4)


def test_a_trace_too_short_to_fill_the_fleet_has_no_knee(one: RunResult) -> None:
    """Where all requests come at once, none faster is tried; one request alone comes so at any speed."""
    for fastest, runs in ((0.0, 1), (2.0, 5)):
        executor = Pretended({"random": 1e9}, one)
        found = find_knee(lambda speed: [_job("random", speed)], 1.0, executor, fastest=fastest)
        assert found.missing is not None
        assert (found.speed, executor.runs) == (max(fastest, 0.35), runs)


def test_one_request_is_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without `--rates` it is replayed at one speed, and the report says that there is no knee."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"time_s": 1764500000, "prompt_tokens": 1000, "completion_tokens": 10}\n')
    assert not main(["replay", str(path), "--policies", "random", "--jobs", "1"])
    out = capsys.readouterr().out
    assert "no knee: all requests at once are no load for this fleet" in out
    assert out.count("| random |") == 1


def test_years_without_requests_cost_nothing() -> None:
    """Readings of idle engines are not repeated, nor are idle seconds kept."""
    requests = (TraceRequest(0.0, 1000, 10), TraceRequest(3e9, 1000, 10))
    job = Job(Entrant("lmetric", "lmetric"), Trace("t", 128, requests), FLEET, RunSettings(), 0, Slo())
    result = run_job(job)
    assert result.summary.good_ratio == 1.0
    assert len(result.heat[0]) <= 120


@pytest.mark.parametrize(
    "text", ["unknown", "lmetric:x=1", "lmetric@soon", "oracle:work=-1", "oracle:sleep=1", "oracle:work=x"]
)
def test_unknown_entrants_are_refused(text: str) -> None:
    """By name, parameter, view, or a value out of range."""
    with pytest.raises(ValueError, match=r"policy|parameter|view"):
        parse_lineup(text)


def test_a_lineup_knows_groups_parameters_and_views() -> None:
    """Each entrant once, in order."""
    names = [entrant.name for entrant in parse_lineup("lmetric@history,oracles,oracle:work=2,lmetric")]
    assert names == [
        "lmetric@history",
        *("oracle", "oracle:work=1", "oracle:work=2", "oracle:work=4", "oracle:work=8"),
        "lmetric",
    ]
    assert {"round_robin", "inference_lb", "oracle"} <= {entrant.name for entrant in parse_lineup("all")}


@pytest.fixture(scope="module")
def results() -> list[RunResult]:
    """Two policies at two speeds with two seeds."""
    jobs = [
        _job(spec, speed, seed, requests=40)
        for speed in (1.0, 3.0)
        for spec in ("round_robin", "oracle:work=1")
        for seed in (0, 1)
    ]
    return run_all(jobs, None, lambda _: None)


def test_the_table_has_a_row_per_policy_and_speed(results: list[RunResult]) -> None:
    """Best first, means over seeds."""
    table = markdown(results)
    rows = [line for line in table.splitlines() if line.startswith(("| round", "| oracle"))]
    assert len(rows) == 4
    p90s = [float(row.split("|")[4]) for row in rows[:2]]
    assert p90s == sorted(p90s)
    assert table.count("###") == 2


def test_the_document_is_json_with_all_runs(results: list[RunResult]) -> None:
    """Every run and every mean; timings only if asked for."""
    content = document({"trace": "t"}, results, timings=False)
    assert (len(content["runs"]), len(content["means"])) == (8, 4)
    assert "decision" not in content["runs"][0]
    assert "decision" in document({}, results, timings=True)["runs"][0]
    assert orjson.loads(orjson.dumps(content)) == content


def test_pictures_are_drawn(results: list[RunResult], tmp_path: Path) -> None:
    """Four PNG files."""
    pytest.importorskip("matplotlib")
    from tokenway.simulator.replay.plots import draw

    paths = draw(results, tmp_path / "new", "t")
    assert [path.name for path in paths] == ["t_ttft_cdf.png", "t_goodput.png", "t_load.png", "t_time.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_command_repeats_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same line twice writes the same file, from processes of its own, and prints a table."""
    for name in ("a.json", "b.json"):
        assert not main(
            f"replay sample --max-requests 40 --engines 2 --engines +1 --kv-scale 0.5 --rates x2 --jobs 2 "
            f"--policies round_robin,inference_lb:request_load_weight=2 --no-timings "
            f"--json {tmp_path / name}".split()
        )
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    out = capsys.readouterr().out
    assert "3 × llama8b-h100 (233,500 KV tokens)" in out
    assert "| inference_lb:request_load_weight=2 |" in out


@pytest.mark.parametrize(
    "line",
    [
        "sample --rates fast",
        "sample --profile none",
        "sample --policies unknown",
        "sample --engines -8",
        "sample --engines many",
        "sample --kv-scale 0",
        "sample --kv-scale inf",
        "sample --engines 99999999999",
        "sample --fleet llama8b-h100:99999999999",
        "sample --fleet llama8b-h100:1:nan",
        "sample --token-error nan",
        "sample --max-requests -1",
        "sample --first-seed 1e9",
        "sample --no-such-option",
        "sample --seeds 0",
        "sample --max-context 1",
        "sample --gateways 0",
        "sample --share",
    ],
)
def test_a_wrong_command_says_why(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line, before anything runs."""
    try:
        code: object = main(["replay", *line.split()])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("tokenway replay: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", ["missing.jsonl", "sample --profiles .", "sample --profiles PROFILES"])
def test_a_file_that_cannot_be_used_is_another_exit_code(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1, as for every other verb; and one line."""
    profiles = tmp_path / "profiles.json"
    profiles.write_text('{"mine": {"base": "none of them"}}')
    assert main(["replay", *line.replace("PROFILES", str(profiles)).split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("tokenway replay: ")
    assert err.count("\n") == 1
