"""The Containerfile, as far as it can be judged without a builder; `.ci/containerfile` runs its commands."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from compiling.licences import licences
from compiling.needs import missing
from testbed.containerfile import (
    CONTAINERFILE,
    arguments,
    ignore_patterns,
    instructions,
    is_ignored,
    sources,
    stages,
)

ROOT = Path(__file__).parents[2]
BUILD, RUN = stages(instructions(CONTAINERFILE.read_text()))
COPIES = [each for each in BUILD if each.name == "COPY"]


def test_both_stages_have_one_python() -> None:
    """The environment refers to it. What compiles has more beside it, and is not shipped."""
    said = instructions(CONTAINERFILE.read_text())
    assert [each.name for each in said[:2]] == ["ARG", "ARG"]
    base, builder = (each.words for each in said[:2])
    assert base == builder.replace("BUILDER=", "BASE=").replace("-trixie", "-slim-trixie")
    assert [each.words.split()[0] for each in said if each.name == "FROM"] == ["${BUILDER}", "${BASE}"]


def test_the_request_path_is_compiled_unless_it_is_not_to_be() -> None:
    """What compiling needs is in the first stage alone, and without a compiler that stage ends at once."""
    assert arguments(BUILD, {}) == {"COMPILE": "1"}
    assert arguments(BUILD, {"COMPILE": ""}) == {"COMPILE": ""}
    with pytest.raises(ValueError, match="COMPILED"):
        arguments(BUILD, {"COMPILED": "1"})
    asked = [each.words for each in BUILD if "COMPILE" in each.words and each.name == "RUN"]
    assert asked[0] == 'test -z "$COMPILE" || python -m compiling'
    assert asked[1].startswith('test -z "$COMPILE" || /build/bin/python -m pip install ')
    assert asked[2].startswith('TOKENWAY_COMPILE="$COMPILE" ')
    assert len(asked) == 3
    assert not any("COMPILE" in each.words for each in RUN)


def test_what_is_missing_to_compile_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what can be done about it, for an image and for a wheel."""
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    said = missing()
    assert said is not None
    for words in ("no C compiler", "no-such-compiler", "BUILDER", "COMPILE= ", "TOKENWAY_COMPILE"):
        assert words in said
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))
    assert "headers of this Python" in str(missing())
    (tmp_path / "Python.h").touch()
    assert missing() is None


@pytest.mark.parametrize("asked", ["0", "yes", "true", "2"])
def test_a_build_is_asked_for_by_1_alone(asked: str) -> None:
    """Another word would make a pure wheel in place of a compiled one, or the other way round."""
    command = [sys.executable, "setup.py", "--version"]
    environment = {**os.environ, "TOKENWAY_COMPILE": asked}
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 1
    assert f"TOKENWAY_COMPILE={asked}" in made.stderr


def test_a_compiled_wheel_has_the_licences_of_what_is_in_it() -> None:
    """Mypyc's runtime is MIT, a part of it Python's; `.ci/containerfile` looks into the image for them."""
    text = "".join(path.read_text() for path in licences())
    assert "mypyc" in text
    assert "The above copyright notice and this permission notice shall be included" in text
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in text


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
    """User 65532, as the chart has it; nothing is fetched in what is shipped, and what was made runs."""
    said = {each.name: each.words for each in RUN}
    assert said["USER"] == "65532:65532"
    assert json.loads(said["ENTRYPOINT"]) == ["/opt/tokenway/bin/tokenway"]
    assert json.loads(said["CMD"]) == ["serve", "/etc/tokenway/tokenway.yaml"]
    assert [each.words for each in RUN if each.name == "RUN"] == [
        '["/opt/tokenway/bin/python", "-c", "import extproc.server.worker"]'
    ]
    assert shlex.split(said["COPY"]) == ["--from=build", "/opt/tokenway", "/opt/tokenway"]


def test_the_base_has_a_python_that_is_supported() -> None:
    """By its tag."""
    base = instructions(CONTAINERFILE.read_text())[0].words.removeprefix("BASE=python:")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {base.partition('-')[0]}" in project["classifiers"]
