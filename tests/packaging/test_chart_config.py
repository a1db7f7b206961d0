"""The chart's schema of `config`: a slip is refused before a pod starts, and nothing that a pod takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.loading import effective, json_schema, parse
from extproc.config.schema import Config
from testbed.chart_schema import definitions
from testbed.helm import CHART, binary, configuration, helm, rendered, template, values_of
from tokenway.cli.check import check

ETC = Path(__file__).parents[2] / "etc"

needs_helm = pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`")

DRAFT_7 = {
    *("$ref", "type", "enum", "pattern", "minLength", "maxLength", "items", "minItems", "uniqueItems"),
    *("minimum", "maximum", "exclusiveMinimum", "properties", "patternProperties", "propertyNames"),
    *("additionalProperties", "minProperties", "maxProperties", "maxItems", "anyOf"),
}
"""Keywords of the draft that values.schema.json is in, of those that pydantic writes."""


def keywords(schema: Mapping[str, Any]) -> Iterator[str]:
    """All keywords of a schema and of those in it."""
    for key, value in schema.items():
        yield key
        if key in ("properties", "patternProperties"):
            for each in value.values():
                yield from keywords(each)
        elif isinstance(value, dict):
            yield from keywords(value)
        elif key == "anyOf":
            for each in value:
                yield from keywords(each)


def nulls() -> dict[str, Any]:
    """A configuration with every section, and every key of each that is no section null."""
    schema = json_schema()

    def of(node: Mapping[str, Any]) -> dict[str, Any] | None:
        for each in (node, *node.get("anyOf", ())):
            inner = schema["$defs"].get(each.get("$ref", "").removeprefix("#/$defs/"), each)
            if "properties" in inner:
                return {key: of(below) for key, below in inner["properties"].items()}
        return None

    return of(schema) or {}


def test_it_is_in_the_draft_that_every_helm_reads() -> None:
    """Each keyword is one of draft 7, and each reference leads to a definition."""
    made = definitions()
    assert {word for each in made.values() for word in keywords(each)} <= DRAFT_7
    text = json.dumps(made)
    assert text.count('"$ref"') == sum(text.count(f'"#/definitions/{name}"') for name in made)


REFUSED: list[tuple[Mapping[str, Any], str]] = [
    ({"severs": {}}, "severs"),
    ({"server": {"drain": 5}}, "/config/server"),
    ({"server": {"drain_s": "5"}}, "/config/server/drain_s"),
    ({"away": {"gone": "opn"}}, "/config/away/gone"),
    ({"holding": {"enabled": "no"}}, "/config/holding/enabled"),
    ({"models": {"llama": {"rule": []}}}, "/config/models/llama"),
    ({"models": {"llama": {"rules": [{"clustr": "a"}]}}}, "/config/models/llama/rules/0"),
    ({"discovery": {"istio": {"tls": {"ca": "a"}}}}, "/config/discovery/istio/tls"),
    ({"health": {"interval_s": 0}}, "/config/health/interval_s"),
    ({"version": 2}, "/config/version"),
]


@needs_helm
@pytest.mark.parametrize(("config", "named"), REFUSED, ids=[json.dumps(each) for each, _ in REFUSED])
def test_a_slip_is_refused(config: Mapping[str, Any], named: str) -> None:
    """By helm, with where it is."""
    done = template("none", {"config": config})
    assert done.returncode != 0
    assert "schema" in done.stderr
    assert named in done.stderr


@needs_helm
def test_lint_refuses_it_too(tmp_path: Path) -> None:
    """Which is what a pipeline runs."""
    values = tmp_path / "values.yaml"
    values.write_text(json.dumps({"config": {"severs": {}}}))
    words = ("--values", str(values_of("none")), "--values", str(values))
    done = helm("lint", str(CHART), *words)
    assert done.returncode != 0
    assert "'severs' not allowed" in done.stdout + done.stderr


TAKEN: list[tuple[str, Mapping[str, Any]]] = [
    ("none", {"models": {"llama": {"aliases": ["llama-3"]}}}),  # its rules are the chart's
    ("none", {"models": {"llama": {"load_balancing": {"cache_radio_weight": 2}}}}),  # AIGW's spelling
    ("none", {"edge": None, "default_cluster": None, "server": {"drain_s": None}}),
    ("none", {"metadata_center": {"lease_s": 9}}),
    ("none", {"discovery": {"kubernetes": {"address_family": "ipv6"}}}),
    ("istio", {"discovery": {"istio": {"labels": {"a": "b"}}, "kubernetes": None}}),
    ("istio", {"istio_gateway": {"selector": {"istio": "edge"}}}),  # address and service are the chart's
    ("istio-inferencepool", {"endpoint_picker": {"fallbacks": 2}, "discovery": {"kubernetes": {"pool": {}}}}),
]


@needs_helm
@pytest.mark.parametrize(("case", "config"), TAKEN, ids=[json.dumps(each) for _, each in TAKEN])
def test_what_the_chart_completes_is_taken(case: str, config: Mapping[str, Any], tmp_path: Path) -> None:
    """A part of a section, AIGW's misspelling, and null for what is not wanted: a pod takes each."""
    assert check(configuration(rendered(case, {"config": config}), tmp_path)) == 0


@needs_helm
@pytest.mark.parametrize(
    "config",
    [
        yaml.safe_load((ETC / "tokenway.yaml").read_text(encoding="utf-8")),
        yaml.safe_load((ETC / "picker.yaml").read_text(encoding="utf-8")),
        yaml.safe_load((ETC / "istio" / "tokenway.yaml").read_text(encoding="utf-8")),
        yaml.safe_load(effective(Config())),
    ],
    ids=["sample", "picker", "istio", "defaults"],
)
def test_what_the_gateway_takes_is_taken(config: Mapping[str, Any]) -> None:
    """Whole configurations, every key of them, and every default as it is printed."""
    parse(json.dumps(config), "tokenway.yaml")
    done = template("none", {"config": config})
    assert done.returncode == 0, done.stderr


@needs_helm
def test_null_is_no_wrong_type() -> None:
    """The gateway takes a key that is null for one that is not given."""
    assert parse(json.dumps(dict.fromkeys(json_schema()["properties"])), "tokenway.yaml") == Config()
    done = template("none", {"config": nulls()})
    assert done.returncode == 0, done.stderr
