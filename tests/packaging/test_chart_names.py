"""Names of what the chart makes: no two installations share one. Without helm: `make kubectl`."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import yaml

from testbed.helm import CHART, NAMESPACE, binary, helm, values_of

pytestmark = pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`")

CASES = ("none-everything", "istio-inferencepool", "envoy-gateway-tls")

LONG = "a-model-of-a-long-name-in-the-cluster-of-"
"""Of a release: 41 characters of the 53 that Helm allows."""


def names(
    case: str, release: str, namespace: str = NAMESPACE, *, fullname: str = ""
) -> set[tuple[str, str, str]]:
    """Kind, namespace and name of each object of an installation."""
    words = ("template", release, str(CHART), "--namespace", namespace, "--values", str(values_of(case)))
    done = helm(*words, values={"fullnameOverride": fullname})
    assert done.returncode == 0, done.stderr
    objects = [each for each in yaml.safe_load_all(done.stdout) if each is not None]
    return {(each["kind"], each["metadata"]["namespace"], each["metadata"]["name"]) for each in objects}


@pytest.mark.parametrize("case", CASES)
def test_releases_of_long_names_share_nothing(case: str) -> None:
    """Names that are equal in all that is kept of them, cut at one place or another."""
    releases = [
        LONG + tail for tail in ("europe-a", "europe-ab", "europe-a-tok", "europe-a-to", "tokenway-aaa")
    ]
    releases += [LONG + "tokenway-aab", LONG + "-tokenway-a", LONG + "-tokenway-b"]
    assert max(map(len, releases)) == 53
    made = [names(case, release) for release in releases]
    made += [names(case, end, fullname="n" * 60 + end) for end in "ab"]
    for one, other in combinations(made, 2):
        assert one.isdisjoint(other)
    for _, _, name in set().union(*made):
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name), name


@pytest.mark.parametrize("case", CASES)
def test_releases_of_one_name_in_two_namespaces_share_nothing(case: str) -> None:
    """What lies in the gateway's namespace as well."""
    for release in ("tokenway", LONG + "europe-a"):
        assert names(case, release).isdisjoint(names(case, release, "other"))


@pytest.mark.parametrize("release", ["tokenway", "llama", "r" * 43, "tokenway-" + "r" * 43])
def test_a_name_that_is_not_cut_is_as_it_was(release: str) -> None:
    """Nothing that is installed is renamed by an upgrade, but for names that were cut."""
    full = release if "tokenway" in release else f"{release}-tokenway"
    assert ("Deployment", NAMESPACE, full) in names("none", release)
