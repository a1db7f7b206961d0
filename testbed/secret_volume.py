"""A Secret as a kubelet mounts it: all names lead through one link, which is replaced in one step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """The volume has these files from now on; those of before are gone.

    Args:
        folder: Where it is mounted; made if it is not there.
        files: What each has, by the key of the Secret.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, coming = folder / "..data", folder / "..data_tmp"
    before = data.readlink() if data.is_symlink() else None
    version = folder / f"..{0 if before is None else 1 + int(before.name.removeprefix('..'))}"
    version.mkdir()
    for name, content in files.items():
        (version / name).write_bytes(content)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data", name))
    coming.symlink_to(version.name)
    coming.replace(data)
    if before is not None:
        shutil.rmtree(folder / before)
