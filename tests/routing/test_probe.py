"""The head on a frozen decoder: its soft minimum, its reading, and the packaged heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from roro_fast.errors import CapacityError, CheckpointError
from roro_fast.models import nano
from roro_fast.routing.probe import ProbeScorer, settings, step_logits
from roro_fast.routing.scoring import Trace
from roro_fast.tasks.ledger import Ledger, parse_query, render_steps

TOKENIZER = AutoTokenizer.from_pretrained(nano.path("small"))


def traces(n: int) -> list[Trace]:
    queries = Ledger().queries("calibrate", n)
    return [Trace(q.prompt, tuple(render_steps(*parse_query(q.prompt)))) for q in queries]


def test_a_step_is_as_right_as_its_worst_token() -> None:
    z = torch.tensor([1.0, 2.0, -800.0, 5.0, 90.0])
    out = step_logits(z, torch.tensor([0, 0, 1, 1, 2]), 3)
    expected = torch.tensor([-(torch.tensor([-1.0, -2.0]).exp().sum().log()).item(), -800.0, 90.0])
    torch.testing.assert_close(out, expected)


def test_scores_equal_a_forward_by_hand() -> None:
    body = nano.load_pair()[0]
    h = body.config.hidden_size
    weight = torch.randn(h + 2, generator=torch.Generator().manual_seed(0)) / 10
    scorer = ProbeScorer(body, TOKENIZER, weight, torch.tensor(0.5))
    some = traces(3)
    found = scorer.score([some[0], Trace(some[1].prompt, ()), some[2]])
    assert found[1].values == () and len(found[2].values) == len(some[2].steps)
    begin = len(TOKENIZER(some[0].prompt)["input_ids"])
    ids = torch.tensor(TOKENIZER(some[0].prompt + "".join(some[0].steps))["input_ids"])
    with torch.no_grad():
        states = body.dense(ids[None])[0]
        logp = torch.log_softmax(body.logits(states), -1)[begin - 1 : -1]
    x = torch.cat((logp.gather(1, ids[begin:, None]), -(logp.exp() * logp).sum(-1, True), states[begin:]), -1)
    lengths = [len(TOKENIZER(s)["input_ids"]) for s in some[0].steps]
    parts = (x @ weight + 0.5).split(lengths)
    expected = torch.stack([torch.sigmoid(-torch.logsumexp(-z, 0)) for z in parts])
    torch.testing.assert_close(torch.tensor(found[0].values), expected.detach(), atol=1e-5, rtol=1e-4)
    assert sum(found[0].tokens) == len(ids)


@pytest.mark.parametrize(("size", "floor"), [("small", 0.9), ("large", 0.98)])
def test_the_packaged_heads_know_a_wrong_step(size: str, floor: float) -> None:
    body = nano.load_pair()[nano.SIZES.index(size)]
    folder = nano.path("small").parent / f"prm-{size}"
    said = settings(folder)
    assert said["body"] == f"nano/{size}" and sum(f.stat().st_size for f in folder.iterdir()) < 300_000
    scorer = ProbeScorer.load(folder, body, TOKENIZER)
    hit = []
    for t in traces(40):
        words = t.steps[1].split()
        at = words.index("gives") + 1
        wrong = " " + " ".join([*words[:at], str((int(words[at]) + 3) % 100), *words[at + 1 :]]) + "\n\n"
        right, planted = scorer.score([Trace(t.prompt, t.steps[:2]), Trace(t.prompt, (t.steps[0], wrong))])
        hit.append(right.values[1] > planted.values[1])
    assert sum(hit) / len(hit) >= floor


def test_directories(tmp_path: Path) -> None:
    small, large = nano.load_pair()
    scorer = ProbeScorer(small, TOKENIZER, torch.zeros(small.config.hidden_size + 2), torch.tensor(2.0))
    scorer.save(tmp_path, {"body": "nano/small"})
    again = ProbeScorer.load(tmp_path, small, TOKENIZER)
    assert again.bias.item() == 2.0 and settings(tmp_path) == {"kind": "probe", "body": "nano/small"}
    with pytest.raises(CheckpointError, match="does not fit"):
        ProbeScorer.load(tmp_path, large, TOKENIZER)
    with pytest.raises(CheckpointError, match="not a readable"):
        ProbeScorer.load(tmp_path / "absent", small, TOKENIZER)
    (tmp_path / "prm.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"prm\.json: not valid JSON"):
        settings(tmp_path)
    with pytest.raises(CapacityError, match="context"):
        scorer.score([Trace(traces(1)[0].prompt, traces(1)[0].steps * 60)])


def test_traces_met_before_are_charged_but_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    body = nano.load_pair()[0]
    scorer = ProbeScorer(body, TOKENIZER, torch.ones(body.config.hidden_size + 2), torch.tensor(0.0))
    a, b, c = traces(3)
    first = scorer.score([a, b, a])
    assert first[0] == first[2] != first[1] and sum(first[2].flops) > 0
    read: list[int] = []
    features = scorer.features
    monkeypatch.setattr(scorer, "features", lambda t: read.append(len(t)) or features(t))
    again = scorer.score([b, Trace(a.prompt, ()), c, a])
    assert read == [1] and again[0] == first[1] and again[3] == first[0] and again[1].values == ()
