"""What is said to be run of the tests is run: by `.ci/run`, or by hand as documents say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.variants import GRPCIO, ISTIO_PROFILE
from tests.source_tree import ROOT

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
RUN = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

PARTS = {"test-unit", "test-e2e"}
"""Of `make test`, for a desk."""

PROGRAMS = {"TOKENWAY_ENVOY", "TOKENWAY_HELM"}
"""Variables that name a program in the place of the one that is fetched."""

_READ = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*"(TOKENWAY_[A-Z_]+)""")


def listed(name: str) -> list[str]:
    """The words of a variable of the Makefile."""
    command = ["make", "--no-print-directory", "-n", "--eval", f"$(info listed: $({name}))", "Makefile"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return said.partition("\n")[0].removeprefix("listed: ").split()


def test_each_target_of_tests_is_a_stage_or_said_to_be_for_a_desk() -> None:
    """A document names those that no stage runs."""
    targets = set(re.findall(r"^(test(?:-[a-z0-9]+)*)\b[^=\n]*:(?!=)", MAKEFILE, re.MULTILINE))
    assert targets > PARTS
    in_stages = set(re.findall(r"make (test(?:-[a-z0-9]+)*)", RUN))
    documents = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    by_hand = {target for target in targets if re.search(rf"`make\s+{target}[` ]", documents)}
    assert targets - in_stages - PARTS <= by_hand
    assert in_stages <= targets


def test_each_variable_that_tests_read_is_set_where_they_are_run() -> None:
    """By a stage, by a target, or in a command that a document shows."""
    read = {
        name
        for folder in ("tests", "testbed")
        for path in (ROOT / folder).rglob("*.py")
        for name in _READ.findall(path.read_text(encoding="utf-8"))
    }
    assert read > PROGRAMS
    said = "\n".join([RUN, MAKEFILE, *(path.read_text(encoding="utf-8") for path in DOCUMENTS)])
    assert {name for name in read - PROGRAMS if not re.search(rf"\b{name}=", said)} == set()


def stems(words: list[str]) -> set[str]:
    """Of files of end-to-end tests, without `test_`."""
    return {Path(word).stem.removeprefix("test_") for word in words if "e2e/" in word}


def test_the_files_that_are_run_by_variables_are_there() -> None:
    """None that was renamed is passed over."""
    there = stems([str(path) for path in (ROOT / "tests" / "e2e").glob("test_*.py")])
    assert there >= ISTIO_PROFILE | GRPCIO
    for path in [*listed("BEYOND_UNITS"), *(f"tests/{name}.py" for name in listed("OLDEST_TESTS"))]:
        assert (ROOT / path).exists(), path


def test_the_oldest_envoy_runs_nothing_that_the_profile_leaves_out() -> None:
    """But for what is of the profile without the variable."""
    assert stems(listed("OLDEST_TESTS")) - {"istio_profile"} <= ISTIO_PROFILE


def test_a_stage_runs_what_the_variants_say() -> None:
    """The profile for Istio by its target, grpcio by its files."""
    profile = re.search(r"^test-istio-profile:.*\n\t(.*)", MAKEFILE, re.MULTILINE)
    assert profile is not None
    assert "TOKENWAY_PROFILE=istio" in profile[1]
    assert profile[1].endswith("tests/e2e")
    grpcio = re.search(r"TOKENWAY_TRANSPORT=grpcio\n\s+files=\(tests/e2e/test_\{(.*)\}\.py\)", RUN)
    assert grpcio is not None
    assert set(grpcio[1].split(",")) == GRPCIO


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_end_to_end_files_in_documents_are_run(document: Path) -> None:
    """A stage runs each file of tests that a document calls tried: one that needs a program builds it."""
    named = set(re.findall(r"tests/[\w/]+/test_\w+\.py", document.read_text(encoding="utf-8")))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    if any(name == "tests/e2e/test_envoy_gateway.py" for name in named):
        assert "make test-envoy-gateway" in RUN
