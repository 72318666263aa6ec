// Axes: positions, round tick values, and numbers as text.

export function linearScale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

export function logScale(low, high, from, to) {
  const inner = linearScale(Math.log10(low), Math.log10(high), from, to);
  return (value) => inner(Math.log10(value));
}

// Steps of 1, 2 or 5 times a power of ten; only ticks inside [low, high].
export function linearTicks(low, high, wanted = 5) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

// Powers of ten, with 2 and 5 between them where there is room.
export function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const marks = decades > 3 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 5];
  const skip = Math.max(1, Math.ceil(decades / 6));
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += 1) {
    if (e % skip) continue;
    for (const mark of marks) {
      const tick = mark * 10 ** e;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  // Within a decade there may be one such value or none.
  return ticks.length > 1 ? ticks : linearTicks(low, high, 4).filter((tick) => tick > 0);
}

// A little room around the values; a flat line gets an axis as well.
export function linearDomain(low, high, fixed = {}) {
  const flat = high - low < 1e-12 * Math.max(Math.abs(low), Math.abs(high), 1e-300);
  const room = flat ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.06;
  const [least, most] = fixed.within ?? [-Infinity, Infinity];
  return [fixed.min ?? Math.max(least, low >= 0 && low - room < 0 ? 0 : low - room), Math.min(most, high + room)];
}

export function logDomain(low, high) {
  const room = high / low < 1.5 ? 1.5 : 1.15;
  return [low / room, high * room];
}

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

// At most `digits` significant digits, without trailing zeros.
export function format(value, digits = 4) {
  if (typeof value === "string") return value; // "infinity"
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e7 || size < 1e-4)) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1000) return WHOLE.format(value);
  return String(Number(value.toPrecision(digits)));
}

// A number and its standard error, with the digits that the error leaves (as opacus_ac.release.running_mean has it).
export function withError(value, error) {
  if (!Number.isFinite(value)) return "–";
  if (!Number.isFinite(error)) return format(value, 2);
  if (error === 0) return format(value, 3);
  let decimals = -Math.floor(Math.log10(error));
  if (Math.round(error * 10 ** decimals) >= 10) decimals -= 1; // 0.96 is shown as 1
  decimals = Math.min(12, Math.max(0, decimals));
  return `${value.toFixed(decimals)} ± ${error.toFixed(decimals)}`;
}

// Index of the step nearest to `step` in a rising list.
export function nearest(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}
