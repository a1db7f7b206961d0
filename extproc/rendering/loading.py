"""A tokenizer folder on disk → `Rendering`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from extproc.rendering.prompt_text import Rendering, build_rendering
from extproc.rendering.vocabulary import UnsupportedTokenizer
from metadata_center.files import read_regular

_MAX_FILE_BYTES: Final = 256 * 1024 * 1024
"""Of one file; the largest `tokenizer.json` today (262,144 entries) has 33 MB."""


def load(folder: Path, variables: Mapping[str, Any] | None = None) -> Rendering:
    """Read a model's tokenizer. Takes about a second: for start and reload, in a thread.

    Args:
        folder: Holds `tokenizer.json`, `tokenizer_config.json` and perhaps `chat_template.jinja`.
        variables: Template variables that the engine was started with.

    Raises:
        UnsupportedTokenizer: A file is missing or unreadable, or the text of the tokens cannot be known.
        UnsupportedTemplate: The chat template does not compile.
    """
    template = folder / "chat_template.jinja"
    try:
        source = _read(template).decode() if template.is_file() else None
        return build_rendering(
            _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json"), source, variables
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedTokenizer(f"{folder}: {error}") from error


def _read(path: Path) -> bytes:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise UnsupportedTokenizer(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    return read_regular(path)
