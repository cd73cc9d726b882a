"""The page in a real browser: it runs without errors under its own policy, and the controls do what they say."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from roro_fast.eval.report import write_report
from tests.eval.samples import report_data

CHROMIUM = next((c for c in ("chromium", "chromium-browser", "google-chrome") if shutil.which(c)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--virtual-time-budget=4000",
    "--dump-dom",
]


def dom(url: str, profile: Path, width: int = 1280) -> str:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},2000", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    data = report_data()
    data.trajectories[1].steps[0].text = "<script>document.documentElement.dataset.owned = 1</script><b>bold</b>"
    return write_report(tmp_path_factory.mktemp("report") / "report.html", data)


def shown(text: str) -> str:
    return " ".join(
        html.unescape(re.sub(r"<[^>]+>", " ", re.search(r'id="v-body".*?</section>', text, re.S)[0])).split()
    )


def test_runs_without_errors_and_opens_a_routed_answer(page, tmp_path):
    text = dom(page.as_uri(), tmp_path)
    root = re.search(r"<html[^>]*>", text)[0]
    assert 'data-ready="1"' in root and "data-error" not in root
    body = shown(text)
    assert "routed by RoRo @ 0.4" in body and "Rubric for this query" in body and "p(true) = 0.93" in body
    assert text.count('class="who m0"') == 4 and text.count('class="who m1"') == 2


def test_a_link_opens_its_answer_and_model_text_stays_text(page, tmp_path):
    text = dom(page.as_uri() + "#t=1", tmp_path)
    assert "routed by all-small" in shown(text)
    assert "<b>bold</b>" in shown(text)
    assert "data-owned" not in re.search(r"<html[^>]*>", text)[0]


DRIVE = """
addEventListener("load", () => {
  const out = {}, q = (s) => document.querySelector(s), all = (s) => [...document.querySelectorAll(s)];
  const who = () => q(".facts b").textContent + " / " + q("#v-select").selectedIndex;
  const key = (node, k) => node.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true }));
  const off = (arm) => all("g.arm").filter((g) => g.dataset.arm === arm).map((g) => g.classList.contains("off"));
  out.first = who();
  q("#v-next").click(); out.next = who();
  key(document.body, "ArrowLeft"); key(document.body, "ArrowLeft"); out.back = who();
  q("#v-filter").value = "wrong"; q("#v-filter").dispatchEvent(new Event("change"));
  out.wrong = [q("#v-select").options.length, !!q(".facts .bad")];
  out.before = off("roro");
  q('.legend [data-arm="roro"]').click(); out.after = off("roro");
  q('[data-show="all"]').click(); out.all = all("g.arm.off").length;
  q('[data-axis="total"]').click();
  out.axes = all(".plot").map((p) => [p.className, p.hidden]);
  const chart = all(".plot.axis-total svg")[0];
  key(chart, "ArrowRight"); out.tip = [q("#tip").hidden, q("#tip").textContent];
  key(chart, "Escape"); out.tipGone = q("#tip").hidden;
  const head = q("#metrics thead th:nth-child(2) button");
  const column = () => all("#metrics tbody tr").map((r) => +r.cells[1].dataset.v);
  head.click(); out.up = column(); head.click(); out.down = column();
  out.wide = document.documentElement.scrollWidth - innerWidth;
  const pre = document.createElement("pre");
  pre.id = "result";
  pre.textContent = JSON.stringify(out);
  document.body.append(pre);
});
"""


@pytest.mark.parametrize("width", [1280, 500])
def test_controls_work(page, tmp_path, width):
    source = re.sub(r"<meta http-equiv=.*?>", "", page.read_text(encoding="utf-8"))
    driven = tmp_path / "driven.html"
    driven.write_text(source.replace("</body>", f"<script>{DRIVE}</script></body>"), encoding="utf-8")
    text = dom(driven.as_uri(), tmp_path / "profile", width)
    found = re.search(r'<pre id="result">(.*?)</pre>', text, re.S)
    assert found, "the driver did not finish: " + re.search(r"<html[^>]*>", text)[0]
    out = json.loads(html.unescape(found[1]))
    assert out["first"] == "RoRo @ 0.4 / 2"
    assert out["next"] == "confidence threshold / 3" and out["back"] == "all-small / 1"
    assert out["wrong"] == [8, True]
    assert not any(out["before"]) and all(out["after"]) and len(out["after"]) > 4
    assert out["all"] == 0
    assert [hidden for name, hidden in out["axes"]] == ["generated" in name for name, _ in out["axes"]]
    assert out["tip"][0] is False and "Accuracy" in out["tip"][1] and "FLOPs, total" in out["tip"][1]
    assert out["tipGone"] is True
    assert out["up"] == sorted(out["up"]) and out["down"] == out["up"][::-1]
    assert out["wide"] <= 0, "the page scrolls sideways"
