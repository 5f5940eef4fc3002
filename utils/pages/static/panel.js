// Charts of several metrics for the same runs, with shared settings: axis, smoothing, logarithms, grouping.

import { Chart } from "./chart.js";
import { COLORS, ask, el, fill, showError, swatch } from "./common.js";

const MORE = 4; // a curve that has grown to so many times the points of a screen is fetched anew, and so thinned
const X_NAMES = { step: "step", tokens: "tokens", time: "time" };
const TIME_UNITS = [[7200, 3600, "h"], [300, 60, "min"], [0, 1, "s"]];

export class Panel {
  /**
   * @param {HTMLElement} root gets the controls and the charts.
   * @param {{metrics: string[], groups?: boolean, onchange?: Function, settings?: object}} options
   */
  constructor(root, options) {
    this.options = options;
    this.settings = { x: "step", smooth: 0, logX: false, logY: false, group: "", metrics: options.metrics, ...options.settings };
    this.runs = [];
    this.charts = new Map();
    this.problem = el("div");
    this.grid = el("div", { class: "charts" });
    this.legend = el("div", { class: "legend" }); // of groups
    fill(root, this.controls(), this.problem, this.grid, this.legend);
    for (const metric of this.settings.metrics) this.add(metric);
  }

  controls() {
    const set = (name, value) => { this.settings[name] = value; this.changed(name === "logY"); };
    const x = el("select", { id: "x-axis", onchange: (event) => set("x", event.target.value) }, Object.keys(X_NAMES).map((name) => el("option", { value: name, selected: name === this.settings.x }, name)));
    const smoothText = el("output", {}, this.settings.smooth.toFixed(2));
    let timer;
    const smooth = el("input", { type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, value: this.settings.smooth, oninput: (event) => {
      smoothText.textContent = Number(event.target.value).toFixed(2);
      clearTimeout(timer);
      timer = setTimeout(() => set("smooth", Number(event.target.value)), 150);
    } });
    const box = (name, text) => el("label", { class: "check" }, el("input", { type: "checkbox", checked: this.settings[name], onchange: (event) => set(name, event.target.checked) }), text);
    this.group = el("select", { id: "group", onchange: (event) => set("group", event.target.value) });
    this.metric = el("select", { id: "metric", "aria-label": "Add a chart of a metric", onchange: (event) => {
      if (event.target.value) { this.add(event.target.value); this.keep(); this.load(); }
      event.target.value = "";
    } });
    this.setGroups([]);
    this.setMetrics([]);
    return el("div", { class: "controls" },
      el("label", {}, "x ", x), el("label", {}, "smoothing ", smooth, " ", smoothText), box("logX", "log x"), box("logY", "log y"),
      this.options.groups && el("label", {}, "group by ", this.group), this.metric);
  }

  /** @param columns that curves can be grouped by. */
  setGroups(columns) {
    const names = [...new Set([...columns, ...(this.settings.group ? [this.settings.group] : [])])];
    fill(this.group, el("option", { value: "" }, "nothing"), ...names.map((name) => el("option", { value: name, selected: name === this.settings.group }, name)));
  }

  setMetrics(names) {
    fill(this.metric, el("option", { value: "" }, "add a chart…"), ...names.filter(({ name }) => !this.charts.has(name)).map(({ name, shown }) => el("option", { value: name }, shown)));
  }

  add(metric) {
    if (this.charts.has(metric)) return;
    const chart = new Chart(metric, {
      onzoom: (start, end) => { entry.range = start === null ? null : [start, end]; this.load([entry]); },
      onclose: () => { this.charts.delete(metric); chart.element.remove(); this.keep(); this.offer(); },
    });
    const entry = { metric, chart, curves: new Map(), range: null, turn: 0 };
    this.charts.set(metric, entry);
    this.grid.append(chart.element);
  }

  keep() {
    this.settings.metrics = [...this.charts.keys()];
    this.options.onchange?.(this.settings);
  }

  changed(onlyDraw) {
    this.keep();
    if (!this.settings.group) fill(this.legend);
    if (onlyDraw) for (const entry of this.charts.values()) this.show(entry);
    else this.load();
  }

  /** @param runs [{key, name, color}] whose curves are shown. */
  async setRuns(runs) {
    const known = this.runs.map((run) => run.key).join(" ");
    this.runs = runs;
    await Promise.all([this.load(), known === runs.map((run) => run.key).join(" ") ? null : this.offer()]);
  }

  async offer() {
    try {
      this.names = this.runs.length ? await ask("metrics", this.runs.map((run) => ["run", run.key])) : [];
    } catch { /* the charts show the error */ }
    this.setMetrics(this.names ?? []);
  }

  highlight(key) {
    if (key === this.highlighted) return;
    this.highlighted = key;
    for (const { chart } of this.charts.values()) { chart.highlight = key; chart.draw(); }
  }

  /** Fetch whole curves. */
  load(entries = [...this.charts.values()]) {
    return Promise.all(entries.map((entry) => this.fetch(entry, false)));
  }

  /** Fetch the points that the curves have gained. */
  extend() {
    return Promise.all([...this.charts.values()].map((entry) => this.fetch(entry, true)));
  }

  async fetch(entry, isDelta) {
    const { settings } = this;
    const turn = isDelta ? entry.turn : ++entry.turn;
    if (!this.runs.length) {
      entry.curves.clear();
      fill(this.legend);
      this.show(entry);
      return;
    }
    const points = Math.max(400, Math.min(2000, 2 * entry.chart.canvas.clientWidth));
    const params = [["metric", entry.metric], ["x", settings.x], ["smooth", settings.smooth || ""], ["group", settings.group], ["log_x", settings.logX || ""], ["points", points]];
    if (entry.range) params.push(["start", entry.range[0]], ["end", entry.range[1]]);
    for (const run of this.runs) params.push(["run", run.key]);
    if (isDelta) for (const [key, curve] of entry.curves) if (curve.x.length < MORE * points) params.push(["known", `${curve.cursor}:${key}`]);
    try {
      const answer = await ask("curves", params);
      if (turn !== entry.turn) return; // there has been a later request
      if (!isDelta) entry.curves.clear();
      entry.label = answer.label;
      for (const curve of answer.groups ?? answer.curves) merge(entry.curves, curve);
      showError(this.problem, null);
    } catch (error) {
      if (turn === entry.turn) showError(this.problem, error);
      if (isDelta) throw error;
    }
    this.show(entry);
  }

  show(entry) {
    const { settings } = this;
    const drawn = (settings.group ? this.groupCurves(entry) : this.runs.map((run) => ({ ...entry.curves.get(run.key), ...run }))).filter((curve) => curve.x?.length);
    const longest = Math.max(0, ...drawn.map((curve) => curve.x.at(-1)));
    const [, scale, unit] = settings.x === "time" ? TIME_UNITS.find(([least]) => longest >= least) : [0, 1, ""];
    const xName = X_NAMES[settings.x];
    const lost = [...entry.curves.values()].reduce((sum, curve) => sum + (curve.not_finite ?? 0), 0);
    entry.chart.title.textContent = entry.label ?? entry.metric;
    const empty = this.whyEmpty(entry, drawn.length, lost);
    entry.chart.show(drawn, {
      xLabel: settings.x === "time" ? `time of training (${unit})` : settings.x === "tokens" ? "tokens of training" : "step",
      xName: unit ? `${xName} (${unit})` : xName, xScale: scale, whole: settings.x !== "time", logX: settings.logX, logY: settings.logY,
      empty,
    });
    const problems = [...entry.curves.values()].filter((curve) => curve.problem).map((curve) => `${curve.name ?? curve.run}: ${curve.problem}`);
    const notes = [lost ? `${lost.toLocaleString("en")} values are not finite and not drawn` : "", ...problems.slice(0, 3)];
    entry.chart.note.textContent = notes.filter(Boolean).join("; ");
    const count = drawn.length;
    const content = count ? `${count} ${count === 1 ? "curve" : "curves"} over ${xName}. Arrow keys read values.` : empty;
    entry.chart.canvas.setAttribute("aria-label", `${entry.label ?? entry.metric}: ${content}`);
  }

  /** The text of a chart without curves. */
  whyEmpty(entry, count, lost) {
    if (!this.runs.length) return "no run is chosen";
    if (count) return "a logarithmic axis shows only values above 0";
    if ([...entry.curves.values()].some((curve) => curve.key && curve.problem)) return "no group has a mean";
    if (entry.range) return `no value of ${entry.metric} in this part`;
    return lost ? `no value of ${entry.metric} is finite` : `${entry.metric} is not logged`;
  }

  /** The curves of the groups; fills the legend, too. Groups without points count, so that colours agree in all charts. */
  groupCurves(entry) {
    const groups = [...entry.curves.values()].map((curve, i) => ({
      ...curve, color: COLORS[i % COLORS.length], name: `${curve.name} (${curve.runs.length})`,
    }));
    fill(this.legend, groups.map(({ key, color, name }) => el("span", { onmouseenter: () => this.highlight(key), onmouseleave: () => this.highlight(undefined) }, swatch(color), name)));
    return groups;
  }
}

/** Store a curve of an answer; one with `added` continues the stored curve. */
function merge(curves, curve) {
  const key = curve.key ?? curve.run;
  const known = curves.get(key);
  if (curve.added && known) {
    curves.set(key, { ...known, cursor: curve.cursor, not_finite: curve.not_finite, x: [...known.x, ...curve.x], y: [...known.y, ...curve.y] });
  } else {
    curves.set(key, curve);
  }
}

