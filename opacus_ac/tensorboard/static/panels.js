// What each chart shows, as lines and bands built from the curves of the runs.

import { format, nearest, withError } from "./scale.js";

export const PANELS = [
  { id: "epsilon", title: "Epsilon spent", unit: "at the run's delta", min: 0,
    note: "dashed: target; dotted: projection at the present rate and noise (its end is the accountant's, the line between is straight)",
    value: "epsilon", target: "epsilon_target", project: true },
  { id: "max_grad_norm", title: "Clipping norm C", unit: "gradient norm, log scale", log: true, value: "max_grad_norm", fold: true },
  { id: "clip_rate", title: "Noisy clip rate", unit: "fraction of records", within: [0, 1],
    note: "thick: running mean; coloured: std of the noise; dashed: target; grey: band in which the learning rate stays",
    value: "noisy_clip_rate", noisy: true,
    missing: "No histogram is released: clipping=\"adaptive\" releases one.", target: "target_clip_rate", band: ["clip_rate_low", "clip_rate_high"] },
  { id: "lr_multiplier", title: "Learning-rate multiplier", unit: "factor on the learning rate", value: "lr_multiplier", fold: true },
  { id: "noisy_loss", title: "Noisy loss", unit: "released mean of clipped losses",
    note: "thick: running mean; coloured: std of the noise of one step around it", value: "noisy_loss", noisy: true,
    missing: "No loss is released: pass loss_bound= to make_private, and record_losses() in the loop." },
  { id: "held_out_loss", title: "Held-out loss", unit: "tag eval/loss, without noise", optional: true, value: "held_out_loss",
    note: "on data that the run's owner declared public" },
  { id: "norms", title: "Noisy gradient norms", unit: "records per norm, log scale", optional: true, histogram: true, min: 0,
    note: "released counts of the last step, below zero shown as zero; the outer bins hold all that lies beyond; dashed: C" },
  { id: "remaining_steps", title: "Remaining steps", unit: "steps that still fit the target", min: 0, value: "remaining_steps",
    missing: "No target epsilon: make_private_with_epsilon sets one." },
  { id: "sample_rate", title: "Sampling rate", unit: "probability per record and step", value: "sample_rate", fold: true },
  { id: "noise_multiplier", title: "Noise multiplier", unit: "noise std / sensitivity of the release", min: 0, value: "noise_multiplier", fold: true },
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

// Value at `step` of a column that has points only where it changes; null where there is none.
export function held(column, step) {
  if (!column?.[0].length) return null;
  let at = nearest(column[0], step);
  if (column[0][at] > step && at > 0) at -= 1;
  return number(column[1][at]);
}

// Running mean and noise of a noisy curve at its last step, or null.
export function lastMean(series, tag) {
  const mean = last(series, `${tag}_mean`);
  return mean && number(mean.value) !== null ? { ...mean, error: held(series[`${tag}_mean_std`], mean.step) } : null;
}

// The running mean as the curve, the released values thin behind it, and one std of their noise around it.
function noisy(panel, run) {
  const [mean, std, error] = ["_mean", "_std", "_mean_std"].map((end) => run.series[panel.value + end]);
  const released = run.series[panel.value];
  if (!mean?.[0].length || !std) return null;
  const curve = line("value", run, run.name, ...mean);
  curve.errors = mean[0].map((step) => held(error, step));
  const room = mean[0].map((step) => held(std, step) ?? 0);
  const edge = (sign) => curve.values.map((v, i) => (v === null ? null
    : Math.min(panel.within?.[1] ?? Infinity, Math.max(panel.within?.[0] ?? -Infinity, v + sign * room[i]))));
  return { curve, released: line("noisy", run, run.name, ...released),
    band: { kind: "noise", slot: run.slot, steps: mean[0], low: edge(-1), high: edge(1) } };
}

// The last histogram of each run as an outline over log10 of the norm, with a line at C.
function histograms(panel, runs) {
  const [values, lines] = [[], []];
  const known = runs.filter((run) => run.norms?.counts.length);
  const top = Math.max(...known.flatMap((run) => run.norms.counts.map(number)));
  for (const run of known) {
    const { edges, counts, step } = run.norms;
    const middles = counts.map((_, i) => (edges[i] + edges[i + 1]) / 2);
    values.push({ ...line("value", run, run.name, middles, counts), at: step });
    lines.push(line("value outline", run, run.name, edges.flatMap((e) => [e, e]), [0, ...counts.flatMap((c) => [c, c]), 0]));
    const bound = held(run.series.max_grad_norm, step);
    if (bound > 0) lines.push(line("target", run, "C", [Math.log10(bound), Math.log10(bound)], [0, top]));
  }
  return { values, lines, bands: [] };
}

export function content(panel, runs) {
  if (panel.histogram) return histograms(panel, runs);
  const values = [];
  const targets = [];
  const bands = [];
  const behind = [];
  for (const run of runs) {
    const curves = run.series;
    const shown = panel.noisy && curves[panel.value] ? noisy(panel, run) : null;
    if (shown) {
      values.push(shown.curve);
      behind.push(shown.released);
      bands.push(shown.band);
    } else if (curves[panel.value]) values.push(line("value", run, run.name, ...curves[panel.value]));
    if (panel.target && curves[panel.target]) targets.push(line("target", run, "target", ...curves[panel.target]));
    const ahead = panel.project ? projection(curves) : null;
    if (ahead) {
      const ends = [ahead.from, ahead.to];
      targets.push(line("projection", run, "projection", ends.map((p) => p.step), ends.map((p) => p.value)));
      targets.push(line("target", run, "target", ends.map((p) => p.step), [ahead.to.value, ahead.to.value]));
    }
    const [low, high] = (panel.band ?? []).map((tag) => curves[tag]);
    if (low && high) bands.push({ kind: "wanted", slot: run.slot, steps: low[0], low: low[1].map(number), high: high[1].map(number) });
  }
  return { values, folded: isFolded(panel, runs), lines: [...behind, ...once(targets.filter((l) => l.kind === "target")),
    ...targets.filter((l) => l.kind === "projection"), ...values],
    bands: [...once(bands.filter((b) => b.kind === "wanted")), ...bands.filter((b) => b.kind === "noise")] };
}

const isConstant = (column) => column[1].every((value) => value === column[1][0]);

// Whether a chart says nothing but one number of each run: the cards say it then.
function isFolded(panel, runs) {
  const known = runs.map((run) => run.series[panel.value]).filter((column) => column?.[0].length);
  return Boolean(panel.fold) && known.length > 0 && known.every(isConstant);
}

// The constant curves of a run as [title, value].
export function folded(run) {
  return PANELS.filter((panel) => isFolded(panel, [run])).map((panel) => [panel.title.toLowerCase(), run.series[panel.value][1][0]]);
}

// What a screen reader says about a chart.
export function describe(panel, runs) {
  const parts = runs.map((run) => {
    if (panel.histogram) return run.norms ? `${run.name}: step ${format(run.norms.step)}` : `${run.name}: no values`;
    const mean = panel.noisy ? lastMean(run.series, panel.value) : null;
    if (mean) return `${run.name}: running mean ${withError(mean.value, mean.error)} at step ${format(mean.step)}`;
    const end = last(run.series, panel.value);
    return end ? `${run.name}: ${format(end.value)} at step ${format(end.step)}` : `${run.name}: no values`;
  });
  return `${panel.title}, ${panel.unit}. ${parts.join("; ")}`;
}
