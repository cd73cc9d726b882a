from __future__ import annotations

import numpy as np

from roro_fast.eval.catalogue import write
from roro_fast.eval.headline import headline, hero
from roro_fast.eval.metrics import Evaluation
from tests.eval.samples import anchors, noisy_arm, point

N = 400


def said(points, against=("roro", "outcome_only")) -> str:
    e = Evaluation([*anchors(N), *points], resamples=300)
    return " ".join(headline(e.summary(against=against))).replace("\u00a0", " ")


def test_a_clear_win_is_said_with_its_numbers():
    e = Evaluation([*anchors(N), *noisy_arm("roro", 0.1, N), *noisy_arm("confidence", 1.0, N)], resamples=300)
    text = " ".join(headline(e.summary(against=["roro"]))).replace("\u00a0", " ")
    need = e.estimate("roro", "flops_at_98")
    spoken = [write(1 - v, "share").replace("\u00a0", " ") for v in (need.mean, need.hi, need.lo)]
    assert f"RoRo keeps 98 % of the large model's accuracy and saves {spoken[0]} of its FLOPs" in text
    first, total = headline(e.summary())[:2]
    assert f"(95 % interval {spoken[1]} to {spoken[2]})" in first.replace("\u00a0", " ")
    assert total.startswith("Counting every forward pass") and "it saves" in total
    assert "large model alone answers 90.0 % correctly, the small one 50.0 %" in text
    assert "It is better than confidence threshold" in text


def test_a_loss_and_a_draw_are_said_as_such():
    better, worse = noisy_arm("confidence", 0.2, N), noisy_arm("roro", 1.2, N)
    assert "It is worse than confidence threshold" in said([*better, *worse])
    same = noisy_arm("roro", 0.5, N) + noisy_arm("outcome_only", 0.5, N)
    assert "Against outcome-only GRPO no difference is established" in said(same)


def test_the_strongest_baseline_is_the_rival_and_the_oracle_is_not():
    arms = {"roro": 0.3, "random": 1.0, "confidence": 0.6, "oracle": 0.05}
    text = said([p for arm, power in arms.items() for p in noisy_arm(arm, power, N)])
    assert "than confidence threshold" in text and "oracle" not in text and "random" not in text


def test_missing_parts_do_not_break_the_sentences():
    assert "No router was evaluated" in said([])
    assert "No paired comparison with confidence threshold" in said(
        noisy_arm("roro", 0.3, N) + noisy_arm("confidence", 0.6, N), against=()
    )
    e = Evaluation(
        [*anchors(N), *noisy_arm("random", 1.0, N), *noisy_arm("confidence", 0.4, N)], resamples=50
    ).summary()
    assert hero(e).name == "confidence"
    flat = Evaluation(
        [point("all_small", np.ones(9), 0.1), point("all_large", np.ones(9), 1.0), point("roro", np.ones(9), 0.5)],
        resamples=50,
    )
    assert "saves 90.0 %" in headline(flat.summary())[0].replace("\u00a0", " ")
