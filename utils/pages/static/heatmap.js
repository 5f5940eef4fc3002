// Histograms over time as a picture: a column for each step, darker where more values lie.

import { el, fill, number } from "./common.js";

const LEFT = 58, RIGHT = 12, TOP = 8, BOTTOM = 24;
const ROWS = 96; // of the picture
const WIDEST = 80; // pixels of a column, so that a single step does not look like a long time

export class Heatmap {
  constructor(canvas, tip) {
    this.canvas = canvas;
    this.tip = tip;
    this.steps = [];
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("pointermove", (event) => this.point(event.clientX - canvas.getBoundingClientRect().left));
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    canvas.addEventListener("blur", () => { this.tip.hidden = true; });
    canvas.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: this.index - 1, ArrowRight: this.index + 1, Home: 0, End: this.steps.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.name(Number.isNaN(to) ? 0 : Math.max(0, Math.min(this.steps.length - 1, to)));
    });
  }

  /** @param steps [{step, min, max, counts, nonfinite}] of one tensor, steps ascending. */
  show(steps, name) {
    this.steps = steps;
    this.index = NaN;
    this.canvas.setAttribute("aria-label", `Histograms of ${name} at ${steps.length} steps. Arrow keys read them.`);
    this.draw();
  }

  draw() {
    const { canvas, steps } = this;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || !steps.length) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const g = canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    const style = getComputedStyle(canvas);
    let low = Math.min(...steps.map((one) => one.min)), high = Math.max(...steps.map((one) => one.max));
    if (!(high > low)) { low -= 0.5; high += 0.5; }
    const wide = Math.min(WIDEST, (width - RIGHT - LEFT) / steps.length), right = LEFT + wide * steps.length;
    const bottom = height - BOTTOM, tall = (bottom - TOP) / ROWS;
    g.fillStyle = style.getPropertyValue("--link");
    steps.forEach((one, column) => {
      const rows = onRows(one, low, high);
      const most = Math.max(...rows);
      rows.forEach((share, row) => {
        if (!share) return;
        g.globalAlpha = 0.06 + 0.94 * Math.sqrt(share / most);
        g.fillRect(LEFT + column * wide, bottom - (row + 1) * tall, Math.ceil(wide), Math.ceil(tall));
      });
    });
    g.globalAlpha = 1;
    g.fillStyle = style.getPropertyValue("--quiet");
    g.font = "12px system-ui, sans-serif";
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (const share of [0, 0.5, 1]) g.fillText(number(Number((low + share * (high - low)).toPrecision(3))), LEFT - 6, bottom - share * (bottom - TOP) + (share ? 6 : -6) * (share !== 0.5));
    g.textBaseline = "top";
    const labels = Math.max(1, Math.min(steps.length, Math.floor((right - LEFT) / 80)));
    for (let i = 0; i < labels; i += 1) {
      const column = labels === 1 ? 0 : Math.round(i * (steps.length - 1) / (labels - 1));
      g.textAlign = i === labels - 1 && labels > 1 ? "right" : i ? "center" : "left";
      const x = i === labels - 1 && labels > 1 ? right : i ? LEFT + (column + 0.5) * wide : LEFT;
      g.fillText(`${i ? "" : "step "}${steps[column].step.toLocaleString("en")}`, x, bottom + 6);
    }
    this.box = { right, bottom, wide };
  }

  point(pixel) {
    if (this.box && this.steps.length) this.name(Math.max(0, Math.min(this.steps.length - 1, Math.floor((pixel - LEFT) / this.box.wide))));
  }

  name(index) {
    const one = this.steps[index];
    this.index = index;
    const count = one.counts.reduce((sum, count) => sum + count, 0);
    fill(this.tip, el("b", {}, `step ${one.step.toLocaleString("en")}`), el("div", {}, `${number(one.min)} to ${number(one.max)}`), el("div", {}, `${count.toLocaleString("en")} values`),
      one.nonfinite ? el("div", { class: "problem" }, `${one.nonfinite.toLocaleString("en")} not finite`) : null);
    this.tip.hidden = false;
    const x = LEFT + (index + 0.5) * this.box.wide, isRight = x > this.canvas.clientWidth / 2;
    this.tip.style.left = isRight ? "auto" : `${x + 12}px`;
    this.tip.style.right = isRight ? `${this.canvas.clientWidth - x + 12}px` : "auto";
  }
}

/** The number of values in each row of the picture; a bin is spread over the rows that it covers. */
function onRows(one, low, high) {
  const rows = new Array(ROWS).fill(0);
  const bins = one.counts.length, width = (one.max - one.min) / bins;
  one.counts.forEach((count, bin) => {
    if (!count) return;
    const start = (one.min + bin * width - low) / (high - low) * ROWS;
    const end = Math.max(start + 1e-9, (one.min + (bin + 1) * width - low) / (high - low) * ROWS);
    for (let row = Math.max(0, Math.min(ROWS - 1, Math.floor(start))); row < Math.min(ROWS, end); row += 1) {
      rows[row] += count * (Math.min(end, row + 1) - Math.max(start, row)) / (end - start);
    }
  });
  return rows;
}
