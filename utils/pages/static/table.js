// The table of all runs, and the curves of the chosen ones.

import { $, COLORS, ask, cellText, counted, el, fill, poll, runUrl, showError, swatch } from "./common.js";
import { openEditor } from "./editor.js";
import { Panel } from "./panel.js";

const CHUNK = 150; // rows that are added at once, when they scroll into view
const MOST_CHOSEN = 200;
const CHOSEN_AT_FIRST = 8;
const HEADERS = { val_loss: "best val", last_val_loss: "last val", age: "started", bits_per_byte: "bits/byte" };
const FACT_COLUMNS = ["status", "age"]; // columns that come with every row
const REFILTER_SECONDS = 10; // how often a condition in SQL is evaluated again while runs train

const state = { rows: new Map(), columns: [], shown: [], order: { column: "age", up: false }, chosen: new Map(), where: null, edit: false, version: null, offset: 0, limit: CHUNK };
const address = new URLSearchParams(location.search);

// ------------------------------------------------------------------------------------------------------- the rows

async function update() {
  const answer = await ask("runs", [["since", state.version]]);
  state.version = answer.version;
  state.edit = answer.edit;
  $("#home").hidden = !answer.playground;
  if (answer.all) {
    state.rows.clear();
    state.columns = answer.columns;
    state.default = answer.default;
    state.offset = answer.now - Date.now() / 1000;
    $("#count").title = answer.folder;
    chooseColumns();
  }
  for (const [key, id, status, problem, start, ...values] of answer.rows) {
    const row = { key, id, status, problem, start };
    state.columns.forEach((column, i) => { row[column] = values[i]; });
    state.rows.set(key, row);
  }
  for (const key of answer.removed ?? []) { state.rows.delete(key); state.chosen.delete(key); }
  return answer;
}

function value(row, column) {
  return column === "age" ? (row.start === null ? null : Date.now() / 1000 + state.offset - row.start) : row[column];
}

function chooseColumns() {
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem("columns")); } catch { /* damaged: the default is shown */ }
  const known = new Set([...FACT_COLUMNS, ...state.columns]);
  state.shown = Array.isArray(kept) ? kept.filter((name) => known.has(name)) : state.default;
  const box = (name) => el("label", { class: "check" }, el("input", { type: "checkbox", checked: state.shown.includes(name), onchange: (event) => {
    state.shown = [...known].filter((one) => (one === name ? event.target.checked : state.shown.includes(one)));
    localStorage.setItem("columns", JSON.stringify(state.shown));
    draw();
  } }), HEADERS[name] ? `${name} (${HEADERS[name]})` : name);
  fill($("#column-list"), ...[...known].map(box), el("button", { type: "button", onclick: () => { localStorage.removeItem("columns"); chooseColumns(); draw(); } }, "Default columns"));
  const groups = [...state.columns.slice(state.columns.indexOf("processor") + 1), "tag", "status"];
  panel.setGroups(groups);
}

/** Whether the row has each word; NAME=VALUE must be the value of that column. */
function matches(row, words) {
  return words.every((word) => {
    const [name, wanted] = word.split("=", 2);
    if (wanted !== undefined && (state.columns.includes(name) || FACT_COLUMNS.includes(name))) {
      const given = value(row, name);
      return String(given ?? "none").toLowerCase() === wanted || cellText(name, given).toLowerCase() === wanted || (typeof given === "number" && given === Number(wanted));
    }
    return [row.id, row.status, row.tag, row.note, ...(row.tags ?? []), row.problem].some((text) => text && String(text).toLowerCase().includes(word));
  });
}

function filtered() {
  const words = $("#search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...state.rows.values()].filter((row) => (!state.where || state.where.has(row.key)) && matches(row, words));
  const { column, up } = state.order;
  const place = (row) => (column === "id" ? row.id : value(row, column));
  const isUp = column === "age" ? !up : up; // the newest has the smallest age
  return rows.sort((a, b) => compare(place(a), place(b), isUp) || (a.id < b.id ? 1 : -1));
}

/** Unknown values come last, however the column is sorted. */
function compare(a, b, up) {
  const isKnown = (one) => one !== null && one !== undefined && one !== "";
  if (!isKnown(a) || !isKnown(b)) return isKnown(b) - isKnown(a);
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return up ? order : -order;
}

// ------------------------------------------------------------------------------------------------------ the table

/** Redraw the table, and keep the focus where it is. */
function keepingFocus(work) {
  const name = document.activeElement?.dataset.focus;
  work();
  if (name) [...document.querySelectorAll("#table [data-focus]")].find((one) => one.dataset.focus === name)?.focus({ preventScroll: true });
}

function focusable(element, name) {
  element.dataset.focus = name;
  return element;
}

const draw = () => keepingFocus(drawAll);

function drawAll() {
  const rows = filtered();
  state.visible = rows;
  const running = [...state.rows.values()].filter((row) => row.status === "running").length;
  $("#count").textContent = [rows.length === state.rows.size ? counted(state.rows.size, "run") : `${rows.length.toLocaleString("en")} of ${counted(state.rows.size, "run")}`, running ? `${running} running` : ""].filter(Boolean).join(", ");
  const free = rows.filter((row) => row.status !== "damaged").slice(0, MOST_CHOSEN);
  const all = el("input", { type: "checkbox", title: "Choose all that are shown", "aria-label": "Choose all that are shown", checked: free.length > 0 && free.every((row) => state.chosen.has(row.key)), onchange: (event) => {
    state.chosen.clear();
    if (event.target.checked) free.forEach((row) => choose(row.key));
    chosenChanged();
  } });
  const header = (column, text) => {
    const isSorted = state.order.column === column;
    const button = el("button", { type: "button", class: "plain", onclick: () => {
      state.order = { column, up: isSorted ? !state.order.up : column !== "age" };
      keepAddress();
      draw();
    } }, text, isSorted ? (state.order.up ? " ▲" : " ▼") : "");
    return el("th", { scope: "col", "aria-sort": isSorted ? (state.order.up ? "ascending" : "descending") : null, class: isNumber(column) ? "number" : null }, focusable(button, `sort ${column}`));
  };
  fill($("#table thead"), el("tr", {}, el("th", { class: "pick" }, focusable(all, "all")), header("id", "run"), ...state.shown.map((column) => header(column, HEADERS[column] ?? column.replaceAll("_", " "))), state.edit && el("th", {}, el("span", { class: "hidden" }, "edit"))));
  fill($("#table tbody"), ...rows.slice(0, state.limit).map(tableRow));
  showMore();
  if (!state.rows.size) $("#more").textContent = "There are no runs yet: python train.py --run-tag baseline makes the first.";
  drawChosen();
}

const NUMBERS = new Map();
const UNKNOWN = [null, undefined, "inf", "-inf", "nan"]; // they do not say whether a column has numbers
function isNumber(column) {
  if (column === "age") return true;
  if (!NUMBERS.has(column)) {
    let known = null;
    for (const row of state.rows.values()) if (!UNKNOWN.includes(row[column])) { known = row[column]; break; }
    if (known !== null) NUMBERS.set(column, typeof known === "number");
    return typeof known === "number";
  }
  return NUMBERS.get(column);
}

function tableRow(row) {
  const color = state.chosen.get(row.key);
  const box = el("input", { type: "checkbox", checked: color !== undefined, disabled: row.status === "damaged", "aria-label": `Show ${row.id}`, onchange: (event) => {
    if (event.target.checked) choose(row.key);
    else state.chosen.delete(row.key);
    chosenChanged();
  } });
  if (color) box.style.accentColor = color;
  focusable(box, `show ${row.key}`);
  const name = focusable(el("a", { href: runUrl(row.key) }, row.id), `open ${row.key}`);
  const cells = state.shown.map((column) => cell(row, column));
  const edit = state.edit && el("td", {}, row.status !== "damaged" && focusable(el("button", { type: "button", class: "plain", "aria-label": `Edit ${row.id}`, onclick: () => openEditor(row.key, refresh) }, "edit"), `edit ${row.key}`));
  const pinned = row.pinned ? el("span", { class: "badge", title: "prune never touches it" }, "pinned") : null;
  const problem = row.problem ? el("span", { class: "problem small block" }, row.problem) : null;
  const element = el("tr", { class: color ? "is-chosen" : null }, el("td", { class: "pick" }, box), el("th", { scope: "row", class: "name" }, name, pinned, problem), ...cells, edit);
  element.dataset.key = row.key;
  return element;
}

function cell(row, column) {
  const text = cellText(column, value(row, column));
  if (column === "status") return el("td", {}, el("span", { class: `status ${/^[a-z]+$/.test(row.status) ? row.status : ""}` }, row.status));
  if (column === "age") return el("td", { class: "number", title: row.start === null ? "" : new Date(1000 * row.start).toISOString().slice(0, 19).replace("T", " ") + " UTC" }, text && `${text} ago`);
  if (column === "note") return el("td", { class: "note", title: text }, text);
  if (column === "tags") return el("td", {}, (row.tags ?? []).map((tag) => el("span", { class: "badge" }, tag)));
  return el("td", { class: isNumber(column) ? "number" : null }, text);
}

function showMore() {
  const left = state.visible.length - state.limit;
  $("#more").textContent = left > 0 ? `${left.toLocaleString("en")} more below` : state.visible.length || !state.rows.size ? "" : "no run matches the filter";
}

new IntersectionObserver((entries) => {
  if (entries[0].isIntersecting && state.visible?.length > state.limit) {
    const added = state.visible.slice(state.limit, state.limit + CHUNK);
    state.limit += CHUNK;
    $("#table tbody").append(...added.map(tableRow));
    showMore();
  }
}, { rootMargin: "600px" }).observe($("#more"));

// Rows are replaced under the pointer, so the table listens for them.
$("#table tbody").addEventListener("mouseover", (event) => {
  const key = event.target.closest("tr")?.dataset.key;
  panel.highlight(state.chosen.has(key) && !panel.settings.group ? key : undefined);
});
$("#table tbody").addEventListener("mouseleave", () => panel.highlight(undefined));

/** Replace the rows that have changed in place. */
function drawChanged(keys) {
  const places = new Map([...$("#table tbody").children].map((element) => [element.dataset.key, element]));
  keepingFocus(() => { for (const key of keys) places.get(key)?.replaceWith(tableRow(state.rows.get(key))); });
}

// --------------------------------------------------------------------------------------------------- the chosen runs

function choose(key) {
  const used = new Set(state.chosen.values());
  const free = COLORS.find((color) => !used.has(color)) ?? COLORS[state.chosen.size % COLORS.length];
  if (state.chosen.size < MOST_CHOSEN) state.chosen.set(key, free);
}

function chosenChanged() {
  keepAddress();
  draw();
  return panel.setRuns(shownRuns());
}

function shownRuns() {
  const rows = [...state.chosen].map(([key, color]) => ({ row: state.rows.get(key), color })).filter(({ row }) => row);
  const tags = rows.map(({ row }) => row.tag);
  return rows.map(({ row, color }) => ({ key: row.key, color, name: row.tag && tags.filter((tag) => tag === row.tag).length === 1 ? row.tag : row.id }));
}

function drawChosen() {
  const runs = shownRuns();
  const compareUrl = `/runs/compare?${new URLSearchParams(runs.map((run) => ["run", run.key]))}`;
  fill($("#chosen"), el("span", {}, `${counted(runs.length, "run")} chosen`),
    runs.length > 1 && el("a", { class: "button", href: compareUrl }, "Compare"),
    runs.length > 0 && el("button", { type: "button", onclick: () => { state.chosen.clear(); chosenChanged(); } }, "Choose none"));
  fill($("#legend"), ...(panel.settings.group ? [] : runs.slice(0, 24).map((run) => el("a", { href: runUrl(run.key), onmouseenter: () => panel.highlight(run.key), onmouseleave: () => panel.highlight(undefined), onfocus: () => panel.highlight(run.key), onblur: () => panel.highlight(undefined) }, swatch(run.color), run.name))), runs.length > 24 && !panel.settings.group ? el("span", { class: "quiet" }, `and ${runs.length - 24} more`) : null);
}

/** Write what is shown into the address, so that it can be shared. */
function keepAddress() {
  const { settings } = panel;
  const kept = [["q", $("#search").value], ["where", $("#where").value], ["sort", state.order.column === "age" && !state.order.up ? "" : `${state.order.column}${state.order.up ? "" : " desc"}`],
    ["x", settings.x === "step" ? "" : settings.x], ["smooth", settings.smooth || ""], ["log", `${settings.logX ? "x" : ""}${settings.logY ? "y" : ""}`], ["group", settings.group],
    ...settings.metrics.map((name) => ["metric", name]), ...[...state.chosen.keys()].map((key) => ["run", key])];
  history.replaceState(null, "", `?${new URLSearchParams(kept.filter(([, text]) => text !== ""))}`);
}

const panel = new Panel($("#panel"), {
  groups: true,
  metrics: address.getAll("metric").length ? address.getAll("metric") : ["val/loss", "train/loss"],
  settings: { x: ["tokens", "time"].includes(address.get("x")) ? address.get("x") : "step", smooth: Math.min(0.99, Math.max(0, Number(address.get("smooth")) || 0)), logX: (address.get("log") ?? "").includes("x"), logY: (address.get("log") ?? "").includes("y"), group: address.get("group") ?? "" },
  onchange: () => { keepAddress(); drawChosen(); },
});

// ----------------------------------------------------------------------------------------------------------- filters

let filteredAt = 0;

async function applyWhere() {
  const where = $("#where").value.trim();
  filteredAt = performance.now();
  try {
    state.where = where ? new Set(await ask("choose", [["where", where]])) : null;
    showError($("#filter-problem"), null);
  } catch (error) {
    showError($("#filter-problem"), error);
  }
}

$("#filters").addEventListener("submit", async (event) => {
  event.preventDefault();
  await applyWhere();
  state.limit = CHUNK;
  keepAddress();
  draw();
});

$("#search").addEventListener("input", () => { state.limit = CHUNK; keepAddress(); draw(); });

document.addEventListener("keydown", (event) => {
  const isText = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "/" && !isText) { $("#search").focus(); event.preventDefault(); }
  if (event.key === "Escape") $("#columns").open = false;
});
document.addEventListener("click", (event) => { if (!$("#columns").contains(event.target)) $("#columns").open = false; });

// -------------------------------------------------------------------------------------------------------------- live

async function refresh() {
  const answer = await update();
  const changed = answer.rows.map(([key]) => key);
  if (!answer.all && !changed.length && !answer.removed.length) return;
  if (state.where && performance.now() - filteredAt > 1000 * REFILTER_SECONDS) await applyWhere();
  const isNew = answer.all || answer.removed.length || changed.some((key) => !state.visible.some((row) => row.key === key));
  if (isNew) draw();
  else { state.visible = state.visible.map((row) => state.rows.get(row.key)); drawChanged(changed); }
  if (answer.all) await panel.setRuns(shownRuns());
  else if (changed.some((key) => state.chosen.has(key))) await panel.extend();
}

async function start() {
  $("#search").value = address.get("q") ?? "";
  $("#where").value = address.get("where") ?? "";
  const sort = address.get("sort");
  if (sort) state.order = { column: sort.replace(/ desc$/, ""), up: !sort.endsWith(" desc") };
  try {
    await update();
  } catch (error) {
    showError($("#filter-problem"), error);
    return;
  }
  if ($("#where").value) await applyWhere();
  const named = address.getAll("run").filter((key) => state.rows.has(key));
  const first = filtered().filter((row) => row.val_loss !== null || row.status === "running").slice(0, CHOSEN_AT_FIRST).map((row) => row.key);
  (named.length ? named : first).forEach(choose);
  draw();
  await panel.setRuns(shownRuns());
  document.body.dataset.ready = "yes";
}

await start();
poll(2, refresh);
