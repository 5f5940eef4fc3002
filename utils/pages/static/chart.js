// A chart of curves on a canvas: axes, lines, bands, a cross-hair that names values, zoom by dragging.

import { el, fill, number, swatch } from "./common.js";

const LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 34;
const NAMED = 12; // curves that the tip under the pointer lists

export class Chart {
  /**
   * @param {string} title of the chart.
   * @param {{onzoom?: Function, onclose?: Function}} options onzoom(start, end) gets the part of x that was chosen, or
   *   two nulls for all of it.
   */
  constructor(title, options = {}) {
    this.options = options;
    this.curves = [];
    this.canvas = el("canvas", { tabIndex: 0, role: "img" });
    this.canvas.setAttribute("aria-label", title);
    this.tip = el("div", { class: "tip", hidden: true, role: "status" });
    this.note = el("p", { class: "quiet small chart-note" });
    this.title = el("h3", {}, title);
    const close = options.onclose && el("button", { class: "plain", type: "button", title: "Remove this chart", "aria-label": `Remove the chart of ${title}`, onclick: options.onclose }, "×");
    this.reset = el("button", { class: "plain", type: "button", hidden: true, onclick: () => this.zoom(null, null) }, "whole axis");
    const head = el("div", { class: "chart-head" }, this.title, this.reset, close);
    this.element = el("figure", { class: "chart" }, head, el("div", { class: "plot" }, this.canvas, this.tip), this.note);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.listen();
  }

  /**
   * @param curves [{name, color, x, y, low?, high?}] with x never decreasing.
   * @param view {xLabel, xName, logX, logY, xScale, whole, empty}: xScale divides x (seconds to hours, say); whole: x
   *   has only integers; empty: the text without curves.
   */
  show(curves, view) {
    this.curves = curves;
    this.view = view;
    this.draw();
  }

  zoom(start, end) {
    this.reset.hidden = start === null;
    this.range = start === null ? null : [start, end];
    this.draw();
    this.options.onzoom?.(start, end);
  }

  draw() {
    const { canvas, view } = this;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!view || !width) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const g = canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    this.ink = { text: style.getPropertyValue("--quiet"), line: style.getPropertyValue("--line") };
    const box = { left: LEFT, right: width - RIGHT, top: TOP, bottom: height - BOTTOM };
    this.x = this.axis("x", view.logX, box.left, box.right);
    this.y = this.axis("y", view.logY, box.bottom, box.top);
    this.box = box;
    if (!this.x || !this.y) {
      g.fillStyle = this.ink.text;
      g.textAlign = "center";
      g.font = "14px system-ui, sans-serif";
      g.fillText(view.empty ?? "nothing to draw", width / 2, height / 2);
      return;
    }
    this.drawAxes(g, box);
    g.save();
    g.beginPath();
    g.rect(box.left - 3, box.top - 2, box.right - box.left + 6, box.bottom - box.top + 4); // room for the dots at the ends
    g.clip();
    for (const curve of this.curves) this.drawBand(g, curve);
    for (const curve of this.curves) this.drawLine(g, curve);
    if (this.drag) {
      g.fillStyle = this.ink.text + "33";
      g.fillRect(Math.min(...this.drag), box.top, Math.abs(this.drag[1] - this.drag[0]), box.bottom - box.top);
    }
    g.restore();
    if (this.pointer !== undefined) this.drawPointer(g, box);
  }

  /** The scale of an axis: {low, high, at(value) -> pixel, value(pixel), log}; null if nothing is on it. */
  axis(name, log, from, to) {
    let low = Infinity, high = -Infinity;
    for (const curve of this.curves) {
      const [first, last] = name === "y" && this.range ? this.visible(curve) : [0, curve.x.length];
      for (const column of name === "x" ? [curve.x] : [curve.y, curve.low, curve.high]) {
        if (!column) continue;
        for (let i = first; i < last; i += 1) {
          const value = column[i];
          if (log && value <= 0) continue;
          if (value < low) low = value;
          if (value > high) high = value;
        }
      }
    }
    if (name === "x" && this.range) [low, high] = this.range;
    if (!(low <= high)) return null;
    if (log) { low = Math.log10(low); high = Math.log10(high); }
    const room = name === "y" ? 0.04 * (high - low) || Math.abs(high) * 0.05 || 0.5 : high > low ? 0 : Math.abs(high) * 0.05 || 0.5;
    if (!(name === "x" && this.range)) { low -= room; high += room; }
    const scale = (to - from) / (high - low || 1);
    return {
      low, high, log,
      at: (value) => from + ((log ? Math.log10(value) : value) - low) * scale,
      value: (pixel) => { const place = low + (pixel - from) / scale; return log ? 10 ** place : place; },
    };
  }

  /** The first and the end index of the points of a curve that the zoom shows. */
  visible(curve) {
    return [lowerBound(curve.x, this.range[0]), lowerBound(curve.x, this.range[1]) + 1].map((i) => Math.min(i, curve.x.length));
  }

  drawAxes(g, box) {
    const { view } = this;
    g.font = "12px system-ui, sans-serif";
    g.lineWidth = 1;
    g.strokeStyle = this.ink.line;
    g.fillStyle = this.ink.text;
    g.textAlign = "right";
    g.textBaseline = "middle";
    const rows = ticks(this.y, Math.max(2, Math.round((box.bottom - box.top) / 45)));
    rows.forEach((tick) => {
      const y = Math.round(this.y.at(tick)) + 0.5;
      line(g, box.left, y, box.right, y);
      g.fillText(tickText(tick, rows, this.y.log), box.left - 6, y);
    });
    g.textAlign = "center";
    g.textBaseline = "top";
    const divisor = view.xScale ?? 1;
    const scaled = { ...this.x, low: this.x.log ? this.x.low - Math.log10(divisor) : this.x.low / divisor, high: this.x.log ? this.x.high - Math.log10(divisor) : this.x.high / divisor };
    const columns = ticks(scaled, Math.max(2, Math.round((box.right - box.left) / 90)));
    columns.forEach((tick) => {
      const x = Math.round(this.x.at(tick * divisor)) + 0.5;
      line(g, x, box.bottom, x, box.bottom + 4);
      g.fillText(tickText(tick, columns, this.x.log), Math.min(x, box.right - 8), box.bottom + 6);
    });
    line(g, box.left, box.bottom + 0.5, box.right, box.bottom + 0.5);
    g.textAlign = "right";
    g.fillText(view.xLabel, box.right, box.bottom + 20);
  }

  drawBand(g, curve) {
    if (!curve.low || curve.x.length < 2) return;
    const floor = this.box.bottom + 4; // stands for values that a logarithmic axis cannot show
    const at = (value) => (this.y.log && value <= 0 ? floor : this.y.at(value));
    g.beginPath();
    curve.x.forEach((x, i) => g.lineTo(this.x.at(x), at(curve.high[i])));
    for (let i = curve.x.length - 1; i >= 0; i -= 1) g.lineTo(this.x.at(curve.x[i]), at(curve.low[i]));
    g.closePath();
    g.globalAlpha = 0.18;
    g.fillStyle = curve.color;
    g.fill();
    g.globalAlpha = 1;
  }

  drawLine(g, curve) {
    g.strokeStyle = g.fillStyle = curve.color;
    g.lineWidth = this.highlight === curve.key && curve.key !== undefined ? 3 : 1.5;
    g.globalAlpha = this.highlight !== undefined && this.highlight !== curve.key ? 0.25 : 1;
    g.lineJoin = "round";
    g.beginPath();
    let points = 0;
    for (let i = 0; i < curve.x.length; i += 1) {
      if ((this.x.log && curve.x[i] <= 0) || (this.y.log && curve.y[i] <= 0)) continue;
      g.lineTo(this.x.at(curve.x[i]), this.y.at(curve.y[i]));
      points += 1;
    }
    g.stroke();
    if (points && points < 40) {
      for (let i = 0; i < curve.x.length; i += 1) {
        if ((this.x.log && curve.x[i] <= 0) || (this.y.log && curve.y[i] <= 0)) continue;
        g.beginPath();
        g.arc(this.x.at(curve.x[i]), this.y.at(curve.y[i]), 2.5, 0, 7);
        g.fill();
      }
    }
    g.globalAlpha = 1;
  }

  drawPointer(g, box) {
    const pixel = Math.min(Math.max(this.pointer, box.left), box.right);
    g.strokeStyle = this.ink.text;
    g.setLineDash([3, 3]);
    line(g, pixel, box.top, pixel, box.bottom);
    g.setLineDash([]);
    for (const { curve, i } of this.near ?? []) {
      const x = this.x.at(curve.x[i]), y = this.y.at(curve.y[i]);
      if (!(x >= box.left - 1 && x <= box.right + 1)) continue;
      g.fillStyle = curve.color;
      g.beginPath();
      g.arc(x, y, 3.5, 0, 7);
      g.fill();
    }
  }

  /** Put the cross-hair at a pixel and name the nearest point of each curve. */
  point(pixel, height) {
    if (!this.x || !this.y) return;
    const { box, view } = this;
    this.pointer = Math.min(Math.max(pixel, box.left), box.right);
    const place = this.x.value(this.pointer);
    this.near = [];
    for (const curve of this.curves) {
      let i = lowerBound(curve.x, place);
      if (i > 0 && (i === curve.x.length || place - curve.x[i - 1] < curve.x[i] - place)) i -= 1;
      if (curve.x.length) this.near.push({ curve, i });
    }
    const listed = [...this.near];
    if (height !== undefined && listed.length > NAMED) {
      listed.sort((a, b) => Math.abs(this.y.at(a.curve.y[a.i]) - height) - Math.abs(this.y.at(b.curve.y[b.i]) - height));
    }
    const shown = listed.slice(0, NAMED).sort((a, b) => b.curve.y[b.i] - a.curve.y[a.i]);
    const rows = shown.map(({ curve, i }) => el("div", { class: "tip-row" }, swatch(curve.color), el("span", { class: "tip-name" }, curve.name), el("b", {}, number(curve.y[i]))));
    const more = this.near.length > shown.length ? el("div", { class: "quiet" }, `and ${this.near.length - shown.length} more`) : null;
    const between = view.whole ? Math.round(place) : place;
    const at = shown.length === 1 ? shown[0].curve.x[shown[0].i] : between;
    fill(this.tip, el("div", { class: "quiet" }, `${view.xName ?? "step"} ${number(Number((at / (view.xScale ?? 1)).toPrecision(6)))}`), ...rows, more);
    this.tip.hidden = !shown.length;
    const isRight = this.pointer > this.canvas.clientWidth / 2;
    this.tip.style.left = isRight ? "auto" : `${this.pointer + 14}px`;
    const room = isRight ? this.pointer : this.canvas.clientWidth - this.pointer;
    this.tip.style.maxWidth = `${room - 14}px`; // longer names end in dots
    this.tip.style.right = isRight ? `${this.canvas.clientWidth - this.pointer + 14}px` : "auto";
    this.draw();
  }

  leave() {
    this.pointer = this.near = undefined;
    this.tip.hidden = true;
    this.draw();
  }

  listen() {
    const { canvas } = this;
    let from = null;
    const place = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0 && this.options.onzoom) {
        from = place(event)[0];
        canvas.setPointerCapture(event.pointerId);
      }
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      this.drag = from !== null && Math.abs(x - from) > 4 ? [from, x] : null;
      this.point(x, y);
    });
    canvas.addEventListener("pointerup", () => {
      const drag = this.drag;
      from = this.drag = null;
      if (drag && this.x) this.zoom(...drag.map((x) => this.x.value(Math.min(Math.max(x, this.box.left), this.box.right))).sort((a, b) => a - b));
    });
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("blur", () => this.leave());
    canvas.addEventListener("dblclick", () => this.range && this.zoom(null, null));
    canvas.addEventListener("keydown", (event) => {
      const { box } = this;
      if (!box) return;
      const step = (box.right - box.left) / (event.shiftKey ? 10 : 100);
      const at = this.pointer ?? box.left;
      const to = { ArrowLeft: at - step, ArrowRight: at + step, Home: box.left, End: box.right }[event.key];
      if (to !== undefined) { this.point(to); event.preventDefault(); }
      if (event.key === "Escape") { this.leave(); if (this.range) this.zoom(null, null); }
    });
  }
}

function line(g, x1, y1, x2, y2) {
  g.beginPath();
  g.moveTo(x1, y1);
  g.lineTo(x2, y2);
  g.stroke();
}

/** The first index whose value is not below `place`. */
function lowerBound(values, place) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < place) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Round numbers between the ends of an axis, about `count` of them. */
export function ticks(axis, count) {
  const { low, high, log } = axis;
  if (log && high - low >= 1) {
    const every = Math.max(1, Math.ceil((high - low) / count));
    const powers = [];
    for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power += every) powers.push(10 ** power);
    if (powers.length > 1) return powers;
  }
  const [start, end] = log ? [10 ** low, 10 ** high] : [low, high];
  const least = (end - start) / count;
  if (!(least > 0)) return [start];
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= least * 0.999) * power;
  const found = [];
  for (let n = Math.ceil(start / step - 1e-9); n <= end / step + 1e-9; n += 1) found.push(n * step);
  return found;
}

function tickText(tick, all, log) {
  const largest = Math.max(...all.map(Math.abs));
  if (tick === 0) return "0";
  if (log || largest < 1e-2 || largest >= 1e12) return String(Number(tick.toPrecision(3))).replace("e+", "e");
  const [divisor, suffix] = [[1e9, "G"], [1e6, "M"], [1e4, "k"]].find(([least]) => largest >= least) ?? [1, ""];
  const scale = suffix === "k" ? 1e3 : divisor;
  const gap = all.length > 1 ? Math.abs(all[1] - all[0]) / scale : largest / scale;
  return (tick / scale).toFixed(Math.max(0, Math.min(6, Math.ceil(-Math.log10(gap) - 1e-9)))) + suffix;
}
