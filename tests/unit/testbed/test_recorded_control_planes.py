"""What control planes sent, as recorded: every file can be read, and holds what its name says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from testbed.control_planes.record import DATA, DEFAULT, SUBSET
from testbed.delta_client import ASSIGNMENTS, assignments, clusters, read_recording

ISTIOD = sorted((DATA / "istiod").glob("*.jsonl"))
KUBERNETES = sorted((DATA / "kubernetes").glob("*.json"))


def last_assignment(name: str, cluster: str) -> list[str] | None:
    """The endpoints of a cluster, as a recording ends."""
    found = None
    for response in read_recording(DATA / "istiod" / f"{name}.jsonl"):
        if response.type_url == ASSIGNMENTS:
            found = assignments(response).get(cluster, found)
    return found


def exchange(name: str) -> Any:
    """A recorded exchange with the API server."""
    return json.loads((DATA / "kubernetes" / f"{name}.json").read_text())


@pytest.mark.parametrize("path", ISTIOD, ids=lambda path: path.stem)
def test_recordings_of_istiod_can_be_read(path: Path) -> None:
    """And are not empty."""
    responses = read_recording(path)
    assert responses
    assert all(response.nonce for response in responses)


def test_recordings_of_istiod_hold_what_they_say() -> None:
    """Members by assignments, existence by clusters."""
    (first,) = read_recording(DATA / "istiod" / "01_clusters.jsonl")
    assert {DEFAULT, SUBSET} <= clusters(first).keys()
    assert last_assignment("03_endpoint_added", SUBSET) == ["::1:8003", "127.0.0.11:8001"]
    assert last_assignment("04_weight_and_endpoint_removed", DEFAULT) == ["::1:8003", "127.0.0.11:8001"]
    assert last_assignment("06_unknown_cluster", "outbound|9||unknown.models.internal") == []
    removed = [
        name
        for response in read_recording(DATA / "istiod" / "07_host_removed.jsonl")
        for name in response.removed_resources
    ]
    assert DEFAULT in removed


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.stem)
def test_recordings_of_the_api_server_can_be_read(path: Path) -> None:
    """A refusal says so by its status, or by an event; all else is 200 and has something in it."""
    found = exchange(path.stem)
    refusal = re.search(r"_(4\d\d)$", path.stem)
    lines = found.get("lines")
    if refusal is not None and lines:
        assert [line["object"]["code"] for line in lines] == [int(refusal[1])]
    else:
        assert found["status"] == (200 if refusal is None else int(refusal[1]))
        assert lines or found["body"]


def test_a_recorded_watch_has_every_kind_of_event() -> None:
    """A Pod comes, changes, goes, and a bookmark ends it."""
    kinds = [line["type"] for line in exchange("pods_watch")["lines"]]
    assert set(kinds) == {"ADDED", "MODIFIED", "DELETED", "BOOKMARK"}
    assert kinds[-1] == "BOOKMARK"
