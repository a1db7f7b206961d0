"""Discovery from a real istiod that knows its clients by their certificates: TLS at 15012, and no token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from testbed.certificates import issued, workload
from testbed.control_planes.record import HOST, endpoint, service_entry
from testbed.istiod import Certificates, Istiod, running_istiod
from tests.e2e.harness import Stack, chat, eventually, key_of, post, running_stack, sample, simulators

pytestmark = [pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]

NAMESPACE = "tokenway"
AWAY = "a source of endpoints is away: what it listed last stays"


def authority(folder: Path) -> Path:
    """One that signed istiod's certificate and a workload's, and a stranger's."""
    folder.mkdir()
    for name in ("ca", "stranger"):
        issued(folder, name)
    issued(folder, "istiod", "ca")
    issued(folder, "tokenway", "ca", who=workload(NAMESPACE))
    issued(folder, "unknown", "stranger", who=workload(NAMESPACE))
    issued(folder, "elsewhere", "ca", who=workload("elsewhere"))
    return folder


def certificates(pki: Path) -> Certificates:
    """Istiod's."""
    return Certificates(pki / "istiod.pem", pki / "istiod.key", pki / "ca.pem")


def put(folder: Path, pki: Path, name: str, *parts: str) -> None:
    """Replace files of Tokenway's by those of a name, as a rotation does."""
    of_part = {"ca": pki / "ca.pem", "cert": pki / f"{name}.pem", "key": pki / f"{name}.key"}
    for part in parts or of_part:
        new = folder / f"{part}.new"
        new.write_bytes(of_part[part].read_bytes())
        new.replace(folder / f"{part}.pem")


def config(istiod: Istiod, files: Path, **more: str) -> dict[str, Any]:
    """One model, served by a service of the mesh."""
    tls = {"ca_file": str(files / "ca.pem"), **more}
    address = f"127.0.0.1:{istiod.tls_port}"
    return {
        "version": 1,
        "discovery": {"istio": {"address": address, "namespace": NAMESPACE, "tls": tls}, "wait_s": 0.5},
        "models": {"sim": {"rules": [{"cluster": f"{HOST}:8000"}]}},
    }


@asynccontextmanager
async def following(istiod: Istiod, files: Path) -> AsyncIterator[Stack]:
    """Tokenway and Envoy, by the pair among the files."""
    pair = {"cert_file": str(files / "cert.pem"), "key_file": str(files / "key.pem")}
    async with running_stack([], config(istiod, files, **pair)) as stack:
        yield stack


async def is_connected(stack: Stack) -> bool:
    """Whether istiod answers, by the metric."""
    return sample(await stack.metrics(), 'tokenway_discovery_connected{source="istio"}') == 1


async def causes(stack: Stack) -> list[str]:
    """Why the source was away, as the log has it."""
    return [line["cause"] for line in stack.gateway_log() if line["event"] == AWAY]


async def hosts(stack: Stack) -> set[str]:
    """Addresses of the endpoints."""
    return {key.rpartition("@")[2] for key in await stack.rows()}


async def test_a_certificate_opens_the_port_and_everything_is_rotated(folder: Path, tmp_path: Path) -> None:
    """Authority, istiod's certificate and ours are replaced in steps: what was listed stays meanwhile."""
    old, new, files = authority(tmp_path / "old"), authority(tmp_path / "new"), tmp_path / "files"
    files.mkdir()
    put(files, old, "tokenway")
    async with (
        simulators(2, time_scale=0.001) as (first, second),
        running_istiod(folder, certificates=certificates(old)) as istiod,
    ):
        istiod.write("models.yaml", service_entry(endpoint("127.0.0.1", first.port)))
        async with following(istiod, files) as stack:

            async def serves() -> bool:
                return (await post(stack, chat("sim", "hello"))).status == 200

            await eventually(lambda: hosts(stack), lambda found: found == {key_of(first)})
            await eventually(serves, bool)
            await istiod.kill()
            istiod.certificates = certificates(new)
            istiod.write("models.yaml", service_entry(endpoint("127.0.0.1", second.port)))
            await istiod.start()
            for step, cause in (("ca", ""), ("key", "KEY_VALUES_MISMATCH")):
                put(files, new, "tokenway", step)

                async def is_named(cause: str = cause) -> bool:
                    return cause in "".join((await causes(stack))[-1:])

                await eventually(is_named, bool)
                assert not await is_connected(stack)
                assert await hosts(stack) == {key_of(first)}
                assert await serves()
            put(files, new, "tokenway", "cert")
            await eventually(lambda: hosts(stack), lambda found: found == {key_of(second)}, 60)
            assert await is_connected(stack)
            assert len(await causes(stack)) == 2


@pytest.mark.parametrize("wrong", ["none", "unknown", "elsewhere", "mismatched", "missing", "junk"])
async def test_what_is_wrong_opens_nothing(wrong: str, folder: Path, tmp_path: Path) -> None:
    """It is away, with the reason; the right files are taken as soon as they are there."""
    pki, files = authority(tmp_path / "pki"), tmp_path / "files"
    files.mkdir()
    put(files, pki, wrong if wrong in ("unknown", "elsewhere") else "tokenway")
    if wrong == "mismatched":
        put(files, pki, "elsewhere", "key")
    elif wrong == "missing":
        (files / "key.pem").unlink()
    elif wrong == "junk":
        (files / "cert.pem").write_text("junk")
    async with running_istiod(folder, certificates=certificates(pki)) as istiod:
        istiod.write("models.yaml", service_entry(endpoint("127.0.0.1", 1)))
        if wrong == "none":  # neither a certificate nor a token
            async with running_stack([], config(istiod, files)) as stack:
                assert not await is_connected(stack)
                assert len(await causes(stack)) == 1
            return
        async with following(istiod, files) as stack:
            assert not await is_connected(stack)
            (cause,) = await causes(stack)
            named = {"mismatched": "KEY_VALUES_MISMATCH", "missing": "key.pem: No such", "junk": "cert.pem"}
            assert named.get(wrong, "") in cause, cause
            assert "PRIVATE KEY" not in str(stack.gateway_log())
            put(files, pki, "tokenway")
            await eventually(lambda: hosts(stack), bool, 60)
            assert await is_connected(stack)
