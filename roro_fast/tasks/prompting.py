"""From a query to prompt token ids: the one place where a chat template is applied, once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roro_fast.errors import ConfigError
from roro_fast.tasks.base import Query

INSTRUCTION = (
    "Solve the problem step by step. Put a blank line after each step and end with the final answer in \\boxed{}."
)
RAW_TASKS = frozenset({"ledger"})  # their prompts are the models' own format


class Prompt(list[int]):
    """Prompt ids for the first tokenizer of a pool; `others` are those for its further tokenizers, in order."""

    def __init__(self, ids: Iterable[int], others: Iterable[Sequence[int]] = ()) -> None:
        super().__init__(ids)
        self.others = tuple(list(o) for o in others)


def encode_prompt(
    tokenizer: Any,
    query: Query,
    system: str | None = None,
    instruction: str = INSTRUCTION,
    few_shot: Sequence[tuple[str, str]] = (),
    chat: Mapping[str, Any] | None = None,
) -> list[int]:
    """Prompt ids of a query.

    A tokenizer with a chat template gets it with the generation prompt added; one without gets the same parts as plain
    text, joined by blank lines, and no special tokens. A ledger query is always its bare prompt.

    Args:
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.
        system: system message; None leaves it to the template.
        instruction: appended to each problem; "" for none.
        few_shot: worked (problem, solution) pairs put before the query.
        chat: variables of the chat template, such as `enable_thinking` of Qwen3.

    Raises:
        ConfigError: the chat template refuses these messages or knows none of these variables.
    """
    if query.task in RAW_TASKS:
        return _plain(tokenizer, query.prompt)

    def ask(problem: str) -> str:
        return f"{problem}\n\n{instruction}" if instruction else problem

    if chat:
        check_chat(tokenizer, chat)
    if not getattr(tokenizer, "chat_template", None):
        shots = [part for problem, solution in few_shot for part in (ask(problem), solution)]
        return _plain(tokenizer, "\n\n".join([*([system] if system else []), *shots, ask(query.prompt)]) + "\n\n")
    messages = [{"role": "system", "content": system}] if system is not None else []
    for problem, solution in few_shot:
        messages += [{"role": "user", "content": ask(problem)}, {"role": "assistant", "content": solution}]
    messages.append({"role": "user", "content": ask(query.prompt)})
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **(chat or {})
        )
    except Exception as e:  # templates raise jinja2 errors of their own making
        raise ConfigError(
            f"prompt: the tokenizer's chat template refuses these messages ({e}); drop prompt.system?"
        ) from e
    return [int(i) for i in ids]


def check_chat(tokenizer: Any, chat: Mapping[str, Any]) -> None:
    """Refuse, by name, variables that the tokenizer's chat template does not read: they would change nothing."""
    template = getattr(tokenizer, "chat_template", None)
    text = "".join(map(str, template.values())) if isinstance(template, Mapping) else str(template or "")
    for key in chat:
        if template and key in inspect.signature(tokenizer.apply_chat_template).parameters:
            raise ConfigError(f"task.chat.{key}: is an argument of the tokenizer, not of its chat template; drop it")
        if key not in text:
            why = "does not read it" if template else "is missing"
            raise ConfigError(
                f"task.chat.{key}: the tokenizer's chat template {why}; drop the key or name the right one"
            )


def _plain(tokenizer: Any, text: str) -> list[int]:
    if hasattr(tokenizer, "backend_tokenizer") or not hasattr(tokenizer, "encode_batch"):
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
