(() => {
  const tip = document.getElementById("tip"), known = new WeakMap();
  const names = new Map([...document.querySelectorAll("[data-name]")].map(e => [e.dataset.key, e.dataset.name]));
  const pair = text => text.split(" ").map(Number);
  const points = path => {
    if (!known.has(path)) {
      const n = path.getAttribute("d").match(/-?\d+/g).map(Number), all = [[n[0], n[1]]];
      for (let i = 2; i + 1 < n.length; i += 2) {
        const last = all[all.length - 1];
        all.push([last[0] + n[i], last[1] + n[i + 1]]);
      }
      known.set(path, all);
    }
    return known.get(path);
  };
  // as many digits as the resolution of the drawing allows
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
