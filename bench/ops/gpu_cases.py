"""Cases of every op for bench.ops.gpu: inputs and gates of the tests, at the sizes that matter on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.ops.gpu_harness import GpuCase, Variant, copies_for
from roro_fast.ops import judge_score as judge
from roro_fast.ops import kv_handoff as handoff
from roro_fast.ops import norm_rope_store as norm
from roro_fast.ops import paged_attention as attention
from roro_fast.ops import router_score as router
from roro_fast.ops import sample_step as sample
from roro_fast.ops.kv_plan import plan_on_device
from roro_fast.ops.kv_project import kv_project as project
from roro_fast.ops.registry import implementations
from tests.ops.cases import judge_score as judge_cases
from tests.ops.cases import kv_handoff as handoff_cases
from tests.ops.cases import kv_project as project_cases
from tests.ops.cases import paged_attention as attention_cases
from tests.ops.cases import router_score as router_cases
from tests.ops.cases import sample_step as sample_cases

BF16 = torch.bfloat16


def usable(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    return [i.name for i in implementations(op) if i.name != "cpu" and i.usable(device, dtype)[0]]


def moved(x: Any, device: torch.device) -> Any:
    """A copy of a tensor, or of a NamedTuple of them, on the device."""
    if isinstance(x, torch.Tensor):
        return x.clone() if x.device == device else x.to(device)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(y, device) for y in x))
    return x


def at(table: list[Any], f: Callable[..., Any]) -> Variant:
    return lambda i: f(table[i % len(table)])


def host(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.cpu()
    return type(result)(*(None if x is None else x.cpu() for x in result))


def build(
    op: str, name: str, c: Any, size: int, call: Callable[[Any, str], Any], check: Callable[[Any], None],
    device: torch.device, dtype: torch.dtype, extra: dict[str, Callable[[Any], Any]] | None = None,
) -> GpuCase:  # fmt: skip
    """One case with a variant for each usable implementation, gated by the test's own check."""
    table = [moved(c, device) for _ in range(copies_for(size, device))]
    names = usable(op, device, dtype)
    variants: dict[str, Variant] = {n: at(table, lambda x, n=n: call(x, n)) for n in names}
    variants |= {n: at(table, f) for n, f in (extra or {}).items()}
    gates = {n: (lambda n=n: check(host(call(table[0], n)))) for n in names}
    return GpuCase(f"{op} {name}", variants, len(table), size, gates)


def router_score(device: torch.device, small: bool) -> Iterator[GpuCase]:
    compiled = torch.compile(router.reference, dynamic=False)
    for n, h, d in [(7, 64, 16)] if small else [(1, 4096, 256), (64, 576, 64), (64, 4096, 256), (256, 4096, 256),
                                                (1024, 4096, 256), (4096, 4096, 256)]:  # fmt: skip
        c = router_cases.make(h, 12, d, 2, n, BF16)
        size = 2 * n * h + 2 * d * (h + 12) + 4 * n * 24
        extra = {} if small else {"torch.compile": lambda c: compiled(*c)}
        yield build(
            "router_score", f"N={n} H={h} D={d}", c, size, lambda c, i: router.router_score(*c, impl=i),
            lambda got, c=c: router_cases.check(c, got, BF16), device, BF16, extra,
        )  # fmt: skip


def sample_step(device: torch.device, small: bool) -> Iterator[GpuCase]:
    large = [(64, 49152, "plain"), (64, 152064, "greedy"), (64, 152064, "plain"), (64, 152064, "both")]
    sizes = [(2, 100, "plain")] if small else large
    for n, v, mode in sizes:
        c = sample_cases.make(n, v, mode, BF16)
        yield build(
            "sample_step", f"N={n} V={v} {mode}", c, 2 * n * v, lambda c, i: sample.sample_step(*c, impl=i),
            lambda got, c=c: sample_cases.check(c, got, BF16), device, BF16,
        )  # fmt: skip


def judge_score(device: torch.device, small: bool) -> Iterator[GpuCase]:
    for m, h, k in [(12, 64, 2)] if small else [(256, 4096, 2), (1024, 4096, 2), (8192, 4096, 8)]:
        c = judge_cases.make(h, k, [4] * (m // 4), [3 if small else 16] * (m // 4 // (3 if small else 16)), BF16)
        own = torch.Generator(device).manual_seed(0)  # the default one may be upset by a capture that failed
        head = torch.randn(100 if small else 152064, h, dtype=BF16, device=device, generator=own)
        extra = {"full head": lambda c, head=head: (c.hidden[c.rows] @ head.T).float().softmax(-1)[:, :2]}
        yield build(
            "judge_score", f"M={m} H={h} K={k}", c, 2 * m * h + 2 * k * h, lambda c, i: judge.judge_score(*c, impl=i),
            lambda got, c=c: judge_cases.check(c, got, BF16), device, BF16, extra if m <= 1024 else {},
        )  # fmt: skip


def kv_handoff(device: torch.device, small: bool) -> Iterator[GpuCase]:
    tokens, inner = (40, (2, 2)) if small else (4096, (28, 2))
    shapes = [(16, 16, ("NHD", "NHD")), (16, 128, ("NHD", "NHD")), (16, 128, ("NHD", "HND"))]
    for source, target, layouts in shapes:
        c = handoff_cases.make(source, target, 4, 128, tokens, layouts, BF16, inner=inner)
        want = handoff_cases.expected(c) if small else None
        c = moved(c, device)
        size = 2 * tokens * inner[0] * inner[1] * 4 * 128 * 2

        def call(c: Any, i: str) -> torch.Tensor:
            handoff.copy(c.source, c.target, c.spans, source_layout=c.source_layout,
                         target_layout=c.target_layout, impl=i)  # fmt: skip
            return c.target

        def check(got: torch.Tensor, c: Any = c, want: torch.Tensor | None = want, call: Any = call) -> None:
            truth = call(moved(c, device), "reference").cpu() if want is None else want
            assert torch.equal(handoff_cases.bits(got), handoff_cases.bits(truth))

        name = f"{source}->{target} {'-'.join(layouts)} {size >> 20} MB"
        yield build("kv_copy", name, c, size, call, check, device, BF16)
    n, length = (5, 64) if small else (256, 4096)
    count = torch.randint(0, 32, (n,))
    start = torch.randint(0, length - 40, (n,))
    rows, pages = torch.arange(n), torch.randint(0, 10**6, (n, length // 16))
    args = [x.to(device) for x in (torch.randint(0, 10**5, (n, length)), rows, start, count, pages)]
    total = int(count.sum())
    variants: dict[str, Variant] = {
        i: (lambda _, i=i: plan_on_device(*args, 16, total, impl=i))
        for i in usable("kv_plan_on_device", device, torch.int64)
    }

    def same() -> None:
        got, want = (plan_on_device(*args, 16, total, impl=i) for i in ("triton", "reference"))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    yield GpuCase(f"kv_plan N={n} T={total}", variants, 1, 8 * 5 * total, {"triton": same})


def kv_project(device: torch.device, small: bool) -> Iterator[GpuCase]:
    """The one fused launch against indexing around the vendor's batched product, which is the reference here."""
    wide = (28, 8, 128, 16)
    sizes = [(40, (2, 1, 16, 16), (4, 3, 32, 16), 2)] if small else [(16, wide, wide, 1), (1024, wide, wide, 1)]
    for tokens, source, target, chosen in sizes:
        c = project_cases.make(tokens, source, target, chosen, BF16)
        before = c.target.clone()

        def call(c: Any, i: str) -> torch.Tensor:
            project(*c, impl=i)
            return c.target

        yield build(
            "kv_project", f"T={tokens} {source[0]}x{source[1]}x{source[2]}", c, 2 * c.maps.weight.numel(), call,
            lambda got, c=c, before=before: project_cases.check(c, before, got), device, BF16,
        )  # fmt: skip


def paged_attention(device: torch.device, small: bool) -> Iterator[GpuCase]:
    heads = (4, 2, 16, 16) if small else (32, 8, 128, 16)
    forks = [(1, 100)] * 3 if small else [(1, 4096 + 64)] * 16
    plain: list[tuple[str, list[tuple[int, int]], Any]] = [
        ("decode", [(1, 60)] * 3 if small else [(1, 1024)] * 32, None),
        ("forks", forks, [(len(forks), 6 if small else 256)]),
    ]
    for name, shapes, shared in plain:
        c = attention_cases.make(shapes, *heads, BF16, shared=shared)
        tokens = sum(n for _, n in shapes)
        if shared:
            tokens -= (len(shapes) - 1) * shared[0][1] * heads[3]
        table = c._replace(truth=None, naive=None)
        extra = {}
        if shared:
            extra["unshared"] = lambda c: attention.paged_attention(*c.args, impl="triton")
        yield build(
            "paged_attention", f"{name} {len(shapes)}x{shapes[0][1]}", table, 4 * tokens * heads[1] * heads[2],
            lambda c, i: attention.paged_attention(*c.args, prefix=c.prefix, impl=i),
            lambda got, c=c: attention_cases.check(c, got, BF16), device, BF16, extra,
        )  # fmt: skip


def norm_rope_store(device: torch.device, small: bool) -> Iterator[GpuCase]:
    for t, h in [(3, 64)] if small else [(64, 4096), (4096, 4096)]:
        x, r, w = torch.randn(t, h, dtype=BF16), torch.randn(t, h, dtype=BF16), torch.rand(h, dtype=BF16)
        pair = torch.randn(t, 2 * h, dtype=BF16)

        def check(got: Any, x: Any = x, r: Any = r, w: Any = w) -> None:
            torch.testing.assert_close(got.normed, norm.add_rms_norm_reference(x, r, w).normed, atol=5e-2, rtol=2e-2)

        def check_silu(got: Any, pair: Any = pair) -> None:
            torch.testing.assert_close(got, norm.silu_mul_reference(pair), atol=5e-2, rtol=2e-2)

        row = norm.AddedNorm(x, r)
        weight = w.to(device)
        yield build(
            "add_rms_norm", f"T={t} H={h}", row, 8 * t * h,
            lambda c, i, weight=weight: norm.add_rms_norm(c[0], c[1], weight, impl=i), check, device, BF16,
        )  # fmt: skip
        yield build(
            "silu_mul", f"T={t} I={h}", pair, 6 * t * h, lambda c, i: norm.silu_mul(c, impl=i), check_silu, device, BF16
        )


OPS: dict[str, Callable[[torch.device, bool], Iterator[GpuCase]]] = {
    "router_score": router_score,
    "judge_score": judge_score,
    "sample_step": sample_step,
    "kv_handoff": kv_handoff,
    "kv_project": kv_project,
    "paged_attention": paged_attention,
    "norm_rope_store": norm_rope_store,
}
