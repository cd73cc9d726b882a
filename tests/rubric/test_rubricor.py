"""The Rubricor with a real decoder through the engine: seeded sampling, parsing of what it writes, checkpoints."""

from __future__ import annotations

import pytest
import torch

from roro_fast.models.lm_trainer import LMTrainer
from roro_fast.rubric.format import InvalidRubric, Rubric
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.train.lm import completion_batch, sft_loss
from tests.rubric.samples import queries
from tests.tiny import save_tiny

TEXT = """- [Hard Rule] (timely escalation) the large model writes line #2
- [Principle] (efficient allocation) at most 2 switches
- [Principle] (efficient allocation) the large model writes at most 2 lines"""
SHORT = TEXT.rsplit("\n", 1)[0]  # two criteria are no rubric
PROMPTS = [q.prompt for q in queries(3)]


@pytest.fixture(scope="module")
def rubricor(tmp_path_factory):
    return Rubricor.load(save_tiny(tmp_path_factory.mktemp("rubricor"), hidden=32))


def test_reading_a_completion(rubricor):
    ids = rubricor.encoder.completion(TEXT)
    draft = rubricor.read(PROMPTS[0], ids)
    assert isinstance(draft.rubric, Rubric) and draft.text == TEXT and draft.ids == tuple(ids)
    cut = rubricor.read(PROMPTS[0], ids[:-1])
    assert isinstance(cut.rubric, InvalidRubric) and cut.rubric.reason == "unfinished"
    foreign = rubricor.read(PROMPTS[0], rubricor.encoder.completion(TEXT.replace("line #2", "line #9")))
    assert isinstance(foreign.rubric, InvalidRubric) and foreign.rubric.reason == "not checkable"


def test_an_open_grammar_takes_any_sentence(rubricor):
    free = Rubricor(rubricor.model, rubricor.tokenizer, closed_grammar=False, max_criteria=3)
    ids = free.encoder.completion(TEXT.replace("at most 2 switches", "the model is right"))
    assert isinstance(free.read(PROMPTS[0], ids).rubric, Rubric)
    four = free.encoder.completion(TEXT + "\n- [Principle] (timely escalation) every model is right")
    assert free.read(PROMPTS[0], four).rubric.reason == "too many criteria"


def test_sampling_is_seeded(rubricor):
    def ids(**kw):
        return [[d.ids for d in g] for g in rubricor.write(PROMPTS, n=3, temperature=1.0, max_new_tokens=12, **kw)]

    first = ids(seed=1)
    assert ids(seed=1) == first and ids(seed=2) != first
    assert len({tuple(x) for g in first for x in g}) > 3
    assert all(len(g) == 3 and all(len(x) <= 12 for x in g) for g in first)


def test_the_drafts_of_a_query_share_its_prompt(rubricor):
    long = [f"{p} Rubric of the large model and the small model." * 2 for p in PROMPTS]
    engine = rubricor.engine()
    before = engine.kv.stats.hit_tokens
    rubricor.write(long, n=4, temperature=1.0, max_new_tokens=2)
    shared = sum((len(rubricor.encoder.rubricor(p)) - 1) // 16 * 16 for p in long)
    assert engine.kv.stats.hit_tokens - before >= 3 * shared > 0
    assert engine.kv.leaked_pages() == 0


def test_weights_changed_in_place_are_seen(tmp_path):
    kept, fresh = (Rubricor.load(save_tiny(tmp_path / str(i), hidden=32)) for i in range(2))
    first = kept.write(PROMPTS, max_new_tokens=12)
    with torch.no_grad():
        for r in (kept, fresh):
            for p in r.model.layers.parameters():
                p.mul_(-1.5)
    again = kept.write(PROMPTS, max_new_tokens=12)
    assert again == fresh.write(PROMPTS, max_new_tokens=12) and again != first


def test_an_untrained_model_writes_explicitly_invalid_rubrics(rubricor):
    for (draft,) in rubricor.write(PROMPTS, max_new_tokens=12):
        assert isinstance(draft.rubric, InvalidRubric) and draft.rubric.reason


def test_a_trained_model_writes_the_rubric_it_was_taught(tmp_path):
    r = Rubricor.load(save_tiny(tmp_path, hidden=64, layers=2))
    ids, targets = completion_batch(
        [r.encoder.rubricor(p) for p in PROMPTS], [r.encoder.completion(TEXT)] * 3, r.encoder.eos
    )
    with LMTrainer(r.model, 1e-2) as trainer:
        for _ in range(60):
            trainer.step(sft_loss(r.model, ids, targets))
    assert [g[0].text for g in r.write(PROMPTS, max_new_tokens=64)] == [TEXT] * 3
    r.save(tmp_path / "saved")
    again = Rubricor.load(tmp_path / "saved")
    assert again.closed_grammar and again.write(PROMPTS, max_new_tokens=64) == r.write(PROMPTS, max_new_tokens=64)


def test_compose_samples_again_only_where_greedy_fails(rubricor, monkeypatch):
    good, bad = rubricor.encoder.completion(TEXT), rubricor.encoder.completion(SHORT)
    asked: list[int] = []

    def write(prompts, *, n=1, temperature=0.0, **_):
        asked.append(len(prompts))
        if temperature == 0:  # greedy: only the first query gets a rubric
            return [[rubricor.read(p, good if i == 0 else bad)] for i, p in enumerate(prompts)]
        found = [[rubricor.read(p, ids) for ids in (bad, good)[:n]] for p in prompts]
        return found[:1] + [[rubricor.read(p, bad)] * n for p in prompts[1:]]

    monkeypatch.setattr(rubricor, "write", write)
    drafts = rubricor.compose(PROMPTS, tries=2)
    assert asked == [3, 2]
    assert [isinstance(d.rubric, Rubric) for d in drafts] == [True, True, False] and drafts[2].text == SHORT
