"""The learned router: signals, sampling, budget bias, standardisation, directories."""

from __future__ import annotations

import json

import pytest
import torch

from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.ops.router_score import reference
from roro_fast.routing import SIGNALS, PolicyConfig, PolicyNetwork, signals
from tests.routing.batches import batch


def trained(hidden: int = 5, **config: object) -> PolicyNetwork:
    """A policy whose every weight matters."""
    p = PolicyNetwork(PolicyConfig(hidden_size=hidden, width=7, **config))  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for w in p.parameters():
            w.copy_(torch.randn(w.shape, generator=g))
    return p


def test_signals_follow_their_names() -> None:
    b = batch(3, last_model=torch.tensor([-1, 0, 1]), min_logprob=torch.tensor([0.0, -1.0, -2.0]), step_cap=6)
    x = signals(b)
    column = {name: x[:, i] for i, name in enumerate(SIGNALS)}
    assert x.shape == (3, len(SIGNALS)) and x.dtype == torch.float32
    torch.testing.assert_close(column["step_share"], torch.tensor([0.0, 1 / 6, 2 / 6]))
    torch.testing.assert_close(column["min_conf"], torch.tensor([0.0, -1.0, -2.0]).exp())
    assert column["last_small"].tolist() == [0, 1, 0] and column["last_large"].tolist() == [0, 0, 1]
    assert column["scout_entropy"].tolist() == [0, 0, 0]
    for name in ("run_min_conf", "run_prod_conf", "large_share", "budget", "first_entropy", "mean_entropy"):
        torch.testing.assert_close(column[name], getattr(b, name))


def test_an_untrained_router_is_a_fair_coin() -> None:
    out = PolicyNetwork(PolicyConfig()).decide(batch(1000))
    torch.testing.assert_close(out.probs, torch.full((1000, 2), 0.5))
    assert 420 < int(out.actions.sum()) < 580


def test_decisions_agree_with_their_stored_features() -> None:
    policy, b = trained(), batch(64, hidden=5)
    out = policy.decide(b)
    assert out.features is not None
    logp = torch.log_softmax(policy.logits(out.features), -1)
    torch.testing.assert_close(logp.gather(1, out.actions[:, None]).squeeze(1), out.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp.exp(), out.probs, atol=1e-5, rtol=1e-5)


def test_actions_are_the_inverse_cdf_of_the_supplied_uniforms() -> None:
    policy = trained(num_models=3)
    b = batch(200, num_models=3, hidden=5)
    out = policy.decide(b)
    cdf = out.probs.cumsum(1)
    for i in range(200):
        a = int(out.actions[i])
        assert (cdf[i, a - 1] if a else 0) <= b.uniforms[i] + 1e-6 and b.uniforms[i] <= cdf[i, a] + 1e-6


def test_temperature_zero_is_greedy_and_a_bias_makes_it_cheaper() -> None:
    policy, b = trained(), batch(300, hidden=5)
    policy.temperature = 0.0
    assert torch.equal(policy.decide(b).actions, policy.decide(b).probs.argmax(1))
    shares = []
    for bias in (-50.0, -2.0, 0.0, 2.0, 50.0):
        policy.bias = bias
        shares.append(float(policy.decide(b).actions.float().mean()))
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == 0


def test_budget_bias_interpolates_the_calibration() -> None:
    policy = trained(calibration=[(0.6, -1.0), (0.2, 3.0), (0.4, 1.0)])
    budget = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.6, 0.9, 1.0])
    want = torch.tensor([3.0, 3.0, 2.0, 0.0, -1.0, -1.0, 0.0])
    torch.testing.assert_close(policy.budget_bias(budget), want)
    assert PolicyNetwork(PolicyConfig(calibration=[(0.5, 2.0)])).budget_bias(budget[:2]).tolist() == [2.0, 2.0]
    assert trained().budget_bias(budget).tolist() == [0.0] * 7


def test_standardisation_is_folded_exactly() -> None:
    policy = trained()
    features = torch.cat((torch.randn(400, 5) * 3 + 1, torch.rand(400, len(SIGNALS)) * 0.5 + 1), 1)
    features[:, -1] = 0.7  # a constant input
    policy.standardize(features)
    h = features[:, :5] * torch.rsqrt(features[:, :5].pow(2).mean(1, keepdim=True) + 1e-6)
    x = (torch.cat((h * policy.norm, features[:, 5:]), 1) - policy.shift) / policy.scale
    by_hand = torch.nn.functional.silu(x @ policy.w1.T + policy.b1) @ policy.w2.T + policy.b2
    torch.testing.assert_close(policy.logits(features), by_hand, atol=2e-4, rtol=2e-4)
    assert policy.scale[-1] > 1e5 and policy.scale[:-1].max() < 10


def test_a_wide_hidden_state_can_be_scaled_to_the_weight_of_the_signals() -> None:
    s, g = len(SIGNALS), torch.Generator().manual_seed(0)
    for hidden, factor in ((4 * s, 2.0), (5, 1.0)):
        features = torch.randn(200, hidden + s, generator=g)
        plain, scaled = (PolicyNetwork(PolicyConfig(hidden_size=hidden)) for _ in range(2))
        plain.standardize(features)
        scaled.standardize(features, scale_hidden=True)
        torch.testing.assert_close(scaled.scale[:hidden], factor * plain.scale[:hidden])
        assert torch.equal(scaled.scale[hidden:], plain.scale[hidden:]) and torch.equal(scaled.shift, plain.shift)


def test_save_and_load(tmp_path) -> None:
    policy = trained(action_space="regenerate", calibration=[(0.3, 1.5)])
    policy.standardize(torch.randn(50, 5 + len(SIGNALS)))
    policy.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = PolicyNetwork.from_pretrained(tmp_path, temperature=0.0)
    assert again.config == policy.config and again.temperature == 0.0
    features = torch.randn(9, 5 + len(SIGNALS))
    assert torch.equal(again.logits(features), policy.logits(features))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "not a readable router"),
        (lambda d: (d / "config.json").write_text("{"), "not a readable router"),
        (lambda d: (d / "model.safetensors").write_bytes(b"junk"), "not a readable router"),
        (lambda d: edit(d, model_type="qwen3"), "model_type"),
        (lambda d: edit(d, signals=["other"]), "signals"),
        (lambda d: edit(d, width=8), "does not fit"),
    ],
)
def test_damaged_directories_are_refused(tmp_path, damage, says) -> None:
    trained().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        PolicyNetwork.from_pretrained(tmp_path)


def edit(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_inputs_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"router\.hidden"):
        trained(hidden=5).decide(batch(2, hidden=4))
    with pytest.raises(ConfigError, match=r"router\.hidden"):
        trained(hidden=5).decide(batch(2))
    with pytest.raises(ConfigError, match=r"router\.signals"):
        PolicyNetwork(PolicyConfig(use_signals=False))


def test_hidden_only_policy_uses_no_signals() -> None:
    policy = trained(use_signals=False)
    b = batch(8, hidden=5)
    out = policy.decide(b)
    want = reference(b.hidden, None, torch.zeros(8, 0), policy.weights, b.uniforms)
    assert torch.equal(out.actions, want.action) and out.features is not None and out.features.shape == (8, 5)


def test_packed_weights_follow_every_change() -> None:
    p, b = trained(), batch(50, hidden=5)
    first = p.packed_weights()
    assert p.packed_weights() is first
    before = p.decide(b).probs
    with torch.no_grad():
        p.w1.mul_(0.5)
    changed = p.decide(b).probs
    assert not torch.allclose(changed, before)
    p.standardize(torch.randn(40, 5 + len(SIGNALS), generator=torch.Generator().manual_seed(1)))
    assert not torch.allclose(p.decide(b).probs, changed)
    torch.testing.assert_close(
        p.decide(b).probs, reference(*p.inputs(b)[:1], None, p.inputs(b)[1], p.weights, b.uniforms).probs
    )
