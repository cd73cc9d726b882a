"""Page allocator of the KV arena and the keys of prefix-cache pages: reference in Python, native in `roro_fast._host`.

`PagePool`, `chain_hash` and `chain_hashes` are the best implementations available; both give the same ids and keys for
the same operations. The environment variable RORO_HOST=python or RORO_HOST=native asks for one by name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from roro_fast.errors import ConfigError

_NONE = -1
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class _Slab:
    """`fresh` page indices were handed out at least once; `returned` holds freed ones, last in first out."""

    __slots__ = ("fresh", "returned", "used")

    def __init__(self) -> None:
        self.used = 0
        self.fresh = 0
        self.returned: list[int] = []


class _Model:
    """Slabs used by 1 .. capacity - 1 pages stand in the bucket of their count; `above` and `below` chain the non-empty
    buckets by count, from `top` down, so that the fullest one is found without a search."""

    __slots__ = ("above", "below", "buckets", "capacity", "owned", "refs", "top", "used")

    def __init__(self, num_slabs: int, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.owned = 0
        self.top = _NONE
        self.buckets: list[dict[int, None]] = [{} for _ in range(capacity)]
        self.above = [_NONE] * capacity
        self.below = [_NONE] * capacity
        self.refs = [0] * (num_slabs * capacity)

    def remove(self, slab: int, count: int) -> None:
        bucket = self.buckets[count]
        del bucket[slab]
        if bucket:
            return
        up, down = self.above[count], self.below[count]
        if up == _NONE:
            self.top = down
        else:
            self.below[up] = down
        if down != _NONE:
            self.above[down] = up

    def insert_on_top(self, slab: int, count: int) -> None:
        """No other bucket is fuller than `count`."""
        if not self.buckets[count]:
            self.above[count], self.below[count] = _NONE, self.top
            if self.top != _NONE:
                self.above[self.top] = count
            self.top = count
        self.buckets[count][slab] = None

    def insert_below(self, slab: int, count: int, upper: int) -> None:
        """`upper` is a non-empty bucket and nothing stands between it and `count`."""
        if not self.buckets[count]:
            down = self.below[upper]
            self.above[count], self.below[count] = upper, down
            self.below[upper] = count
            if down != _NONE:
                self.above[down] = count
        self.buckets[count][slab] = None


class PythonPagePool:
    """Reference-counted pages of K models in one arena of equal slabs.

    A slab belongs to one model at a time and holds `pages_per_slab[m]` pages of model `m`; page `k` of slab `s` has id
    `s * pages_per_slab[m] + k`. Pages come from the fullest partly used slab of the model, then from free slabs, so
    that slabs drain; a slab without used pages returns to the common free list. Equal operations give equal ids.
    Every operation costs O(1) per page. A bad id, a bad model or a double free raises ValueError and changes nothing.
    """

    def __init__(self, num_slabs: int, pages_per_slab: Sequence[int]) -> None:
        if num_slabs < 0:
            raise ValueError(f"num_slabs: {num_slabs} is negative")
        if not pages_per_slab:
            raise ValueError("pages_per_slab: empty; give one page count per model")
        for m, capacity in enumerate(pages_per_slab):
            if capacity < 1:
                raise ValueError(f"pages_per_slab[{m}]: {capacity}; a slab must hold at least one page")
        self._models = [_Model(num_slabs, capacity) for capacity in pages_per_slab]
        self._slabs = [_Slab() for _ in range(num_slabs)]
        self._free = list(range(num_slabs - 1, -1, -1))

    @property
    def num_slabs(self) -> int:
        return len(self._slabs)

    @property
    def free_slabs(self) -> int:
        """Slabs that no model owns."""
        return len(self._free)

    @property
    def pages_per_slab(self) -> list[int]:
        return [m.capacity for m in self._models]

    def alloc(self, model: int, n: int) -> list[int]:
        """`n` new pages with reference count 1, or [] when `n` pages cannot be had."""
        m = self._model(model)
        if n < 0:
            raise ValueError(f"n: {n} pages asked for; it must not be negative")
        pages: list[int] = []
        if n > self.available(model):
            return pages
        while n > 0:
            if m.top != _NONE:
                slab = next(reversed(m.buckets[m.top]))
                m.remove(slab, m.top)
            else:
                slab = self._free.pop()
                m.owned += 1
            s = self._slabs[slab]
            take = min(n, m.capacity - s.used)
            reused = min(take, len(s.returned))
            fresh = s.fresh + take - reused
            base = slab * m.capacity
            pages += [base + s.returned.pop() for _ in range(reused)]
            pages += range(base + s.fresh, base + fresh)
            s.fresh = fresh
            s.used += take
            m.used += take
            n -= take
            if s.used < m.capacity:  # it was the fullest, so it stays on top
                m.insert_on_top(slab, s.used)
        for page in pages:
            m.refs[page] = 1
        return pages

    def incref(self, model: int, pages: Sequence[int]) -> None:
        """One more owner for each of `pages`."""
        m = self._model(model)
        for page in pages:
            self._check(m, model, page)
            if m.refs[page] == 0:
                raise ValueError(f"page {page} of model {model}: not allocated, cannot be shared")
        for page in pages:
            m.refs[page] += 1

    def decref(self, model: int, pages: Sequence[int]) -> None:
        """One owner less for each of `pages`; those without owners become free, in the given order."""
        m = self._model(model)
        for page in pages:
            self._check(m, model, page)
        freed = []
        for i, page in enumerate(pages):
            if m.refs[page] == 0:
                for undone in pages[:i]:
                    m.refs[undone] += 1
                raise ValueError(f"page {page} of model {model}: not allocated, freed twice?")
            m.refs[page] -= 1
            if m.refs[page] == 0:
                freed.append(page)
        for page in freed:
            self._release(m, page)

    def refcount(self, model: int, page: int) -> int:
        """Owners of a page; 0 when it is free."""
        m = self._model(model)
        self._check(m, model, page)
        return m.refs[page]

    def available(self, model: int) -> int:
        """Pages that `alloc` could give `model` now."""
        m = self._model(model)
        return (m.owned + len(self._free)) * m.capacity - m.used

    def used(self, model: int) -> int:
        """Pages of `model` that have an owner."""
        return self._model(model).used

    def _model(self, model: int) -> _Model:
        if not 0 <= model < len(self._models):
            raise ValueError(f"model {model}: the pool has models 0..{len(self._models) - 1}")
        return self._models[model]

    @staticmethod
    def _check(m: _Model, model: int, page: int) -> None:
        if not 0 <= page < len(m.refs):
            raise ValueError(f"page {page} of model {model}: out of range, ids are 0..{len(m.refs)} exclusive")

    def _release(self, m: _Model, page: int) -> None:
        slab, k = divmod(page, m.capacity)
        s = self._slabs[slab]
        count = s.used
        s.used -= 1
        m.used -= 1
        s.returned.append(k)
        if s.used > 0:
            if count == m.capacity:
                m.insert_on_top(slab, s.used)
            else:
                m.insert_below(slab, s.used, count)
        if count < m.capacity:
            m.remove(slab, count)
        if s.used == 0:
            s.fresh = 0
            s.returned.clear()
            m.owned -= 1
            self._free.append(slab)


def _mix(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    """`_mix` of a uint64 array, in place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(_M1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_M2)
    x ^= x >> np.uint64(31)
    return x


def _as_int64(tokens: Any) -> np.ndarray:
    if isinstance(tokens, list | tuple):
        array = np.array(tokens) if tokens else np.empty(0, np.int64)
    else:
        array = np.asarray(memoryview(tokens))
    if array.dtype != np.int64 or array.ndim != 1 or not array.flags.c_contiguous:
        raise TypeError("tokens: expected a list of int or a contiguous 1-D int64 buffer")
    return array


def _chain_hashes(root: int, tokens: np.ndarray, page_size: int) -> list[int]:
    pages = tokens.view(np.uint64).reshape(-1, page_size)
    position = _mix_array(np.arange(1, page_size + 1, dtype=np.uint64) * np.uint64(_GAMMA))
    content = _mix_array(pages ^ position).sum(1, dtype=np.uint64) + np.uint64(page_size)
    keys = []
    for c in _mix_array(content).tolist():
        root = _mix((_mix((root + _GAMMA) & _MASK) + c) & _MASK)
        keys.append(root)
    return keys


def python_chain_hash(parent: int, tokens: Sequence[int] | np.ndarray) -> int:
    """64-bit key of a prefix-cache page that holds `tokens` (int64 [n]) after the page with key `parent`.

    Order, position and number of tokens count. Not cryptographic: whoever shares a page over a key compares the tokens.
    """
    array = _as_int64(tokens)
    if len(array) == 0:
        return _mix((_mix((parent + _GAMMA) & _MASK) + _mix(0)) & _MASK)
    return _chain_hashes(parent, array, len(array))[0]


def python_chain_hashes(root: int, tokens: Sequence[int] | np.ndarray, page_size: int) -> list[int]:
    """Keys of all full pages of `tokens` (int64 [n]), the first one after `root`: `n // page_size` of them."""
    if page_size < 1:
        raise ValueError(f"page_size: {page_size} must be at least 1")
    array = _as_int64(tokens)
    return _chain_hashes(root, array[: len(array) // page_size * page_size], page_size)


def _native() -> Any:
    """The extension module, or None when the reference is to be used."""
    choice = os.environ.get("RORO_HOST", "auto")
    if choice not in ("auto", "python", "native"):
        raise ConfigError(f"RORO_HOST: {choice!r} is not a choice; use auto, python or native")
    if choice == "python":
        return None
    try:
        return importlib.import_module("roro_fast._host")
    except ImportError as e:
        if choice == "native":
            raise ConfigError(
                f"RORO_HOST: native was asked for but the extension is missing ({e}); "
                "install again with a C++ compiler, or unset it"
            ) from e
        return None


_host_module = _native()
HAVE_NATIVE: bool = _host_module is not None

if TYPE_CHECKING or _host_module is None:
    PagePool = PythonPagePool
    chain_hash = python_chain_hash
    chain_hashes = python_chain_hashes
else:
    PagePool = _host_module.PagePool
    chain_hash = _host_module.chain_hash
    chain_hashes = _host_module.chain_hashes


def native_module() -> Any:
    """`roro_fast._host`, or None where the Python implementations serve."""
    return _host_module


def root_hash(model: int, weight_version: int) -> int:
    """Parent key of the first page of a sequence: pages are shared only within one model and one weight version."""
    return chain_hash(0, [model, weight_version])
