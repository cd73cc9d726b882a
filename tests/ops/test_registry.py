"""Which implementation serves: priority under auto, no silent fallback for an order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.ops import registry
from roro_fast.ops.registry import Implementation, implementations, register, requested, select

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RORO_IMPL", raising=False)
    registry.check_order("")  # imports all ops: what registers must not land in the copy only
    monkeypatch.setattr(registry, "_TABLE", {op: dict(table) for op, table in registry._TABLE.items()})
    register(Implementation("probe", "reference", lambda: "reference", differentiable=True))
    register(Implementation("probe", "fast", lambda: "fast", lambda d, t: (t == torch.float32, "only fp32"), 10))
    register(Implementation("probe", "gpu", lambda: "gpu", lambda d, t: (d.type == "cuda", "needs a GPU"), 20))
    yield
    registry._select.cache_clear()


def served(dtype: torch.dtype = torch.float32, impl: str | None = None) -> str:
    return str(select("probe", CPU, dtype, impl)())


def test_auto_takes_the_best_usable() -> None:
    assert [i.name for i in implementations("probe")] == ["gpu", "fast", "reference"]
    assert served() == "fast" and served(torch.float16) == "reference"


def test_auto_keeps_to_the_devices_it_is_for() -> None:
    register(Implementation("probe", "slow", lambda: "slow", priority=30, auto_on=("cuda",)))
    assert served() == "fast" and served(impl="slow") == "slow"


def test_an_order_is_obeyed_or_refused() -> None:
    assert served(impl="reference") == "reference"
    with pytest.raises(ConfigError, match="probe:fast cannot serve cpu/torch.float16: only fp32"):
        served(torch.float16, "fast")
    with pytest.raises(ConfigError, match="probe:gpu .* needs a GPU"):
        served(impl="gpu")
    with pytest.raises(ConfigError, match="'probe' has no implementation 'magic'; choose one of reference, fast, gpu"):
        served(impl="magic")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("", "fast"),
        ("auto", "fast"),
        ("reference", "reference"),
        ("probe=reference", "reference"),
        ("sample_step=reference", "fast"),
        ("sample_step=reference,probe=reference", "reference"),
        ("probe=auto", "fast"),
    ],
)
def test_the_environment_orders(monkeypatch: pytest.MonkeyPatch, value: str, name: str) -> None:
    assert served() == "fast"
    monkeypatch.setenv("RORO_IMPL", value)
    assert served() == name, "a change is noticed although choices are cached"
    assert requested("probe") == (None if name == "fast" else name)
    assert served(impl="fast") == "fast", "an argument beats the environment"


def test_an_impossible_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORO_IMPL", "probe=gpu")
    with pytest.raises(ConfigError, match="needs a GPU"):
        served()


@pytest.mark.parametrize("value", ["kv_handoff=reference", "refrence", "probe=reference,nosuch=cpu"])
def test_an_order_for_what_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RORO_IMPL", value)
    with pytest.raises(ConfigError, match="RORO_IMPL: (there is no op|nothing is called) .* choose one of"):
        served()


def test_a_bare_name_is_an_order_to_the_ops_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORO_IMPL", "cuda")
    assert served() == "fast", "no op in this test has a CUDA kernel"
    monkeypatch.setenv("RORO_IMPL", "gpu")
    with pytest.raises(ConfigError, match="needs a GPU"):
        served()


def test_only_a_differentiable_one_serves_where_gradients_are_needed() -> None:
    assert select("probe", CPU, torch.float32, grad=True)() == "reference"
    with pytest.raises(ConfigError, match="probe:fast .* it has no gradients"):
        select("probe", CPU, torch.float32, "fast", grad=True)


def test_a_new_implementation_is_noticed() -> None:
    assert served() == "fast"
    register(Implementation("probe", "faster", lambda: "faster", priority=15))
    assert served() == "faster"


def test_every_op_has_a_reference() -> None:
    import roro_fast.engine  # noqa: F401

    for op in ("kv_copy_pages", "paged_attention", "router_score", "sample_step"):
        if op in registry.ops():
            assert implementations(op)[-1].name == "reference" and implementations(op)[-1].priority == 0
    assert {"kv_copy_pages", "paged_attention", "sample_step"} <= set(registry.ops())
