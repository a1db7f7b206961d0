"""The chart's schema of `config`, made from that of tokenway.yaml by `python -m testbed.chart_schema`.

It refuses a key that no section has and a value of a wrong type, and less than the gateway does.

Rules:
    1. Nothing is required: the chart fills in, and `config` is laid over what it writes.
    2. Null is no wrong type: the gateway takes it for a key that is not given, so it unsets the chart's.
    3. Only keywords of draft 7, in which the chart's schema is, and of them those that refuse something.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from extproc.config.loading import json_schema
from testbed.helm import CHART

SCHEMA_FILE: Final = CHART / "values.schema.json"

ROOT: Final = "config.Config"
"""The definition that stands for all of tokenway.yaml; those of its sections are named alike."""

_DEFINITIONS: Final = '  "definitions": {\n'
_GENERATED: Final = re.compile(r'^    "config\..*\n', re.MULTILINE)
_ANNOTATIONS: Final = frozenset({"title", "description", "default", "examples", "deprecated"})
_NULL: Final = {"type": "null"}
_NAMED: Final = frozenset({"properties", "patternProperties"})
"""Keywords whose keys are names, not keywords."""


def definitions() -> dict[str, Any]:
    """Of `config`: each section by its name, nothing in it required."""
    published = json_schema()
    sections = published.pop("$defs")
    del published["$schema"]
    named = {ROOT: published, **{f"config.{name}": section for name, section in sections.items()}}
    return {name: _or_null(_lenient(section)) for name, section in named.items()}


def written(text: str) -> str:
    """The text of the chart's schema with the definitions of now: a line for each, before those by hand."""
    lines = "".join(f"    {json.dumps(name)}: {json.dumps(made)},\n" for name, made in definitions().items())
    before, found, after = _GENERATED.sub("", text).partition(_DEFINITIONS)
    assert found, "no definitions"
    return before + found + lines + after


def _lenient(schema: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _ANNOTATIONS or key == "required":
            continue
        if key in _NAMED:
            made[key] = {name: _or_null(_lenient(each)) for name, each in value.items()}
        elif key == "$ref":
            made[key] = value.replace("#/$defs/", "#/definitions/config.")
        elif isinstance(value, dict):
            made[key] = _lenient(value)
        elif key in ("anyOf", "allOf", "oneOf"):
            made[key] = [_lenient(each) for each in value]
        else:
            made[key] = value
    return made


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, and null as well: definitions have it themselves, so a reference to one needs nothing."""
    if "$ref" in schema:
        return schema
    if "anyOf" in schema:
        others = [each for each in schema["anyOf"] if each != _NULL]
        return _or_null(others[0]) if len(others) == 1 else {**schema, "anyOf": [*others, _NULL]}
    kind = schema.pop("type")
    made = {"type": [kind, "null"], **schema}
    if "const" in made:
        made["enum"] = [made.pop("const")]
    if "enum" in made:
        made["enum"] = [*made["enum"], None]
    return made


if __name__ == "__main__":
    SCHEMA_FILE.write_text(written(SCHEMA_FILE.read_text(encoding="utf-8")), encoding="utf-8")
