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
  // decimals that the drawing resolves, and of these those up to the second digit of the uncertainty
  const decimals = (unit, half) => {
    const most = Math.max(0, Math.min(12, Math.floor(-Math.log10(unit))));
    return half > 0 ? Math.min(most, Math.max(0, 1 - Math.floor(Math.log10(half)))) : most;
  };
  const shown = (value, places, sign) => {
    const text = value.toFixed(places).replace("-", "\u2212");
    if (!Number(value.toFixed(places))) return text.replace("\u2212", "");
    return sign && value > 0 ? "+" + text : text;
  };
  const read = event => {
    const chart = event.target.closest && event.target.closest(".chart"), plot = chart && chart.querySelector(".plot");
    tip.hidden = true;
    if (!plot) return;
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const box = plot.viewBox.baseVal, width = box.width, height = box.height;
    const x = (place.x - plot.getAttribute("x")) * width / plot.getAttribute("width");
    const [first, last] = pair(chart.dataset.steps), [low, high] = pair(chart.dataset.values);
    const log = "log" in chart.dataset, apart = chart.classList.contains("difference"), near = [], lines = [];
    let step = null;
    for (const path of plot.querySelectorAll(".line")) {
      const group = path.parentNode;
      if (getComputedStyle(group).display === "none") continue;
      const all = points(path);
      if (x < all[0][0] - 60 || x > all[all.length - 1][0] + 60) continue;
      const at = all.reduce((best, p, i) => Math.abs(p[0] - x) < Math.abs(all[best][0] - x) ? i : best, 0);
      const band = group.querySelector(".band"), edge = band ? points(band) : null;  // the upper edge, then the lower
      near.push([group.dataset.arm, all[at], edge && [edge[edge.length - 1 - at][1], edge[at][1]]]);
    }
    const value = y => log ? low * Math.pow(high / low, 1 - y / height) : low + (1 - y / height) * (high - low);
    for (const [arm, point, edges] of near) {
      const mean = value(point[1]), [least, most] = edges ? edges.map(value) : [mean, mean];
      const unit = log ? mean * (Math.pow(high / low, 1 / height) - 1) : (high - low) / height;
      const places = decimals(unit, (most - least) / 2);
      const interval = edges && apart ? ` (${shown(least, places, true)} to ${shown(most, places, true)})` : "";
      if (step === null) step = first + point[0] / width * (last - first);
      const outside = point[1] > height ? "below" : point[1] < 0 ? "above" : "";
      lines.push([arm, outside || shown(mean, places, apart) + interval]);
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
