from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roro_fast.tasks import checkers
from roro_fast.tasks.answers import check_answer, check_answers, compare, extract_final_answer, marked_answer

LIMIT = 1.0


@pytest.fixture(scope="module", autouse=True)
def warm_workers():
    assert compare("(x+1)^2", "x^2+2x+1", timeout=60).correct
    yield
    checkers.close_shared_pools()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, so \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        (r"\boxed{a\{b\}} and {", r"a\{b\}"),
        (r"set {1,2 \boxed{5}", "5"),
        (r"cut off \boxed{7} then \boxed{\frac{1}{", "7"),
        (r"\boxed 7.", "7"),
        ("<answer> 7 </answer> or 8", "7"),
        ("1\n#### 1,200\n", "1,200"),
        ("#### Step 1\nso 5", "5"),
        ("The answer is 5. No: the answer is 6 dollars", "6"),
        ("So, the answer is 4 + 8 = 12 bolts.", "12"),
        ("**Answer:** $18", "$18"),
        (r"The final answer is: $\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"answer is \(x+1\)", "x+1"),
        ("The answer is **Evelyn**.", "Evelyn"),
        ("he has 3, then -4 left.", "-4"),
        (r"\boxed{}", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_extracts_the_final_answer(text, answer):
    assert extract_final_answer(text) == answer


def test_a_last_number_is_not_a_marked_answer():
    assert marked_answer("so 5") is None
    assert marked_answer("#### 5") == "5"


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 1,200", "1200"),
        ("The 3 of them make 70", "70"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{0.5}", r"50\%"),
        (r"\boxed{5}", "x=5"),
        (r"\boxed{-2,1}", "1,-2"),
        (r"\boxed{3\sqrt{13}}", r"\sqrt{117}"),
        (r"\boxed{(3,\pi/2)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{evelyn}", r"\text{Evelyn}"),
        ("Evelyn", r"\text{Evelyn}"),
    ],
)
def test_right_answers(text, gold):
    verdict = check_answer(text, gold, timeout=30)
    assert verdict.correct and verdict.error == ""


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("70", "-70"),
        ("-70", "70"),
        ("The 70 of them make 3", "70"),
        (r"\boxed{5 million}", "5"),
        (r"\boxed{x+2}", "x+1"),
        (r"\boxed{1,2,3}", "1,2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    ],
)
def test_wrong_answers(text, gold):
    verdict = check_answer(text, gold, timeout=30)
    assert not verdict.correct and verdict.error == ""


def test_no_answer_is_an_error():
    verdict = check_answer("no idea", "70")
    assert (verdict.correct, verdict.predicted, verdict.error) == (False, None, "no answer")


@given(st.integers(-(10**12), 10**12))
def test_plain_numbers_need_no_worker(n):
    # a timeout of zero would fail any answer that reaches one
    assert check_answer(f"so \\boxed{{{n:,}}}", str(n), timeout=0.0).correct
    assert check_answer(f"#### {n + 1}", str(n), timeout=0.0).error == ""
    assert not check_answer(f"#### {n + 1}", str(n), timeout=0.0).correct


HOSTILE = {
    "tower": "9^{9^{9^9}}",
    "chain": "9^9^9^9",
    "python tower": "9**9**9**9",
    "factorials": "(((((9!)!)!)!)!)!",
    "factorial": "1000000!",
    "exponent": "10^{10^{10}}",
    "sum": r"\sum_{n=1}^{10^{10}} \frac{1}{n}",
    "integral": r"\int_0^1 x^{x^{x^x}} dx",
    "parentheses": "(" * 1900,
    "fractions": r"\frac{" * 200 + "1" + "}{2}" * 200,
    "digits": "7" * 1900,
}
HUGE = {
    "letters": "x" * 10**6,
    "braces": "{" * 10**6,
    "boxes": r"\boxed{" * 10**5,
    "tags": "<answer>" * 10**5,
    "phrases": "answer is " * 10**5,
    "phrase lines": "answer is\n" * 10**5,
    "dollars": "$" * 10**6,
    "digits": "1" * 10**6,
    "groups": "1,111" * 10**5,
    "hashes": "####" * 10**5,
    "long box": r"\boxed{" + "1+" * 10**5 + "1}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_expressions_are_bounded(name):
    text = f"so \\boxed{{{HOSTILE[name]}}}"
    check_answer("\\boxed{y+1+1}", "y+2", timeout=60)  # a killed worker's successor has started
    start = time.monotonic()
    verdict = check_answer(text, "7", timeout=LIMIT)
    assert time.monotonic() - start < LIMIT + 4.0  # the margin is a worker's start on a busy machine
    assert not verdict.correct


def test_a_hostile_expression_times_out_and_the_next_answer_is_judged():
    assert check_answer(r"\boxed{9^{9^{9^9}}}", "7", timeout=LIMIT).error == "timeout"
    assert check_answer(r"\boxed{z+1+1}", "z+2", timeout=60).correct


@pytest.mark.parametrize("name", HUGE)
def test_megabytes_are_bounded_without_a_worker(name):
    start = time.monotonic()
    verdict = check_answer(HUGE[name], "7", timeout=LIMIT)
    assert time.monotonic() - start < LIMIT + 4.0
    assert not verdict.correct


def test_hostile_gold_is_bounded_too():
    assert check_answer(r"\boxed{7}", "9^{9^{9^9}}", timeout=LIMIT).error == "timeout"


def test_threads_get_their_own_answers():
    pairs = [(f"\\boxed{{a+{i}+{i}}}", f"a+{2 * i if i % 2 else 2 * i + 1}") for i in range(24)]
    found: dict[int, bool] = {}

    def work(i: int) -> None:
        found[i] = check_answer(*pairs[i], timeout=60).correct

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pairs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {i: bool(i % 2) for i in range(24)}
    assert [v.correct for v in check_answers(pairs, timeout=60)] == [bool(i % 2) for i in range(24)]


def test_batch_keeps_order_around_a_hostile_answer():
    pairs = [(r"\boxed{b+1}", "1+b"), (r"\boxed{8^{8^{8^8}}}", "3"), ("#### 4", "4"), ("none", "4")]
    verdicts = check_answers(pairs, timeout=LIMIT)
    assert [v.correct for v in verdicts] == [True, False, True, False]
    assert [v.error for v in verdicts] == ["", "timeout", "", "no answer"]


def test_exit_is_clean_and_leaves_no_process():
    """A program that ends right after a time-out: no traceback, and its workers are gone."""
    code = """
from roro_fast.tasks import checkers
from roro_fast.tasks.answers import check_answers
print([v.error for v in check_answers([(r"\\\\boxed{9^{9^{9^9}}}", "7"), (r"\\\\boxed{x+1+1}", "x+2")], timeout=0.5)])
print(*(w.process.pid for w in checkers.shared_pool("math")._all))
"""
    done = subprocess.run(
        [sys.executable, "-c", code.replace("\\\\\\\\", "\\\\")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == ""
    first, pids = done.stdout.splitlines()
    assert first.count("timeout") >= 1
    assert pids.split()
    for pid in map(int, pids.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
