// The text of one run: a span for each token, coloured by its probability, with the other likely tokens in a tip.
"use strict";

const BOUNDS = [0.01, 0.05, 0.2, 0.5, 0.9];
const tip = document.getElementById("tip");

function percent(logprob) {
  const chance = Math.exp(logprob);
  return chance < 1e-4 ? chance.toExponential(1) : `${(100 * chance).toFixed(2)}%`;
}

// The text with escapes, so that white space is visible.
function quoted(text) {
  return JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "·");
}

// The bytes of a token that is part of a character (bytes:\xe2\x82); null for any other token.
function partialBytes(token) {
  const match = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(token);
  return match && new Uint8Array(match[1].slice(2).split("\\x").map((byte) => parseInt(byte, 16)));
}

class Output {
  constructor(run) {
    this.tokens = 0;
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // holds back an unfinished character
    this.length = 0; // characters in the spans
    this.text = "";
    this.section = document.createElement("section");
    const title = document.createElement("h2");
    const loss = document.createElement("span");
    loss.className = "quiet small";
    loss.textContent = run.val_loss === null ? "" : `  val loss ${run.val_loss.toFixed(4)}`;
    title.append(run.id, loss);
    this.pre = document.createElement("pre");
    this.pre.setAttribute("aria-label", `Text of ${run.id}`);
    this.status = document.createElement("p");
    this.status.className = "quiet small status";
    this.section.append(title, this.pre, this.status);
    this.pre.addEventListener("keydown", (event) => this.move(event));
    this.began = performance.now();
  }

  begin(prompt) {
    const span = document.createElement("span");
    span.className = "prompt";
    span.textContent = prompt;
    this.pre.append(span);
    this.say("waiting");
  }

  say(words) {
    this.status.textContent = words;
  }

  take(choice) {
    const { tokens, token_logprobs: logprobs, top_logprobs: tops } = choice.logprobs;
    this.text += choice.text;
    tokens.forEach((token, index) => this.add(token, logprobs[index], tops[index]));
    const seconds = (performance.now() - this.began) / 1000;
    this.say(`${this.tokens} tokens, ${Math.round(this.tokens / seconds)} a second`);
    if (choice.finish_reason) this.flush();
    if (choice.finish_reason === "stop") this.cutAfter(this.text.length);
    if (choice.finish_reason) this.say(`${this.status.textContent}${choice.finish_reason === "stop" ? ", ended by a stop string or end-of-text" : ""}`);
  }

  add(token, logprob, top) {
    this.tokens += 1;
    const bytes = partialBytes(token);
    if (!bytes) this.flush();
    const text = bytes ? this.decoder.decode(bytes, { stream: true }) : token;
    const span = document.createElement("span");
    const level = BOUNDS.filter((bound) => Math.exp(logprob) >= bound).length;
    span.className = `t p${level}${text.includes("\n") ? " nl" : ""}`;
    span.textContent = text;
    span.tabIndex = this.tokens === 1 ? 0 : -1;
    span.token = { token, logprob, top, end: this.length + text.length };
    span.setAttribute("aria-label", `${quoted(token)}, ${percent(logprob)}`);
    this.length += text.length;
    this.pre.append(span);
  }

  // Show U+FFFD in the last span for held-back bytes that will not become a character.
  flush() {
    const text = this.decoder.decode(), last = this.pre.lastElementChild;
    if (!text) return;
    last.textContent += text;
    last.token.end += text.length;
    this.length += text.length;
  }

  // Strike through the tokens of a stop string, and end-of-text.
  cutAfter(length) {
    for (const span of this.pre.querySelectorAll(".t")) span.classList.toggle("cut", span.token.end > length);
  }

  // The text is one stop for the Tab key; arrow keys move within it.
  move(event) {
    const spans = [...this.pre.querySelectorAll(".t")];
    const place = spans.indexOf(document.activeElement);
    const steps = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -spans.length, End: spans.length };
    if (place < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const next = spans[Math.min(spans.length - 1, Math.max(0, place + steps[event.key]))];
    spans[place].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

function showTip(span) {
  hideTip();
  const { token, logprob, top } = span.token;
  const table = document.createElement("table");
  const rows = Object.entries(top).sort((one, other) => other[1] - one[1]);
  for (const [text, chance] of rows) {
    const row = table.insertRow();
    row.className = text === token && chance === logprob ? "drawn" : "";
    row.insertCell().textContent = quoted(text);
    row.insertCell().textContent = percent(chance);
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  span.classList.add("shown");
  placeTip();
}

// Keep the tip beside its token while the page is scrolled.
function placeTip() {
  const span = document.querySelector(".t.shown");
  if (!span) return;
  const place = span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = place.bottom + 6 + size.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${below ? place.bottom + 6 : Math.max(8, place.top - size.height - 6)}px`;
}

function hideTip() {
  tip.hidden = true;
  document.querySelector(".t.shown")?.classList.remove("shown");
}

for (const kind of ["pointerover", "focusin", "click"]) {
  document.addEventListener(kind, (event) => (event.target.token ? showTip(event.target) : kind !== "focusin" && hideTip()));
}
document.addEventListener("focusout", hideTip);
document.addEventListener("scroll", placeTip, true);
addEventListener("resize", placeTip);
