"""Which route a request takes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.request.rules import Backend, ModelRules, Route, Rule, RuleTable
from extproc.values.balancing import Algorithm, LoadBalancing


class NoRng:
    """Fails a test that draws although there is nothing to draw for."""

    def random(self) -> float:
        """Fail."""
        raise AssertionError("drew a random number for a certain outcome")


def table(*rules: Rule, name: str = "llama", aliases: tuple[str, ...] = ()) -> RuleTable:
    """A table of one model."""
    return RuleTable([ModelRules(name, rules, aliases)])


def refusal(rules: RuleTable, model: str, headers: dict[str, str] | None = None) -> RouterError:
    """The error that a request is refused with."""
    with pytest.raises(RouterError) as caught:
        rules.match(model, headers or {}, NoRng())
    return caught.value


def test_lone_rule_without_headers_takes_everything() -> None:
    """The common case needs neither headers nor a draw, and carries every setting of the rule."""
    lb = LoadBalancing(algorithm=Algorithm.RANDOM)
    rule = Rule("c", Backend.SGLANG, {}, {"gpu": "h200"}, 1, "sql", "up", "r", "g")
    route = RuleTable([ModelRules("llama", (rule,), (), lb)]).match("llama", {"x": "y"}, NoRng())
    assert route == Route("llama", "c", Backend.SGLANG, {"gpu": "h200"}, "sql", "up", "r", lb, "g")


def test_group_defaults_to_the_cluster() -> None:
    """Endpoints of one cluster share a predictor unless the rule says otherwise."""
    assert table(Rule("c")).match("llama", {}, NoRng()).group == "c"


def test_unknown_model_is_not_found() -> None:
    """A name that no cluster serves is 404 model_not_found on the field `model`."""
    error = refusal(table(Rule("c")), "gpt")
    assert (error.reason, error.status, error.param) == (Reason.MODEL_NOT_FOUND, 404, "model")
    assert error.message == "The model `gpt` does not exist or is not served here."


def test_overlong_model_name_is_cut_in_the_message() -> None:
    """A client cannot make an error answer as large as its request."""
    assert len(refusal(table(Rule("c")), "x" * 1_000_000).message) < 300


def test_known_model_without_matching_rule_has_no_route() -> None:
    """Without a default rule, a request without the headers is 404 route_not_found."""
    error = refusal(table(Rule("c", headers={"x-tier": "gold"})), "llama", {"x-tier": "silver"})
    assert (error.reason, error.status) == (Reason.ROUTE_NOT_FOUND, 404)
    assert "silver" not in error.message


def test_all_headers_must_match_exactly() -> None:
    """A rule with two headers needs both; the default takes the rest."""
    rules = table(Rule("default"), Rule("gold", headers={"a": "1", "b": "2"}))
    assert rules.match("llama", {"a": "1", "b": "2", "c": "3"}, NoRng()).cluster == "gold"
    for headers in ({"a": "1"}, {"a": "1", "b": "22"}, {"a": "1", "b": ""}, {}):
        assert rules.match("llama", headers, NoRng()).cluster == "default"


def test_alias_leads_to_the_model_and_its_name_is_written_upstream() -> None:
    """A request by alias is the model's, and the engine gets a name that it knows."""
    rules = table(Rule("c"), aliases=("l", "l2"))
    for alias in ("l", "l2"):
        route = rules.match(alias, {}, NoRng())
        assert (route.model, route.upstream_model) == ("llama", "llama")
    assert rules.match("llama", {}, NoRng()).upstream_model is None


@pytest.mark.parametrize(
    ("rule", "asked", "expected"),
    [
        (Rule("c", model="up"), "llama", "up"),
        (Rule("c", model="up"), "alias", "up"),
        (Rule("c", lora="sql"), "llama", "sql"),
        (Rule("c", lora="sql", model="up"), "llama", "up"),
        (Rule("c", model="llama"), "llama", None),
        (Rule("c", lora="alias"), "alias", None),
    ],
)
def test_upstream_model(rule: Rule, asked: str, expected: str | None) -> None:
    """The rule's model, else its adapter, else the canonical name; None where the body is right already."""
    assert table(rule, aliases=("alias",)).match(asked, {}, NoRng()).upstream_model == expected


def test_weight_zero_switches_a_rule_off() -> None:
    """A rule of weight 0 never matches, not even as the only or the most specific one."""
    off = Rule("off", headers={"a": "1"}, weight=0)
    assert table(off, Rule("on")).match("llama", {"a": "1"}, NoRng()).cluster == "on"
    assert refusal(table(off), "llama", {"a": "1"}).reason is Reason.ROUTE_NOT_FOUND


def test_name_served_twice_is_refused() -> None:
    """Two models cannot share a name or an alias."""
    with pytest.raises(ValueError, match="'b' is served twice"):
        RuleTable([ModelRules("a", (Rule("c"),), ("b",)), ModelRules("b", (Rule("c"),))])


@pytest.mark.parametrize(("draw", "expected"), [(0.0, "a"), (0.2499, "a"), (0.25, "b"), (0.9999999, "b")])
def test_weighted_pick_by_one_draw(draw: float, expected: str) -> None:
    """Weights 1 and 3 split the unit interval at a quarter."""

    class Fixed:
        def random(self) -> float:
            """The chosen draw."""
            return draw

    rules = table(Rule("a", weight=1), Rule("b", weight=3))
    assert rules.match("llama", {}, Fixed()).cluster == expected


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10), min_size=2, max_size=5).filter(any), st.integers(0, 2**32))
def test_traffic_follows_the_weights(weights: list[int], seed: int) -> None:
    """Over 2,000 picks each share is within 5 standard deviations of its weight."""
    rng = random.Random(seed)
    rules = table(*(Rule(str(i), weight=weight) for i, weight in enumerate(weights)))
    picks = 2_000
    counts = [0] * len(weights)
    for _ in range(picks):
        counts[int(rules.match("llama", {}, rng).cluster)] += 1
    for weight, count in zip(weights, counts, strict=True):
        share = weight / sum(weights)
        assert abs(count - picks * share) <= 5 * (picks * share * (1 - share)) ** 0.5


some_headers = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12"))


@given(st.lists(some_headers, max_size=8), some_headers, st.integers(0, 2**32))
def test_more_specific_never_loses(
    rule_headers: list[dict[str, str]], headers: dict[str, str], seed: int
) -> None:
    """The chosen rule matches, and no matching rule names more headers; without one there is no route."""
    rules = table(*(Rule(str(i), headers=required) for i, required in enumerate(rule_headers)))
    matching = [required for required in rule_headers if required.items() <= headers.items()]
    if not matching:
        assert refusal(rules, "llama", headers).reason is Reason.ROUTE_NOT_FOUND
        return
    chosen = rule_headers[int(rules.match("llama", headers, random.Random(seed)).cluster)]
    assert chosen in matching
    assert len(chosen) == max(len(required) for required in matching)


@given(st.permutations(range(4)))
def test_order_in_the_file_does_not_matter(order: list[int]) -> None:
    """Specificity alone decides between rules of different specificity."""
    by_specificity = [Rule(str(i), headers=dict.fromkeys("abc"[:i], "1")) for i in range(4)]
    rules = table(*(by_specificity[i] for i in order))
    for i in range(4):
        assert rules.match("llama", dict.fromkeys("abc"[:i], "1"), NoRng()).cluster == str(i)


def test_any_model_serves_names_that_no_other_has() -> None:
    """Each as a model of its own: an adapter's cache is not its base model's. Named models go first."""
    rules = RuleTable([ModelRules("llama", (Rule("c"),), ("l",)), ModelRules("*", (Rule("pool"),))])
    assert rules.match("l", {}, NoRng()).cluster == "c"
    one, other = (rules.match(name, {}, NoRng()) for name in ("sql-lora", "base"))
    assert (one.cluster, one.model, one.upstream_model, one.group) == ("pool", "sql-lora", None, "pool")
    assert other.model == "base"
    assert rules.match("sql-lora", {}, NoRng()) is one
    assert {route.cluster for route in rules.open_to({})} == {"c", "pool"}
    assert rules.rewritten == {"l"}


def test_any_model_has_rules_like_others() -> None:
    """With headers, and with the engine's own name."""
    rules = RuleTable([ModelRules("*", (Rule("gold", headers={"tier": "gold"}), Rule("c", model="engine")))])
    assert rules.match("x", {"tier": "gold"}, NoRng()).cluster == "gold"
    assert rules.match("x", {}, NoRng()).upstream_model == "engine"
    assert "*" in rules.rewritten


def test_names_of_any_model_are_bounded() -> None:
    """A client decides what a model is called, not how much is kept of it."""
    rules = RuleTable([ModelRules("*", (Rule("pool"),))])
    for number in range(3000):
        assert rules.match(f"m{number}", {}, NoRng()).model == f"m{number}"
    assert len(rules._of_any) <= 1024
    for name in ("", "x" * 201):
        assert refusal(rules, name).reason is Reason.MODEL_NOT_FOUND
