// The form, the links that reproduce a text, and the history.
"use strict";

const byId = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];
const FIELDS = [...NUMBERS, "prompt", "stop"];
const LINK_FIELDS = [...FIELDS, "run"];
const HISTORY = "playground history";
const MOST_HISTORY = 50;
const ALTERNATIVES = 5;

let runs = [];
let current = null; // the AbortController of the texts that are being generated

function newSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

function problem(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = !message;
}

function chosenRuns() {
  return [...document.querySelectorAll("#runs input:checked")].map((box) => box.value);
}

// The values of the form, as the parameters of a link.
function readForm() {
  const link = new URLSearchParams();
  for (const id of chosenRuns()) link.append("run", id);
  for (const name of FIELDS) if (byId(name).value !== "" || name === "prompt") link.set(name, byId(name).value);
  return link;
}

function fillForm(link) {
  const named = link.getAll("run");
  for (const box of document.querySelectorAll("#runs input")) box.checked = named.includes(box.value);
  for (const name of FIELDS) if (link.has(name)) byId(name).value = link.get(name);
  for (const name of ["top_p", "top_k", "min_p", "repetition_penalty", "stop"]) if (!link.has(name)) byId(name).value = "";
  const missing = named.filter((id) => !runs.some((run) => run.id === id));
  problem(missing.length ? `This server does not have ${missing.join(", ")}.` : "");
}

function fillDefaults() {
  const first = runs[0];
  document.querySelector("#runs input").checked = true;
  for (const [name, value] of Object.entries(first.defaults)) {
    byId(name === "max_new_tokens" ? "max_tokens" : name).value = value ?? "";
  }
  byId("seed").value = "1337";
}

function requestOf(link, run) {
  const body = { model: run, prompt: link.get("prompt"), logprobs: ALTERNATIVES };
  for (const name of NUMBERS) if (link.has(name)) body[name] = Number(link.get(name));
  if (link.has("stop")) body.stop = link.get("stop").replaceAll("\\n", "\n").replaceAll("\\t", "\t");
  return body;
}

async function generate() {
  const link = readForm();
  const chosen = runs.filter((run) => link.getAll("run").includes(run.id));
  if (!chosen.length) return problem("Choose a run.");
  problem("");
  stop();
  const own = (current = new AbortController());
  byId("stop-button").disabled = false;
  history.replaceState(null, "", `#${link}`);
  const outputs = chosen.map((run) => new Output(run));
  byId("outputs").replaceChildren(...outputs.map((output) => output.section));
  await Promise.all(chosen.map((run, index) => generateOne(link, run, outputs[index], own.signal)));
  if (current === own) {
    byId("stop-button").disabled = true;
    current = null;
    remember(link, outputs[0].text);
  }
}

async function generateOne(link, run, output, signal) {
  output.begin(link.get("prompt"));
  try {
    await streamCompletion(requestOf(link, run.id), signal, (choice) => output.take(choice));
  } catch (error) {
    if (error.name === "AbortError") return output.say(`${output.tokens} tokens, stopped`);
    output.status.classList.add("problem");
    output.say(error.message);
    if (error.status === 401) byId("key-row").hidden = false;
  }
}

function stop() {
  current?.abort();
  byId("stop-button").disabled = true;
}

function past() {
  try {
    return JSON.parse(localStorage.getItem(HISTORY)) ?? [];
  } catch {
    return [];
  }
}

function remember(link, text) {
  const entry = { link: String(link), text: text.slice(0, 200) };
  const entries = [entry, ...past().filter((other) => other.link !== entry.link)].slice(0, MOST_HISTORY);
  try {
    localStorage.setItem(HISTORY, JSON.stringify(entries));
  } catch { /* the browser stores nothing for this page */ }
  showHistory();
}

function showHistory() {
  const entries = past();
  byId("past").hidden = !entries.length;
  byId("history").replaceChildren(...entries.map(({ link, text }) => {
    const asked = new URLSearchParams(link);
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${asked.getAll("run").join(", ")}, seed ${asked.get("seed")}: ${asked.get("prompt")}${text}`;
    button.addEventListener("click", () => {
      fillForm(asked);
      byId("prompt").scrollIntoView({ block: "center" });
      generate();
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

function showRuns() {
  for (const run of runs) {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = run.id;
    label.append(box, run.id);
    label.title = `${run.run}, context ${run.context} tokens, vocabulary ${run.vocabulary}`;
    byId("runs").append(label);
  }
}

async function begin() {
  try {
    runs = await fetchRuns();
  } catch (error) {
    byId("key-row").hidden = error.status !== 401;
    return problem(error.message);
  }
  byId("key-row").hidden = true;
  problem("");
  showRuns();
  fillDefaults();
  showHistory();
  readLink();
}

// A link that names a run generates its text at once.
function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (![...link.keys()].some((name) => LINK_FIELDS.includes(name))) return;
  fillForm(link);
  if (chosenRuns().length && byId("form").reportValidity()) generate();
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("stop-button").addEventListener("click", stop);
byId("reseed").addEventListener("click", () => {
  byId("seed").value = newSeed();
});
byId("copy").addEventListener("click", async () => {
  const link = `${location.origin}/#${readForm()}`;
  try {
    await navigator.clipboard.writeText(link);
    byId("note").textContent = "copied";
  } catch {
    history.replaceState(null, "", link);
    byId("note").textContent = "the link is in the address bar";
  }
});
byId("forget").addEventListener("click", () => {
  localStorage.removeItem(HISTORY);
  showHistory();
});
byId("key").addEventListener("change", () => {
  sessionStorage.setItem("key", byId("key").value);
  if (!runs.length) begin();
});
addEventListener("hashchange", readLink);
addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop(), hideTip();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
});
begin();
