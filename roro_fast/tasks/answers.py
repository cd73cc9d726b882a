"""Final answers: find the one a completion gives, and compare it with the gold one.

Most answers are settled here by exact arithmetic on plain numbers or by equal text; the rest go to math-verify in a
worker process with a hard time limit, so that no expression can hang a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from roro_fast.tasks import checkers
from roro_fast.tasks.numbers import NUMBER, comparable, parse_quantity, plain, same_text, same_value
from roro_fast.tasks.thinking import after_thinking

TAIL = 20_000  # a final answer stands near the end; bounds every scan
MAX_ANSWER = 2_000

_HASHES = re.compile(r"####[ \t]*([-+$\\.\d\u2212][^\n]*)")  # "#### Step" is a heading
_PHRASE = re.compile(r"\banswer\b(?:\*\*|__)?[ \t]*(?:\bis\b|:|=)[ \t]*:?[ \t]*(?=\S)", re.IGNORECASE)
_BRACES = re.compile(r"(\\f?boxed *\{)|(\\f?boxed +[^\s$,{}\\]+)|\\[{}]|([{}])")
_MATH = re.compile(r"\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`error` is empty when the answer could be judged; a verdict with an error is never correct.

    Errors: "no answer", "too long", "timeout", "worker died", "not parsable", "gold answer not parsable", "not judged
    (...)" with the exception that the checker raised.
    """

    correct: bool
    predicted: str | None = None
    error: str = ""


def extract_final_answer(text: str) -> str | None:
    """The final answer of a completion, or None: the marked one if there is one, else the last number.

    Thoughts are left out (`after_thinking`); only the last 20,000 characters are read.
    """
    text = after_thinking(text)
    answer = marked_answer(text)
    if answer is not None:
        return answer
    numbers = NUMBER.findall(text[-TAIL:])
    return numbers[-1] if numbers else None


def marked_answer(text: str) -> str | None:
    r"""The answer a completion marks as final, or None.

    Tried in turn, the last occurrence each time: `\boxed{...}`, `<answer>...</answer>`, `#### N` and "answer is N" or
    "answer: N".
    """
    text = text[-TAIL:]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(close, 0))
    if start >= 0:
        return text[start + len("<answer>") : close].strip() or None
    hashes = _HASHES.findall(text)
    if hashes:
        return hashes[-1].strip()
    phrases = list(_PHRASE.finditer(text))
    return _from_phrase(text[phrases[-1].end() :].partition("\n")[0]) or None if phrases else None


def check_answer(predicted_text: str, gold: str, timeout: float = 2.0) -> Verdict:
    """Judge a completion against the gold answer within `timeout` seconds. Usable from any thread."""
    answer = extract_final_answer(predicted_text)
    if answer is not None:
        return compare(answer, gold, timeout)
    said = after_thinking(predicted_text)
    if len(said) <= MAX_ANSWER and same_text(plain(said), plain(gold)):
        return Verdict(True, said.strip())
    return Verdict(False, None, "no answer")


def check_answers(pairs: Iterable[tuple[str, str]], timeout: float = 2.0) -> list[Verdict]:
    """`check_answer` of every (completion, gold) pair in order, `checkers.WORKERS` at a time."""
    with ThreadPoolExecutor(checkers.WORKERS) as threads:
        return list(threads.map(lambda pair: check_answer(pair[0], pair[1], timeout), pairs))


def compare(answer: str, gold: str, timeout: float = 2.0) -> Verdict:
    """Judge an extracted answer: equal text, then plain numbers, then math-verify."""
    if len(answer) > MAX_ANSWER:
        return Verdict(False, answer[:100] + "...", "too long")
    mine, want = plain(answer), plain(gold)
    if same_text(mine, want):
        return Verdict(True, answer)
    a, b = parse_quantity(mine), parse_quantity(want)
    if a and b:
        same = same_value(a.value, b.value)
        # 50 for 50% is right, but 0.5 may be too: that is math-verify's to say
        if comparable(a, b) or (same and not (a.unit and b.unit)):
            return Verdict(same, answer)
    try:
        correct, error = _math_verify(want, mine, timeout)
    except checkers.WorkerTimeout:
        return Verdict(False, answer, "timeout")
    except checkers.WorkerDied:
        return Verdict(False, answer, "worker died")
    return Verdict(correct, answer, error)


@lru_cache(maxsize=65536)
def _math_verify(gold: str, answer: str, timeout: float) -> tuple[bool, str]:
    score, error = checkers.shared_pool("math").ask({"gold": gold, "predicted": answer}, timeout)
    return score == 1.0, error


def _last_boxed(text: str) -> str | None:
    r"""Contents of the last complete `\boxed{...}` or `\fbox{...}`, or the word after a bare `\boxed`."""
    found: tuple[int, str] | None = None
    stack: list[int | None] = []  # per open brace: where the contents of its box start, None for other braces
    for match in _BRACES.finditer(text):
        box, bare, brace = match.groups()
        if box:
            stack.append(match.end())
        elif bare:
            found = (match.start(), bare.split(None, 1)[1].rstrip("."))
        elif brace == "{":
            stack.append(None)
        elif brace == "}" and stack:
            start = stack.pop()
            if start is not None and (found is None or start > found[0]):
                found = (start, text[start : match.start()])
    return found[1] if found else None


def _from_phrase(rest: str) -> str:
    """The answer in what follows "the answer is": a formula, else the number after the last "=", else the clause."""
    rest = rest.strip().strip("*_ ")
    formula = _MATH.search(rest)
    if formula:
        return next(g for g in formula.groups() if g is not None).strip()
    if "\\" in rest:
        return rest.rstrip(". ")
    number = NUMBER.search(rest.rsplit("=", 1)[-1]) or NUMBER.search(rest)
    if number:
        return number.group()
    return re.split(r"[.;,](?:\s|$)", rest, maxsplit=1)[0].strip(" *_\"'")
