// The page of one run.

import { $, COLORS, ask, el, fill, poll, request, runUrl, showError, size } from "./common.js";
import { openEditor } from "./editor.js";
import { Heatmap } from "./heatmap.js";
import { Panel } from "./panel.js";

const key = new URLSearchParams(location.search).get("run") ?? "";
const named = [["run", key]];
const SYSTEM = "system/";
let run, version = null, panel, system;

function facts(place, rows) {
  fill(place, rows.map(([name, text]) => [el("dt", {}, name), el("dd", name === "command" || name === "directory" ? { class: "code" } : {}, text)]).flat());
}

function showFacts() {
  document.title = run.tag ?? run.id;
  $("#name").textContent = run.id;
  const status = $("#status");
  status.textContent = run.status;
  status.className = `status ${/^[a-z]+$/.test(run.status) ? run.status : ""}`;
  fill($("#problems"), run.problems.map((text) => el("p", { class: "problem" }, text)));
  facts($("#results"), run.results ?? []);
  facts($("#provenance"), run.provenance ?? []);
  if (run.relatives?.length) $("#provenance").append(el("dt", {}, "see also"), el("dd", {}, run.relatives.map(({ key: other, id }) => el("a", { href: runUrl(other), class: "block" }, id))));
}

function showEvaluations() {
  const { columns = [], rows = [] } = run.evaluations ?? {};
  $("#evaluations").hidden = !rows.length;
  fill($("#evaluations thead"), el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name))));
  fill($("#evaluations tbody"), rows.map((row) => el("tr", {}, row.map((text) => el("td", {}, text)))));
}

function showSettings() {
  const onlyOwn = $("#only-own").checked, word = $("#setting-search").value.toLowerCase();
  const fits = (setting) => (word ? `${setting.key} ${setting.value} ${setting.section}`.toLowerCase().includes(word) : !onlyOwn || setting.own);
  const rows = (run.settings ?? []).filter(fits).map((setting) => el("tr", { class: setting.own ? "own" : null },
    el("th", { scope: "row" }, setting.key, el("span", { class: "source block" }, setting.section)),
    el("td", { class: "wrap" }, setting.value, setting.resolved === undefined ? null : el("span", { class: "source block" }, `resolved to ${setting.resolved}`)),
    el("td", { class: "source" }, setting.source), el("td", { class: "small quiet" }, setting.meaning ?? "")));
  fill($("#setting-table tbody"), rows.length ? rows : el("tr", {}, el("td", { colSpan: 4, class: "quiet" }, word ? "no setting matches" : "every setting has its default")));
}

async function showSamples() {
  const samples = await ask("samples", named);
  $("#samples").hidden = !samples.length;
  const blocks = samples.map(({ step, text }) => [el("h3", {}, `step ${step.toLocaleString("en")}`), el("pre", { class: "text sample" }, text)]);
  const open = $("#sample-list details")?.open;
  fill($("#sample-list"), blocks.slice(0, 1).flat(), blocks.length > 1 ? el("details", { open }, el("summary", {}, `${blocks.length - 1} earlier`), ...blocks.slice(1).flat()) : null);
}

const heat = new Heatmap($("#heat"), $("#heat-tip"));

async function showHistograms(name) {
  const found = await ask("histograms", [...named, ["name", name]]);
  $("#histograms").hidden = !found.names.length;
  fill($("#tensor"), found.names.map((one, i) => el("option", { value: one, selected: one === found.name }, found.shown[i])));
  heat.show(found.steps, found.shown[found.names.indexOf(found.name)] ?? "");
}

async function showFiles() {
  const files = await ask("files", named);
  $("#file-count").textContent = `${files.length} files, ${size(files.reduce((sum, file) => sum + file.bytes, 0))}`;
  fill($("#file-list"), files.map((file) => {
    const url = `/runs/api/file?${new URLSearchParams([["run", key], ["file", file.key]])}`;
    return el("tr", {}, el("th", { scope: "row", class: "wrap" }, el("a", { href: url, download: "", onclick: (event) => download(event, url, file.name) }, file.name)), el("td", { class: "number" }, size(file.bytes)));
  }));
}

/** Download a file with the API key, which a link cannot send. */
async function download(event, url, name) {
  if (!sessionStorage.getItem("key")) return;
  event.preventDefault();
  const content = await (await request(url)).blob();
  const link = el("a", { href: URL.createObjectURL(content), download: name.split("/").at(-1) });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function start() {
  try {
    run = await ask("run", named);
    const table = await ask("runs");
    version = table.version;
    $("#edit").hidden = !table.edit || run.status === "damaged";
  } catch (error) {
    $("#live").hidden = true;
    document.querySelectorAll("section").forEach((section) => { section.hidden = true; });
    showError($("#problems"), error);
    document.body.dataset.ready = "yes";
    return;
  }
  showFacts();
  if (run.status === "damaged") {
    document.querySelectorAll("section").forEach((section) => { section.hidden = section.id !== "files"; });
  } else {
    showEvaluations();
    showSettings();
    $("#environment").hidden = !run.environment;
    $("#environment-text").textContent = run.environment;
    const own = run.metrics.filter((name) => !name.startsWith(SYSTEM));
    const first = ["val/loss", "train/loss", "lr", "grad_norm"].filter((name) => own.includes(name));
    const shown = [{ key, name: run.tag ?? run.id, color: COLORS[0] }];
    panel = new Panel($("#panel"), { metrics: first.length ? first : own.slice(0, 4) });
    const measured = run.metrics.filter((name) => name.startsWith(SYSTEM));
    $("#system").hidden = !measured.length;
    system = new Panel($("#system-panel"), { metrics: measured, settings: { x: "time" } });
    await Promise.all([panel.setRuns(shown), measured.length ? system.setRuns(shown) : null, showSamples(), showHistograms()]);
  }
  await showFiles();
  document.body.dataset.ready = "yes";
}

$("#only-own").addEventListener("change", showSettings);
$("#setting-search").addEventListener("input", showSettings);
$("#tensor").addEventListener("change", (event) => showHistograms(event.target.value));
$("#edit").addEventListener("click", () => openEditor(key, reload));

async function reload() {
  run = await ask("run", named);
  showFacts();
  showEvaluations();
}

let seen = 0;
async function refresh() {
  const answer = await ask("runs", [["since", version]]);
  version = answer.version;
  if (!answer.rows.some(([one]) => one === key)) return;
  await reload();
  await Promise.all([panel?.extend(), system?.extend()]);
  seen += 1;
  if (seen % 5 === 0 || run.status !== "running") await Promise.all([showSamples(), showHistograms($("#tensor").value || null), showFiles()]);
}

await start();
if (run) poll(2, refresh);
