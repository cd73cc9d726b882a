"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

window.addEventListener("error", (e) => { document.documentElement.dataset.error = e.message; });

// -- tooltips: hover, touch, or focus a chart and use the arrow keys
const tip = $("#tip");
let lit = null;
function light(point, x, y) {
  if (lit) lit.classList.remove("on");
  lit = point;
  tip.hidden = !point;
  if (!point) return;
  point.classList.add("on");
  tip.textContent = point.dataset.tip;
  const box = point.getBoundingClientRect();
  const left = (x ?? box.left) + 14, top = (y ?? box.top) + 14;
  tip.style.left = Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (top + tip.offsetHeight > innerHeight ? top - tip.offsetHeight - 28 : top) + "px";
}
for (const chart of $$("svg.chart")) {
  chart.addEventListener("pointermove", (e) => light(e.target.closest(".pt"), e.clientX, e.clientY));
  chart.addEventListener("pointerleave", () => light(null));
  chart.addEventListener("blur", () => light(null));
  chart.addEventListener("keydown", (e) => {
    if (e.key === "Escape") return light(null);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (!step) return;
    const points = $$(".pt", chart).filter((p) => !p.closest(".off"));
    if (!points.length) return;
    e.preventDefault();
    const at = points.indexOf(lit);
    light(points[at < 0 ? 0 : (at + step + points.length) % points.length]);
  });
}

// -- which cost, which routers
for (const button of $$("[data-axis]")) {
  button.addEventListener("click", () => {
    for (const b of $$("[data-axis]")) b.setAttribute("aria-pressed", String(b === button));
    for (const p of $$(".plot")) p.hidden = !p.classList.contains("axis-" + button.dataset.axis);
  });
}
function show(button, on) {
  button.setAttribute("aria-pressed", String(on));
  for (const g of $$("g.arm")) if (g.dataset.arm === button.dataset.arm) g.classList.toggle("off", !on);
}
const legend = $$(".legend [data-arm]");
for (const b of legend) b.addEventListener("click", () => show(b, b.getAttribute("aria-pressed") !== "true"));
for (const b of $$("[data-show]")) b.addEventListener("click", () => legend.forEach((x) => show(x, b.dataset.show === "all")));

// -- sortable tables
for (const table of $$("table.sortable")) {
  const heads = $$("thead th", table);
  heads.forEach((head, column) => $("button", head)?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const h of heads) if (h.hasAttribute("aria-sort")) h.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => { const v = row.cells[column].dataset.v; return v === "" ? NaN : Number(v); };
    const rows = $$("tbody tr", table);
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return up ? x - y : y - x;
    });
    $("tbody", table).append(...rows);
  }));
}

// -- trajectory viewer; all text goes in as text nodes, never as markup
function el(tag, css, ...children) {
  const node = document.createElement(tag);
  if (css) node.className = css;
  node.append(...children.filter((c) => c !== null && c !== undefined && c !== ""));
  return node;
}
const percent = (v, digits = 1) => (100 * v).toFixed(digits) + " %";
const flops = (v) => { const k = Math.max(0, Math.floor(Math.log10(v || 1) / 3)); return (v / 1000 ** k).toPrecision(3) + " " + ["", "k", "M", "G", "T", "P", "E"][Math.min(k, 6)] + "FLOP"; };
const mark = (right) => right === null ? "" : el("span", right ? "ok" : "bad", right ? "✓ right" : "✗ wrong");
const setting = (t, arms) => arms[t.arm] + (t.knob === null ? "" : " @ " + Number(t.knob.toPrecision(4))) + (t.sample ? " #" + (t.sample + 1) : "");

function stepItem(step, index, models) {
  const label = models[step.model] ?? "model " + step.model;
  const meta = el("div", "meta",
    el("span", "who m" + step.model % 4, label),
    el("span", "", "step " + (index + 1)),
    mark(step.correct),
    el("span", "", step.tokens + " tokens, " + flops(step.flops)),
    step.probability === null ? "" : el("span", "", "chosen with p = " + step.probability.toFixed(2)),
    el("span", "", "confidence " + step.confidence.toFixed(2)));
  const item = el("li", "m" + step.model % 4, meta);
  if (step.rejected) {
    item.append(el("div", "meta", el("span", "", "draft by " + models[0] + " was discarded" + (step.draft ? ":" : ""))));
    if (step.draft) item.append(el("div", "text draft", step.draft.trim()));
  }
  item.append(el("div", "text", step.text.trim() || "(empty)"));
  return item;
}

function rubricBox(t) {
  const list = el("ol", "rubric");
  for (const c of t.rubric) {
    const known = c.p_true !== null;
    const fill = el("span", "");
    fill.style.width = known ? 100 * c.p_true + "%" : "0";
    list.append(el("li", "", el("div", "", c.sentence),
      el("div", "meta", c.tag + " ×" + c.weight, " · " + c.axis,
        known ? el("span", c.p_true >= 0.5 ? "ok" : "bad", c.p_true >= 0.5 ? "✓ holds" : "✗ does not hold") : "not judged",
        known ? el("span", "meter", fill) : "", known ? "p(true) = " + c.p_true.toFixed(2) : "")));
  }
  const score = t.score === null ? "" : el("p", "", "Judge's score S = ", el("b", "", (t.score > 0 ? "+" : "") + t.score.toFixed(2)), " on −1 … +1");
  return el("div", "", el("h3", "", "Rubric for this query and the Judge's verdicts"), list, score);
}

function render(t, models, arms) {
  const facts = el("div", "facts",
    el("span", "", "routed by ", el("b", "", setting(t, arms))),
    t.correct === null ? "" : el("span", t.correct ? "ok" : "bad", t.correct ? "✓ answer right" : "✗ answer wrong"),
    el("span", "", "answered ", el("b", "", t.predicted || "nothing"), t.answer ? " · truth " + t.answer : ""),
    el("span", "", "cost ", el("b", "", t.flops_share === null ? flops(t.generated_flops) : percent(t.flops_share, 0) + " of all-large"), " · total " + flops(t.total_flops)),
    el("span", "", (1000 * t.seconds).toFixed(0) + " ms"),
    t.discarded_tokens ? el("span", "", t.discarded_tokens + " tokens discarded") : "",
    t.finish_reason === "eos" ? "" : el("span", "bad", "ended by: " + t.finish_reason));
  const ribbon = el("div", "ribbon");
  ribbon.setAttribute("aria-hidden", "true");
  t.steps.forEach((s, i) => { const part = el("span", "m" + s.model % 4, String(i + 1)); part.style.flexGrow = s.tokens; ribbon.append(part); });
  const steps = el("ol", "steps", ...t.steps.map((s, i) => stepItem(s, i, models)));
  const cols = el("div", t.rubric.length ? "cols" : "cols single", steps, t.rubric.length ? rubricBox(t) : "");
  const none = t.rubric.length ? "" : el("p", "note", "No rubric was written for this answer.");
  $("#v-body").replaceChildren(el("p", "query", t.query.trim()), facts, t.note ? el("p", "note", t.note) : "", ribbon, cols, none);
}

const source = $("#v-data");
if (source) {
  const { models, arms, trajectories } = JSON.parse(source.textContent);
  const select = $("#v-select"), filter = $("#v-filter");
  const keep = {
    all: () => true,
    right: (t) => t.correct === true,
    wrong: (t) => t.correct === false,
    mixed: (t) => new Set(t.steps.map((s) => s.model)).size > 1,
  };
  const shown = () => trajectories[Number(select.value)];
  const open = (link = true) => {
    const t = shown();
    if (!t) return $("#v-body").replaceChildren(el("p", "missing", "No answer of this kind was kept."));
    render(t, models, arms);
    if (link) history.replaceState(null, "", "#t=" + select.value);
  };
  const fill = () => {
    const groups = new Map();
    trajectories.forEach((t, i) => { if (keep[filter.value](t)) groups.set(t.query_id, [...(groups.get(t.query_id) ?? []), [t, i]]); });
    select.replaceChildren(...[...groups].map(([id, members]) => {
      const group = el("optgroup", "");
      group.label = id;
      for (const [t, i] of members) {
        const option = el("option", "", (t.correct ? "✓ " : t.correct === false ? "✗ " : "") + setting(t, arms) + " · " + id);
        option.value = i;
        group.append(option);
      }
      return group;
    }));
  };
  const move = (by) => {
    const n = select.options.length;
    if (!n) return;
    select.selectedIndex = (select.selectedIndex + by + n) % n;
    open();
  };
  const follow = () => {
    const m = /^#t=(\d+)$/.exec(location.hash);
    if (!m || !trajectories[Number(m[1])]) return false;
    filter.value = "all";
    fill();
    select.value = m[1];
    open(false);
    $("#viewer").scrollIntoView();
    return true;
  };
  filter.addEventListener("change", () => { fill(); open(); });
  select.addEventListener("change", () => open());
  $("#v-prev").addEventListener("click", () => move(-1));
  $("#v-next").addEventListener("click", () => move(1));
  window.addEventListener("hashchange", follow);
  document.addEventListener("keydown", (e) => {
    if (e.target.closest("select, svg, .scroll") || e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "ArrowRight") move(1);
    if (e.key === "ArrowLeft") move(-1);
  });
  fill();
  if (!follow()) {
    const best = [(t) => keep.mixed(t) && t.rubric.length, keep.mixed].map((f) => trajectories.findIndex(f)).find((i) => i >= 0);
    select.value = best ?? 0;
    open(false);
  }
}
document.documentElement.dataset.ready = "1";
