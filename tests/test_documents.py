"""What the documents say of the tree, of settings and of commands must be so."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.clusters import parse_clusters
from extproc.config.loading import json_schema, parse
from extproc.config.schema import Config
from extproc.observing.metrics.table import FAMILIES
from tests.setting_names import is_setting
from tests.source_tree import MAY_IMPORT, MODULES, ROOT, name_of
from tokenway.cli.main import main
from tokenway.simulator.replay.lineup import parse_lineup

ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

FOR_USERS = [path for path in DOCUMENTS if path.parent != ROOT / "docs" / "adr" and path != ARCHITECTURE]
"""Documents that name settings; elsewhere a name with a dot may be a module."""

HOMES = ("", "extproc", "extproc/discovery", "metadata_center", "tokenway", "tokenway/simulator")
"""Folders that a path in a document may be relative to."""

_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_CODE = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(r"(?:^|&& |\$ |; )(?:\.venv/bin/)?(tokenway (?!.*: ).*)")
_DEFAULT = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+)`(?: \(|, )([\d,.]+) ?(ms|s|MiB|)[;:,)]")
_UNITS = {"": 1, "s": 1, "ms": 0.001, "MiB": 1 << 20}
_PROGRAMS = ("egctl", "helm", "istioctl", "kubectl", "make", "pip", "tokenway")
_LABELS = re.compile(r"(tokenway_[a-z_]+)\{([^}]+)\}")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"(?:[\w-]+/)+(?:(?!__init__)[\w.-]+\.py)?")
_DOTTED = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)(?:[:,\s].*)?")
_METRIC = re.compile(r"tokenway_[a-z_]+")
_TARGET = re.compile(r"\bmake ((?:demo|test|check|lock|bench|fuzz)[a-z-]*)")
_OWNER = re.compile(r"(\w+(?:\.\w+)+)\.([A-Z]\w+)")
_MODULE = re.compile(r"(?:\w+/)*(?:\w+\.py|\w+/)")


def rows() -> dict[str, list[str]]:
    """Each package with a row in docs/architecture.md, by the name it is imported by, and its cells."""
    found: dict[str, list[str]] = {}
    for line in ARCHITECTURE.read_text(encoding="utf-8").splitlines():
        cells = line.strip("|").split(" | ")
        first = _CODE.fullmatch(cells[0].strip())
        if line.startswith("| ") and len(cells) == 4 and first is not None:
            name = first[1].removesuffix("/").removesuffix(".py").replace("/", ".")
            found[name] = [cell.strip() for cell in cells]
    return found


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    """Each relative link is to a file that is there, and to a heading that it has."""
    broken = []
    for link, anchor in _LINK.findall(path.read_text(encoding="utf-8")):
        there = path.parent / link if link else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(f"{link}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_paths_in_documents_are_there(path: Path) -> None:
    """So are the folders and modules that are named with their folder."""
    named = {
        word
        for code in _CODE.findall(path.read_text(encoding="utf-8"))
        for word in code.replace(":", " ").split()
        if _PATH.fullmatch(word) and word.partition("/")[0] in _tops()
    }
    assert {word for word in named if not any((ROOT / home / word).exists() for home in HOMES)} == set()


def _tops() -> set[str]:
    """First folders of the paths that are ours to keep true."""
    return {folder.name for home in HOMES for folder in (ROOT / home).iterdir() if folder.is_dir()}


def test_the_modules_in_a_row_are_in_its_package() -> None:
    """A module named without its folder is in the package of its row."""
    missing = [
        f"{package}: {name}"
        for package, cells in rows().items()
        for name in _CODE.findall(cells[1])
        if _MODULE.fullmatch(name) and not (ROOT / package.replace(".", "/") / name).exists()
    ]
    assert missing == []


def test_every_package_has_its_row() -> None:
    """Each package right below ours is in a table, and each module there."""
    roots = {"extproc", "metadata_center", "tokenway", "tokenway.simulator"}
    below = set()
    for module in MODULES:
        parts = module.split(".")
        below.add(".".join(parts[: 3 if module.startswith("tokenway.simulator.") else 2]))
    inside_a_row = {f"metadata_center.{path.stem}" for path in (ROOT / "metadata_center").glob("*.py")}
    starts_the_command = {"tokenway.__main__", "tokenway.simulator.__main__"}
    assert below - roots - inside_a_row - starts_the_command - rows().keys() == set()


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_the_tables_say_what_a_package_may_import(package: str) -> None:
    """The last column is `MAY_IMPORT`."""
    assert frozenset(_CODE.findall(rows()[package][3])) == MAY_IMPORT[package]


def test_every_decision_is_listed() -> None:
    """docs/adr/README.md has each decision record by its own title."""
    folder = ROOT / "docs" / "adr"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    for path in sorted(folder.glob("0*.md")):
        number, _, title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(". ")
        assert f"| {number} | [{title}]({path.name}) |" in listed, path.name


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_settings_in_documents_exist(path: Path) -> None:
    """A dotted name that begins with a section of tokenway.yaml is a setting."""
    schema = json_schema()
    named = {
        found[1]
        for code in _CODE.findall(path.read_text(encoding="utf-8"))
        if (found := _DOTTED.fullmatch(code)) and found[1].partition(".")[0] in schema["properties"]
    }
    assert {name for name in named if not is_setting(schema, schema, name.split("."))} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_metrics_in_documents_exist(path: Path) -> None:
    """A metric that is named is a family of the gateway's; the metadata center's begin with its name."""
    families = {family.name for family in FAMILIES}
    named = {
        name
        for code in _CODE.findall(path.read_text(encoding="utf-8"))
        for name in _METRIC.findall(code)
        if not name.startswith("tokenway_metadata_")
    }
    assert {name for name in named if not any(family.startswith(name) for family in families)} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_of_make_exist(path: Path) -> None:
    """`make X` has a rule for X."""
    words = set((ROOT / "Makefile").read_text(encoding="utf-8").replace(":", " ").split())
    assert set(_TARGET.findall(path.read_text(encoding="utf-8"))) <= words


def test_owners_exist() -> None:
    """Each owner of state in docs/architecture.md is a class of ours."""
    owners = [_OWNER.fullmatch(code) for code in _CODE.findall(ARCHITECTURE.read_text(encoding="utf-8"))]
    found = [(owner[1], owner[2]) for owner in owners if owner is not None]
    assert found
    for module, name in found:
        whole = module if module.startswith("metadata_center.") else f"extproc.{module}"
        assert hasattr(importlib.import_module(whole), name), f"{whole}.{name}"


def examples(path: Path, *languages: str) -> list[str]:
    """The fenced examples of a document in one of these languages, at the left margin."""
    found = _FENCE.findall(path.read_text(encoding="utf-8"))
    return [
        "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        for indent, language, body in found
        if language in languages
    ]


def spans(path: Path) -> list[str]:
    """What a document has between backticks in its prose, also where a line ends inside."""
    prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_configurations_in_documents_are_accepted(path: Path) -> None:
    """An example in YAML is a tokenway.yaml, or an object of Kubernetes; so is a setting with its value."""
    for example in examples(path, "yaml"):
        if "apiVersion" not in yaml.safe_load(example):
            parse(example, name_of(path))
    sections = json_schema()["properties"]
    for span in spans(path):
        name, colon, value = span.partition(": ")
        first, *inner = name.split(".")
        if not colon or value.startswith(("{CLUSTER", "http")):
            continue
        for part in reversed(inner):
            value = f"{{{part}: {value}}}"
        if first == "load_balancing":  # of a model
            parse(f"models: {{m: {{rules: [{{cluster: c}}], {first}: {value}}}}}", span)
        elif first in sections:
            parse(f"{first}: {value}", span)


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_json_in_documents_is_accepted(path: Path) -> None:
    """An example in JSON is an endpoint or a cluster of clusters.json, or a line to replay."""
    for example in examples(path, "json"):
        document = json.loads(example)
        if "time_s" in document:
            continue
        cluster = document if "name" in document else {"name": "c", "endpoints": [document]}
        parse_clusters(json.dumps({"clusters": [cluster]}), name_of(path))


def commands(path: Path) -> set[str]:
    """Commands of ours in a document that can be run as they stand: no `…`, no choice in brackets."""
    lines = [
        line
        for example in examples(path, "", "sh", "console")
        for line in example.replace("\\\n", "").splitlines()
    ]
    found = [match[1] for line in lines if (match := _COMMAND.search(line))]
    found += [span for span in spans(path) if span.startswith("tokenway ")]
    return {re.split(r" *(?:#| [|>&]|$)", command)[0] for command in found if not re.search("[…<]", command)}


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_commands_in_documents_are_understood(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a verb and options that there are; one that there is not is all that is wrong with it then.

    A verb that is named alone may want more words.
    """
    for command in sorted(commands(path)):
        words = shlex.split(command)[1:]
        with pytest.raises(SystemExit):
            main([*words, "--no-such-option"])
        refusal = "arguments: --no-such-option\n"
        if all(map(str.isalpha, words)):
            refusal = f"({refusal}|arguments are required)"
        assert words == ["--version"] or re.search(refusal, capsys.readouterr().err), command


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_policies_of_commands_in_documents_exist(path: Path) -> None:
    """Each policy and parameter of a `tokenway replay` is one that the replayer has."""
    for command in commands(path):
        named = re.search(r"^tokenway replay .*--policies (?!\$)(\S+)", command)
        assert named is None or parse_lineup(named[1])


def at(settings: Any, names: list[str]) -> Any:
    """The value of a setting by its dotted name, in parts."""
    for name in names:
        settings = getattr(settings, name)
    return settings


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_defaults_in_documents_hold(path: Path) -> None:
    """A number in brackets behind a setting, with its unit, is the default."""
    named = [
        (name, float(number.replace(",", "")) * _UNITS[unit])
        for name, number, unit in _DEFAULT.findall(path.read_text(encoding="utf-8"))
        if name.partition(".")[0] in json_schema()["properties"]
    ]
    wrong = [(name, said) for name, said in named if said != at(Config(), name.split("."))]
    assert wrong == []


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_labels_in_documents_exist(path: Path) -> None:
    """A metric that is named with labels has these."""
    labels = {family.name: family.labels for family in FAMILIES}
    named = {
        (metric, label.partition("=")[0].strip())
        for span in spans(path)
        for metric, inside in _LABELS.findall(span)
        for label in inside.split(",")
    }
    assert {(metric, label) for metric, label in named if label not in labels[metric]} == set()


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_variables_in_documents_are_read(path: Path) -> None:
    """A variable of the environment that bears our name is in the code, or in a test that it sets up."""
    named = {name for span in spans(path) for name in re.findall(r"TOKENWAY_[A-Z_]+", span)}
    assert {name for name in named if not any(name in text for text in sources())} == set()


@functools.cache
def sources() -> tuple[str, ...]:
    """The text of every module, and of what builds the wheel."""
    files = [
        path
        for home in ("extproc", "metadata_center", "tokenway", "tests")
        for path in (ROOT / home).rglob("*.py")
    ]
    here = Path(__file__)
    return tuple(path.read_text(encoding="utf-8") for path in [*files, ROOT / "setup.py"] if path != here)


@pytest.mark.parametrize("path", FOR_USERS, ids=name_of)
def test_lines_of_the_log_in_documents_are_written(path: Path) -> None:
    """Several words in lower case are what a log, or a command, says; programs that are run are not."""
    said = {span for span in spans(path) if re.fullmatch(r"[a-z]+(?: [a-z]+)+", span)}
    named = {span for span in said if span.partition(" ")[0] not in _PROGRAMS}
    assert {span for span in named if not any(span in text for text in sources())} == set()
