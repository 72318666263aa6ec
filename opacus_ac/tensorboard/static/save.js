// What a chart shows as a file: its points as CSV, its picture as PNG. Made in the page; nothing is sent anywhere.

const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "opacity",
  "font-size", "font-family", "text-anchor"];
const SCALE = 2;
const LINE = 18;

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A cell that a spreadsheet takes neither for several cells nor for a formula.
export function cell(value) {
  const text = String(value ?? "");
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

const NAMES = { value: "curve", noisy: "released", target: "target", projection: "projection" };

export function csv(chart) {
  const { values, lines } = chart.content;
  const rows = [["run", "what", chart.panel.histogram ? "log10_norm" : "step", chart.panel.id, "noise_std"]];
  const shown = chart.panel.histogram ? values : lines;
  for (const line of shown) {
    const what = line.errors ? "running mean" : NAMES[line.kind] ?? line.kind;
    line.steps.forEach((step, i) => rows.push([line.run, what, step, line.values[i], line.errors?.[i]]));
  }
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

// The drawing with its styles written into it: as a picture it has no style sheet.
function standalone(svg) {
  const copy = svg.cloneNode(true);
  const [from, to] = [svg, copy].map((node) => [...node.querySelectorAll("*")]);
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    for (const name of STYLES) to[i].style.setProperty(name, style.getPropertyValue(name));
  });
  for (const node of copy.querySelectorAll(".cursor, .zoom")) node.remove();
  return new XMLSerializer().serializeToString(copy);
}

async function png(chart) {
  const image = new Image();
  const [width, height] = ["width", "height"].map((name) => Number(chart.svg.getAttribute(name)));
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(chart.svg))}`;
  await image.decode();
  const runs = [...new Map(chart.content.values.map((line) => [line.slot, line])).values()];
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width * SCALE, (height + LINE * (runs.length + 1.5)) * SCALE];
  const [pen, page] = [canvas.getContext("2d"), getComputedStyle(chart.figure)];
  pen.scale(SCALE, SCALE);
  pen.fillStyle = page.backgroundColor;
  pen.fillRect(0, 0, width, canvas.height);
  pen.fillStyle = page.color;
  pen.font = `600 13px ${page.fontFamily}`;
  pen.fillText(`${chart.panel.title} (${chart.panel.unit})`, 8, LINE, width - 16);
  pen.drawImage(image, 0, LINE * 1.5, width, height);
  pen.font = `12px ${page.fontFamily}`;
  runs.forEach((line, i) => legend(pen, chart, line, height + LINE * (i + 2), page.color));
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

function legend(pen, chart, line, y, colour) {
  const style = getComputedStyle(chart.svg.querySelector(`.line.value.run-${line.slot}`) ?? chart.svg);
  pen.strokeStyle = style.stroke;
  pen.lineWidth = 2;
  pen.setLineDash((style.strokeDasharray.match(/[\d.]+/g) ?? []).map(Number));
  pen.beginPath();
  pen.moveTo(10, y);
  pen.lineTo(40, y);
  pen.stroke();
  pen.fillStyle = colour;
  pen.fillText(line.label, 48, y + 4);
}

// The two buttons of a chart.
export function saver(chart) {
  const box = document.createElement("span");
  box.className = "save";
  const kinds = {
    CSV: () => download(new Blob([csv(chart)], { type: "text/csv" }), `${chart.panel.id}.csv`),
    PNG: async () => download(await png(chart), `${chart.panel.id}.png`),
  };
  for (const [kind, save] of Object.entries(kinds)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kind;
    button.setAttribute("aria-label", `Save ${chart.panel.title} as ${kind}`);
    button.addEventListener("click", () => { if (chart.svg) save(); });
    box.append(button);
  }
  return box;
}
