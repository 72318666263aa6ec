// Names by which a person tells runs apart, what differs between them, and the list to choose from: sorted, filtered.

import { element, swatch } from "./chart.js";
import { format } from "./scale.js";

// The Trainer calls a run's folder by time and machine: Nov29_08-19-09_host.
const STAMP = /^([A-Z][a-z]{2})(\d\d)_(\d\d)-(\d\d)-(\d\d)_.*$/;
const readable = (part) => part.replace(STAMP, (_, month, day, h, m, s) => `${Number(day)} ${month} ${h}:${m}:${s}`);

// Short names: without the folders that all share, "runs" and machine names; the whole name where two would be alike.
export function labels(names) {
  const parts = names.map((name) => name.split("/"));
  let shared = 0;
  const first = parts[0] ?? [];
  while (names.length > 1 && parts.every((p) => p.length > shared + 1 && p[shared] === first[shared])) shared += 1;
  const short = parts.map((p) => p.slice(shared).filter((part) => part !== "runs").map(readable).join(" / "));
  const found = short.map((name, i) => (name && short.indexOf(name) === short.lastIndexOf(name) ? name : names[i]));
  return new Map(names.map((name, i) => [name, found[i] === "." ? "this folder" : found[i]]));
}

const IGNORED = new Set(["version", "private", "warnings", "released", "noise_source", "settings", "first_step",
  "first_bound", "next_bound", "ended", "unreadable"]);
const plain = (value) => (typeof value === "number" ? format(value) : value === null ? "none" : String(value));

// Public settings of a run as [name, text].
function settings(meta) {
  const own = Object.entries(meta).filter(([name]) => !IGNORED.has(name));
  const more = meta.settings && typeof meta.settings === "object" ? Object.entries(meta.settings) : [];
  return new Map([...own, ...more].map(([name, value]) => [name.replaceAll("_", " "), plain(value)]));
}

// For each run, in words, the settings that are not the same in all.
export function differences(runs) {
  const all = runs.map((run) => settings(run.meta));
  const names = [...new Set(all.flatMap((one) => [...one.keys()]))];
  const differ = names.filter((name) => new Set(all.map((one) => one.get(name))).size > 1);
  return all.map((one) => differ.filter((name) => one.has(name)).map((name) => `${name} ${one.get(name)}`));
}

const epsilon = (run) => (typeof run.meta.target_epsilon === "number" ? run.meta.target_epsilon : Infinity);
const ORDERS = {
  latest: ["latest first", () => 0],
  name: ["by name", (a, b) => a.label.localeCompare(b.label, "en", { numeric: true })],
  epsilon: ["by target epsilon", (a, b) => epsilon(a) - epsilon(b)],
};

// Filter and order of the list; it is built once, so that typing is never interrupted by new points.
export class RunTools {
  constructor(onChange) {
    this.filter = element("input", { type: "search", placeholder: "filter by name or setting", "aria-label": "Filter runs" });
    this.order = element("select", { "aria-label": "Order of runs" });
    this.order.append(...Object.entries(ORDERS).map(([value, [text]]) => element("option", { value }, text)));
    this.filter.addEventListener("input", onChange);
    this.order.addEventListener("change", onChange);
    this.box = element("div", { class: "tools" });
    this.box.append(this.filter, this.order);
  }

  sorted(runs) {
    return [...runs].sort(ORDERS[this.order.value][1]);
  }

  matches(run) {
    const text = [run.run, run.label, ...[...settings(run.meta)].map((pair) => pair.join(" "))].join("\n").toLowerCase();
    return this.filter.value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  }
}

export function selector(runs, selected, limit, tools, onToggle) {
  const box = element("fieldset", { class: "runs" });
  const shown = runs.filter((run) => tools.matches(run));
  const hidden = runs.length - shown.length;
  box.append(element("legend", {}, `Runs (at most ${limit} at once${hidden ? `; ${hidden} do not match the filter` : ""})`));
  for (const run of shown) {
    const slot = selected.get(run.run);
    const label = element("label", { class: slot === undefined ? "run" : `run run-${slot}`, title: run.run, "data-run": run.run });
    const input = element("input", { type: "checkbox" });
    input.checked = slot !== undefined;
    input.disabled = slot === undefined && selected.size >= limit;
    input.addEventListener("change", () => onToggle(run.run, input.checked));
    label.append(input, swatch(slot), element("span", {}, run.label));
    box.append(label);
  }
  return box;
}
