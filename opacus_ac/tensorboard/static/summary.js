// Figures of each run, alerts, and the statement of what was released. All text is set as text.

import { element, swatch } from "./chart.js";
import { folded, last, lastMean, projection } from "./panels.js";
import { format, withError } from "./scale.js";

const words = (value) => (Array.isArray(value) ? value.map(String) : []);

function isPrivate(run) {
  return run.meta.private === true && last(run.series, "epsilon")?.value !== "infinity";
}

// One loud line for each run whose guarantee is void, and one for each warning of its record.
export function alerts(runs) {
  return runs.flatMap((run) => {
    const found = [];
    const notes = words(run.meta.warnings);
    if (run.meta.unreadable) found.push(element("p", { class: "alert" }, `${run.name}: ${run.meta.unreadable}`));
    else if (!isPrivate(run)) {
      const reason = notes.length ? notes.join("; ") : "no finite bound holds";
      found.push(element("p", { class: "alert loud" }, `${run.name} is NOT PRIVATE, epsilon = infinity: ${reason}`));
    } else for (const note of notes) found.push(element("p", { class: "alert" }, `${run.name}: ${note}`));
    return found;
  });
}

function figure(label, value, detail, name) {
  const item = element("div", { class: "figure" });
  item.append(element("dt", {}, label), element("dd", { "data-figure": name }, value));
  if (detail) item.append(element("dd", { class: "detail" }, detail));
  return item;
}

function epsilonFigure(run) {
  const spent = last(run.series, "epsilon");
  const target = last(run.series, "epsilon_target");
  const at = spent ? `delta ${format(run.meta.delta)}, after step ${format(spent.step)}` : "no value yet";
  const of = target ? ` of ${format(target.value)}` : "";
  return figure("epsilon spent", `${spent ? format(spent.value) : "–"}${of}`, at, "epsilon");
}

function meter(run) {
  const spent = last(run.series, "epsilon")?.value;
  const target = last(run.series, "epsilon_target")?.value;
  if (typeof spent !== "number" || typeof target !== "number" || !(target > 0)) return null;
  const share = Math.min(1, spent / target);
  return element("progress", { max: 1, value: share, "aria-label": `${Math.round(share * 100)} % of epsilon spent` });
}

export function card(run) {
  const box = element("section", { class: `card run-${run.slot}`, "aria-label": run.name, title: run.path });
  const title = element("h2");
  title.append(swatch(run.slot), element("span", {}, run.name));
  const list = element("dl");
  const remaining = last(run.series, "remaining_steps");
  const heldOut = last(run.series, "held_out_loss");
  const ahead = projection(run.series);
  const end = ahead ? `projection: target reached at step ${format(ahead.to.step)}` : "";
  const bound = last(run.series, "max_grad_norm");
  list.append(epsilonFigure(run));
  if (isPrivate(run) && remaining) list.append(figure("remaining steps", format(remaining.value), end, "remaining"));
  if (bound) list.append(figure("clipping norm C", format(bound.value), `step ${format(bound.step)}`, "bound"));
  list.append(...noisyFigure(run, "noisy_clip_rate", "noisy clip rate", "rate", ""));
  list.append(...noisyFigure(run, "noisy_loss", "noisy loss", "loss", lossBound(run)));
  if (heldOut) list.append(figure("held-out loss", format(heldOut.value), `public data, step ${format(heldOut.step)}`, "held-out"));
  const bar = meter(run);
  const lines = [];
  if (run.parts.length) lines.push(`resumed at step ${format(run.meta.first_step)}; with ${run.parts.join(", ")} before`);
  if (run.differs.length) lines.push(`differs in: ${run.differs.join("; ")}`);
  const constant = folded(run);
  if (constant.length) lines.push(`constant: ${constant.map(([title, value]) => `${title} ${format(value)}`).join("; ")}`);
  const quiet = lines.map((text) => element("p", { class: "quiet" }, text));
  box.append(title, ...quiet, ...(bar ? [bar] : []), verdicts(run), list);
  return box;
}

const SIGNS = { good: "✓", note: "–", warning: "!", bad: "✕" };

// What the server says about the run, each with a sign, so that not only the colour tells how it is meant.
function verdicts(run) {
  const found = element("ul", { class: "verdicts" });
  for (const [level, text] of run.verdicts) {
    const line = element("li", { class: level in SIGNS ? level : "note" });
    line.append(element("i", { class: "sign", "aria-hidden": "true" }, SIGNS[level] ?? SIGNS.note), element("span", {}, text));
    found.append(line);
  }
  return found;
}

// The running mean with its error; the released value alone only where no mean was written.
function noisyFigure(run, tag, label, name, detail) {
  const [mean, value] = [lastMean(run.series, tag), last(run.series, tag)];
  if (mean) return [figure(label, withError(mean.value, mean.error), ["mean of the last steps", detail].filter(Boolean).join("; "), name)];
  return value ? [figure(label, format(value.value, 3), ["one step, noise unknown", detail].filter(Boolean).join("; "), name)] : [];
}

function lossBound(run) {
  return typeof run.meta.loss_bound === "number" ? `each record's clipped to ${format(run.meta.loss_bound)}` : "";
}

const ROWS = [
  ["protects", "unit"], ["neighbours", "adjacency"], ["sampling", "sampling"], ["N (taken as public)", "dataset_size"],
  ["accounting", "accountant"], ["clip rule", "clip_policy"], ["noise", "noise_source"],
];

export function statement(run) {
  const box = element("details", { class: `statement run-${run.slot}`, "data-run": run.path });
  const spent = last(run.series, "epsilon");
  const claim = isPrivate(run)
    ? `(${format(spent?.value ?? NaN, 6)}, ${format(run.meta.delta)})-differential privacy after ${format(spent?.step ?? NaN)} steps`
    : "NOT PRIVATE: epsilon = infinity";
  box.append(element("summary", {}, `${run.name}: what was released, and the claim`), element("p", { class: "claim" }, claim));
  const list = element("dl");
  for (const [label, key] of ROWS) {
    if (run.meta[key] !== undefined) list.append(element("dt", {}, label), element("dd", {}, String(run.meta[key])));
  }
  list.append(element("dt", {}, "every step releases"));
  for (const item of words(run.meta.released)) list.append(element("dd", {}, item));
  for (const item of words(run.meta.warnings)) list.append(element("dt", {}, "WARNING"), element("dd", {}, item));
  box.append(list);
  return box;
}
