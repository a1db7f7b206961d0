"""The build that pyproject.toml describes, with compiled modules where `TOKENWAY_COMPILE=1` asks for them.

That needs a C compiler, Python's headers and what requirements/compile.txt locks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

MAKING = {"bdist_wheel", "build", "build_ext"}
"""Commands that make what is compiled; others run this file as well, for metadata."""

if os.environ.get("TOKENWAY_COMPILE") == "1" and MAKING.intersection(sys.argv):
    sys.path.insert(0, str(ROOT))
    from compiling.extensions import extensions

    setup(ext_modules=extensions(ROOT))
else:
    setup()
