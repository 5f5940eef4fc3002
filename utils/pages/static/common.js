// Shared by the pages of runs: requests, elements, and how values are written.
// All text of runs goes into the page as text nodes: nothing here parses a string as markup.

export const COLORS = ["#3b6fb6", "#e07b1f", "#2f9e63", "#d1495b", "#8a63c4", "#1b9aaa", "#b8860b", "#7a7f87",
  "#5b8def", "#c2527f", "#6b9b2a", "#a0633a"];
const KEY_NAME = "key"; // as in the playground

/** GET /runs/api/PATH. params: [name, value] pairs; empty values are left out. */
export async function ask(path, params = []) {
  const query = new URLSearchParams(params.filter(([, value]) => value !== null && value !== undefined && value !== ""));
  return (await request(`/runs/api/${path}${query.size ? "?" + query : ""}`)).json();
}

/** POST a change, with the header that pages of other origins cannot send. */
export async function change(path, body) {
  const headers = { "Content-Type": "application/json", "X-Workbench-Edit": "1" };
  return (await request(`/runs/api/${path}`, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

export async function request(url, options = {}) {
  const key = sessionStorage.getItem(KEY_NAME);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(url, { ...options, headers });
  } catch {
    throw new Error("the server does not answer");
  }
  if (response.status === 401 && !options.asked) {
    const given = prompt("This server asks for its API key:");
    if (given) {
      sessionStorage.setItem(KEY_NAME, given);
      return request(url, { ...options, asked: true });
    }
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const error = new Error(body?.error?.message ?? `the server answered with status ${response.status}`);
    error.status = response.status;
    throw error;
  }
  return response;
}

/** Make an element. props: `class`, `on...` functions, data and ARIA attributes, properties; children: elements, texts. */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name.includes("-") || name === "for" || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const $ = (selector, root = document) => root.querySelector(selector);

export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter(Boolean));
  return element;
}

export function swatch(color) {
  const mark = el("span", { class: "swatch" });
  mark.style.background = color;
  return mark;
}

export const runUrl = (key) => `/runs/run?${new URLSearchParams([["run", key]])}`;
export const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

export function size(bytes) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let i = 0;
  while (bytes >= 1000 && i < units.length - 1) { bytes /= 1000; i += 1; }
  return i ? `${bytes.toFixed(1)} ${units[i]}` : `${bytes} B`;
}

const two = (number) => String(number).padStart(2, "0");

export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) { const whole = Math.round(seconds); return `${Math.floor(whole / 60)}:${two(whole % 60)} min`; }
  if (seconds >= 2 * 86400) return `${Math.round(seconds / 86400)} d`;
  const minutes = Math.round(seconds / 60);
  return `${Math.floor(minutes / 60)}:${two(minutes % 60)} h`;
}

/** A number with the digits that matter. */
export function number(value) {
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
  return String(Number(value.toPrecision(6)));
}

const GROUPED = new Set(["steps", "parameters", "best_step"]);

/** A value of the table, in words. */
export function cellText(column, value) {
  if (value === null || value === undefined || value === "") return "";
  if (column === "age" || column === "duration") return duration(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.join(", ");
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && !GROUPED.has(column) && !column.endsWith("loss")) return String(value);
  return column.endsWith("loss") || column.endsWith("bits_per_byte") ? value.toFixed(4) : number(value);
}

/** Call `work` every `seconds` while the page is visible, and show in #live whether the server answers. */
export function poll(seconds, work) {
  const live = $("#live");
  let failed = 0;
  async function turn() {
    if (!document.hidden) {
      try {
        await work();
        failed = 0;
      } catch {
        failed += 1;
      }
      live.classList.toggle("lost", failed > 0);
      live.textContent = failed ? "no connection" : "live";
    }
    setTimeout(turn, 1000 * seconds * Math.min(8, 1 + failed));
  }
  document.addEventListener("visibilitychange", () => { if (!document.hidden) work().catch(() => {}); });
  setTimeout(turn, 1000 * seconds);
}

export function showError(place, error) {
  fill(place, error ? el("p", { class: "problem", role: "alert" }, error.message ?? String(error)) : null);
}
