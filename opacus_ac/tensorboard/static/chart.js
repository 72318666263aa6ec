// One line chart in SVG, with axes, a crosshair that all charts share, and a tooltip. All text is set as text.

import { saver } from "./save.js";
import { format, linearDomain, linearScale, linearTicks, logDomain, logScale, logTicks, nearest, withError } from "./scale.js";

const SVG = "http://www.w3.org/2000/svg";
export const HEIGHT = 210;
const MARGIN = { top: 10, right: 14, bottom: 38, left: 58 };

export function element(tag, attributes = {}, text = null) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

function shape(tag, attributes, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

// A piece of a run's line, as its curves have it: colour and dashes. Empty for a run that is not shown.
export function swatch(slot) {
  const box = shape("svg", { class: "swatch", viewBox: "0 0 26 10", "aria-hidden": "true" });
  if (slot !== undefined) box.append(shape("line", { class: `line value run-${slot}`, x1: 0, x2: 26, y1: 5, y2: 5 }));
  return box;
}

function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value === null) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

export class Chart {
  constructor(panel, onCursor, onZoom) {
    this.panel = panel;
    this.onCursor = onCursor;
    this.onZoom = onZoom;
    this.range = null; // [first, last] step shown; null for all
    this.figure = element("figure", { class: "panel", id: `panel-${panel.id}` });
    const caption = element("figcaption");
    caption.append(element("h2", {}, panel.title), element("span", { class: "unit" }, panel.unit), saver(this));
    this.plot = element("div", { class: "plot" });
    this.tooltip = element("div", { class: "tooltip", hidden: "" });
    this.figure.append(caption, this.plot);
    if (panel.note) this.figure.append(element("p", { class: "note" }, panel.note));
  }

  draw(content, description) {
    this.content = content;
    this.figure.hidden = content.folded || (Boolean(this.panel.optional) && !content.values.length);
    if (this.figure.hidden) {
      this.svg = null;
      this.plot.replaceChildren();
      return;
    }
    this.description = description;
    const known = content.lines.flatMap((l) => l.values).filter((v) => v !== null && (!this.panel.log || v > 0));
    const focused = document.activeElement === this.svg;
    if (!content.values.length || !known.length) {
      this.svg = null;
      this.plot.replaceChildren(element("p", { class: "empty" }, this.emptyText()));
      return;
    }
    this.width = Math.max(240, this.plot.clientWidth);
    this.svg = shape("svg", { width: this.width, height: HEIGHT, role: "img", tabindex: "0", "aria-label": description });
    this.setScales(known);
    this.drawAxes();
    this.inner = this.clipped();
    for (const band of content.bands) this.inner.append(this.band(band));
    for (const line of content.lines) this.drawLine(line);
    this.svg.append(this.inner);
    this.cursor = shape("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    this.svg.append(this.cursor);
    this.listen();
    this.plot.replaceChildren(this.svg, this.tooltip);
    if (focused) this.svg.focus({ preventScroll: true });
  }

  emptyText() {
    const infinite = this.panel.id === "epsilon" && this.content.values.length;
    if (infinite) return "Epsilon is infinite: no bound holds.";
    return this.panel.missing ?? "Not written by the chosen runs.";
  }

  // An inner drawing that cuts off what lies outside the axes.
  clipped() {
    const [x, width] = [MARGIN.left - 4, this.width - MARGIN.left - MARGIN.right + 8];
    return shape("svg", { class: "inner", x, y: 0, width, height: HEIGHT, viewBox: `${x} 0 ${width} ${HEIGHT}` });
  }

  setScales(all) {
    const [first, end] = extent(this.content.lines.flatMap((l) => l.steps));
    const zoomed = this.panel.histogram ? null : this.range;
    const inside = (steps, values) => (zoomed ? values.filter((_, i) => steps[i] >= zoomed[0] && steps[i] <= zoomed[1]) : values);
    const seen = this.content.lines.flatMap((l) => inside(l.steps, l.values)).filter((v) => v !== null && (!this.panel.log || v > 0));
    const known = seen.length ? seen : all;
    const bandValues = this.content.bands.flatMap((b) => [...inside(b.steps, b.low), ...inside(b.steps, b.high)]);
    const [low, high] = extent(this.panel.log ? known : known.concat(bandValues));
    const [bottom, top] = [HEIGHT - MARGIN.bottom, MARGIN.top];
    this.xDomain = zoomed ?? [this.panel.histogram ? first : Math.min(first, 0), end > first ? end : first + 1];
    this.yDomain = this.panel.log ? logDomain(low, high) : linearDomain(low, high, this.panel);
    this.x = linearScale(...this.xDomain, MARGIN.left, this.width - MARGIN.right);
    this.y = (this.panel.log ? logScale : linearScale)(...this.yDomain, bottom, top);
  }

  drawAxes() {
    const [right, bottom] = [this.width - MARGIN.right, HEIGHT - MARGIN.bottom];
    const group = shape("g", { class: "axes", "aria-hidden": "true" });
    const yTicks = this.panel.log ? logTicks(...this.yDomain) : linearTicks(...this.yDomain);
    for (const tick of yTicks) {
      const y = this.y(tick);
      group.append(shape("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }));
      group.append(shape("text", { class: "tick y", x: MARGIN.left - 7, y: y + 4 }, format(tick)));
    }
    const xTicks = linearTicks(...this.xDomain, this.width < 360 ? 3 : 6).filter(Number.isInteger);
    for (const tick of xTicks) {
      const x = this.x(tick);
      group.append(shape("line", { class: "mark", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      group.append(shape("text", { class: "tick x", x, y: bottom + 16 }, format(this.panel.histogram ? 10 ** tick : tick)));
    }
    group.append(shape("line", { class: "base", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
    group.append(shape("text", { class: "axis", x: (MARGIN.left + right) / 2, y: HEIGHT - 6 }, this.panel.histogram ? "gradient norm" : "step"));
    this.svg.append(group);
  }

  drawLine(line) {
    const dots = [];
    let path = "";
    let pen = "M";
    line.steps.forEach((step, i) => {
      const value = line.values[i];
      if (value === null || (this.panel.log && !(value > 0))) {
        pen = "M"; // a gap, not a bridge
        return;
      }
      dots.push([this.x(step), this.y(value)]);
      path += `${pen}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
      pen = "L";
    });
    if (!dots.length) return;
    this.inner.append(shape("path", { class: `line ${line.kind} run-${line.slot}`, d: path, "data-points": dots.length }));
    if (line.kind !== "value") return; // an outline has no end
    const [cx, cy] = dots.at(-1);
    this.inner.append(shape("circle", { class: `end run-${line.slot}`, cx, cy, r: 3 }));
  }

  band(band) {
    const keep = band.steps.map((s, i) => [s, band.low[i], band.high[i]]).filter((p) => p[1] !== null && p[2] !== null);
    const upper = keep.map(([s, , high]) => `${this.x(s).toFixed(1)} ${this.y(high).toFixed(1)}`);
    const lower = keep.map(([s, low]) => `${this.x(s).toFixed(1)} ${this.y(low).toFixed(1)}`).reverse();
    return shape("path", { class: `band ${band.kind} run-${band.slot}`, d: `M${upper.concat(lower).join("L")}Z` });
  }

  listen() {
    this.svg.addEventListener("pointermove", (event) => this.onCursor(this, this.stepAt(event), false));
    if (!this.panel.histogram) this.listenToZoom();
    this.svg.addEventListener("pointerleave", () => this.onCursor(this, null, false));
    this.svg.addEventListener("blur", () => this.onCursor(this, null, false));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  stepAt(event) {
    const share = (event.clientX - this.svg.getBoundingClientRect().left - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    return this.xDomain[0] + share * (this.xDomain[1] - this.xDomain[0]);
  }

  // Dragging shows a stretch of steps in all charts; a double click shows all steps again.
  listenToZoom() {
    let from = null;
    const mark = shape("rect", { class: "zoom", y: MARGIN.top, height: HEIGHT - MARGIN.top - MARGIN.bottom, visibility: "hidden" });
    this.svg.append(mark);
    const ends = (event) => [from, this.stepAt(event)].sort((a, b) => a - b).map((s) => Math.min(this.xDomain[1], Math.max(this.xDomain[0], s)));
    this.svg.addEventListener("pointerdown", (event) => { from = event.button === 0 ? this.stepAt(event) : null; });
    this.svg.addEventListener("pointermove", (event) => {
      if (from === null) return;
      const [low, high] = ends(event).map((step) => this.x(step));
      for (const [name, value] of Object.entries({ x: low, width: high - low, visibility: "visible" })) mark.setAttribute(name, value);
    });
    this.svg.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const [low, high] = ends(event);
      from = null;
      mark.setAttribute("visibility", "hidden");
      if (this.x(high) - this.x(low) > 8 && high - low >= 1) this.onZoom([low, high]);
    });
    this.svg.addEventListener("pointerleave", () => {
      from = null;
      mark.setAttribute("visibility", "hidden");
    });
    this.svg.addEventListener("dblclick", () => this.onZoom(null));
  }

  // Arrow keys walk over the points of the first run; Home and End jump; Escape hides and shows all steps again.
  key(event) {
    const steps = this.content.values[0].steps;
    const end = steps.length - 1;
    const at = this.step === null || this.step === undefined ? end : nearest(steps, this.step);
    const moves = { ArrowLeft: Math.max(0, at - 1), ArrowRight: Math.min(end, at + 1), Home: 0, End: end };
    if (event.key === "Escape") {
      this.onCursor(this, null, true);
      if (this.range) this.onZoom(null);
    }
    else if (event.key in moves) this.onCursor(this, steps[moves[event.key]], true);
    else return;
    event.preventDefault();
  }

  // Show the crosshair at `step`; the chart under the pointer also says the values.
  setCursor(step, own) {
    this.step = step;
    if (!this.svg) return "";
    const visible = step !== null && step >= this.xDomain[0] && step <= this.xDomain[1];
    this.cursor.setAttribute("visibility", visible ? "visible" : "hidden");
    this.tooltip.hidden = !(visible && own);
    if (!visible) return "";
    const x = this.x(step);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    return own ? this.fillTooltip(step, x) : "";
  }

  fillTooltip(step, x) {
    const rows = this.content.values.map((line) => {
      const i = nearest(line.steps, step);
      const value = line.errors ? `running mean ${withError(line.values[i], line.errors[i])}` : format(line.values[i] ?? NaN, 6);
      const place = this.panel.histogram ? `records at norm ${format(10 ** line.steps[i], 2)}, step ${format(line.at)}`
        : `at step ${format(line.steps[i])}`;
      const text = `${line.label}: ${value} ${place}`;
      const row = element("div", { class: `row run-${line.slot}` });
      row.append(swatch(line.slot), element("span", {}, text));
      return { row, text };
    });
    this.tooltip.replaceChildren(...rows.map((r) => r.row));
    this.tooltip.style.left = "0";
    this.tooltip.style.left = `${Math.max(0, Math.min(x, this.width - this.tooltip.offsetWidth))}px`;
    return rows.map((r) => r.text).join("; ");
  }
}
