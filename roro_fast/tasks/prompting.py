"""From a query to prompt token ids: the one place where a chat template is applied, once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roro_fast.errors import ConfigError
from roro_fast.tasks.base import Query
from roro_fast.tasks.thinking import opening

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
    text, joined by blank lines, after what it puts before any text itself (Gemma and Llama a BOS). A ledger query is
    always its bare prompt.

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
        text = "\n\n".join([*([system] if system else []), *shots, ask(query.prompt)]) + "\n\n"
        return [*_beginning(tokenizer), *_plain(tokenizer, text)]
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


def encode_prompts(
    tokenizers: Sequence[Any], query: Query, *, chat: Mapping[str, Any] | None = None, **settings: Any
) -> Prompt:
    """`encode_prompt` for each tokenizer of a pool, whose models will go on with one another's text.

    A variable of `chat` goes to the templates that read it. Where one template opens the thought itself and another
    leaves that to its model, the latter is opened too: otherwise one model would begin inside and one outside of it.
    """
    if query.task in RAW_TASKS:
        first, *others = [encode_prompt(t, query) for t in tokenizers]
        return Prompt(first, others)
    check_chats(tokenizers, chat or {})
    known = [{k: v for k, v in (chat or {}).items() if k in template_text(t)} for t in tokenizers]
    ids = [encode_prompt(t, query, chat=own, **settings) for t, own in zip(tokenizers, known, strict=True)]
    begun = [opening(t, own) for t, own in zip(tokenizers, known, strict=True)]
    if start := max(begun):
        ids = [p if own else [*p, *_plain(t, start)] for p, own, t in zip(ids, begun, tokenizers, strict=True)]
    return Prompt(ids[0], ids[1:])


def check_chats(tokenizers: Sequence[Any], chat: Mapping[str, Any]) -> None:
    """`check_chat` for a pool: each variable must be read by some template."""
    for key, value in chat.items():
        readers = [t for t in tokenizers if key in template_text(t)]
        check_chat(readers[0] if readers else tokenizers[0], {key: value})


def template_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return "".join(map(str, template.values())) if isinstance(template, Mapping) else str(template or "")


def check_chat(tokenizer: Any, chat: Mapping[str, Any]) -> None:
    """Refuse, by name, variables that the tokenizer's chat template does not read: they would change nothing."""
    template, text = getattr(tokenizer, "chat_template", None), template_text(tokenizer)
    for key in chat:
        if template and key in inspect.signature(tokenizer.apply_chat_template).parameters:
            raise ConfigError(f"task.chat.{key}: is an argument of the tokenizer, not of its chat template; drop it")
        if key not in text:
            why = "does not read it" if template else "is missing"
            raise ConfigError(
                f"task.chat.{key}: the tokenizer's chat template {why}; drop the key or name the right one"
            )


def _beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before any text by itself."""
    if _bare(tokenizer):
        return []
    whole, plain = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    n = len(whole) - len(plain)
    return [int(i) for i in whole[:n]] if whole[n:] == plain else []


def _bare(tokenizer: Any) -> bool:
    """Whether it is a `tokenizers.Tokenizer`."""
    return hasattr(tokenizer, "encode_batch") and not hasattr(tokenizer, "backend_tokenizer")


def _plain(tokenizer: Any, text: str) -> list[int]:
    if _bare(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
