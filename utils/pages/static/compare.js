// The comparison of several runs: verdict, curves, differences.

import { $, COLORS, ask, el, fill, runUrl, showError, swatch } from "./common.js";
import { Panel } from "./panel.js";

const address = new URLSearchParams(location.search);
const keys = address.getAll("run");
const named = keys.map((key) => ["run", key]);
const LETTERS = (i) => (i < 26 ? String.fromCharCode(65 + i) : `${LETTERS(Math.floor(i / 26) - 1)}${LETTERS(i % 26)}`);

function table(place, columns, rows) {
  fill($("thead", place), columns.length ? el("tr", {}, columns.map((name, i) => el("th", { scope: "col", class: i ? "number" : null }, name))) : null);
  fill($("tbody", place), rows.map((row) => el("tr", {}, row.map((text, i) => (i ? el("td", { class: "number" }, text || "–") : el("th", { scope: "row" }, text))))));
}

function showVerdict(found) {
  $("#verdicts").hidden = !found;
  if (!found) return;
  $("#note").textContent = found.note ?? "";
  fill($("#verdict-list tbody"), found.verdicts.map((pair) => el("tr", {}, el("th", { scope: "row" }, `${pair.first} against ${pair.second}`), el("td", { class: pair.kind.split(" ")[0] }, pair.word), el("td", { class: "quiet" }, pair.why))));
  if (!found.verdicts.length) fill($("#verdict-list tbody"), el("tr", {}, el("td", { class: "quiet" }, "These runs differ only in their seed: they are one group, so there is nothing to compare.")));
  $("#groups-title").textContent = `${found.metric} at the end`;
  table($("#groups"), ["group", "runs", "mean", "std", "95% of the mean"], found.groups);
  $("#splits").textContent = found.splits.join("; ");
  fill($("#at"), found.at.map(({ axis, title, rows }) => {
    const place = el("table", { class: "auto" }, el("thead"), el("tbody"));
    table(place, [axis, ...found.groups.map(([name]) => name)], rows);
    return el("div", {}, el("h3", {}, title), el("div", { class: "scroll" }, place));
  }));
  fill($("#left-out"), found.left_out.map((text) => el("p", { class: "quiet small" }, `left out: ${text}`)));
}

function showDiff(found, runs) {
  $("#diff").hidden = !found;
  if (!found) return;
  const letters = runs.map((_, i) => LETTERS(i));
  const cells = (row) => row.values.map((text, i) => el("td", { class: "wrap" }, text, row.sources[i] ? el("span", { class: "source block" }, row.sources[i]) : null));
  const part = (title, rows) => [el("h3", {}, title), el("div", { class: "scroll" }, el("table", { class: "auto" }, el("thead", {}, el("tr", {}, el("th", {}, ""), letters.map((letter) => el("th", { scope: "col" }, letter)))), el("tbody", {}, rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row.name), cells(row))))))];
  const body = found.sections.map(({ title, rows }) => part(title, rows)).flat();
  if (!found.sections.length) body.push(el("p", {}, "No setting, code, corpus or environment differs."));
  if (found.commits.length) body.push(el("h3", {}, "Commits between the runs"), el("pre", {}, found.commits.join("\n")));
  if (found.patch.length) body.push(el("h3", {}, "Uncommitted changes"), el("pre", {}, found.patch.map((text) => el("span", { class: text.startsWith("+") ? "added block" : text.startsWith("-") ? "removed block" : "block" }, text || " "))));
  body.push(...part("Results", found.results));
  body.push(el("h3", {}, "Logs, bit by bit"), ...found.curves.map(([, kind, text], i) => el("p", {}, `A and ${LETTERS(i + 1)}: `, el("span", { class: kind }, text))));
  fill($("#diff-body"), body);
}

async function load() {
  const answer = await ask("compare", [...named, ["metric", address.get("metric")]]);
  const runs = answer.runs;
  fill($("#problems"), answer.problems.map((text) => el("p", { class: "problem" }, text)));
  fill($("#run-list"), runs.map((run, i) => el("tr", {}, el("td", {}, swatch(COLORS[i % COLORS.length]), LETTERS(i)), el("th", { scope: "row" }, el("a", { href: runUrl(run.key) }, run.id)), el("td", {}, run.name === run.id ? "" : run.name))));
  showVerdict(answer.comparison);
  showDiff(answer.diff, runs);
  return answer;
}

async function start() {
  try {
    const answer = await load();
    const shown = answer.runs.map((run, i) => ({ key: run.key, name: run.name, color: COLORS[i % COLORS.length] }));
    const names = await ask("metrics", named);
    const current = answer.comparison?.metric ?? address.get("metric") ?? "val/loss";
    fill($("#metric"), names.filter(({ name }) => !name.startsWith("system/")).map(({ name, shown: text }) => el("option", { value: name, selected: name === current }, text)));
    $("#verdicts").hidden = !answer.comparison && !address.get("metric");
    fill($("#legend"), shown.map((run, i) => el("a", { href: runUrl(run.key) }, swatch(run.color), `${LETTERS(i)} ${run.name}`)));
    const panel = new Panel($("#panel"), { metrics: [...new Set([current, "train/loss"])] });
    await panel.setRuns(shown);
  } catch (error) {
    showError($("#problems"), error);
    document.querySelectorAll("section").forEach((section) => { section.hidden = true; });
  }
  document.body.dataset.ready = "yes";
}

$("#metric").addEventListener("change", (event) => {
  address.set("metric", event.target.value);
  history.replaceState(null, "", `?${address}`);
  load().catch((error) => showError($("#problems"), error));
});

await start();
