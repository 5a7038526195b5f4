"""The page's style and its one script, which only adds the reading of values under the pointer."""

from collections.abc import Sequence

from pipeline.page.colors import DARK, DASHES, LIGHT, readable, settle

STYLE = """
:root { color-scheme: light dark; --paper: LIGHT; --ink: #1b1f24; --soft: #59626c; --rule: #dde1e6; --tint: #f4f6f8;
  --good: #116329; --bad: #a40e26; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 20px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 6px; }
p { margin: 4px 0 10px; max-width: 62rem; }
small, .soft, figcaption small { color: var(--soft); font-size: 13px; font-weight: normal; }
a { color: inherit; }
code { font: 13px/1.4 ui-monospace, Menlo, Consolas, monospace; }
.verdicts { list-style: none; margin: 12px 0; padding: 0; }
.verdicts li { padding: 5px 0 5px 30px; border-top: 1px solid var(--rule); position: relative; }
.verdicts li.control { margin-left: 30px; }
.verdicts .key { position: absolute; left: 0; top: 13px; }
.better { color: var(--good); font-weight: 650; }
.worse { color: var(--bad); font-weight: 650; }
.undecided { font-weight: 650; }
.key { width: 24px; height: 8px; flex: none; overflow: visible; }
.key line { stroke: var(--arm); stroke-width: 2.5; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; margin: 8px 0; }
.scroll:focus-visible { outline: 2px solid var(--soft); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13.5px; overflow-wrap: normal; }
th, td { padding: 6px 12px; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { font-weight: 600; background: var(--tint); vertical-align: bottom; white-space: pre-line; line-height: 1.3;
  max-width: 240px; overflow-wrap: break-word; }
tr > th:first-child { position: sticky; left: 0; border-right: 1px solid var(--rule); }
tbody th { font-weight: 600; background: var(--paper); }
tbody th .name, tbody th code { width: max-content; max-width: 300px; white-space: normal; overflow-wrap: anywhere; }
tbody th code { display: block; }
th .name { display: flex; gap: 8px; align-items: center; }
th .name.control { padding-left: 18px; font-weight: 500; }
td.number { text-align: right; }
td.same { color: var(--soft); }
td.differs { font-weight: 650; }
td small { display: block; }
.bar { display: flex; align-items: center; gap: 8px; min-width: 190px; }
.bar i { display: block; height: 12px; background: var(--arm); border-radius: 2px; flex: none; }
.forest { margin: 10px 0; }
.forest .row { display: grid; grid-template-columns: 205px 1fr 300px; align-items: stretch; }
.forest .row + .row { border-top: 1px solid var(--rule); }
.forest .who, .forest .figures { align-self: center; font-size: 13.5px; padding: 4px 0; }
.forest .who .name { display: flex; gap: 8px; align-items: center; }
.forest .control .who { padding-left: 20px; }
.lane { position: relative; min-height: 42px; }
.strip { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.axis-row svg { width: 100%; height: 22px; display: block; overflow: visible; }
.forest .zero { stroke: var(--ink); stroke-width: 1; }
.forest rect.reach { fill: var(--soft); opacity: .13; }
.forest line.reach { stroke: var(--soft); stroke-dasharray: 2 2; }
.forest .interval { stroke: var(--arm); stroke-width: 2; }
.forest .mean { fill: var(--arm); stroke: var(--arm); stroke-width: 2; }
.forest .control .mean { fill: var(--paper); }
.forest .seed { fill: var(--arm); opacity: .6; }
.directions { display: flex; justify-content: space-between; color: var(--soft); font-size: 12.5px; padding: 0 4%; }
svg text { fill: var(--soft); font-size: 11.5px; }
.axis { stroke: var(--soft); }
.grid { stroke: var(--rule); }
.legend { position: sticky; top: 0; z-index: 2; background: var(--paper); border: 0; margin: 0 0 10px; padding: 6px 0;
  border-bottom: 1px solid var(--rule); display: flex; flex-wrap: wrap; gap: 2px 18px; min-width: 0; }
.legend label { display: flex; align-items: center; gap: 7px; font-size: 13.5px; padding: 4px 0; cursor: pointer;
  white-space: nowrap; }
.legend input { margin: 0; width: 16px; height: 16px; accent-color: var(--arm); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px 20px;
  margin-bottom: 20px; }
h3 { font-size: 1rem; margin: 14px 0 4px; }
.panel { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 13.5px; }
.chart { width: 100%; height: auto; display: block; touch-action: pan-y; }
.plot { overflow: hidden; }
.plot .line { fill: none; stroke: var(--arm); stroke-width: 17; stroke-linejoin: round; stroke-linecap: round;
  stroke-dasharray: var(--dash); }
.plot .dot { stroke-width: 60; }
.plot .band { fill: var(--arm); opacity: .14; }
.gate { stroke: var(--arm); stroke-width: 1.3; }
#tip { position: fixed; z-index: 3; pointer-events: none; background: var(--paper); border: 1px solid var(--soft);
  border-radius: 5px; padding: 5px 9px; font-size: 12.5px; box-shadow: 0 2px 8px #0003; max-width: 300px; }
#tip div { display: flex; gap: 8px; align-items: center; }
#tip b { margin-left: auto; padding-left: 10px; }
[hidden] { display: none !important; }
@media (max-width: 720px) {
  body { padding: 14px; }
  .forest .row { grid-template-columns: 1fr; padding-top: 6px; }
  .forest .figures { order: -1; padding-bottom: 0; }
  .forest .who { order: -2; padding: 0; }
  .forest .axis-row .who { display: none; }
  .legend { flex-wrap: nowrap; overflow-x: auto; }
  thead th, tbody th, td { padding: 6px 9px; }
  tbody th .name, tbody th code { max-width: 38vw; }
}
"""

DARK_STYLE = """
--paper: DARK; --ink: #e6e9ec; --soft: #a3adb8; --rule: #30363d; --tint: #1d2228; --good: #57d27c; --bad: #ff8b85;
"""

SCRIPT = """
(() => {
  const tip = document.getElementById("tip"), known = new WeakMap();
  const names = new Map([...document.querySelectorAll("[data-name]")].map(e => [e.dataset.key, e.dataset.name]));
  const pair = text => text.split(" ").map(Number);
  const points = path => {
    if (!known.has(path)) {
      const n = path.getAttribute("d").match(/-?\\d+/g).map(Number), found = [[n[0], n[1]]];
      for (let i = 2; i + 1 < n.length; i += 2) {
        const last = found[found.length - 1];
        found.push([last[0] + n[i], last[1] + n[i + 1]]);
      }
      known.set(path, found);
    }
    return known.get(path);
  };
  // a value read off the drawing has as many digits as the drawing is fine
  const shown = (value, unit) => {
    const digits = Math.floor(Math.log10(Math.abs(value) || 1)) + Math.floor(-Math.log10(unit)) + 1;
    return digits < 1 ? "0" : value.toPrecision(Math.min(digits, 12));
  };
  const read = event => {
    const chart = event.target.closest && event.target.closest(".chart"), plot = chart && chart.querySelector(".plot");
    tip.hidden = true;
    if (!plot) return;
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const box = plot.viewBox.baseVal, width = box.width, height = box.height;
    const x = (place.x - plot.getAttribute("x")) * width / plot.getAttribute("width");
    const [first, last] = pair(chart.dataset.steps), [low, high] = pair(chart.dataset.values);
    const log = "log" in chart.dataset, near = [], lines = [];
    let step = null;
    for (const path of plot.querySelectorAll(".line")) {
      const group = path.parentNode;
      if (getComputedStyle(group).display === "none") continue;
      const all = points(path);
      if (x < all[0][0] - 60 || x > all[all.length - 1][0] + 60) continue;
      near.push([group.dataset.arm, all.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best)]);
    }
    for (const [arm, point] of near) {
      const share = 1 - point[1] / height;
      const value = log ? low * Math.pow(high / low, share) : low + share * (high - low);
      const unit = log ? value * (Math.pow(high / low, 1 / height) - 1) : (high - low) / height;
      if (step === null) step = first + point[0] / width * (last - first);
      lines.push([arm, share < 0 ? "below" : share > 1 ? "above" : shown(value, unit)]);
    }
    if (!lines.length) return;
    tip.replaceChildren();
    tip.append("step " + Math.round(step));
    for (const [arm, value] of lines) {
      const row = document.createElement("div"), key = document.querySelector(`.legend [data-key="${arm}"] .key`);
      const bold = document.createElement("b");
      bold.textContent = value;
      row.append(key.cloneNode(true), names.get(arm), bold);
      tip.append(row);
    }
    tip.hidden = false;
    const size = tip.getBoundingClientRect(), right = document.documentElement.clientWidth;
    const beside = event.clientX + 16 + size.width > right ? event.clientX - 16 - size.width : event.clientX + 16;
    tip.style.left = Math.max(4, beside) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 12, innerHeight - size.height - 4)) + "px";
  };
  addEventListener("pointermove", read);
  addEventListener("pointerdown", read);
  document.documentElement.addEventListener("pointerleave", () => { tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
"""


def style(colors: Sequence[str]) -> str:
    """The style sheet for arms of these colours, in the order of their indices."""
    settled = settle(colors)
    light = "".join(_arm(index, color, LIGHT) for index, color in enumerate(settled))
    dark = "".join(_arm(index, color, DARK) for index, color in enumerate(settled))
    # a box without its tick hides the arm in every panel; no script is needed for that
    switches = "".join(
        f"body:has(#show-{index}:not(:checked)) .panels .a{index} {{ display: none; }}\n"
        for index in range(len(colors))
    )
    dashes = "".join(
        f".a{index} {{ --dash: {_dash(index, 10) or 'none'}; }} .key.a{index} line {{ stroke-dasharray: "
        f"{_dash(index, 1) or 'none'}; }}\n"
        for index in range(len(colors))
    )
    at_night = f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK_STYLE.replace('DARK', DARK)} }} {dark} }}"
    return STYLE.replace("LIGHT", LIGHT) + light + dashes + at_night + "\n" + switches


def _arm(index: int, color: str, background: str) -> str:
    return f".a{index} {{ --arm: {readable(color, background)}; }}\n"


def _dash(index: int, unit: int) -> str:
    return " ".join(f"{float(length) * unit:g}" for length in DASHES[index % len(DASHES)].split())
