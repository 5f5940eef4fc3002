// Requests to the server of this page.
"use strict";

function apiHeaders() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not an error body of this API */ }
  throw new ApiError(response.status, message);
}

async function fetchRuns() {
  const response = await checked(await fetch("/v1/models", { headers: apiHeaders() }));
  return (await response.json()).data;
}

// Calls take(choice) for each event of a streamed completion.
async function streamCompletion(body, signal, take) {
  const request = { method: "POST", headers: apiHeaders(), body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await checked(await fetch("/v1/completions", request));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "the connection ended before the text did");
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(500, chunk.error.message);
      for (const choice of chunk.choices) take(choice);
    }
  }
}
