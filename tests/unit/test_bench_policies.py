"""The benchmark of policies: its lines, what stored figures depend on, and what is read from them."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are not installed

from benchmarks.policies import cells as declared
from benchmarks.policies.aims import aims
from benchmarks.policies.cells import Cell, CellKind, cells, named, selected
from benchmarks.policies.chance import gateways, holding, is_loss, knowing, ratio
from benchmarks.policies.figures import (
    GOODPUT,
    KEPT,
    P90,
    Column,
    Row,
    best,
    compact,
    is_compared,
    means,
    ratios,
    shared_seeds,
)
from benchmarks.policies.figures import kept as read_back
from benchmarks.policies.missed import missed
from benchmarks.policies.one_by_one import one_by_one
from benchmarks.policies.questions import AT_KNEE, CHANCE, IN_QUESTION, SEEDS, every_cell, near_name
from benchmarks.policies.running import differences, load, path_of, run_cells, verify
from benchmarks.policies.stamps import ROOT, code_of, sources, stamp
from benchmarks.policies.tables import document, limit_said, reuse, worst
from benchmarks.policies.waiting import late_binding
from extproc.choosing.rivals.registry import LATE, RIVALS
from tokenway.cli.replay_options import replay_parser
from tokenway.simulator.policies.registry import OWN
from tokenway.simulator.replay.lineup import parse_lineup

TINY = Cell(
    "hot-spot",
    "strong",
    CellKind.RIVALS,
    3,
    ("round_robin",),
    (1.0,),
    ("gen:hot-spot:requests=20", "--engines", "2"),
)


def test_every_line_is_one_that_the_command_understands() -> None:
    """Options parse, policies exist, and names are distinct."""
    every = every_cell()
    for cell in every:
        assert cell.argv[:2] == ("tokenway", "replay")
        options = replay_parser().parse_args(cell.argv[2:])
        assert len(parse_lineup(options.policies)) == len(cell.policies)
    assert len({cell.name for cell in every}) == len(every)


def test_every_rival_of_the_registry_takes_part_once() -> None:
    """A new rival must be put into a group."""
    groups = (*declared.STRONG, *declared.SIMPLE, *declared.REST, *declared.LATE, *declared.AFFINITY)
    assert sorted(groups) == sorted({**RIVALS, **LATE})
    assert set(declared.OWN) <= set(OWN)


def test_no_cell_uses_a_seed_that_rules_were_shaped_on() -> None:
    """Seeds 1 and 2 are for shaping; speeds rise from below to past the knee."""
    assert {cell.seed for cell in every_cell()} == {3, 4, 5}
    assert all(list(each.speeds) == sorted(set(each.speeds)) for each in declared.WORKLOADS)
    assert {len(each.speeds) for each in declared.WORKLOADS} == {3}
    assert {(len(each.speeds), each.seeds) for each in declared.EXTRA} == {(1, (3,))}


def test_each_further_list_of_words_narrows_the_choice() -> None:
    """Words of one list add up; lists intersect; an unknown word is an error."""
    every = cells()
    rivals = selected(every, ["conversation,azure", "rivals", "3"])
    assert {cell.workload for cell in rivals} == {"conversation", "azure"}
    assert {(cell.kind, cell.seed) for cell in rivals} == {(CellKind.RIVALS, 3)}
    assert selected(every, []) == every
    with pytest.raises(ValueError, match="unknown"):
        selected(every, ["rivals", "unknown"])
    with pytest.raises(ValueError, match="unknown"):
        named(every, "unknown")


def copied(root: Path) -> None:
    """A copy of all that any cell depends on."""
    for path in {path for kind in CellKind for path in sources(kind)}:
        there = root / path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("tokenway/simulator/policies/ours.py", {CellKind.OWN, CellKind.WHOLE}),
        ("extproc/choosing/completion.py", {CellKind.OWN, CellKind.WHOLE}),
        ("tokenway/simulator/replay/run.py", {CellKind.OWN, CellKind.WHOLE}),
        ("tokenway/simulator/replay/ledger.py", {CellKind.OWN, CellKind.WHOLE}),
        ("tokenway/simulator/replay/oracle.py", {CellKind.ORACLES}),
        ("extproc/choosing/rivals/dynamo.py", {CellKind.RIVALS, CellKind.ORACLES, CellKind.WHOLE}),
        ("tokenway/simulator/engine/engine.py", set(CellKind)),
        ("tokenway/simulator/replay/trace.py", set(CellKind)),
    ],
)
def test_a_change_makes_those_stale_that_depend_on_it(
    tmp_path: Path, changed: str, stale: set[CellKind]
) -> None:
    """Work on the product's own rules does not ask for the rivals' hours again; the engine concerns all."""
    copied(tmp_path)
    probes = {kind: replace(TINY, kind=kind) for kind in CellKind}
    before = {kind: stamp(cell, tmp_path, tmp_path) for kind, cell in probes.items()}
    with (tmp_path / changed).open("a", encoding="utf-8") as file:
        file.write("changed = True\n")
    assert {kind for kind, cell in probes.items() if stamp(cell, tmp_path, tmp_path) != before[kind]} == stale


def test_words_make_nothing_stale(tmp_path: Path) -> None:
    """Comments, docstrings and empty lines of every source may change; no figure depends on them."""
    copied(tmp_path)
    before = {kind: stamp(replace(TINY, kind=kind), tmp_path, tmp_path) for kind in CellKind}
    for path in {path for kind in CellKind for path in sources(kind, tmp_path)}:
        words = re.sub(r'^( *""")(?=\w)', r"\1Other words, ä. ", path.read_text(encoding="utf-8"), flags=re.M)
        path.write_text(f'# A comment.\n\n{words}\n# Another: """\n', encoding="utf-8")
    assert {kind: stamp(replace(TINY, kind=kind), tmp_path, tmp_path) for kind in CellKind} == before


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (b"x = 1  # one\n", b"x = 1"),
        (b'x = "# none"\n', b'x = "# none"'),
        (b'def f():\n    """Text\n    # more\n    """\n    return 1\n', b"def f():\n    return 1"),
        ('x = 1\n"""Größe."""  # ä\n\ny = """kept\n\n"""\n'.encode(), b'x = 1\ny = """kept\n"""'),
        (b'"""a"""; x = 1\n', b"       ; x = 1"),
    ],
)
def test_code_is_what_is_left(source: bytes, code: bytes) -> None:
    """Strings that are values stay."""
    assert code_of(source) == code


def test_a_stamp_covers_line_trace_and_sources(tmp_path: Path) -> None:
    """Another option, another trace of the same name: another stamp."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text("one")
    cell = replace(TINY, line=("trace.jsonl", "--engines", "2"))
    stamps = [stamp(cell, tmp_path), stamp(replace(cell, line=(*cell.line, "--share")), tmp_path)]
    trace.write_text("two")
    stamps.append(stamp(cell, tmp_path))
    assert len(set(stamps)) == 3
    with pytest.raises(FileNotFoundError):
        stamp(replace(cell, line=("missing",)), tmp_path)


def test_a_cell_runs_once_and_can_be_verified(tmp_path: Path) -> None:
    """The installed command runs; what is stored is not run again; a second run gives the same figures."""
    results = tmp_path / "results"
    first = run_cells([TINY], tmp_path, results, 1)
    assert (first["ran"], first["stored_before"], first["failed"]) == (1, 0, [])
    stored = load(TINY, results)
    assert stored is not None
    assert stored.argv == TINY.argv
    assert [run["policy"] for run in stored.document["runs"]] == ["round_robin"]
    again = run_cells([TINY], tmp_path, results, 1)
    assert (again["ran"], again["stored_before"]) == (0, 1)
    assert verify(TINY, tmp_path, results, 1) == []


def test_a_cell_that_fails_is_reported_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's own words are shown; the next cells would still run."""
    broken = replace(TINY, policies=("unknown",))
    done = run_cells([broken], tmp_path, tmp_path, 1)
    assert (done["ran"], done["failed"]) == (0, [broken.name])
    assert "no policy is called 'unknown'" in capsys.readouterr().out
    assert load(broken, tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"version": 99}', b"\xff"])
def test_a_file_that_is_no_cell_counts_as_missing(tmp_path: Path, content: bytes) -> None:
    """Whatever is in it, it is run again."""
    path_of(TINY, tmp_path).write_bytes(content)
    assert load(TINY, tmp_path) is None


def test_differences_name_what_differs_but_not_real_time() -> None:
    """Decision times differ from run to run; everything else must not."""
    run: dict[str, Any] = {"policy": "p", "speed": 2.0, "ttft_p90_s": 1.0, "decision": {"mean_us": 3.0}}
    same = {**run, "decision": {"mean_us": 9.0}}
    assert differences({"runs": [run]}, {"runs": [same]}) == []
    assert differences({"runs": [run]}, {"runs": [{**run, "ttft_p90_s": 1.5}]}) == [
        "p x2 ttft_p90_s: 1.0 before, 1.5 now"
    ]
    assert differences({"runs": [run]}, {"runs": []}) == ["1 runs before, 0 now"]


def row(policy: str, seed: int, p90_s: float | None, goodput: float, kind: CellKind = CellKind.RIVALS) -> Row:
    """A run of the conversation workload at its knee; all other figures are 1."""
    workload = declared.WORKLOADS[0]
    cell = Cell(workload.name, "strong", kind, seed, (policy,), workload.speeds, workload.line)
    figures = dict.fromkeys(KEPT, 1.0) | {"ttft_p90_s": p90_s, "goodput_rps": goodput}
    return Row(cell, policy, workload.speeds[1], figures)


def test_means_are_over_seeds_that_all_have() -> None:
    """A policy with fewer seeds is left out rather than compared on easier ones."""
    rows = [row("a", 3, 1.0, 1.0), row("a", 4, 4.0, 0.0), row("b", 3, 1.0, 1.0)]
    assert shared_seeds(rows, ["a"]) == {3, 4}
    assert shared_seeds(rows, ["a", "b"]) == {3}
    assert shared_seeds(rows, []) == frozenset()
    speed = rows[0].speed
    assert means(rows, [3, 4]).keys() == {(speed, "a")}
    assert means(rows, [3, 4])[speed, "a"]["ttft_p90_s"] == 2.0
    assert means(rows, [3, 4])[speed, "a"]["goodput_rps"] == 0.0


def test_the_best_rival_is_that_of_each_column() -> None:
    """Least time, most goodput; a policy without a figure is not it."""
    figures = {each.policy: each.figures for each in (row("a", 3, 2.0, 9.0), row("b", 3, 1.0, 8.0))}
    figures["none"] = row("none", 3, None, 0.0).figures
    assert best(figures, P90) == ("b", 1.0)
    assert best(figures, GOODPUT) == ("a", 9.0)
    assert best({}, P90) is None
    assert Column("x", "x").worst([0.5, 2.0]) == 2.0
    assert GOODPUT.worst([0.5, 2.0]) == 0.5
    assert P90.ratio(None, 1.0) is P90.ratio(1.0, 0.0) is None


def test_the_worst_ratio_is_the_least_favourable_of_all_workloads() -> None:
    """Own figures stand against the best rival of each column; the worst single seed is beside the mean."""
    rows = [
        each for seed in (3, 4) for each in (row("lmetric", seed, 2.0, 10.0), row("smetric", seed, 4.0, 8.0))
    ]
    rows += [
        row("least_completion", 3, 1.0, 9.0, CellKind.OWN),
        row("least_completion", 4, 9.0, 9.0, CellKind.OWN),
    ]
    workload = declared.WORKLOADS[0]
    found = ratios(rows, workload, [3, 4])
    knee = workload.speeds[1]
    assert found["least_completion", "ttft_p90_s", knee] == pytest.approx(1.5)
    assert found["least_completion", "goodput_rps", knee] == pytest.approx(0.9)
    table = worst(rows)[-1]
    assert "1.50 conversation (4.50)" in table
    assert "0.90 conversation (0.90)" in table
    assert "| `least_completion` | at the knee |" in table
    assert "(0.90) | 100 |" in table
    rows += [row("quartz", seed, 0.1, 99.0) for seed in (3, 4)]  # it lets requests wait
    assert ratios(rows, workload, [3, 4]) == found
    assert worst(rows)[-1] == table


def late(policy: str, p90_s: float, seed: int = 3, kind: CellKind = CellKind.RIVALS) -> Row:
    """A run of a rival that waits, or of the product's rule that does."""
    made = row(policy, seed, p90_s, 10.0, kind)
    return replace(made, cell=replace(made.cell, group="late" if kind is CellKind.RIVALS else "own"))


def test_late_binding_is_compared_with_late_binding() -> None:
    """Own over the best that waits, and over the best that decides at once; what was not run is named."""
    rows = [late("llmd_flow", 4.0), late("quartz", 2.0), row("lmetric", 3, 8.0, 10.0)]
    rows.append(late("late_completion", 3.0, kind=CellKind.OWN))
    page = "\n".join(late_binding(rows))
    assert "| conversation, 8 engines | ×2.75 | 3 | 2 | `quartz` | 1.50 | 8 | `lmetric` | 0.38 | 3 |" in page
    assert "were not run on: agent sessions, 8 engines ×1.75 (seed 3, 4, 5);" in page
    assert "conversation, 8 engines ×3 (seed 4, 5)" in page
    assert late_binding(rows[2:]) == []


def test_an_aim_names_the_rows_that_miss_it() -> None:
    """At the conversation's knee p90 is to be at most that of the best rival, goodput no less."""
    rows = [row("lmetric", 3, 2.0, 10.0), row("least_completion", 3, 2.1, 10.0, CellKind.OWN)]
    page = aims(rows)[-1]
    knee = (
        "| `least_completion` | TTFT p90 s | below and at the knee | ≤ 1 | 0 of 1 | conversation ×2.75 1.05 |"
    )
    assert knee in page
    assert "| `least_completion` | goodput requests/s | everywhere | ≥ 1 | 1 of 1 | – |" in page
    assert "| `late_completion` | TTFT p99 s | everywhere | ≤ 1 | 0 of 0 | – |" in page
    assert aims([]) == []


def test_a_missed_aim_shows_what_the_rival_ahead_pays() -> None:
    """One is ahead by half its goodput, another for nothing; a third is not."""
    own = row("least_completion", 3, 2.1, 10.0, CellKind.OWN)
    page = missed(
        [row("lmetric", 3, 1.0, 5.0), row("smetric", 3, 2.0, 10.0), row("dynamo", 3, 2.09, 9.0), own]
    )
    assert "none in 0 of 1" in page[1]
    assert page[-1].splitlines()[2:] == [
        "| `least_completion` | conversation ×2.75 | TTFT p90 s ≤ 1 | `lmetric`"
        " | 1.00 | 1.00 | **2.10** | 1.00 | 1.00 | 2.00 | `smetric` |"
    ]
    costly = missed([row("lmetric", 3, 1.0, 5.0), own])
    assert "none in 1 of 1" in costly[1]
    assert costly[-1].endswith("| 2.00 | – |")
    assert missed([row("lmetric", 3, 3.0, 10.0), own]) == missed([]) == []


def test_an_aim_of_goodput_says_how_much_there_is_to_be_had() -> None:
    """Over a rival that answers 10 of 10.4 offered in time nobody has more than 1.04."""
    rows = [row("lmetric", 3, 2.0, 10.0), row("least_completion", 3, 2.1, 9.5, CellKind.OWN)]
    rows = [replace(each, figures={**each.figures, "offered_rps": 10.4}) for each in rows]
    assert (
        "| goodput requests/s | everywhere | ≥ 1 | 0 of 1 | conversation ×2.75 (of 1.04) 0.95 |"
        in aims(rows)[-1]
    )


def test_each_rival_is_shown_by_itself_over_all_rows() -> None:
    """In how many rows it is ahead, by figure and in all of them; the nearest in the mean stands first."""
    own = [row(policy, 3, 1.0, 10.0, CellKind.OWN) for policy in ("least_completion", "late_completion")]
    near = row("near", 3, 0.9, 10.2)
    far = replace(row("far", 3, 2.0, 5.0), figures={**row("far", 3, 2.0, 5.0).figures, "ttft_mean_s": 4.0})
    waits = row("quartz", 3, 0.1, 99.0)
    *_, text = one_by_one([*own, near, far, waits])
    lines = [line for line in text.splitlines() if "late_completion" in line]
    assert [line.split("`late_completion` | ")[1] for line in lines] == [
        "1 | 1.00 (0) | 1.00 (0) | 1.11 (1) | 1.00 (0) | 1.00 (0) | 0.98 (0) | 1 | 0 |",
        "1 | 0.25 (0) | 1.00 (0) | 0.50 (0) | 1.00 (0) | 1.00 (0) | 2.00 (0) | 0 | 1 |",
    ]
    assert one_by_one([near]) == []


def test_what_knowing_more_is_worth_is_over_the_rule_that_serves() -> None:
    """A run with a thing known stands over one without, seed by seed; it is in no mean of the comparison."""
    held = row("late_completion", 3, 2.0, 10.0, CellKind.OWN)
    held = replace(held, cell=replace(held.cell, group="own"))
    known = row("late_completion", 3, 1.0, 12.0, CellKind.OWN)
    known = replace(known, cell=replace(known.cell, group="known-caches"))
    said = replace(known, policy=declared.SAID[1], cell=replace(known.cell, group="known-all"))
    page = knowing([held, known, said])[-1]
    assert "| ×2.75 | caches | 1.00 | 1.00 | 0.50 | 1.00 | 1.00 | 1.20 | 3 |" in page
    assert "| conversation, 8 engines | ×2.75 | all | 1.00 | 1.00 | 0.50 |" in page
    assert "| limits |" not in page
    assert is_compared(held.cell)
    assert not is_compared(known.cell)
    assert knowing([held]) == []


def test_each_rival_that_waits_is_in_each_row() -> None:
    """Own over the rival's in every column; what is worse is bold, for goodput the other way round."""
    rows = [late("llmd_flow", 4.0), late("quartz", 2.0), late("late_completion", 3.0, kind=CellKind.OWN)]
    rows[1] = replace(rows[1], figures=dict(rows[1].figures) | {"goodput_rps": 12.5, "shed_ratio": 0.25})
    lines = "\n".join(late_binding(rows)).splitlines()
    (heading,) = [line for line in lines if line.startswith("| **conversation, 8 engines, ×2.75**")]
    at = lines.index(heading)
    assert heading.endswith("| 1 | 1 | 3 | 1 | 1e+03 | 10 | 100 | 3 |")
    same = "1 (1.00) | 1 (1.00)"
    assert lines[at + 1] == (
        f"|  | `llmd_flow` | {same} | 4 (0.75) | 1 (1.00) | 1e+03 (1.00) | 10 (1.00) | 100 |  |"
    )
    assert lines[at + 2] == (
        f"|  | `quartz` | {same} | 2 (**1.50**) | 1 (1.00) | 1e+03 (1.00) | 12.5 (**0.80**) | 25 |  |"
    )


def test_a_speed_with_fewer_seeds_does_not_shorten_the_other() -> None:
    """Past the knee on two seeds, at it on one: both rows are there, each of its own seeds."""
    knee, past = declared.WORKLOADS[0].speeds[1:]
    rows = [late("quartz", 2.0), late("late_completion", 3.0, kind=CellKind.OWN)]
    rows += [
        replace(each, speed=past)
        for seed, factor in ((3, 1.0), (4, 4.0))
        for each in (
            late("quartz", factor, seed),
            late("late_completion", factor, seed, CellKind.OWN),
        )
    ]
    page = "\n".join(late_binding(rows))
    assert f"| conversation, 8 engines | ×{knee:g} | 3 | 2 | `quartz` | 1.50 | – | – | – | 3 |" in page
    assert f"| conversation, 8 engines | ×{past:g} | 2 | 2 | `quartz` | 1.00 | – | – | – | 3, 4 |" in page


def test_what_the_limit_is_worth_is_shown_where_it_was_said() -> None:
    """1.5 times the best rival's p90 while it is learned, 0.75 with it; none elsewhere."""
    rows = [row("lmetric", 3, 2.0, 10.0), row("least_completion", 3, 3.0, 10.0, CellKind.OWN)]
    assert limit_said(rows) == []
    rows.append(row("least_completion:max_num_seqs=128", 3, 1.5, 10.0, CellKind.OWN))
    page = "\n".join(limit_said(rows))
    assert "| ×2.75 | `least_completion` | 1.00 → 1.00 | 1.00 → 1.00 | 1.50 → 0.75 |" in page
    assert "| ×2.75 | `late_completion` | – |" in page
    assert "agent sessions" not in page


def asked(policy: str, seed: int, p90_s: float, group: str, workload: str = "bursty") -> Row:
    """A run of a row in question; all other figures are 1."""
    made = row(policy, seed, p90_s, 1.0, CellKind.OWN)
    speed = AT_KNEE.get(workload.removesuffix("-near"), IN_QUESTION["bursty"][0])
    return replace(made, cell=replace(made.cell, workload=workload, group=group), speed=speed)


def test_holding_loses_only_where_the_seeds_agree() -> None:
    """The same mean of 1.1 is a loss where all seeds have it, and none where one seed has the whole of it."""
    immediate = [asked("least_completion", seed, 1.0, "own") for seed in SEEDS]
    for p90_s, shown in (
        ((1.1, 1.09, 1.11), "**1.10 (1.09–1.11)**"),
        ((1.0, 1.0, 1.331), "1.10 (1.00–1.33)"),
    ):
        held = [asked("late_completion", seed, each, "own") for seed, each in zip(SEEDS, p90_s, strict=True)]
        assert f"1.00 (1.00–1.00) | {shown} | 1.00" in holding([*immediate, *held])[-1]
    again = [asked(CHANCE, seed, 1.2, "held") for seed in SEEDS[:1]]
    assert f"| ×2.5 | `{CHANCE}` | 1.00 | 1.00 | 1.20 | 1.00 |" in holding([*immediate, *again])[-1]
    assert holding(immediate) == []


def test_less_goodput_is_the_loss_and_one_seed_shows_none() -> None:
    """Student's test needs two seeds at least."""
    assert is_loss([-0.2, -0.21], GOODPUT)
    assert not is_loss([-0.2, -0.21], P90)
    assert is_loss([0.2, 0.21], P90)
    assert not is_loss([0.2], P90)
    assert ratio([], P90) == "–"


def test_several_gateways_are_shown_over_one() -> None:
    """A quarter more at two, nothing said of four, which did not run; none of it is in the comparison."""
    name = near_name("azure")
    one, two = (
        asked("late_completion", 3, p90_s, f"gateways-{count}", name)
        for count, p90_s in ((1, 1.0), (2, 1.25))
    )
    page = gateways([one, two])[-1]
    assert "×16 | `late_completion` | 2 | 1.00 | 1.00 | 1.25 | 1.00 | 1.00 | 1.00 | 3 |" in page
    assert page.count("late_completion") == 1
    assert gateways([one]) == []
    assert "| ×16" not in document([one, two], []).split("## Several gateways over one")[0]


def test_reuse_is_shown_as_available_foreseen_and_obtained() -> None:
    """0.9 of what is available; runs from before these figures have none."""
    mine = late("late_completion", 1.0, kind=CellKind.OWN)
    figures = dict(mine.figures) | {"available_ratio": 0.5, "foreseen_ratio": 0.48, "hit_ratio": 0.45}
    rows = [replace(mine, figures=figures), row("lmetric", 3, 1.0, 1.0)]
    page = "\n".join(reuse(rows))
    assert "| conversation, 8 engines | ×2.75 | 50.0 | – | – | – | 48.0 | 45.0 | 90.0 | 100.0 |" in page
    assert reuse([replace(mine, figures=dict.fromkeys(KEPT))]) == []


def test_each_workload_says_what_the_engine_model_does_to_its_knee() -> None:
    """62.3 ms by the kernels for 48.8 ms by the profile: 1.28."""
    page = document([row("lmetric", 3, 1.0, 1.0)], [])
    assert "a full one 1.28." in page
    assert "(×3 as ×2.35)" in page


def test_the_page_and_the_kept_document_hold_what_ran() -> None:
    """Lines that ran are shown as they ran; figures are cut to four digits."""
    rows = [row("lmetric", 3, 1.23456, 10.0)]
    cell = rows[0].cell
    page = document(rows, [cell])
    assert " ".join(cell.argv) in page
    assert "`lmetric`" in page
    (kept,) = compact([(cell, "stamp", 1.04, rows)])["cells"]
    assert kept["line"] == " ".join(cell.argv)
    assert dict(zip(("policy", "speed", *KEPT), kept["rows"][0], strict=True))["ttft_p90_s"] == 1.235


def test_kept_figures_are_read_back_with_their_age() -> None:
    """What is kept stands in for a run that is not stored; one of another command line does not."""
    rows = [row("lmetric", 3, 1.23456, 10.0)]
    cell = rows[0].cell
    document_kept = compact([(cell, "stamp", 1.04, rows)])
    found = read_back(document_kept, cell)
    assert found is not None
    stamped, cpu_s, (again,) = found
    assert (stamped, cpu_s, again.policy, again.speed) == ("stamp", 1.0, "lmetric", rows[0].speed)
    assert again.figures["ttft_p90_s"] == 1.235
    assert compact([(cell, stamped, cpu_s, [again])]) == document_kept
    assert read_back(document_kept, replace(cell, seed=4)) is None
    page = document(rows, [cell], [cell.name])
    assert f"1 of 1 `{cell.kind}` were run before" in page
    assert "were run before" not in document(rows, [cell])
