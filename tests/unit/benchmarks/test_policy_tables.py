"""The benchmark of policies: what its tables say of what ran, and the documents that show them."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from benchmarks.policies import cells as declared
from benchmarks.policies.aims import aims
from benchmarks.policies.cells import Cell, CellKind
from benchmarks.policies.chance import gateways, holding, is_loss, knowing, ratio
from benchmarks.policies.excerpts import DOCUMENTS, excerpts
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
from benchmarks.policies.rendering import KEPT_FILE, TABLES, page
from benchmarks.policies.short import gateways_and_views, near_the_knee, slower_engines
from benchmarks.policies.tables import document, limit_said, reuse, worst
from benchmarks.policies.waiting import late_binding


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


def test_documents_show_the_kept_results() -> None:
    """docs/policies.md is what `results.json` says but for its age; repeated tables are copies of its own."""
    written = TABLES.read_text(encoding="utf-8")
    made = page(orjson.loads(KEPT_FILE.read_bytes()), every_cell())
    first = "## Worst ratio"
    assert written[written.index(first) :] == made[made.index(first) :]
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert "copied from docs/policies.md" in text
        assert excerpts(text, written) == text


def test_a_repeated_table_is_copied_by_its_heading() -> None:
    """The old table is replaced, words around it stay; a heading without a table is an error."""
    tables = "# T\n\n## A\n\nWords.\n\n| a |\n|---|\n| 1 |\n\n## A: B\n\n| b |\n|---|\n\n## C\n\nNone.\n"
    comment = "<!-- copied from docs/policies.md: {} -->\n\n"
    text = f"Before.\n\n{comment.format('A')}| old |\n\nBetween.\n\n{comment.format('A: B')}\nAfter.\n"
    filled = excerpts(text, tables)
    assert filled == text.replace("| old |\n", "| a |\n|---|\n| 1 |\n").replace(
        "-->\n\n\n", "-->\n\n| b |\n|---|\n\n"
    )
    assert excerpts(filled, tables) == filled
    for unknown in ("C", "D"):
        with pytest.raises(ValueError, match=unknown):
            excerpts(comment.format(unknown), tables)


def test_the_knee_is_shown_worst_first_and_where_slower_engines_stand() -> None:
    """Ratios of the held rule, per workload and rate, and those of the speed about 1.2 times as high."""
    first, second = declared.WORKLOADS[0], declared.WORKLOADS[1]
    rows = []
    for workload, own_p90_s in ((first, (1.0, 2.0, 3.0)), (second, (8.0, 8.0, 8.0))):
        for speed, p90_s in zip(workload.speeds, own_p90_s, strict=True):
            made = [row("lmetric", 3, 2.0, 9.0), row("late_completion", 3, p90_s, 9.0, CellKind.OWN)]
            rows += [
                replace(each, speed=speed, cell=replace(each.cell, workload=workload.name)) for each in made
            ]
    knee = near_the_knee(rows)[-1].splitlines()[2:]
    assert [line.split(" | ")[-1] for line in knee] == [
        "8 (4.00) |",
        "8 (4.00) |",
        "3 (1.50) |",
        "2 (1.00) |",
    ]
    assert knee[0].startswith(f"| {second.title} | at the knee | 2 `lmetric` | – | – |")
    slower = slower_engines(rows)[-1]
    least, most = first.speeds[0], first.speeds[2]
    assert f"| {first.title} | ×{least:g} | 0.50 | {most / least:.2f} | ×{most:g} | 1.50 |" in slower


def test_gateways_and_views_have_a_line_each() -> None:
    """A column per policy and speed; what did not run is a dash, other questions are not shown."""
    made = row("lmetric", 3, 2.0, 9.0, CellKind.WHOLE)
    groups = (("gateways-2", "lmetric"), ("view-events", "least_completion"), ("one-more-engine", "lmetric"))
    rows = [replace(made, policy=policy, cell=replace(made.cell, group=group)) for group, policy in groups]
    lines = gateways_and_views(rows)[-1].splitlines()
    assert lines[0].endswith("| `lmetric` ×2.75 | `least_completion` ×2.75 |")
    assert lines[2:] == ["| gateways-2 | 2 | – |", "| view-events | – | 2 |"]
    assert gateways_and_views(rows[2:]) == []


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
