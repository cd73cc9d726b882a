"""Bad input to the engine: one clear error, or a counted finish reason, and neighbours that never notice."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from roro_fast.engine import BoundaryBatch, Decisions, Request, StepEngine
from roro_fast.errors import CapacityError, ConfigError
from roro_fast.models.decoder import Decoder
from tests.engine import pairs
from tests.engine.pairs import CONTEXT, Constant, Drawn, engine, pool, prompt, requests, run

OK = prompt(7, 10)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"prompt_ids": []}, ConfigError, "request.prompt_ids: empty"),
        ({"prompt_ids": prompt(1, CONTEXT)}, CapacityError, "request.prompt_ids: 160 tokens .* context of 160"),
        ({"prompt_ids": [3, 10**6]}, ConfigError, "request.prompt_ids: an id is outside"),
        ({"prompt_ids": [3, -1]}, ConfigError, "request.prompt_ids: an id is outside"),
        ({"max_new_tokens": 0}, ConfigError, "request.max_new_tokens"),
        ({"max_steps": 0}, ConfigError, "request.max_steps"),
        ({"max_step_tokens": -1}, ConfigError, "request.max_step_tokens"),
        ({"temperature": -0.5}, ConfigError, "request.temperature"),
        ({"temperature": float("nan")}, ConfigError, "request.temperature"),
        ({"top_k": -2}, ConfigError, "top_k"),
        ({"top_p": 0.0}, ConfigError, "top_p"),
        ({"top_p": 1.5}, ConfigError, "top_p"),
        ({"model": 2}, ConfigError, "request.model: 2 .* pool of 2"),
    ],
)
def test_bad_requests_are_refused_by_field(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    e = engine()
    with pytest.raises(error, match=says):
        e.add(Request(**({"prompt_ids": OK} | fields)))
    assert not e.has_work


def test_bad_engines_are_refused_by_field() -> None:
    for settings, says in [
        ({"page_size": 0}, "engine.page_size"),
        ({"max_num_seqs": 0}, "engine.max_num_seqs"),
        ({"max_num_seqs": 9, "max_batch_tokens": 8}, "engine.max_batch_tokens: 8 .* 9"),
        ({"delimiter": ""}, "delimiter"),
        ({"delimiter": "§"}, "delimiter.*§"),
        ({"kv_bytes": 0}, "engine.kv_bytes"),
    ]:
        with pytest.raises(ConfigError, match=says):
            engine(**settings)
    with pytest.raises(ConfigError, match="models: the pool is empty"):
        engine([])


def test_one_model_cannot_be_routed_but_can_generate() -> None:
    e = engine(pool(1))
    with pytest.raises(ConfigError, match="models: .* at least two"):
        next(e.rollout(requests(2), Drawn()))
    pairs.assert_clean(e)
    assert len(e.generate([OK], max_new_tokens=3)[0][0]) == 3
    with pytest.raises(ConfigError, match="action_space"):
        engine().add(requests(1)[0], Constant(0, action_space="both"))


def test_the_context_may_be_capped() -> None:
    e = engine(max_model_len=20)
    with pytest.raises(CapacityError, match="context of 20"):
        e.add(Request(prompt(1, 20)))
    t = run(e, [Request(prompt(4, 19), max_new_tokens=9, tag={"id": 0})])[0]
    assert len(t.token_ids) == 1 and t.finish_reason in ("context", "eos")


@dataclass
class Wrong:
    """Answers with `field` replaced by `value`."""

    field: str
    value: torch.Tensor
    name: str = "wrong"
    action_space: str = "next"
    needs_scout: bool = False

    def decide(self, batch: BoundaryBatch) -> Decisions:
        return replace(Constant(1).decide(batch), **{self.field: self.value})


@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("actions", torch.tensor([0, 1, 2])),
        ("actions", torch.tensor([0, -1, 1])),
        ("actions", torch.tensor([0, 1])),
        ("actions", torch.tensor([[0], [1], [1]])),
        ("actions", torch.tensor([0.0, float("nan"), 1.0])),
        ("logprobs", torch.zeros(2)),
        ("probs", torch.tensor([[0.5, 0.5], [float("nan"), 0.5], [1.0, 0.0]])),
        ("probs", torch.ones(3, 3)),
    ],
)
def test_a_policy_that_answers_nonsense_is_named(field: str, value: torch.Tensor, scout: bool) -> None:
    e = engine(page_size=4)
    rows = [replace(r, prompt_ids=prompt(i, 5)) for i, r in enumerate(requests(3))]
    with pytest.raises(ConfigError, match="policy 'wrong': decide"):
        list(e.rollout(rows, Wrong(field, value, needs_scout=scout)))
    pairs.assert_clean(e)
    assert len(run(e, requests(3), Drawn())) == 3, "the engine goes on"


def test_an_exception_in_a_policy_leaves_the_engine_usable() -> None:
    class Broken(Drawn):
        def decide(self, batch: BoundaryBatch) -> Decisions:
            if len(self.seen) > 9:
                raise ZeroDivisionError
            return super().decide(batch)

    e = engine()
    with pytest.raises(ZeroDivisionError):
        list(e.rollout(requests(8), Broken("regenerate", True)))
    pairs.assert_clean(e)
    want = run(engine(), requests(8), Drawn())
    for i, t in run(e, requests(8), Drawn()).items():
        pairs.assert_same(t, want[i])


POISON = 77


def poisoned() -> list[Decoder]:
    """Models whose embedding of one token is NaN: only sequences that hold it are sick."""
    models = copy.deepcopy(pool(2))
    for m in models:
        m.embed.weight[POISON] = float("nan")
    return models


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 8}, {"page_size": 2, "kv_bytes": 600_000}])
@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_nan_stays_with_the_sequence_that_made_it(space: str, scout: bool, settings: dict[str, int]) -> None:
    """Sick and healthy sequences side by side, and pages reused in between: the healthy ones must not change."""
    rows = [
        replace(r, prompt_ids=[x for x in r.prompt_ids if x != POISON] or [5], max_new_tokens=60) for r in requests(12)
    ]
    want = run(engine(), rows, Drawn(space, scout))
    sick = [
        Request(prompt(i, 3 + 9 * i)[:-1] + [POISON] * (1 + i % 2), max_new_tokens=9, tag={"id": 50 + i})
        for i in range(6)
    ]
    e = engine(poisoned(), **settings)
    mixture = [r for pair in zip(sick, rows[:6], rows[6:], strict=True) for r in pair]
    for order in (mixture, mixture[::-1]):
        got = {t.meta["id"]: t for t in e.rollout(order, Drawn(space, scout))}
        assert e.kv.leaked_pages() == 0
        for i in range(50, 56):
            assert got[i].finish_reason == "nan" and got[i].token_ids == []
        for i, t in want.items():
            if POISON in t.token_ids:
                assert POISON in got[i].token_ids and got[i].finish_reason == "nan" or t.token_ids[-1] == POISON
            else:
                pairs.assert_same(got[i], t)
    pairs.assert_clean(e)


def test_nan_is_not_cached() -> None:
    """Weights that are mended in place heal the engine: no page computed while they were broken is found again."""
    models = copy.deepcopy(pool(2))
    e = engine(models, page_size=4, max_batch_tokens=16)
    healthy = models[1].layers[0].qkv.weight.clone()
    models[1].layers[0].qkv.weight[:] = float("nan")
    sick = [t.finish_reason for t in e.rollout(requests(6), Constant(1))]
    assert sick == ["nan"] * 6 and not e.kv._cached[1]
    models[1].layers[0].qkv.weight[:] = healthy
    want = run(engine(), requests(6), Constant(1))
    for i, t in run(e, requests(6), Constant(1)).items():
        pairs.assert_same(t, want[i])


def test_a_written_part_survives_nan() -> None:
    """Model 1 breaks down in mid answer: what model 0 wrote is kept and reported."""
    models = copy.deepcopy(pool(2))
    models[1].norm.weight[:] = float("nan")
    rows = [replace(r, tag=r.tag | {"plan": [0, 0, 1]}) for r in requests(8)]
    for t in run(engine(models), rows, pairs.Planned()).values():
        if t.finish_reason == "nan":
            assert len(t.steps) == 2 and t.steps[-1].end == len(t.token_ids) and t.cost.generated_tokens[1] == 0
            assert len(t.decisions) == 3
        else:
            assert len(t.steps) <= 2


def test_fork_says_what_is_wrong() -> None:
    e = engine(max_num_seqs=1)
    rid = e.add(Request(OK, max_new_tokens=20))
    e.step()
    with pytest.raises(CapacityError, match="engine.max_num_seqs"):
        e.fork(rid, Request([1]))
    with pytest.raises(KeyError):
        e.fork(rid + 1, Request([1]))
    assert e.abort(rid)


class TestScore:
    LABELS = (9, 40, 77)

    @pytest.mark.parametrize("max_batch_tokens", [8, 64, 8192])
    def test_equals_the_full_softmax_restricted_to_the_labels(self, max_batch_tokens: int) -> None:
        e = engine(max_batch_tokens=max_batch_tokens)
        prompts = [prompt(i, n) for i, n in enumerate((7, 1, 30, 30, 12, 160, 3))]
        rows = [[0, 6, 3], [0], [], [29], [11, 11], [159, 0], []]
        for m, model in enumerate(e.models):
            got = e.score(prompts, rows, list(self.LABELS), model=m)
            assert [tuple(g.shape) for g in got] == [(len(r), 3) for r in rows]
            for p, r, g in zip(prompts, rows, got, strict=True):
                p_all = pairs.cold_logits(model, p).softmax(-1)[r][:, list(self.LABELS)]
                torch.testing.assert_close(g, (p_all / p_all.sum(-1, keepdim=True)).float(), atol=1e-6, rtol=0)
        assert e.score([], [], [9, 10]) == []
        assert not e.has_work

    @pytest.mark.parametrize(
        ("prompts", "rows", "labels", "error", "says"),
        [
            ([OK], [[10]], [9], ConfigError, r"rows\[0\]"),
            ([OK], [[-1]], [9], ConfigError, r"rows\[0\]"),
            ([OK, []], [[0], []], [9], ConfigError, r"prompts\[1\]: empty"),
            ([OK], [[0], [0]], [9], ConfigError, "rows: 2 .* 1 prompts"),
            ([OK], [[0]], [], ConfigError, "label_ids"),
            ([OK], [[0]], [9, 10**6], ConfigError, "label_ids"),
            ([[3, 10**6]], [[0]], [9], ConfigError, r"prompts\[0\]: an id"),
            ([prompt(1, CONTEXT + 1)], [[0]], [9], CapacityError, "161 tokens"),
        ],
    )
    def test_bad_input_is_refused(
        self, prompts: list[list[int]], rows: list[list[int]], labels: list[int], error: type[Exception], says: str
    ) -> None:
        with pytest.raises(error, match=says):
            engine().score(prompts, rows, labels)

    def test_unknown_model(self) -> None:
        with pytest.raises(ConfigError, match="model: 3"):
            engine().score([OK], [[0]], [9], model=3)


def test_seven_requests_too_many_are_no_problem() -> None:
    e = StepEngine(pool(2), pairs.tokenizer(), max_num_seqs=1, kv_bytes=1 << 20)
    assert len(run(e, requests(8), Drawn())) == 8
