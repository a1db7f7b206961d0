"""The build that pyproject.toml describes, with compiled modules where `TOKENWAY_COMPILE=1` asks for them.

That needs a C compiler, Python's headers and what requirements/compile.txt locks.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent

MAKING = {"bdist_wheel", "build", "build_ext"}
"""Commands that make what is compiled; others run this file as well, for metadata."""

ASKED = os.environ.get("TOKENWAY_COMPILE", "")

if ASKED not in ("", "1"):
    sys.exit(f"TOKENWAY_COMPILE={ASKED}: accepted are 1, and nothing for pure Python")
if ASKED and MAKING.intersection(sys.argv):
    sys.path.insert(0, str(ROOT))
    from compiling.extensions import extensions
    from compiling.licences import HOLDER, licences
    from compiling.needs import missing

    class WheelWithLicences(bdist_wheel):
        """Has them in `licenses/mypy/` of its metadata."""

        def write_wheelfile(self, wheelfile_base: str, *args: Any, **named: Any) -> None:
            """Called when the folder of metadata is there, before it is packed."""
            folder = Path(wheelfile_base, "licenses", HOLDER)
            folder.mkdir(parents=True, exist_ok=True)
            for path in licences():
                shutil.copy(path, folder)
            super().write_wheelfile(wheelfile_base, *args, **named)

    if lacking := missing():
        sys.exit(lacking)
    setup(ext_modules=extensions(ROOT), cmdclass={"bdist_wheel": WheelWithLicences})
else:
    setup()
