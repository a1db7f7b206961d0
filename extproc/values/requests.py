"""What a client asked for, understood."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Protocol

from metadata_center.types import value

ANY_MODEL: Final = "*"
"""Name of the model, as operators write it, that serves names which no other model has."""


class Operation(StrEnum):
    """What the request asks for; values are OpenTelemetry `gen_ai.operation.name`s where one exists."""

    CHAT = "chat"
    TEXT_COMPLETION = "text_completion"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    COMPACT = "compact"
    COUNT_TOKENS = "count_tokens"
    INPUT_TOKENS = "input_tokens"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    RERANK = "rerank"
    SCORE = "score"
    CLASSIFY = "classify"
    POOLING = "pooling"
    TRANSCRIPTION = "transcription"
    TRANSLATION = "translation"


GENERATING: Final = frozenset(
    (Operation.CHAT, Operation.TEXT_COMPLETION, Operation.RESPONSES, Operation.MESSAGES)
)
"""Operations of one kind of model, which answers them with objects or events."""

COMPUTING_NOTHING: Final = frozenset(
    (Operation.COUNT_TOKENS, Operation.INPUT_TOKENS, Operation.TOKENIZE, Operation.DETOKENIZE)
)
"""Operations whose answers have no usage, for no model runs."""

CONTINUING: Final = frozenset((Operation.RESPONSES, Operation.COMPACT, Operation.INPUT_TOKENS))
"""Operations that may build on a stored response or a conversation, which one endpoint alone has."""

SPEECH_TO_TEXT: Final = frozenset((Operation.TRANSCRIPTION, Operation.TRANSLATION))
"""Operations on audio, whose answers may be text alone, and of silence none."""


class Rewritable(Protocol):
    """A body that is edited without having been decoded; see `extproc.request.multipart.Form`."""

    def rewritten(self, model: str | None, allowed: frozenset[str]) -> bytes | None:
        """The body to send instead, or None if it may go as it came."""
        ...

    def is_changed(self, allowed: frozenset[str]) -> bool:
        """Whether that changes more than the model."""
        ...

    def around_model(self, allowed: frozenset[str]) -> tuple[bytes, bytes]:
        """What it has before the model's name and behind it."""
        ...


@value
class InferenceRequest:
    """One understood request body.

    Attributes:
        operation: Which API it came by.
        model: The client's name for the model, before any rewriting.
        stream: True if the client asked for server-sent events.
        prompt: Canonical prompt bytes: equal conversation prefixes give equal byte prefixes;
            media replaced by content hashes. Never logged.
        prompt_tokens: Exact count when the client sent token ids, else None.
        max_tokens: The client's output bound, or None.
        cache_salt: The engine's cache namespace asked for by the client, or None.
        body: The decoded JSON object, owned by this request; sanitising edits it. Empty for a form.
        is_multimodal: True if any part was image, audio or video.
        form: The body where it is `multipart/form-data`, else None.
        widths: (offset in `prompt`, bytes) where media count for so many bytes more than they have there.
        more_bytes: What the prompt counts for beyond the length of `prompt`: widths, and what was cut off.
        has_body: False if `body` was left where it was decoded, so that nothing can be rendered here.
        choices: Sequences that are generated for it: `n` for each of its prompts.
    """

    operation: Operation
    model: str
    stream: bool
    prompt: bytes
    prompt_tokens: int | None
    max_tokens: int | None
    cache_salt: str | None
    body: dict[str, Any]
    is_multimodal: bool = False
    form: Rewritable | None = None
    widths: tuple[tuple[int, int], ...] = ()
    more_bytes: int = 0
    has_body: bool = True
    choices: int = 1

    @property
    def prompt_bytes(self) -> int:
        """Bytes that the prompt counts for."""
        return len(self.prompt) + self.more_bytes
