"""The control plane that tests share. Without its programs they are skipped: `make kubernetes`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from testbed import istiod as harness
from testbed import kubernetes
from testbed.control_planes import definitions
from testbed.istiod import Istiod, running_istiod
from testbed.kubernetes import Cluster, running_cluster


@pytest.fixture(scope="session", autouse=True)
def _programs_are_built() -> None:
    if not kubernetes.is_available():
        pytest.skip("no Kubernetes API server: run `make kubernetes`")


@pytest.fixture(scope="session")
def session_folder() -> Iterator[Path]:
    """For what lives as long as the tests, with a short name."""
    made = Path(tempfile.mkdtemp(prefix="twk", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a test's own, with a short name."""
    made = Path(tempfile.mkdtemp(prefix="twk", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(_programs_are_built: None, session_folder: Path) -> AsyncIterator[Cluster]:
    """A cluster with InferencePool and a user `reader` that may do nothing yet.

    Tests share it, each in a `namespace` of its own; one that stops the API server has to start it again.
    """
    async with running_cluster(session_folder, users=("reader",)) as running:
        await running.apply(*definitions.inference_extension())
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    """A namespace of the test's own; what is in it stays, unseen by other tests."""
    name = f"t{abs(hash(request.node.nodeid)):x}"
    made: dict[str, Any] = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    await cluster.apply(made)
    return name


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def istiod(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Istiod]:
    """One that reads the API server and knows InferencePools."""
    if not harness.is_available():
        pytest.skip("no istiod: run `make istiod`")
    await cluster.apply(*definitions.gateway_api(), *definitions.istio())
    await cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system"}})
    async with running_istiod(
        tmp_path_factory.mktemp("istiod"),
        kubeconfig=cluster.kubeconfig(),
        environment={"ENABLE_GATEWAY_API_INFERENCE_EXTENSION": "true"},
    ) as made:
        yield made
