"""How many sequences an engine generates for one request."""

from __future__ import annotations

from typing import Any, Final

from extproc.values.requests import Operation

MOST_CHOICES: Final = 1 << 20
"""No engine makes as many; what says more counts for these."""


def choices_of(operation: Operation, fields: dict[str, Any]) -> int:
    """Choices of all prompts of a request, 1 at least.

    Args:
        operation: Chats and completions have several: `n`; completions `best_of`, and several prompts.
        fields: The decoded body; what makes no sense in it counts for nothing.
    """
    if operation is not Operation.CHAT and operation is not Operation.TEXT_COMPLETION:
        return 1
    each = fields.get("n")
    choices = each if type(each) is int and each > 1 else 1
    if operation is Operation.CHAT:
        return min(choices, MOST_CHOICES)
    best_of = fields.get("best_of")
    if type(best_of) is int:
        choices = max(choices, best_of)
    prompts = fields.get("prompt")
    if prompts is None:
        prompts = fields.get("prompt_embeds")
    if type(prompts) is list and prompts and type(prompts[0]) is not int:
        choices *= len(prompts)
    return min(choices, MOST_CHOICES)
