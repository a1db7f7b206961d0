"""Discovery from an istiod as clusters have it: TLS at its port 15012, and a service account's token."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from testbed import istiod as harness
from testbed.certificates import issued, workload
from testbed.control_planes import definitions
from testbed.control_planes.record import HOST, endpoint, service_entry
from testbed.istiod import Certificates, Istiod, running_istiod
from testbed.kubernetes import Cluster
from tests.e2e.harness import Stack, chat, eventually, key_of, post, running_stack, sample, simulators

pytestmark = [pytest.mark.kubernetes, pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]

NAMESPACE = "tokenway"
AUDIENCE = "istio-ca"
SERVER_NAME = "istiod.istio-system.svc"


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


def config(istiod: Istiod, ca: Path, token: Path, namespace: str = NAMESPACE) -> dict[str, Any]:
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


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def authority(
    cluster: Cluster, istiod: Istiod, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Istiod]:
    """An istiod that is its own authority: it signs its certificate, and workloads' that show a token."""
    folder = tmp_path_factory.mktemp("authority")
    signing = {"ENABLE_CA_SERVER": "true"}
    async with running_istiod(folder, kubeconfig=cluster.kubeconfig(), environment=signing) as running:
        yield running


def request_to_sign(folder: Path) -> bytes:
    """And `key.pem`, which it is for."""
    words = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-subj", "/", "-addext", f"subjectAltName={workload(NAMESPACE)}", "-keyout", "key.pem"]
    command = ["openssl", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60).stdout


async def signed(istiod: Istiod, folder: Path, token: str) -> None:
    """`cert.pem` and `key.pem`, signed by istiod as it signs those of sidecars.

    Source: istio.v1.auth.IstioCertificateService: the text `csr` is field 1 of the request, the texts
    `cert_chain` are field 1 of the response.
    """
    asked = request_to_sign(folder)
    root = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    override = (("grpc.ssl_target_name_override", SERVER_NAME),)
    async with grpc.aio.secure_channel(f"127.0.0.1:{istiod.tls_port}", root, override) as channel:
        call = channel.unary_unary("/istio.v1.auth.IstioCertificateService/CreateCertificate")
        answer = await call(
            b"\x0a" + encoded_length(len(asked)) + asked, metadata=(("authorization", f"Bearer {token}"),)
        )
    chain = re.findall(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n", answer, re.DOTALL)
    (folder / "cert.pem").write_bytes(b"".join(chain))


def encoded_length(number: int) -> bytes:
    """A varint of two bytes."""
    assert 128 <= number < 1 << 14
    return bytes((number & 0x7F | 0x80, number >> 7))


async def test_a_certificate_of_istiods_own_authority_opens_the_port(
    cluster: Cluster, authority: Istiod, tmp_path: Path
) -> None:
    """Its root is where clusters have it; no token goes with discovery, only with the request to sign."""
    secret = {"apiVersion": "v1", "kind": "Secret"}
    path = {**secret, "metadata": {"name": "istio-ca-secret", "namespace": "istio-system"}}
    root = (await cluster.get(path))["data"]["ca-cert.pem"]
    (tmp_path / "ca.pem").write_bytes(base64.b64decode(root))
    await signed(
        authority, tmp_path, await cluster.account_token("tokenway", NAMESPACE, audiences=[AUDIENCE])
    )
    await cluster.apply(service_entry(endpoint("127.0.0.1", 1)))
    files = {f"{part}_file": str(tmp_path / f"{part}.pem") for part in ("ca", "cert", "key")}
    settings = config(authority, tmp_path / "ca.pem", tmp_path / "none")
    settings["discovery"]["istio"]["tls"] = {**files, "server_name": SERVER_NAME}
    async with running_stack([], settings) as stack:
        await eventually(stack.rows, bool)
        assert await connected(stack) == 1
