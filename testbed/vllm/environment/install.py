"""Makes the environment of the tests with a real vLLM: a venv in `.tools/vllm`, a model in `.tools/models`.

    python testbed/vllm/environment/install.py

Rules:
    1. Idempotent: a finished step leaves a stamp of what it was made from and is skipped while that is
       unchanged; an unfinished or outdated one starts again from nothing.
    2. pip is used as this machine configures it; no index is named here.
    3. A torch that needs CUDA is refused before it is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
TOOLS: Final = HERE.parents[2] / ".tools"
VLLM: Final = TOOLS / "vllm"
MODEL: Final = TOOLS / "models" / "small"
STAMP: Final = ".made-from"

TORCH: Final = "torch==2.13.0"
REQUIREMENTS: Final = HERE / "requirements.txt"
CONSTRAINTS: Final = HERE / "constraints.txt"
NO_DEPENDENCIES: Final = (HERE / "requirements-nodeps.txt", HERE / "requirements-vllm.txt")
MAKE_MODEL: Final = HERE / "make_model.py"
CHAT_TEMPLATE: Final = HERE / "chat_template.jinja"

CPU_ONLY: Final = (
    "pip would install a build of torch that needs CUDA ({}). Make pip find PyTorch's CPU builds first, for "
    "example with PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL, and try again."
)


def fingerprint(sources: Iterable[Path]) -> str:
    """Of the contents of `sources` and this Python."""
    digest = hashlib.sha256(sys.version.encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def is_ready() -> bool:
    """True if venv and model are there and up to date."""
    return all(_is_made(folder, sources) for folder, sources, _ in _steps())


def _is_made(folder: Path, sources: Iterable[Path]) -> bool:
    stamp = folder / STAMP
    return stamp.exists() and stamp.read_text() == fingerprint(sources)


def _pip(*words: str | Path, capture: bool = False) -> str:
    """Run pip of the venv.

    Raises:
        SystemExit: It failed; what it had to say is on standard error.
    """
    done = subprocess.run(
        [VLLM / "bin" / "python", "-m", "pip", "--quiet", *words],
        check=False,
        text=True,
        stdout=subprocess.PIPE if capture else None,
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def cuda_needs(report: str) -> list[str]:
    """Requirements of the packages in a pip report that only CUDA builds have."""
    return [
        requirement
        for package in json.loads(report)["install"]
        for requirement in package["metadata"].get("requires_dist", ())
        if requirement.startswith(("nvidia-", "cuda-")) and "extra ==" not in requirement
    ]


def install_vllm() -> None:
    """Fill the venv."""
    venv.create(VLLM, with_pip=True)
    needs = cuda_needs(_pip("install", "--dry-run", "--no-deps", "--report", "-", TORCH, capture=True))
    if needs:
        raise SystemExit(CPU_ONLY.format(needs[0]))
    _pip("install", "--requirement", REQUIREMENTS, "--constraint", CONSTRAINTS)
    for requirements in NO_DEPENDENCIES:
        _pip("install", "--no-deps", "--requirement", requirements)


def make_model() -> None:
    """Write the model with the Python that runs this if it has what that takes, else with the venv's."""
    has_all = all(importlib.util.find_spec(name) for name in ("numpy", "tokenizers"))
    python = sys.executable if has_all else VLLM / "bin" / "python"
    subprocess.run([python, MAKE_MODEL, MODEL], check=True)


def _steps() -> list[tuple[Path, tuple[Path, ...], Callable[[], None]]]:
    """Folders, what they are made from, and by what; in order."""
    return [
        (VLLM, (REQUIREMENTS, CONSTRAINTS, *NO_DEPENDENCIES), install_vllm),
        (MODEL, (MAKE_MODEL, CHAT_TEMPLATE), make_model),
    ]


def main() -> None:
    """Do the steps that are not done."""
    for folder, sources, make in _steps():
        if not _is_made(folder, sources):
            shutil.rmtree(folder, ignore_errors=True)
            make()
            (folder / STAMP).write_text(fingerprint(sources))


if __name__ == "__main__":
    main()
