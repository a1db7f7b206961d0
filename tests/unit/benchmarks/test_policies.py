"""The benchmark of policies: its lines, what stored figures depend on, and how they are run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.policies import cells as declared
from benchmarks.policies.cells import Cell, CellKind, cells, named, selected
from benchmarks.policies.questions import every_cell
from benchmarks.policies.running import differences, load, path_of, run_cells, verify
from benchmarks.policies.stamps import ROOT, code_of, sources, stamp
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
