from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest

from roro_fast.errors import DataError
from roro_fast.eval.plain import from_plain, to_plain


@dataclass
class Inner:
    x: float
    names: list[str] = field(default_factory=list)


@dataclass
class Outer:
    count: int
    inner: Inner
    table: dict[str, list[Inner]] = field(default_factory=dict)
    maybe: bool | None = None


VALUE = Outer(3, Inner(math.nan, ["a", "ü<"]), {"k": [Inner(1.5)]}, True)


def test_round_trip_through_strict_json():
    text = json.dumps(to_plain(VALUE), allow_nan=False)
    back = from_plain(Outer, json.loads(text))
    assert math.isnan(back.inner.x)
    back.inner.x = VALUE.inner.x
    assert back == VALUE
    assert from_plain(Outer, {"count": 1, "inner": {"x": 2}}).maybe is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "3"}, "Outer.count: expected int, got '3'"),
        ({"count": True}, "Outer.count: expected int"),
        ({"inner": {}}, "Outer.inner.x: missing"),
        ({"inner": {"x": "1"}}, "Outer.inner.x: expected a number"),
        ({"inner": {"x": 1, "y": 2}}, "Outer.inner.y: unknown field; known are x, names"),
        ({"table": {"k": [{"x": 1}, 5]}}, r"Outer.table.k\[1\]: expected an object, got 5"),
        ({"table": {"k": {}}}, "Outer.table.k: expected a list"),
        ({"maybe": 1}, "Outer.maybe: expected bool"),
    ],
)
def test_errors_name_the_path(change, message):
    with pytest.raises(DataError, match=message):
        from_plain(Outer, {**to_plain(VALUE), **change})
