"""Thoughts in completions: reasoning models write them between <think> and </think>, before what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from roro_fast.tasks.base import Query

THINK, END_THINK = "<think>", "</think>"
OPEN = "opens_thought"  # key of Query.meta: the prompt ends inside a thought, so the completion begins in one


def after_thinking(text: str) -> str:
    """What a completion says outside of its thoughts: the text after the last `</think>`, or all of a text without one.

    A thought that was begun and not ended leaves nothing: what it mentions is no answer.
    """
    begun, ended = text.rfind(THINK), text.rfind(END_THINK)
    if begun > ended:
        return ""
    return text[ended + len(END_THINK) :] if ended >= 0 else text


def said(query: Query, steps: Sequence[str]) -> str:
    """The answer part of a completion to `query`."""
    return after_thinking((THINK if query.meta.get(OPEN) else "") + "".join(steps))


def opens_thought(tokenizer: Any, chat: Mapping[str, Any]) -> bool:
    """Whether the chat template opens the thought itself, as those of DeepSeek-R1 and Qwen3-Thinking do."""
    return bool(opening(tokenizer, chat))


def opening(tokenizer: Any, chat: Mapping[str, Any]) -> str:
    """The `<think>` that ends the chat template's prompt, with what follows it; "" when it opens no thought."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    turn = [{"role": "user", "content": "?"}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False, **chat)
    begun = text.rfind(THINK)
    return text[begun:] if begun > text.rfind(END_THINK) else ""


def in_thought(query: Query) -> Query:
    """The same query, for a prompt that opens a thought."""
    return replace(query, meta={**query.meta, OPEN: True})
