"""The Helm chart of the repository, rendered by the real helm (`make kubectl`)."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from testbed.processes import REPOSITORY

CHART: Final = REPOSITORY / "charts" / "tokenway"
CASES: Final = tuple(sorted(path.stem for path in (CHART / "ci").glob("*.yaml")))
"""Names of the sets of values that are kept beside the chart."""

RELEASE: Final = "test"
NAMESPACE: Final = "models"

HTTP_LISTENER: Final[Mapping[str, Any]] = {
    "name": "http",
    "port": 80,
    "protocol": "HTTP",
    "allowedRoutes": {"namespaces": {"from": "All"}},
}
"""Of the Gateway that a route of the chart joins, from any namespace."""

_TIMEOUT_S: Final = 60.0


def binary() -> Path:
    """The real helm: `TOKENWAY_HELM`, or the one in the repository's tools folder."""
    named = os.environ.get("TOKENWAY_HELM")
    return Path(named) if named else REPOSITORY / ".tools" / "kubectl" / "helm"


def values_of(case: str) -> Path:
    """The file of a set of values."""
    return CHART / "ci" / f"{case}.yaml"


def helm(*words: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm; `values` come as a file on standard input."""
    argv = [str(binary()), *words, *(() if values is None else ("--values", "-"))]
    given = None if values is None else json.dumps(values)
    return subprocess.run(argv, input=given, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)


def template(
    case: str | None = None, values: Mapping[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Render the chart by a kept set of values, by others on top, or both."""
    files = () if case is None else ("--values", str(values_of(case)))
    return helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *files, values=values)


@functools.cache
def _text(case: str | None, values: str) -> str:
    done = template(case, json.loads(values))
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(case: str | None = None, values: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The objects that the chart makes.

    Raises:
        AssertionError: helm refuses; shows what it said.
    """
    text = _text(case, json.dumps(values or {}))
    return [document for document in yaml.safe_load_all(text) if document is not None]


def of_kind(objects: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Those of a kind."""
    return [each for each in objects if each["kind"] == kind]


def configuration(objects: Sequence[Mapping[str, Any]], into: Path) -> Path:
    """Write the files of the ConfigMap; where tokenway.yaml is."""
    (found,) = of_kind(objects, "ConfigMap")
    for name, text in found["data"].items():
        (into / name).write_text(text)
    return into / "tokenway.yaml"
