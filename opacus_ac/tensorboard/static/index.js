// The Privacy tab: asks for runs and curves about once a second and draws what has changed.

import { Chart, element } from "./chart.js";
import { content, describe, PANELS } from "./panels.js";
import { differences, labels, RunTools, selector } from "./runs.js";
import { alerts, card, statement } from "./summary.js";

const POLL_MS = 1000;
const NO_RUN = "No run has a privacy record here. PrivacyDashboard writes one; is --logdir the folder that it writes to?";
const REST = 5; // times the length of the last answer: many long runs are asked for less often

async function read(path) {
  const answer = await fetch(new URL(path, import.meta.url));
  if (!answer.ok) throw new Error(`TensorBoard answered ${answer.status}`);
  return answer.text();
}

class App {
  constructor() {
    this.selected = new Map(); // run -> colour slot
    this.touched = false;
    this.shown = "";
    this.busy = false;
    this.again = false;
    this.open = new Set(); // runs whose statement is unfolded
    this.charts = PANELS.map((panel) => new Chart(panel, (...args) => this.cursor(...args), (range) => this.zoom(range)));
    this.tools = new RunTools(() => this.draw());
    this.build();
  }

  build() {
    this.status = element("p", { class: "status", role: "status" }, "Loading …");
    this.spoken = element("p", { class: "spoken", "aria-live": "polite" });
    const head = element("header");
    head.append(element("h1", {}, "Privacy"), this.status);
    [this.runsBox, this.alertsBox, this.cards, this.panels, this.statements] = ["", "alerts", "cards", "panels", "statements"]
      .map((name) => element("div", name ? { class: name } : {}));
    this.alertsBox.setAttribute("role", "alert");
    this.panels.hidden = true;
    this.panels.append(...this.charts.map((chart) => chart.figure));
    const main = element("main");
    main.append(head, this.tools.box, this.runsBox, this.alertsBox, this.cards, this.panels, this.statements, this.spoken);
    document.body.replaceChildren(main);
  }

  // Never two at once; a change of selection meanwhile asks again.
  async refresh() {
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    try {
      await this.load();
    } catch (error) {
      const since = this.answered ? ` What is shown is of ${this.answered}` : "";
      this.status.textContent = `No answer (${error.message}); trying again. Is tensorboard still running?${since}`;
      this.panels.classList.add("stale");
      this.shown = "";
    } finally {
      this.busy = false;
    }
    if (this.again) {
      this.again = false;
      await this.refresh();
    }
  }

  async load() {
    const runsText = await read("./runs");
    const { runs, max_runs: limit } = JSON.parse(runsText);
    this.choose(runs, limit);
    const query = new URLSearchParams([...this.selected.keys()].map((run) => ["run", run]));
    const seriesText = this.selected.size ? await read(`./series?${query}`) : "{}";
    this.answered = new Date().toLocaleTimeString("en-GB");
    this.panels.classList.remove("stale");
    const text = JSON.stringify([runsText, seriesText, [...this.selected]]);
    if (text === this.shown || this.again) return; // other runs were chosen meanwhile: their curves come next
    const named = labels(runs.map((run) => run.run));
    this.runs = runs.map((run) => ({ ...run, label: named.get(run.run) }));
    this.limit = limit;
    this.series = JSON.parse(seriesText);
    this.draw();
    this.shown = text;
  }

  // Until somebody chooses, the latest runs are shown; a run that is gone is dropped.
  choose(runs, limit) {
    const known = new Set(runs.map((run) => run.run));
    for (const run of this.selected.keys()) if (!known.has(run)) this.selected.delete(run);
    if (this.touched) return;
    for (const { run } of runs) if (this.selected.size < Math.min(limit, 6)) this.select(run);
  }

  select(run) {
    if (this.selected.has(run)) return;
    const used = new Set(this.selected.values());
    let slot = 0;
    while (used.has(slot)) slot += 1;
    this.selected.set(run, slot);
  }

  toggle(run, on) {
    this.touched = true;
    if (on) this.select(run);
    else this.selected.delete(run);
    this.refresh();
  }

  chosen() {
    const runs = this.tools.sorted(this.runs).filter((run) => this.selected.has(run.run));
    const differ = differences(runs);
    return runs.map(({ run, label, meta, parts = [] }, i) => {
      const { curves = {}, norms, state, verdicts = [] } = this.series[run] ?? {};
      return { path: run, name: label, slot: this.selected.get(run), meta, parts, differs: differ[i],
        series: curves, norms, state, verdicts };
    });
  }

  draw() {
    if (!this.runs) return;
    const runs = this.chosen();
    const newest = Math.max(...runs.flatMap((run) => Object.values(run.series).map((column) => column[0].at(-1))));
    const live = runs.filter((run) => run.state === "running" || run.state === "waiting").length;
    const at = `step ${Number.isFinite(newest) ? newest : 0}`;
    this.status.textContent = !this.runs.length ? NO_RUN : !runs.length ? "No run is chosen: tick one." : live ? `live, ${at}` : `no run is going on; last ${at}`;
    const focus = document.activeElement?.closest?.(".run")?.dataset.run;
    this.runsBox.replaceChildren(selector(this.tools.sorted(this.runs), this.selected, this.limit, this.tools, (...args) => this.toggle(...args)));
    for (const label of this.runsBox.querySelectorAll(".run")) {
      if (focus !== undefined && label.dataset.run === focus) label.firstChild.focus();
    }
    const found = alerts(runs);
    const said = [...this.alertsBox.children].map((line) => line.textContent).join("\n");
    // Replacing equal lines would make a screen reader say them again.
    if (said !== found.map((line) => line.textContent).join("\n")) this.alertsBox.replaceChildren(...found);
    this.cards.replaceChildren(...runs.map(card));
    this.statements.replaceChildren(...runs.map((run) => this.foldable(run)));
    this.panels.hidden = !runs.length;
    this.drawCharts(runs);
  }

  foldable(run) {
    const box = statement(run);
    box.open = this.open.has(run.path);
    box.addEventListener("toggle", () => (box.open ? this.open.add(run.path) : this.open.delete(run.path)));
    return box;
  }

  drawCharts(runs) {
    for (const chart of this.charts) chart.draw(content(chart.panel, runs), describe(chart.panel, runs));
    if (this.at) this.cursor(...this.at);
    performance.mark("privacy-curves");
  }

  zoom(range) {
    for (const chart of this.charts) chart.range = range;
    this.drawCharts(this.chosen());
  }

  cursor(owner, step, speak) {
    this.at = step === null ? null : [owner, step, false];
    let text = "";
    // A histogram has another axis: its crosshair is its own.
    for (const chart of this.charts) {
      const shares = chart === owner || !(chart.panel.histogram || owner.panel.histogram);
      text += chart.setCursor(shares ? step : null, chart === owner);
    }
    if (speak) this.spoken.textContent = text;
  }
}

// TensorBoard marks its own page as dark; this frame hears nothing of it.
function followTheme() {
  const host = window.parent === window ? null : window.parent.document.body;
  const apply = () => {
    const dark = host ? host.classList.contains("dark-mode") : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  };
  apply();
  if (host) new MutationObserver(apply).observe(host, { attributes: true, attributeFilter: ["class"] });
}

const visible = () => !document.hidden && document.body.clientWidth > 0;

export async function render() {
  document.documentElement.lang = "en";
  document.title = "Privacy";
  const style = element("link", { rel: "stylesheet", href: new URL("./style.css", import.meta.url).href });
  const styled = new Promise((done) => ["load", "error"].forEach((name) => style.addEventListener(name, done)));
  document.head.append(style);
  followTheme();
  await styled;
  const app = new App();
  const loop = async () => {
    const start = performance.now();
    if (visible()) await app.refresh();
    setTimeout(loop, Math.max(POLL_MS, REST * (performance.now() - start)));
  };
  let width = 0;
  new ResizeObserver(() => {
    if (!app.runs || !visible() || width === app.panels.clientWidth) return;
    width = app.panels.clientWidth;
    app.drawCharts(app.chosen());
  }).observe(app.panels);
  await loop();
}
