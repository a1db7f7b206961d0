"""What Envoy may serve by itself."""

from __future__ import annotations

from extproc.config.schema import Config
from extproc.values.endpoints import Endpoint
from extproc.xds.open_models import closed_names, open_models, open_models_and_any, subset_pools
from tests.conftest import endpoint

CONFIG = Config.model_validate(
    {
        "models": {
            "open": {"rules": [{"cluster": "a"}], "aliases": ["also"]},
            "gated": {"rules": [{"cluster": "a", "headers": {"x-team": "red"}}], "aliases": ["gated-too"]},
            "second": {"rules": [{"cluster": "b", "headers": {"x-team": "red"}}, {"cluster": "a"}]},
            "off": {"rules": [{"cluster": "a", "weight": 0}, {"cluster": "a", "headers": {"x": "1"}}]},
            "next": {"rules": [{"cluster": "a", "weight": 0}, {"cluster": "b"}]},
            "part": {"rules": [{"cluster": "a", "subset": {"gpu": "h200"}}]},
        }
    }
)


def test_a_model_is_open_by_a_rule_that_is_on_and_wants_no_headers() -> None:
    """Under each of its names; a model without such a rule is not served without Tokenway."""
    found = {name: rule.cluster for name, rule in open_models(CONFIG).items()}
    assert found == {"open": "a", "also": "a", "second": "a", "next": "b", "part": "a"}


def test_a_rule_for_a_part_of_a_cluster_has_a_pool_of_its_own() -> None:
    """Endpoints with all labels of the rule, and no pool for rules without labels."""
    clusters: dict[str, tuple[Endpoint, ...]] = {
        "a": (endpoint(1, labels={"gpu": "h200"}), endpoint(2), endpoint(3, labels={"gpu": "a100"}))
    }
    assert subset_pools(open_models(CONFIG), clusters) == {"model:part": clusters["a"][:1]}


def test_names_that_no_model_has_are_open_by_the_rule_for_any() -> None:
    """And those that a model has are not, whatever is thought of it."""
    any_model = {"*": {"rules": [{"cluster": "b", "headers": {"x": "1"}}, {"cluster": "a"}]}}
    dumped = CONFIG.model_dump(mode="json", exclude_defaults=True)
    config = Config.model_validate({"models": {**dumped["models"], **any_model}})
    found = open_models_and_any(config)
    assert found["*"].cluster == "a"
    assert {**open_models(config), "*": found["*"]} == found
    assert closed_names(config, found) == {"gated", "gated-too", "off"}
    assert closed_names(config, found.keys() - {"open"}) == {"gated", "gated-too", "off", "open"}
    assert closed_names(config, open_models(config)) == frozenset()
    assert open_models_and_any(CONFIG) == open_models(CONFIG)
    gated = Config.model_validate({"models": {"*": {"rules": [{"cluster": "b", "headers": {"x": "1"}}]}}})
    assert open_models_and_any(gated) == {}
