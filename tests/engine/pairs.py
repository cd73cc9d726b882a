"""Tiny random-weight pools, policies and the independent recomputation that engine tests compare with."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from roro_fast.engine import BoundaryBatch, Decisions, Request, RoutingPolicy, StepEngine, Trajectory
from roro_fast.engine.slots import Phase
from roro_fast.models import nano_tokenizer
from roro_fast.models.decoder import Decoder, DenseAttention
from roro_fast.models.loading import load_decoder

CONTEXT = 160
TOLERANCE = 1e-4
CONFIGS = {"qwen3": Qwen3Config, "llama": LlamaConfig, "qwen2": Qwen2Config, "gemma3": Gemma3TextConfig}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
# family, layers, hidden, heads, kv heads, vocabulary padding
POOL = [("qwen3", 2, 32, 4, 2, 5), ("llama", 3, 48, 4, 1, 0), ("qwen2", 2, 64, 4, 4, 16), ("qwen3", 1, 32, 2, 2, 1)]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=nano_tokenizer.build(),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


@cache
def model_pair(index: int, family: str = "") -> tuple[Any, Decoder]:
    """(transformers model, our decoder) of POOL[index]; blank lines and EOS are likely, logits well separated."""
    listed, layers, hidden, heads, kv_heads, padding = POOL[index]
    family = family or listed
    extra: dict[str, Any] = {"head_dim": 16} if family in ("qwen3", "gemma3") else {}
    if family == "gemma3":
        extra |= {"sliding_window": 12, "layer_types": KINDS[:layers], "query_pre_attn_scalar": 16}
    config = CONFIGS[family](
        vocab_size=len(tokenizer()) + padding,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        **extra,
    )
    torch.manual_seed(100 + index)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(float(p.dim() == 1), 0.3 if p.dim() > 1 else 0.1)
        model.lm_head.weight[tokenizer().convert_tokens_to_ids("\n\n")] *= 2.5
        model.lm_head.weight[2] *= 2.0
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return model, load_decoder(directory)


DTYPE = torch.float64  # of `exact`; the fixture `implementation` sets float32, which the C++ kernels serve


def exact(index: int) -> Decoder:
    """POOL[index] in fp64, so that rounding which depends on batch shapes cannot flip a sampled token; in fp32 for the
    kernels whose rows do not depend on the batch."""
    return _cast(index, DTYPE)


@cache
def _cast(index: int, dtype: torch.dtype) -> Decoder:
    return copy.deepcopy(model_pair(index)[1]).to(dtype)


def pool(k: int = 2) -> list[Decoder]:
    return [exact(i) for i in range(k)]


# layers of each model, and how many of them all have in common
FAMILIES = {"prefix": ([2, 4], 2), "twins": ([3, 3], 1), "three": ([2, 3, 4], 1), "one of three": ([2, 4, 3], 2)}


def family(name: str) -> list[Decoder]:
    """Models that begin alike: cut from one of 4 layers, changed from the last common layer on, with heads apart."""
    return [copy.deepcopy(m) for m in _family(name, DTYPE)]


@cache
def _family(name: str, dtype: torch.dtype) -> list[Decoder]:
    depths, common = FAMILIES[name]
    deep = copy.deepcopy(model_pair(1)[1])
    deep.layers.append(copy.deepcopy(deep.layers[0]))
    g = torch.Generator().manual_seed(4)
    models = []
    with torch.no_grad():
        for p in deep.layers[3].parameters():
            p.mul_(torch.rand(p.shape, generator=g) + 0.5)
        for depth in depths:
            m = copy.deepcopy(deep)
            m.layers, m.config = m.layers[:depth], replace(m.config, num_layers=depth)
            for p in [*m.layers[common:].parameters(), m.norm.weight, m.head.weight]:
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=g))
            models.append(m.to(dtype))
    return models


def engine(models: list[Decoder] | None = None, **settings: Any) -> StepEngine:
    defaults: dict[str, Any] = {"max_num_seqs": 8, "kv_bytes": 8 << 20}
    return StepEngine(pool() if models is None else models, tokenizer(), **(defaults | settings))


def tight(k: int, tokens: int, page_size: int, **settings_: int) -> StepEngine:
    """The smallest arena that holds one sequence of `tokens` tokens for every model."""
    probe = engine(pool(k), page_size=page_size, kv_bytes=64 << 20)
    slab = probe.kv.page_bytes[0] * probe.kv.pool.pages_per_slab[0]
    pages = -(-tokens // page_size)
    slabs = max(-(-pages // n) for n in probe.kv.pool.pages_per_slab)
    return engine(pool(k), page_size=page_size, kv_bytes=slabs * slab, **settings_)


def prompt(seed: int, length: int) -> list[int]:
    """Random ids, special tokens left out."""
    return np.random.default_rng(seed).integers(4, len(tokenizer()), length).tolist()


def requests(n: int, **settings: Any) -> list[Request]:
    """Prompts of 1 to 40 tokens; every third repeats an earlier prompt or extends it. tag["id"] numbers them."""
    out = []
    for i in range(n):
        ids = prompt(i, 1 + i * 17 % 40) if i % 3 < 2 else prompt(i - 2, 1 + (i - 2) * 17 % 40) + prompt(99, i % 2 * 7)
        fields = {"sample": i, "seed": 7, "max_new_tokens": 30, "max_step_tokens": 6, "tag": {"id": i}} | settings
        out.append(Request(ids, **fields))
    return out


@dataclass
class Constant:
    model: int
    name: str = "constant"
    action_space: str = "next"
    needs_scout: bool = False

    def decide(self, batch: BoundaryBatch) -> Decisions:
        actions = torch.full((len(batch),), self.model)
        probs = torch.nn.functional.one_hot(actions, batch.num_models).float()
        return Decisions(actions, torch.zeros(len(batch)), probs)


@dataclass
class Drawn:
    """Uniformly random actions; remembers what it saw of each row by (tag id, decision number)."""

    action_space: str = "next"
    needs_scout: bool = False
    name: str = "drawn"
    seen: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    def decide(self, batch: BoundaryBatch) -> Decisions:
        k = batch.num_models
        actions = (batch.uniforms * k).long()
        for i, tag in enumerate(batch.tags):
            row = {
                name: getattr(batch, name)[i] for name in ("step_index", "step_tokens", "large_share", "mean_logprob")
            }
            if batch.hidden is not None:
                row |= {name: getattr(batch, name)[i] for name in ("hidden", "scout_entropy", "scout_maxprob")}
            row |= {"step_cap": batch.step_cap, "prefix": batch.prefix[i](), "actions": tag["actions"]}
            self.seen[tag.get("id", -1), len(tag["actions"])] = row
        probs = torch.full((len(batch), k), 1 / k)
        return Decisions(actions, probs[:, 0].log(), probs)


@dataclass
class Planned:
    """Follows tag["plan"], a list of actions, over and over."""

    action_space: str = "next"
    needs_scout: bool = False
    name: str = "planned"

    def decide(self, batch: BoundaryBatch) -> Decisions:
        actions = torch.tensor([t["plan"][len(t["actions"]) % len(t["plan"])] for t in batch.tags])
        probs = torch.nn.functional.one_hot(actions, batch.num_models).float()
        return Decisions(actions, torch.zeros(len(batch)), probs)


def run(e: StepEngine, rows: Iterable[Request], policy: RoutingPolicy | None = None) -> dict[int, Trajectory]:
    """Trajectories by tag id; nothing may be left behind."""
    out = {t.meta["id"]: t for t in e.rollout(rows, policy)}
    assert_clean(e)
    return out


def assert_clean(e: StepEngine) -> None:
    assert e.kv.leaked_pages() == 0
    assert not e.has_work and not e.kv.num_pages.any() and (e.slots.phase == Phase.FREE).all()
    for m in range(e.kv.num_parts):
        e.kv.clear_prefixes(m)
        assert e.kv.pool.used(m) == 0


@torch.no_grad()
def cold_logits(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Logits [S, V] of one dense prefill of the whole sequence."""
    return model.logits(model.dense(torch.tensor([ids], device=model.device)))[0]


@torch.no_grad()
def cold_hidden(model: Decoder, ids: list[int]) -> torch.Tensor:
    """The last token's state [H] float32 of one dense prefill."""
    return model.dense(torch.tensor([ids], device=model.device))[0, -1].float()


@torch.no_grad()
def cold_kv(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Keys and values [S, layers, 2, Hkv, D] of one dense prefill."""
    dense, kept = DenseAttention(1, len(ids), model.config.windows), []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept.append(torch.stack((k, v), 1))
        return dense(layer, q, k, v)

    model(torch.tensor(ids, device=model.device), torch.arange(len(ids), device=model.device), attend)
    return torch.stack(kept, 1)


def cached_kv(e: StepEngine, m: int, slot: int) -> torch.Tensor:
    """Keys and values [kv_len, layers, 2, Hkv, D] that the pages of `slot` hold for part m."""
    pages = e.kv.pages[m][e.kv.table[m, slot, : e.kv.num_pages[m, slot]]]
    return pages.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)[: e.kv.kv_len[m, slot]]


def check_kv(e: StepEngine, atol: float | None = None) -> int:
    """Every key and value of a running sequence equals a cold prefill's; returns how many tokens were compared."""
    compared = 0
    atol = atol or (1e-5 if torch.float64 == DTYPE else 1e-4)
    for slot in np.nonzero(e.slots.phase != Phase.FREE)[0]:
        ids = e.slots.tokens[slot, : e.slots.length[slot]].tolist()
        for m, model in enumerate(e.models):
            n, p = int(e.kv.kv_len[m, slot]), e.shared_layers
            if n:
                want = cold_kv(model, ids)
                if e.kv.home(m) == m:
                    torch.testing.assert_close(cached_kv(e, m, slot), want[:n, p:], atol=atol, rtol=0)
                if p:
                    assert e.kv.home(m) == m or n <= e.kv.kv_len[e.kv.trunk, slot]
                    shared = cached_kv(e, e.kv.trunk, slot)
                    torch.testing.assert_close(shared, want[: len(shared), :p], atol=atol, rtol=0)
                compared += n
    return compared


def audit(e: StepEngine, t: Trajectory, *, greedy: bool) -> None:
    """Recompute a trajectory from cold prefills alone: who wrote each step, its tokens, statistics and boundaries."""
    ids, n = t.prompt_ids + t.token_ids, len(t.prompt_ids)
    logps = [cold_logits(m, ids)[:, : e.vocab_size].log_softmax(-1) for m in e.models]
    assert [s.start for s in t.steps] == [0, *(s.end for s in t.steps)][: len(t.steps)]
    assert (t.steps[-1].end if t.steps else 0) == len(t.token_ids)
    for step, text in zip(t.steps, t.step_texts, strict=True):
        tokens = t.token_ids[step.start : step.end]
        logp = logps[step.model][n + step.start - 1 : n + step.end - 1]
        chosen = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        if greedy:
            assert (logp.amax(1) - chosen).max() < TOLERANCE, "a token is not its writer's greedy choice"
        entropy = -(logp.exp() * logp).sum(1)
        measured = [step.mean_logprob, step.min_logprob, step.first_entropy, step.mean_entropy]
        truth = [chosen.mean(), chosen.min(), entropy[0], entropy.mean()]
        np.testing.assert_allclose(measured, [float(x) for x in truth], atol=TOLERANCE)
        ends = [x == 2 or "\n\n" in e.tokenizer.decode([x]) for x in tokens]
        assert not any(ends[:-1]) and ends[-1] == step.closed
        assert text == e.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert t.cost.generated_tokens == [
        sum(s.end - s.start for s in t.steps if s.model == m) for m in range(len(e.models))
    ]


def assert_same(a: Trajectory, b: Trajectory) -> None:
    """Equal up to rounding in everything that must not depend on batching or memory."""
    assert a.token_ids == b.token_ids and a.prompt_ids == b.prompt_ids and a.finish_reason == b.finish_reason
    assert [(s.start, s.end, s.model, s.closed) for s in a.steps] == [
        (s.start, s.end, s.model, s.closed) for s in b.steps
    ]
    assert [(d.step, d.action, d.kind) for d in a.decisions] == [(d.step, d.action, d.kind) for d in b.decisions]
    stats = [[[s.mean_logprob, s.min_logprob, s.first_entropy, s.mean_entropy] for s in t.steps] for t in (a, b)]
    np.testing.assert_allclose(*stats, atol=TOLERANCE)
    assert a.cost.generated_tokens == b.cost.generated_tokens and a.cost.discarded_tokens == b.cost.discarded_tokens
    assert a.step_texts == b.step_texts
