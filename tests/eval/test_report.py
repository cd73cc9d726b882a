from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from roro_fast.errors import DataError
from roro_fast.eval.catalogue import NBSP, write
from roro_fast.eval.metrics import Evaluation
from roro_fast.eval.plain import from_plain, to_plain
from roro_fast.eval.plots import looks, wilson
from roro_fast.eval.report import MAX_TRAJECTORIES, render, write_report
from roro_fast.eval.report_data import Curve, JudgeRound, PairStats, ReportData
from roro_fast.eval.svg import ticks
from tests.eval.samples import anchors, noisy_arm, report_data

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"


class Page(HTMLParser):
    """Collects every tag with its attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())  # no-break spaces become plain ones

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"unbalanced </{tag}>"

    def handle_data(self, data):
        if not {"script", "style"} & set(self.stack):
            self.words.append(data)


@pytest.fixture(scope="module")
def data() -> ReportData:
    return report_data()


def test_one_balanced_page_without_any_outside_reference(data, tmp_path):
    path = write_report(tmp_path / "report.html", data)
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.stack
    assert not any({"src", "srcset"} & set(a) for _, a in page.tags)
    assert all(a["href"].startswith("#") for _, a in page.tags if "href" in a)
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html
    assert 50_000 < len(html) < 600_000
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in page.tags if "href" in a} <= set(ids)


def test_the_numbers_of_the_evaluation_are_on_the_page(data):
    text = Page(render(data)).text
    said = lambda v, unit, signed=False: write(v, unit, signed).replace(NBSP, " ") in text  # noqa: E731
    for a in data.evaluation.arms:
        assert a.label in text
        for m, unit in (("area", "ratio"), ("acc_at_60", "share"), ("cpt95", "share")):
            if a.metrics:
                assert said(a.metrics[m].mean, unit)
        for p in a.points:
            assert said(p.values["accuracy"].mean, "share")
    d = data.evaluation.difference("roro", "shuffled", "area")
    assert said(d.mean, "ratio", True) and said(d.hi, "ratio", True)
    assert "655" in text and "process quality" in text and "Outcome reward" in text and "torch 2.13.0" in text


def test_text_of_models_cannot_become_markup(data):
    """Plant markup in every string of the record; the page has the very same tags as the clean one."""

    def poison(v):
        if isinstance(v, str):
            return v + EVIL
        if isinstance(v, list):
            return [poison(x) for x in v]
        return (
            {k: poison(x) if k not in ("name", "a", "b", "arm", "metric", "kind") else x for k, x in v.items()}
            if (isinstance(v, dict))
            else v
        )

    small = replace(data, trajectories=data.trajectories[:3])
    raw = poison(to_plain(small))
    raw["pairs"]["by_rule"] = {EVIL: 3, "cost": 2, "process quality": 1}
    raw["provenance"] = {f"{EVIL}{k}": v for k, v in raw["provenance"].items()}
    for a in raw["evaluation"]["arms"]:
        a["name"] = a["name"] if a["name"] in ("roro", "all_small", "all_large") else a["name"] + EVIL
    for d in raw["evaluation"]["differences"]:
        d["b"] = d["b"] if d["b"] == "roro" else d["b"] + EVIL
        d["a"] = d["a"] if d["a"] == "roro" else d["a"] + EVIL
    raw["evaluation"]["small"], raw["evaluation"]["large"] = "all_small", "all_large"
    html = render(from_plain(ReportData, raw))
    page, clean = Page(html), Page(render(small))
    count = lambda p, tag: sum(t == tag for t, _ in p.tags)  # noqa: E731
    for tag in ("script", "img", "iframe", "object", "style", "link", "meta"):
        assert count(page, tag) == count(clean, tag), tag
    assert not any(k.startswith("on") for _, a in page.tags for k in a)
    assert html.count("<script>") == 1 and "<img" not in html and "alert(1)</script>" not in html
    embedded = re.search(r'<script type="application/json" id="v-data">(.*?)</script>', html, re.S).group(1)
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded)["trajectories"][2]["steps"][0]["text"].endswith(EVIL)


def test_the_policy_allows_only_the_pages_own_script(data):
    html = render(data)
    policy = next(a["content"] for t, a in Page(html).tags if t == "meta" and "http-equiv" in a)
    script = re.search(r"<script>(.*?)</script>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_an_empty_run_still_makes_a_page_that_says_what_is_missing():
    text = Page(render(ReportData(title="empty"))).text
    for sentence in (
        "There is no evaluation in this run yet.",
        "No frontier:",
        "No trajectories were kept",
        "no router was trained",
        "No Judge was trained",
        "No preference pairs were built",
        "recorded no provenance",
    ):
        assert sentence in text, sentence


def test_parts_may_be_absent_one_by_one(data):
    anchors_only = Evaluation(anchors(9), resamples=5).summary()
    for change in (
        {"evaluation": None},
        {"evaluation": anchors_only},
        {"curves": []},
        {"judge": []},
        {"pairs": None},
        {"pairs": PairStats({}, 0, 0)},
        {"trajectories": []},
        {"provenance": {}},
        {"curves": [Curve("roro", 0, "outcome_reward", [0.0], [0.5])]},
        {"curves": [Curve("new_arm", 0, "my_metric", [0.0, 1.0], [math.nan, math.nan])]},
        {"judge": [JudgeRound(0, 0.5, 0)]},
    ):
        assert not Page(render(replace(data, **change))).stack, change
    assert "no router was evaluated" in Page(render(replace(data, evaluation=anchors_only))).text


def test_undefined_values_are_dashes_not_nan():
    e = Evaluation([*anchors(20, 0.9, 0.9), *noisy_arm("roro", 0.3, 20, 1)], resamples=20).summary()
    html = render(ReportData(title="flat", evaluation=e))
    assert (
        "–" in html and not re.search(r"\bnan\b", Page(html).text, re.I) and '"nan"' not in html and "nan," not in html
    )


def test_long_lists_of_trajectories_are_cut_and_counted(data):
    many = replace(data, trajectories=data.trajectories * 10)
    assert f"{160 - MAX_TRAJECTORIES} more answers are in the run directory" in Page(render(many)).text


def test_the_record_survives_the_disk_and_names_faults(data, tmp_path):
    path = tmp_path / "eval.json"
    data.save(path)
    assert to_plain(ReportData.load(path)) == to_plain(data)
    assert render(ReportData.load(path)) == render(data)
    with pytest.raises(DataError, match="eval2.json: not found; run `roro eval` first"):
        ReportData.load(tmp_path / "eval2.json")
    raw = json.loads(path.read_text())
    for change, message in (
        ({"format": 0}, "format 0, this version reads 1"),
        ({"judge": [{"round": 1}]}, r"eval.json.judge\[0\].accuracy: missing"),
        ({"titel": "x"}, "eval.json.titel: unknown field"),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(DataError, match=message):
            ReportData.load(path)


def test_arms_are_told_apart_by_more_than_colour(data):
    style = looks([(a.name, a.kind) for a in data.evaluation.arms])
    assert len({(k.shape, k.dash) for k in style.values()}) == len(style)
    assert style["fixed_rubric"].hidden and not style["roro"].hidden


@pytest.mark.parametrize("bounds", [(0, 1), (0.31, 0.97), (-3e-4, 2e-3), (10, 12345), (0.5, 0.5)])
def test_ticks_are_round_few_and_inside(bounds):
    lo, hi = bounds
    found = ticks(lo, hi)
    assert 1 <= len(found) <= 11 and all(lo - 1e-9 <= v <= hi + 1e-9 for v in found)
    assert lo == hi or len(found) >= 3


def test_wilson_interval_by_hand():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert wilson(1.0, 10)[1] == 1 and wilson(0.3, 0) == (0, 1)
