"""Speculative Thinking: cues, their fitted risks, and the length of a hand-over."""

from __future__ import annotations

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.routing.speculative_thinking import SpeculativeThinking, fit_cues, opening
from tests.routing.batches import traced


def test_published_cues_hand_over() -> None:
    drafts = ("So x is 3.", "Wait, x is 4.", "x is 4|Let me think again about it", "The waiter brings another dish")
    assert SpeculativeThinking().decide(traced(*drafts)).actions.tolist() == [0, 1, 1, 1]
    assert SpeculativeThinking().decide(traced("await the checks")).actions.tolist() == [0], "whole words only"


def test_cues_count_in_the_opening_only() -> None:
    draft = "a " * 20 + "wait"
    assert SpeculativeThinking().decide(traced(draft)).actions.tolist() == [0]
    assert SpeculativeThinking(window=21).decide(traced(draft)).actions.tolist() == [1]
    assert opening(" Pays 5: 37 gives 32 #1\n\n", 20) == " pays gives "


def test_a_hand_over_lasts_its_steps() -> None:
    policy = SpeculativeThinking(handover=3)
    plain = [traced("go on|go on|go on|go on|go on", actions=[a]) for a in ([0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1])]
    assert [policy.decide(b).actions.item() for b in plain] == [1, 1, 0]
    assert SpeculativeThinking(handover=1).decide(plain[0]).actions.tolist() == [0]
    fired_again = traced("go on|go on|go on|go on", actions=[[1, 1, 1]])
    assert SpeculativeThinking(handover=2).decide(fired_again).actions.tolist() == [1], "the third began another"
    with pytest.raises(ConfigError, match="handover"):
        SpeculativeThinking(handover=0)


def test_fitted_risks_are_smoothed_error_rates() -> None:
    drafts = [(" swaps: 12 gives 21", False), (" swaps: 12 gives 12", False), (" pays 5: 12 gives 7", True)]
    risk = fit_cues(drafts)
    assert risk == {"gives": 3 / 5, "pays": 1 / 3, "swaps": 3 / 4}
    policy = SpeculativeThinking(risk, threshold=1 - 0.7)
    b = traced(" pays 3: 5 gives 2", " swaps: 1 gives 10")
    torch.testing.assert_close(policy.score(b), torch.tensor([1 - 3 / 5, 1 - 3 / 4]))
    assert policy.decide(b).actions.tolist() == [0, 1]
