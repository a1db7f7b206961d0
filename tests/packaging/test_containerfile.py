"""The Containerfile, as far as it can be judged without a builder; `.ci/containerfile` runs its commands."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path

import pytest

from testbed.containerfile import CONTAINERFILE, ignore_patterns, instructions, is_ignored, sources, stages

ROOT = Path(__file__).parents[2]
BUILD, RUN = stages(instructions(CONTAINERFILE.read_text()))
COPIES = [each for each in BUILD if each.name == "COPY"]


def test_both_stages_have_one_base() -> None:
    """The environment refers to its Python; a digest is given in one place. What compiles may have more."""
    said = instructions(CONTAINERFILE.read_text())
    assert [each.name for each in said[:2]] == ["ARG", "ARG"]
    assert said[0].words.startswith("BASE=")
    assert said[1].words == "BUILDER=${BASE}"
    assert [each.words.split()[0] for each in said if each.name == "FROM"] == ["${BUILDER}", "${BASE}"]


def test_nothing_is_compiled_unless_asked_for() -> None:
    """The base has no compiler; what compiles and what it needs are in the first stage alone."""
    assert [each.words for each in BUILD if each.name == "ARG"] == ["COMPILE="]
    asked = [each.words for each in BUILD if "COMPILE" in each.words and each.name == "RUN"]
    assert len(asked) == 2
    assert asked[0].startswith('test -z "$COMPILE" || ')
    assert asked[1].startswith('TOKENWAY_COMPILE="$COMPILE" ')
    assert not any("COMPILE" in each.words for each in RUN)


@pytest.mark.parametrize("copying", COPIES, ids=[each.words for each in COPIES])
def test_what_is_copied_is_there(copying: object) -> None:
    """And is not ignored."""
    assert list(sources(copying))  # type: ignore[arg-type]


def test_what_a_wheel_is_made_of_is_copied() -> None:
    """Every package with its data, and what the shipped links lead to."""
    copied = {name for copying in COPIES for _, name in sources(copying)}
    for package in ("extproc", "metadata_center", "tokenway"):
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert modules <= copied
    for link in (ROOT / "extproc" / "shipped").iterdir():
        assert str(link.resolve().relative_to(ROOT)) in copied
    assert not any("__pycache__" in name or name.startswith("tests") for name in copied)


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("tests/conftest.py", True),
        (".venv/bin/python", True),
        (".git/config", True),
        ("extproc/errors.py", False),
        ("extproc/__pycache__/errors.pyc", True),
        ("requirements/run.txt", False),
        ("charts/tokenway/values.yaml", True),
    ],
)
def test_the_context_is_small(path: str, ignored: bool) -> None:
    """What a builder is sent."""
    assert is_ignored(path, ignore_patterns()) is ignored


def test_everything_installed_is_locked() -> None:
    """By hashes from requirements/, or without an index."""
    installs = [each.words for each in BUILD if " install " in each.words or " wheel " in each.words]
    assert len(installs) == 5
    for words in installs:
        assert "--no-deps" in words
        assert "--require-hashes" in words or "--no-index" in words


def test_the_image_runs_as_nobody_in_particular() -> None:
    """User 65532, as the chart has it, and nothing is run or fetched in the image that is shipped."""
    said = {each.name: each.words for each in RUN}
    assert said["USER"] == "65532:65532"
    assert json.loads(said["ENTRYPOINT"]) == ["/opt/tokenway/bin/tokenway"]
    assert json.loads(said["CMD"]) == ["serve", "/etc/tokenway/tokenway.yaml"]
    assert "RUN" not in said
    assert shlex.split(said["COPY"]) == ["--from=build", "/opt/tokenway", "/opt/tokenway"]


def test_the_base_has_a_python_that_is_supported() -> None:
    """By its tag."""
    base = instructions(CONTAINERFILE.read_text())[0].words.removeprefix("BASE=python:")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {base.partition('-')[0]}" in project["classifiers"]
