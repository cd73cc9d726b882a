"""From a query to prompt token ids: the one place where a chat template is applied, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from roro_fast.errors import ConfigError
from roro_fast.tasks.base import Query

INSTRUCTION = (
    "Solve the problem step by step. Put a blank line after each step and end with the final answer in \\boxed{}."
)
RAW_TASKS = frozenset({"ledger"})  # their prompts are the models' own format


def encode_prompt(
    tokenizer: Any,
    query: Query,
    system: str | None = None,
    instruction: str = INSTRUCTION,
    few_shot: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Prompt ids of a query.

    A tokenizer with a chat template gets it with the generation prompt added; one without gets the same parts as plain
    text, joined by blank lines, and no special tokens. A ledger query is always its bare prompt.

    Args:
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.
        system: system message; None leaves it to the template.
        instruction: appended to each problem; "" for none.
        few_shot: worked (problem, solution) pairs put before the query.

    Raises:
        ConfigError: the chat template refuses these messages.
    """
    if query.task in RAW_TASKS:
        return _plain(tokenizer, query.prompt)

    def ask(problem: str) -> str:
        return f"{problem}\n\n{instruction}" if instruction else problem

    if not getattr(tokenizer, "chat_template", None):
        shots = [part for problem, solution in few_shot for part in (ask(problem), solution)]
        return _plain(tokenizer, "\n\n".join([*([system] if system else []), *shots, ask(query.prompt)]) + "\n\n")
    messages = [{"role": "system", "content": system}] if system is not None else []
    for problem, solution in few_shot:
        messages += [{"role": "user", "content": ask(problem)}, {"role": "assistant", "content": solution}]
    messages.append({"role": "user", "content": ask(query.prompt)})
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as e:  # templates raise jinja2 errors of their own making
        raise ConfigError(
            f"prompt: the tokenizer's chat template refuses these messages ({e}); drop prompt.system?"
        ) from e
    return [int(i) for i in ids]


def _plain(tokenizer: Any, text: str) -> list[int]:
    if hasattr(tokenizer, "backend_tokenizer") or not hasattr(tokenizer, "encode_batch"):
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
