// A curve over steps as SVG, with axes.
import { $, drawn } from "./parts.js";

const LEFT = 46, RIGHT = 346, TOP = 12, BOTTOM = 150;

// points: [step, value]; raw: the same before smoothing, drawn thinner; range: of the values, if it is known.
export function curve(id, points, name, { raw = [], range = null } = {}) {
  const svg = $(id), ok = ([, y]) => y !== null && Number.isFinite(y);
  const json = JSON.stringify([points, name, raw]);
  if (svg.dataset.shown === json) return;
  svg.dataset.shown = json;
  svg.dataset.points = points.filter(ok).length;
  svg.replaceChildren();
  points = points.filter(ok);
  raw = raw.filter(ok);
  const add = (tag, attributes, text) => svg.append(drawn(tag, attributes, text));
  if (!points.length) {
    add("rect", { x: 0, y: TOP - 4, width: 360, height: BOTTOM - TOP + 8, rx: 6, class: "bare" });
    add("text", { x: 180, y: 86, "text-anchor": "middle" }, "nothing measured yet");
    svg.setAttribute("aria-label", `${name}: nothing measured yet`);
    return;
  }
  const xs = points.map(([x]) => x), all = [...points, ...raw].map(([, y]) => y);
  const ys = ticks(...(range || [Math.min(...all), Math.max(...all)]), 5), across = ticks(xs[0], Math.max(...xs), 5, true);
  const [low, high] = [ys[0], ys.at(-1)], [first, last] = [xs[0], Math.max(...xs, xs[0] + 1)];
  const place = ([x, y]) => [LEFT + (RIGHT - LEFT) * (x - first) / (last - first), BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low)];
  const line = (all) => all.map((point) => place(point).map((v) => v.toFixed(1)).join(",")).join(" ");
  for (const y of ys) {
    const at = place([first, y])[1];
    add("line", { x1: LEFT, x2: RIGHT, y1: at, y2: at, class: "grid" });
    add("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, tidy(y, ys));
  }
  for (const x of across.filter((one) => one >= first && one <= last)) {
    add("text", { x: place([x, low])[0], y: BOTTOM + 17, "text-anchor": "middle" }, String(x));
  }
  add("text", { x: (LEFT + RIGHT) / 2, y: BOTTOM + 35, "text-anchor": "middle" }, "step");
  if (raw.length) add("polyline", { points: line(raw), class: "raw" });
  add("polyline", { points: line(points) });
  const dots = raw.length ? points.slice(-1) : points;
  for (const point of dots) add("circle", { cx: place(point)[0], cy: place(point)[1], r: 3.5 });
  const [x, y] = place(points.at(-1)), value = points.at(-1)[1].toFixed(3);
  const right = x > RIGHT - 40;
  add("text", { x: right ? RIGHT : x + 8, y: y < TOP + 22 ? y + 20 : y - 9, "text-anchor": right ? "end" : "start", class: "now" }, value);
  const told = points.length > 1 ? `${points[0][1].toFixed(3)} at step ${xs[0]}, ${value} at step ${xs.at(-1)}` : `${value} at step ${xs[0]}`;
  svg.setAttribute("aria-label", `${name}: ${told}`);
}

// Round numbers that span a range.
function ticks(low, high, most, whole = false) {
  if (!(high > low)) [low, high] = whole ? [low, low + 1] : [low - Math.abs(low) * 0.1 - 0.01, high + Math.abs(high) * 0.1 + 0.01];
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let k = Math.floor(low / step + 1e-9); k * step < high + step * 0.999; k += 1) found.push(k * step);
  return found;
}

function tidy(value, all) {
  const digits = Math.min(4, Math.max(0, -Math.floor(Math.log10(all[1] - all[0]) + 1e-9)));
  return value.toFixed(digits);
}

export function smooth(rows) {
  let mean = null;
  return rows.filter(([, y]) => y !== null).map(([x, y]) => {
    mean = mean === null ? y : 0.9 * mean + 0.1 * y;
    return [x, mean];
  });
}
