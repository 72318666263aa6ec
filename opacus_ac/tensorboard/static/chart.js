// One line chart in SVG, with axes, a crosshair that all charts share, and a tooltip. All text is set as text.

import { format, linearDomain, linearScale, linearTicks, logDomain, logScale, logTicks, nearest, withError } from "./scale.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 210;
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
  constructor(panel, onCursor) {
    this.panel = panel;
    this.onCursor = onCursor;
    this.figure = element("figure", { class: "panel", id: `panel-${panel.id}` });
    const caption = element("figcaption");
    caption.append(element("h2", {}, panel.title), element("span", { class: "unit" }, panel.unit));
    this.plot = element("div", { class: "plot" });
    this.tooltip = element("div", { class: "tooltip", hidden: "" });
    this.figure.append(caption, this.plot);
    if (panel.note) this.figure.append(element("p", { class: "note" }, panel.note));
  }

  draw(content, description) {
    this.content = content;
    this.figure.hidden = Boolean(this.panel.optional) && !content.values.length;
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
    for (const band of content.bands) this.svg.append(this.band(band));
    for (const line of content.lines) this.drawLine(line);
    this.cursor = shape("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    this.svg.append(this.cursor);
    this.listen();
    this.plot.replaceChildren(this.svg, this.tooltip);
    if (focused) this.svg.focus({ preventScroll: true });
  }

  emptyText() {
    const infinite = this.panel.id === "epsilon" && this.content.values.length;
    return infinite ? "Epsilon is infinite: no bound holds." : "Not written by the chosen runs.";
  }

  setScales(known) {
    const steps = this.content.lines.flatMap((l) => l.steps);
    const [first, end] = extent(steps);
    const bandValues = this.content.bands.flatMap((b) => [...b.low, ...b.high]);
    const [low, high] = extent(this.panel.log ? known : known.concat(bandValues));
    const [bottom, top] = [HEIGHT - MARGIN.bottom, MARGIN.top];
    this.xDomain = [this.panel.histogram ? first : Math.min(first, 0), end > first ? end : first + 1];
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
    this.svg.append(shape("path", { class: `line ${line.kind} run-${line.slot}`, d: path, "data-points": dots.length }));
    if (line.kind !== "value") return; // an outline has no end
    const [cx, cy] = dots.at(-1);
    this.svg.append(shape("circle", { class: `end run-${line.slot}`, cx, cy, r: 3 }));
  }

  band(band) {
    const keep = band.steps.map((s, i) => [s, band.low[i], band.high[i]]).filter((p) => p[1] !== null && p[2] !== null);
    const upper = keep.map(([s, , high]) => `${this.x(s).toFixed(1)} ${this.y(high).toFixed(1)}`);
    const lower = keep.map(([s, low]) => `${this.x(s).toFixed(1)} ${this.y(low).toFixed(1)}`).reverse();
    return shape("path", { class: `band ${band.kind} run-${band.slot}`, d: `M${upper.concat(lower).join("L")}Z` });
  }

  listen() {
    this.svg.addEventListener("pointermove", (event) => {
      const left = this.svg.getBoundingClientRect().left;
      const share = (event.clientX - left - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
      this.onCursor(this, this.xDomain[0] + share * (this.xDomain[1] - this.xDomain[0]), false);
    });
    this.svg.addEventListener("pointerleave", () => this.onCursor(this, null, false));
    this.svg.addEventListener("blur", () => this.onCursor(this, null, false));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  // Arrow keys walk over the points of the first run; Home and End jump; Escape hides.
  key(event) {
    const steps = this.content.values[0].steps;
    const end = steps.length - 1;
    const at = this.step === null || this.step === undefined ? end : nearest(steps, this.step);
    const moves = { ArrowLeft: Math.max(0, at - 1), ArrowRight: Math.min(end, at + 1), Home: 0, End: end };
    if (event.key === "Escape") this.onCursor(this, null, true);
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
      row.append(element("i", { class: "swatch", "aria-hidden": "true" }), element("span", {}, text));
      return { row, text };
    });
    this.tooltip.replaceChildren(...rows.map((r) => r.row));
    this.tooltip.classList.toggle("flip", x > this.width / 2);
    this.tooltip.style.left = `${x}px`;
    return rows.map((r) => r.text).join("; ");
  }
}
