"""The native page pool and prefix hashes against the Python reference, and the reference against first principles."""

from __future__ import annotations

import array
import importlib
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.engine import pages

native = importlib.import_module("roro_fast._host") if importlib.util.find_spec("roro_fast._host") else None
POOLS = [pytest.param(pages.PythonPagePool, id="python")]
HASHES = [pytest.param((pages.python_chain_hash, pages.python_chain_hashes), id="python")]
if native:
    POOLS.append(pytest.param(native.PagePool, id="native"))
    HASHES.append(pytest.param((native.chain_hash, native.chain_hashes), id="native"))
needs_native = pytest.mark.skipif(native is None, reason="roro_fast._host is not built here")

shapes = st.tuples(st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1, max_size=3))
operations = st.lists(
    st.tuples(
        st.sampled_from(["alloc", "alloc", "incref", "decref", "decref"]),
        st.integers(0, 2),
        st.randoms(use_true_random=False),
        st.integers(0, 8),
    ),
    max_size=60,
)


class Oracle:
    """What the pool must look like, recomputed from scratch from the multiset of owned pages."""

    def __init__(self, num_slabs: int, capacities: list[int]) -> None:
        self.num_slabs, self.capacities = num_slabs, capacities
        self.owners: list[dict[int, int]] = [{} for _ in capacities]

    def slab_use(self, m: int) -> dict[int, int]:
        use: dict[int, int] = {}
        for page in self.owners[m]:
            use[page // self.capacities[m]] = use.get(page // self.capacities[m], 0) + 1
        return use

    def free_slabs(self) -> int:
        return self.num_slabs - sum(len(self.slab_use(m)) for m in range(len(self.capacities)))

    def available(self, m: int) -> int:
        return (self.free_slabs() + len(self.slab_use(m))) * self.capacities[m] - len(self.owners[m])

    def alloc(self, m: int, n: int, got: list[int]) -> None:
        if n > self.available(m):
            assert got == []
            return
        assert len(got) == n
        for page in got:
            assert 0 <= page < self.num_slabs * self.capacities[m]
            assert page not in self.owners[m]
            slab, use = page // self.capacities[m], self.slab_use(m)
            others = {s for o in range(len(self.capacities)) if o != m for s in self.slab_use(o)}
            assert slab not in others
            partial = [u for u in use.values() if u < self.capacities[m]]
            assert use.get(slab, 0) == max(partial, default=0)
            self.owners[m][page] = 1

    def check(self, pool) -> None:
        assert pool.free_slabs == self.free_slabs()
        for m, capacity in enumerate(self.capacities):
            assert pool.used(m) == len(self.owners[m])
            assert pool.available(m) == self.available(m)
            assert [pool.refcount(m, p) for p in range(self.num_slabs * capacity)] == [
                self.owners[m].get(p, 0) for p in range(self.num_slabs * capacity)
            ]


def run(pool_type, shape, ops, check: bool) -> list:
    """Apply `ops` (made applicable to the state they meet); returns everything the pool answered."""
    pool, oracle, log = pool_type(*shape), Oracle(*shape), []
    for kind, m, rng, n in ops:
        m %= len(shape[1])
        owned = sorted(oracle.owners[m].items())
        if kind == "alloc":
            got = pool.alloc(m, n)
            oracle.alloc(m, n, got)
            log.append(got)
        elif owned:
            chosen = [p for p, _ in rng.sample(owned, min(n, len(owned)))]
            if kind == "incref":
                chosen += chosen[:1]
                pool.incref(m, chosen)
            else:
                chosen += [p for p in chosen[:1] if oracle.owners[m][p] > 1]
                pool.decref(m, chosen)
            for p in chosen:
                oracle.owners[m][p] += 1 if kind == "incref" else -1
                if oracle.owners[m][p] == 0:
                    del oracle.owners[m][p]
        if check:
            oracle.check(pool)
    log.append([pool.free_slabs, *(pool.available(m) for m in range(len(shape[1])))])
    return log


@pytest.mark.parametrize("pool_type", POOLS)
@settings(max_examples=150, deadline=None)
@given(shape=shapes, ops=operations)
def test_every_operation_sequence_matches_the_recount(pool_type, shape, ops):
    run(pool_type, shape, ops, check=True)


@needs_native
@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 12), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    plan=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 2**16), st.integers(0, 12)), max_size=120
    ),
)
def test_native_gives_the_ids_of_the_reference(shape, plan):
    pool, reference = native.PagePool(*shape), pages.PythonPagePool(*shape)
    owned: list[list[int]] = [[] for _ in shape[1]]
    for kind, m, pick, n in plan:
        m %= len(shape[1])
        if kind < 2:
            got = pool.alloc(m, n)
            assert got == reference.alloc(m, n)
            owned[m] += got
        elif owned[m]:
            chosen = [owned[m][(pick + 7 * i) % len(owned[m])] for i in range(n % len(owned[m]) + 1)]
            chosen = list(dict.fromkeys(chosen))
            verb = "incref" if kind == 2 else "decref"
            getattr(pool, verb)(m, chosen)
            getattr(reference, verb)(m, chosen)
            owned[m] = owned[m] + chosen if kind == 2 else [p for p in owned[m] if reference.refcount(m, p)]
        assert pool.free_slabs == reference.free_slabs
        assert [pool.available(i) for i in range(len(owned))] == [reference.available(i) for i in range(len(owned))]


@pytest.mark.parametrize("pool_type", POOLS)
def test_allocation_is_all_or_nothing_and_slabs_come_back(pool_type):
    pool = pool_type(2, [4, 1])
    a = pool.alloc(0, 5)
    assert a == [0, 1, 2, 3, 4]
    assert pool.alloc(1, 1) == [] and pool.alloc(0, 4) == [] and pool.used(0) == 5
    pool.decref(0, a[:4])
    assert pool.free_slabs == 1 and pool.alloc(1, 1) == [0]
    assert pool.alloc(0, 4) == [] and pool.alloc(0, 3) == [5, 6, 7]


@pytest.mark.parametrize("pool_type", POOLS)
def test_fullest_partial_slab_is_preferred(pool_type):
    pool = pool_type(3, [4])
    first = pool.alloc(0, 12)
    pool.decref(0, [0, 1, 2])
    pool.decref(0, [4])
    pool.decref(0, [8, 9])
    assert pool.alloc(0, 1) == [4]
    assert sorted(pool.alloc(0, 2)) == [8, 9]
    assert sorted(pool.alloc(0, 3)) == [0, 1, 2]
    assert sorted(first) == list(range(12))


@pytest.mark.parametrize("pool_type", POOLS)
def test_bad_use_is_refused_and_changes_nothing(pool_type):
    pool = pool_type(2, [2, 3])
    a = pool.alloc(0, 3)
    pool.incref(0, [a[0]])
    with pytest.raises(ValueError, match="page 1 of model 0: not allocated, freed twice"):
        pool.decref(0, [a[0], a[1], a[1]])
    assert [pool.refcount(0, p) for p in range(4)] == [2, 1, 1, 0]
    with pytest.raises(ValueError, match="page 3 of model 0: not allocated, cannot be shared"):
        pool.incref(0, [a[0], 3])
    assert pool.refcount(0, a[0]) == 2
    for page in (-1, 4):
        for verb in (pool.incref, pool.decref):
            with pytest.raises(ValueError, match=rf"page {page} of model 0: out of range"):
                verb(0, [a[0], page])
        with pytest.raises(ValueError, match="out of range"):
            pool.refcount(0, page)
    assert pool.refcount(0, a[0]) == 2
    for model in (-1, 2):
        for call in (pool.available, pool.used, lambda m: pool.alloc(m, 1), lambda m: pool.decref(m, [])):
            with pytest.raises(ValueError, match=rf"model {model}: the pool has models 0..1"):
                call(model)
    with pytest.raises(ValueError, match="n: -1 pages"):
        pool.alloc(0, -1)
    for args, message in (
        ((-1, [1]), "num_slabs: -1"),
        ((1, []), "pages_per_slab: empty"),
        ((1, [2, 0]), r"pages_per_slab\[1\]: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pool_type(*args)


tokens_of_any_size = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=70)


@needs_native
@settings(max_examples=200, deadline=None)
@given(root=st.integers(-(2**70), 2**70), tokens=tokens_of_any_size, page_size=st.integers(1, 20))
def test_native_hashes_equal_the_reference(root, tokens, page_size):
    want = pages.python_chain_hashes(root, tokens, page_size)
    assert native.chain_hashes(root, tokens, page_size) == want
    assert native.chain_hashes(root, np.array(tokens, np.int64), page_size) == want
    assert pages.python_chain_hashes(root, array.array("q", tokens), page_size) == want
    assert native.chain_hash(root, tokens) == pages.python_chain_hash(root, tokens)


@pytest.mark.parametrize("hashes", HASHES)
def test_chain_is_the_fold_of_single_pages(hashes):
    chain_hash, chain_hashes = hashes
    tokens = list(range(40))
    keys = chain_hashes(9, tokens, 16)
    assert len(keys) == 2 and chain_hashes(9, tokens[:15], 16) == []
    assert keys == [chain_hash(9, tokens[:16]), chain_hash(chain_hash(9, tokens[:16]), tokens[16:32])]


@pytest.mark.parametrize("hashes", HASHES)
def test_hashes_are_pinned(hashes):
    chain_hash, chain_hashes = hashes
    assert chain_hash(0, []) == PINNED[0]
    assert chain_hashes(1, [0, -1, 2**63 - 1, 7], 2) == PINNED[1]


PINNED = (5197578548964807871, [15519919125511458385, 8236611222671865733])


@pytest.mark.parametrize("hashes", HASHES)
def test_hashes_spread(hashes):
    """No collision and no weak bit among small changes: order, position, length, root, one-bit differences."""
    chain_hash, _ = hashes
    base = [5, 6, 7, 8]
    variants = [base, base[::-1], base[:3], [0, *base], [*base, 0], [0] * 4, [0] * 5, []]
    variants += [[t ^ (1 << b) if j == i else t for j, t in enumerate(base)] for i in range(4) for b in range(60)]
    keys = [chain_hash(root, v) for root in (0, 1, 2, 1 << 63) for v in variants]
    assert len(set(keys)) == len(keys)
    bits = np.array([[k >> b & 1 for b in range(64)] for k in keys])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.1
    flips = np.array([bin(chain_hash(0, [1 << b, 3]) ^ chain_hash(0, [0, 3])).count("1") for b in range(60)])
    assert 28 < flips.mean() < 36


@pytest.mark.parametrize("hashes", HASHES)
def test_hashes_refuse_what_is_not_int64(hashes):
    chain_hash, chain_hashes = hashes
    for tokens in ([1.5], [2**63], ["a"], np.arange(4, dtype=np.int32), np.arange(8)[::2], np.zeros((2, 2), np.int64)):
        with pytest.raises(TypeError, match="tokens: expected a list of int"):
            chain_hash(0, tokens)
    with pytest.raises(ValueError, match="page_size: 0"):
        chain_hashes(0, [1], 0)


def test_root_depends_on_model_and_version():
    assert len({pages.root_hash(m, v) for m in range(3) for v in range(3)}) == 9


@pytest.mark.parametrize("choice", ["python", "native", "fortran"])
def test_environment_chooses_by_name(choice):
    code = "from roro_fast.engine import pages; print(pages.HAVE_NATIVE)"
    p = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RORO_HOST": choice},
        capture_output=True,
        text=True,
        check=False,
    )
    if choice == "fortran" or (choice == "native" and native is None):
        assert p.returncode != 0 and f"RORO_HOST: {'native was' if choice == 'native' else repr(choice)}" in p.stderr
    else:
        assert p.stdout.strip() == str(choice == "native"), p.stderr
