"""The Helm chart: what it renders for each provider, and what it refuses. Without helm: `make kubectl`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.loading import load_all
from testbed.helm import (
    CASES,
    CHART,
    NAMESPACE,
    binary,
    configuration,
    helm,
    of_kind,
    rendered,
    template,
    values_of,
)
from tokenway.cli.check import check

ROOT = Path(__file__).parents[2]

needs_helm = pytest.mark.skipif(not binary().exists(), reason="no helm: run `make kubectl`")

PLAIN = {"modelServers": {"matchLabels": {"app": "vllm"}, "model": "llama"}}

PROVIDERS = ("none", "istio", "istio-inferencepool", "envoy-gateway")

WARNINGS: dict[str, set[str]] = {
    "istio": {"server.listen_insecure"},
    "istio-plain": {"server.listen_insecure"},
    "istio-inferencepool-swap": {"default_cluster"},
}
"""What `tokenway check` warns of: clear text, closed by the NetworkPolicy; a pool that serves any path."""

WHOLE = {"resources"}
"""Values that are one thing, though they have keys."""


def leaves(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every value of values.yaml, by its dotted name."""
    for key, value in node.items():
        if isinstance(value, dict) and value and key not in WHOLE:
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def pod_of(case: str) -> dict[str, Any]:
    """The specification of the pods."""
    (deployment,) = of_kind(rendered(case), "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def containers(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All of a pod, those that run first as well."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def test_the_table_of_values_is_that_of_the_chart() -> None:
    """docs/kubernetes.md has each key, in order, with its default."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| .+ \|$", text[text.index("## Values") :], re.MULTILINE)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert rows == [(name, json.dumps(value)) for name, value in leaves(values)]


def test_the_schema_knows_every_value() -> None:
    """And none that values.yaml does not have, so that a slip in a name is refused."""

    def names(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
        if "$ref" in node:
            node = schema["definitions"][node["$ref"].rpartition("/")[2]]
        inner = node.get("properties")
        if inner is None or path[-1:] in (("resources",), ("config",)):
            yield ".".join(path)
            return
        assert node["additionalProperties"] is False, path
        for key, below in inner.items():
            yield from names(below, (*path, key))

    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    known = set(names(schema)) - {"global", "envoy.image.pullPolicy"}
    assert known == {name for name, _ in leaves(values)}


def test_the_version_is_that_of_the_package() -> None:
    """The image is tagged by it."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project


def test_every_provider_has_a_case() -> None:
    """Each is rendered below."""
    named = {
        yaml.safe_load(values_of(case).read_text()).get("provider", {}).get("name", "none") for case in CASES
    }
    assert named == set(PROVIDERS)


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_lint_has_nothing_to_say(case: str) -> None:
    """Not even a warning."""
    done = helm("lint", "--strict", str(CHART), "--namespace", NAMESPACE, "--values", str(values_of(case)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_usable(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tokenway check` takes what is in the ConfigMap; all that it warns of is what the provider is about."""
    path = configuration(rendered(case), tmp_path)
    assert check(path) == 0
    lines = capsys.readouterr().err.splitlines()
    warned = {
        line.partition(": warning: ")[2].partition(":")[0]
        for line in lines
        if not line.endswith("where it runs")  # certificates are in the pod's volumes
    }
    assert {subject for subject in warned if not subject.startswith("line ")} == WARNINGS.get(case, set())
    config, _ = load_all(path)
    assert config.server.admin.address == "127.0.0.1"
    assert config.endpoint_picker is not None
    assert config.endpoint_picker.health_listen == ("0.0.0.0:9003",)
    assert config.endpoint_picker.metrics_listen == ("0.0.0.0:9090",)


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_pods_are_confined(case: str) -> None:
    """Everything that the restricted Pod Security Standard asks for, and a root that is read-only."""
    pod = pod_of(case)
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert pod.keys().isdisjoint({"hostNetwork", "hostPID", "hostIPC"})


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_what_a_pod_needs_is_there(case: str) -> None:
    """Volumes, ports and the account that are named exist, each once, and all of them are used."""
    objects = rendered(case)
    pod = pod_of(case)
    mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert sorted(mounted) == sorted(volumes)
    ports = {port["name"] for container in containers(pod) for port in container.get("ports", ())}
    asked = {
        port["targetPort"]
        for service in of_kind(objects, "Service")
        if not service["metadata"]["name"].endswith("-models")
        for port in service["spec"]["ports"]
    }
    assert asked <= ports
    for policy in of_kind(objects, "NetworkPolicy"):
        assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} <= ports
    assert [pod["serviceAccountName"]] == [
        account["metadata"]["name"] for account in of_kind(objects, "ServiceAccount")
    ]
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_probes_ask_by_grpc(case: str) -> None:
    """Of the port for health alone, but for the start beside Envoy; and pods have time to drain."""
    pod = pod_of(case)
    (container,) = pod["containers"]
    names = (
        ("liveness", "readiness")
        if "exec" in container["startupProbe"]
        else ("startup", "liveness", "readiness")
    )
    assert (len(names) == 2) == case.startswith("none")
    for probe in names:
        service = "readiness" if probe == "readiness" else "liveness"
        assert container[f"{probe}Probe"]["grpc"] == {"port": 9003, "service": service}
    values = yaml.safe_load((CHART / "values.yaml").read_text()) | yaml.safe_load(values_of(case).read_text())
    assert pod["terminationGracePeriodSeconds"] >= values["leaveSeconds"] + values["drainSeconds"] + 15


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_rights_are_few_and_local(case: str) -> None:
    """Reading, in the release's namespace, and only where Kubernetes is asked; no token otherwise."""
    objects = rendered(case)
    assert {each["metadata"].get("namespace") for each in objects} <= {NAMESPACE, "gateways"}
    assert {each["kind"] for each in objects if each["metadata"]["namespace"] != NAMESPACE} <= {
        "ClientTrafficPolicy",
        "EnvoyFilter",
    }
    assert not any(each["kind"].startswith("Cluster") for each in objects)
    roles = of_kind(objects, "Role")
    assert pod_of(case)["automountServiceAccountToken"] is bool(roles)
    for role in roles:
        for rule in role["rules"]:
            assert rule["verbs"] == ["get", "list", "watch"]
            assert "secrets" not in rule["resources"]
            assert "*" not in (*rule["resources"], *rule["apiGroups"])
    asks = "kubernetes" in yaml.safe_load(of_kind(objects, "ConfigMap")[0]["data"]["tokenway.yaml"]).get(
        "discovery", {}
    )
    assert asks is bool(roles)


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_ports_say_their_protocol(case: str) -> None:
    """For Istio, which otherwise takes them for TCP."""
    for service in of_kind(rendered(case), "Service"):
        for port in service["spec"]["ports"]:
            assert (
                port["appProtocol"]
                == {"grpc": "kubernetes.io/h2c", "http": "http", "https": "https"}[
                    port["name"].partition("-")[0]
                ]
            )


@needs_helm
def test_a_password_is_in_a_secret_alone() -> None:
    """The configuration names a variable, the pod takes it from the Secret."""
    objects = rendered("none-everything")
    config = yaml.safe_load(of_kind(objects, "ConfigMap")[0]["data"]["tokenway.yaml"])
    (container,) = pod_of("none-everything")["containers"]
    sources = {one["name"]: one.get("valueFrom") for one in container["env"]}
    named = config["metadata_center"]["password_env"]
    assert sources[named] == {"secretKeyRef": {"name": "redis", "key": "password"}}


@needs_helm
def test_envoy_alone_has_the_key_of_the_edge_and_follows_it() -> None:
    """Files in a folder that stays name those in volumes that the kubelet renews."""
    pod = pod_of("none-tls")
    (tokenway,) = pod["containers"]
    bootstrap, envoy = pod["initContainers"]
    config = yaml.safe_load(of_kind(rendered("none-tls"), "ConfigMap")[0]["data"]["tokenway.yaml"])
    secrets = {each["name"]: each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each}
    mounts = {each["mountPath"]: each for each in envoy["volumeMounts"]}
    named = {
        key: secrets[mounts[folder]["name"]]
        for key, (folder, _, _) in (
            (key, path.rpartition("/")) for key, path in config["edge"]["tls"].items()
        )
    }
    assert named == {"cert_file": "edge", "key_file": "edge", "client_ca_file": "clients"}
    assert not any("subPath" in each for each in mounts.values())
    for other in (tokenway, bootstrap):
        assert secrets.keys().isdisjoint(each["name"] for each in other["volumeMounts"])
    folder = re.search(r"--sds (/\S+)/sds ", bootstrap["command"][-1])
    assert folder is not None
    assert folder[1] in mounts


@needs_helm
def test_a_new_process_for_settings_and_none_for_clusters() -> None:
    """The pods' annotation follows tokenway.yaml alone; clusters are reloaded."""

    def checksum(values: Mapping[str, Any]) -> str:
        (deployment,) = of_kind(rendered("none-static", values), "Deployment")
        found: str = deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        return found

    plain = checksum({})
    assert checksum({"clusters": [{"name": "other", "endpoints": []}]}) == plain
    assert checksum({"config": {"logging": {"level": "debug"}}}) != plain


@needs_helm
def test_what_is_said_wins_over_what_the_chart_says(tmp_path: Path) -> None:
    """`config` is laid over, key by key."""
    path = configuration(rendered("none", {"config": {"server": {"workers": 3}}}), tmp_path)
    config, _ = load_all(path)
    assert (config.server.workers, config.server.run_dir) == (3, "/run/tokenway/sockets")


@needs_helm
@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_notes_name_what_was_made(provider: str) -> None:
    """The commands to verify it are those of this release."""
    extra = {"istio": {"namespace": "istio-ingress"}}.get(provider, {"name": "gw"})
    values = {**PLAIN, "provider": {"name": provider}, "gateway": extra}
    done = helm(*("install", "test", str(CHART), "--namespace", NAMESPACE, "--dry-run=client"), values=values)
    assert done.returncode == 0, done.stderr
    assert "kubectl -n models rollout status deploy/test-tokenway" in done.stdout
    assert ("tokenway render istio" in done.stdout) == (provider == "istio")


def installations() -> list[str]:
    """Every `helm install` of the documents; options in a block of their own are added to the first."""
    found: list[str] = []
    options: list[str] = []
    for name in ("README.md", "docs/kubernetes.md"):
        blocks = re.findall(r"^```\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
        for block in blocks:
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("helm install")]
            options += [line for line in lines if line.startswith("  --set")]
    names = {
        "REGISTRY": "images.internal",
        "GATEWAY": "gw",
        "POOL": "pool",
        "NAMESPACE": "gateways",
        "MODEL": "llama",
    }
    filled = [found[0], *found, *(found[0] + line for line in options)]
    for word, value in names.items():
        filled = [re.sub(rf"\b{word}\b", value, each) for each in filled]
    return sorted(
        {each.replace("[", "").replace("]", "") if "set-json" not in each else each for each in filled}
    )


@needs_helm
@pytest.mark.parametrize("command", installations())
def test_the_installations_of_the_documents_are_taken(command: str) -> None:
    """As they stand, but for the names that a reader fills in."""
    program, *words = shlex.split(command)
    assert program == "helm"
    words = [str(CHART) if word == "charts/tokenway" else word for word in words]
    done = helm(*words, "--dry-run=client")
    assert done.returncode == 0, done.stderr
    assert "Tokenway is installed for provider" in done.stdout


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_roles_are_those_of_the_document(case: str) -> None:
    """Of those that docs/kubernetes.md lists, what the case asks for."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    block = re.search(r"^## Roles$.*?^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    documented = yaml.safe_load(block[1])["rules"]
    for role in of_kind(rendered(case), "Role"):
        assert all(rule in documented for rule in role["rules"])


WRONG_TYPES: list[tuple[Mapping[str, Any], str]] = [
    ({"provider": {"name": "nginx"}}, "provider"),
    ({"provder": {"name": "none"}}, "provder"),
    ({"replicas": "2"}, "replicas"),
    ({"replicas": -1}, "replicas"),
    ({"workers": 0}, "workers"),
    ({"modelServers": {"targetPorts": []}}, "targetPorts"),
    ({"modelServers": {"targetPorts": list(range(8000, 8009))}}, "targetPorts"),
    ({"modelServers": {"targetPorts": [8000, 8000]}}, "targetPorts"),
    ({"modelServers": {"targetPorts": [70000]}}, "targetPorts"),
    ({"modelServers": {"matchLabels": {"app": 1}}}, "matchLabels"),
    ({"clusters": [{"name": "a"}]}, "clusters"),
    ({"metadataCenter": {"url": "redis://:secret@redis:6379"}}, "url"),
    ({"metadataCenter": {"url": "redis"}}, "url"),
    ({"image": {"digest": "latest"}}, "digest"),
    ({"fullnameOverride": "Not A Name"}, "fullnameOverride"),
    ({"inferencePool": {"failureMode": "Open"}}, "failureMode"),
    ({"inferencePool": {"name": "with.dots"}}, "name"),
    ({"picker": {"tls": {"mode": "mutual"}}}, "mode"),
    ({"picker": {"fallbacks": 16}}, "fallbacks"),
    ({"httpRoute": {"timeout": "soon"}}, "timeout"),
    ({"istio": {"address": "istiod"}}, "address"),
    ({"envoy": {"service": {"type": "Public"}}}, "type"),
    ({"envoy": {"tls": {"secretName": "edge"}}}, "secretName"),
    ({"drainSeconds": -1}, "drainSeconds"),
    ({"networkPolicy": {"metrics": ["monitoring"]}}, "metrics"),
]


@needs_helm
@pytest.mark.parametrize(("values", "named"), WRONG_TYPES, ids=[json.dumps(each) for each, _ in WRONG_TYPES])
def test_the_schema_refuses(values: Mapping[str, Any], named: str) -> None:
    """And says which value it is about."""
    done = template("none-static", values)
    assert done.returncode != 0
    assert "schema" in done.stderr
    assert named in done.stderr


ONE_CLUSTER = [{"name": "llama", "endpoints": [{"address": "10.0.0.7", "port": 8000}]}]

DO_NOT_GO_TOGETHER: list[tuple[str | None, Mapping[str, Any], str]] = [
    (None, {}, "no model servers: set modelServers.matchLabels"),
    (
        "envoy-gateway",
        {"modelServers": {"matchLabels": None}, "clusters": ONE_CLUSTER},
        "set modelServers.matchLabels",
    ),
    ("none", {"replicas": 2}, "set metadataCenter.url"),
    ("none", {"autoscaling": {"enabled": True}}, "set metadataCenter.url"),
    ("istio", {"replicas": 2, "metadataCenter": {"url": "http://m:1"}}, "metadataCenter.url of Redis"),
    ("istio", {"gateway": {"namespace": ""}}, "set gateway.namespace"),
    ("istio", {"istio": {"tls": False}}, "istio.clientCertificate"),
    ("istio-inferencepool", {"gateway": {"name": ""}}, "set gateway.name"),
    ("envoy-gateway", {"gateway": {"name": ""}}, "set gateway.name"),
    ("istio-inferencepool", {"inferencePool": {"create": False}}, "set inferencePool.name"),
    ("istio-inferencepool", {"picker": {"tls": {"mode": "secret"}}}, "set picker.tls.secret"),
    ("envoy-gateway", {"picker": {"tls": {"mode": "self-signed"}}}, "plain or secret"),
    ("envoy-gateway", {"picker": {"tls": {"mode": "secret", "secret": "s"}}}, "set picker.tls.ca"),
    ("none", {"fullnameOverride": "1st"}, "a Service's name begins with a letter, `1st` does not"),
    (
        "none-everything",
        {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}},
        "autoscaling.minReplicas exceeds",
    ),
    ("none", {"envoy": {"tls": {"clientCa": "clients"}}}, "set envoy.tls.secret"),
    ("istio", {"envoy": {"tls": {"secret": "edge"}}}, "provider istio clients speak TLS to the gateway"),
    ("none", {"terminationGracePeriodSeconds": 70}, "terminationGracePeriodSeconds must exceed"),
    ("none", {"serviceMonitor": {"create": True}}, "networkPolicy.metrics"),
]


@needs_helm
@pytest.mark.parametrize(
    ("case", "values", "said"), DO_NOT_GO_TOGETHER, ids=[said for *_, said in DO_NOT_GO_TOGETHER]
)
def test_the_chart_refuses(case: str | None, values: Mapping[str, Any], said: str) -> None:
    """With what to do about it."""
    done = template(case, values)
    assert done.returncode != 0
    assert said in done.stderr
