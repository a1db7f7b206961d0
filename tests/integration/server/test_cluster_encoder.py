"""Kinds of cluster encoded by a process of their own: the same bytes, and none lost where it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from extproc.server.envoys import cluster_encoder
from extproc.server.envoys.cluster_encoder import ClusterEncoder
from extproc.xds.cluster_encoding import encode
from extproc.xds.cluster_kinds import ClusterKind, UpstreamTls

KINDS = [
    ClusterKind(),
    ClusterKind(None, 7),
    ClusterKind(UpstreamTls("ca.pem", "engine", "own.pem", "key.pem"), 1024),
    ClusterKind(UpstreamTls("/ä/ca.pem", "engine")),
]


@pytest.mark.parametrize("is_ahead", [True, False])
def test_another_process_makes_the_same_bytes_and_ends(is_ahead: bool) -> None:
    """Started ahead or when it is asked."""
    encoder = ClusterEncoder()
    if is_ahead:
        encoder.__enter__()
    process = encoder._ahead
    assert encoder.encode(KINDS) == {kind: encode(kind) for kind in KINDS}
    assert process is None or process.returncode == 0
    assert encoder.encode(KINDS[:1]) == {KINDS[0]: encode(KINDS[0])}, "a later question has a process as well"


@pytest.mark.parametrize(
    "program", ["raise SystemExit(3)", "print('no answer')", "import time; time.sleep(60)"]
)
def test_where_a_process_fails_they_are_encoded_here(
    program: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends, says something else, or hangs."""
    monkeypatch.setattr(cluster_encoder, "python_module", lambda _: [sys.executable, "-c", program])
    monkeypatch.setattr(cluster_encoder, "MAX_WAIT_S", 1.0)
    assert ClusterEncoder().encode(KINDS) == {kind: encode(kind) for kind in KINDS}
    assert [record.message for record in caplog.records] == ["clusters are encoded here"]


def test_a_process_that_cannot_be_started_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither ahead nor when it is asked."""
    monkeypatch.setattr(cluster_encoder, "python_module", lambda _: ["/nowhere/python"])
    with ClusterEncoder() as encoder:
        assert encoder.encode(KINDS) == {kind: encode(kind) for kind in KINDS}
    assert [record.message for record in caplog.records] == ["clusters are encoded here"]


def test_one_that_is_not_asked_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    """A configuration was refused, or several workers have their own."""
    with ClusterEncoder() as encoder:
        process = encoder._ahead
        assert process is not None
    assert process.returncode is not None
    orphan = subprocess.run(
        [sys.executable, "-m", "extproc.server.envoys.encoding_process"],
        input=b"",
        capture_output=True,
        check=True,
    )
    assert (orphan.stdout, orphan.stderr) == (b"", b""), "whose gateway went without a question"
    assert capfd.readouterr().err == ""
