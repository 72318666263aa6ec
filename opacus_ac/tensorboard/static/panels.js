// What each chart shows, as lines and bands built from the curves of the runs.

import { format } from "./scale.js";

export const PANELS = [
  { id: "epsilon", title: "Epsilon spent", unit: "at the run's delta", min: 0,
    note: "dashed: target; dotted: projection at the present rate and noise (its end is the accountant's, the line between is straight)",
    value: "epsilon", target: "epsilon_target", project: true },
  { id: "max_grad_norm", title: "Clipping norm C", unit: "gradient norm, log scale", log: true, value: "max_grad_norm" },
  { id: "clip_rate", title: "Noisy clip rate", unit: "fraction of records", min: 0, max: 1,
    note: "dashed: target; shaded: band in which the learning rate stays",
    value: "noisy_clip_rate", target: "target_clip_rate", band: ["clip_rate_low", "clip_rate_high"] },
  { id: "lr_multiplier", title: "Learning-rate multiplier", unit: "factor on the learning rate", value: "lr_multiplier" },
  { id: "noisy_loss", title: "Noisy loss", unit: "released mean of clipped losses", value: "noisy_loss" },
  { id: "remaining_steps", title: "Remaining steps", unit: "steps that still fit the target", min: 0, value: "remaining_steps" },
  { id: "sample_rate", title: "Sampling rate", unit: "probability per record and step", value: "sample_rate" },
  { id: "noise_multiplier", title: "Noise multiplier", unit: "noise std / sensitivity of the release", min: 0, value: "noise_multiplier" },
];

const number = (value) => (typeof value === "number" ? value : null);

export function last(series, tag) {
  const column = series?.[tag];
  if (!column || !column[0].length) return null;
  const end = column[0].length - 1;
  return { step: column[0][end], value: column[1][end] };
}

// Where the budget ends at the present rate and noise, or null when nothing is left, known or private.
export function projection(series) {
  const remaining = last(series, "remaining_steps");
  const spent = last(series, "epsilon");
  const target = last(series, "epsilon_target");
  if (!remaining || !number(spent?.value) || !number(target?.value) || !(remaining.value > 0)) return null;
  return { from: spent, to: { step: remaining.step + remaining.value, value: target.value } };
}

function line(kind, run, label, steps, values) {
  return { kind, run: run.name, slot: run.slot, label, steps, values: values.map(number) };
}

// Equal public constants of several runs are drawn once, in the colour of the first.
function once(lines) {
  const seen = new Set();
  return lines.filter((l) => {
    const key = `${l.values ? l.values.at(-1) : l.low.at(-1)}/${l.high ? l.high.at(-1) : ""}/${l.steps.at(-1)}`;
    return !seen.has(key) && seen.add(key);
  });
}

export function content(panel, runs) {
  const values = [];
  const targets = [];
  const bands = [];
  for (const run of runs) {
    const curves = run.series;
    if (curves[panel.value]) values.push(line("value", run, run.name, ...curves[panel.value]));
    if (panel.target && curves[panel.target]) targets.push(line("target", run, "target", ...curves[panel.target]));
    const ahead = panel.project ? projection(curves) : null;
    if (ahead) {
      const ends = [ahead.from, ahead.to];
      targets.push(line("projection", run, "projection", ends.map((p) => p.step), ends.map((p) => p.value)));
      targets.push(line("target", run, "target", ends.map((p) => p.step), [ahead.to.value, ahead.to.value]));
    }
    const [low, high] = (panel.band ?? []).map((tag) => curves[tag]);
    if (low && high) bands.push({ slot: run.slot, steps: low[0], low: low[1].map(number), high: high[1].map(number) });
  }
  return { values, lines: [...once(targets.filter((l) => l.kind === "target")),
    ...targets.filter((l) => l.kind === "projection"), ...values], bands: once(bands) };
}

// What a screen reader says about a chart.
export function describe(panel, runs) {
  const parts = runs.map((run) => {
    const end = last(run.series, panel.value);
    return end ? `${run.name}: ${format(end.value)} at step ${format(end.step)}` : `${run.name}: no values`;
  });
  return `${panel.title}, ${panel.unit}. ${parts.join("; ")}`;
}
