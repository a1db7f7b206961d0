"""Discovery from an istiod as clusters have it: TLS at its port 15012, and a service account's token."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from testbed import istiod as harness
from testbed.control_planes import definitions
from testbed.control_planes.record import HOST, endpoint, service_entry
from testbed.istiod import Certificates, Istiod, running_istiod
from testbed.kubernetes import Cluster
from tests.e2e.harness import Stack, chat, eventually, key_of, post, running_stack, sample, simulators

pytestmark = [pytest.mark.kubernetes, pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]

NAMESPACE = "tokenway"
AUDIENCE = "istio-ca"


def issued(folder: Path, name: str, authority: str | None = None) -> None:
    """A certificate for 127.0.0.1, by itself or by an authority of the folder."""
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
    if authority is not None:
        words += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
        words += ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key"]
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with istiod's certificate, and another authority."""
    made = tmp_path_factory.mktemp("pki")
    issued(made, "ca")
    issued(made, "stranger")
    issued(made, "istiod", "ca")
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def istiod(
    cluster: Cluster, pki: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Istiod]:
    """One that reads the API server, serves TLS and asks for tokens."""
    if not harness.is_available():
        pytest.skip("no istiod: run `make istiod`")
    await cluster.apply(*definitions.istio())
    for name in ("istio-system", NAMESPACE):
        await cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    await cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "tokenway", "namespace": NAMESPACE},
        }
    )
    certificates = Certificates(pki / "istiod.pem", pki / "istiod.key", pki / "ca.pem")
    folder = tmp_path_factory.mktemp("istiod")
    async with running_istiod(folder, kubeconfig=cluster.kubeconfig(), certificates=certificates) as running:
        yield running


def config(istiod: Istiod, ca: Path, token: Path, namespace: str = NAMESPACE) -> dict[str, object]:
    """One model, served by a service of the mesh."""
    tls = {"ca_file": str(ca), "token_file": str(token)}
    address = f"127.0.0.1:{istiod.tls_port}"
    return {
        "version": 1,
        "discovery": {
            "istio": {"address": address, "namespace": namespace, "tls": tls},
            "wait_s": 0.5,
        },
        "models": {"sim": {"rules": [{"cluster": f"{HOST}:8000"}]}},
    }


async def connected(stack: Stack) -> float | None:
    """Whether istiod answers, by the metric."""
    return sample(await stack.metrics(), 'tokenway_discovery_connected{source="istio"}')


async def test_a_token_opens_the_port(cluster: Cluster, istiod: Istiod, pki: Path, tmp_path: Path) -> None:
    """A service of a custom resource is listed and served; an edit of it shows."""
    token = tmp_path / "token"
    token.write_text(await cluster.account_token("tokenway", NAMESPACE, audiences=[AUDIENCE]))
    async with simulators(2, time_scale=0.001) as (first, second):
        await cluster.apply(service_entry(endpoint("127.0.0.1", first.port)))
        async with running_stack([], config(istiod, pki / "ca.pem", token)) as stack:

            async def hosts() -> set[str]:
                return {key.rpartition("@")[2] for key in await stack.rows()}

            await eventually(hosts, lambda found: found == {key_of(first)})

            async def status() -> int:
                return (await post(stack, chat("sim", "hello"))).status

            await eventually(status, lambda found: found == 200)
            await cluster.apply(service_entry(endpoint("127.0.0.1", second.port)))
            await eventually(hosts, lambda found: found == {key_of(second)})


@pytest.mark.parametrize("wrong", ["token", "audience", "authority", "namespace"])
async def test_what_is_wrong_opens_nothing(
    wrong: str, cluster: Cluster, istiod: Istiod, pki: Path, tmp_path: Path
) -> None:
    """Tokenway starts without its endpoints, says so, and goes on trying: the right files are taken later."""
    right = await cluster.account_token("tokenway", NAMESPACE, audiences=[AUDIENCE])
    shown = {"token": "none", "audience": await cluster.account_token("tokenway", NAMESPACE)}
    token, authority = tmp_path / "token", tmp_path / "ca.pem"
    token.write_text(shown.get(wrong, right))
    authority.write_bytes((pki / ("stranger.pem" if wrong == "authority" else "ca.pem")).read_bytes())
    namespace = "default" if wrong == "namespace" else NAMESPACE
    await cluster.apply(service_entry(endpoint("127.0.0.1", 1)))
    async with running_stack([], config(istiod, authority, token, namespace)) as stack:
        assert await connected(stack) == 0
        assert await stack.rows() == {}
        if wrong != "namespace":  # that one is a setting
            token.write_text(right)
            authority.write_bytes((pki / "ca.pem").read_bytes())
            await eventually(stack.rows, bool, 60)
            assert await connected(stack) == 1
