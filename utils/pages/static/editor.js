// The dialog that edits the tag, tags, note and pin of a run.

import { ask, change, el, fill, showError } from "./common.js";

export async function openEditor(key, done) {
  const problem = el("div");
  let run;
  try {
    run = await ask("run", [["run", key]]);
  } catch (error) {
    alert(error.message);
    return;
  }
  const { notes } = run;
  const tag = el("input", { type: "text", value: run.tag ?? "", maxLength: 200, disabled: run.status === "running" });
  const tags = el("input", { type: "text", value: notes.tags.join(", "), placeholder: "good, to repeat" });
  const note = el("textarea", { rows: 6, value: notes.note, maxLength: 100000 });
  const pinned = el("input", { type: "checkbox", checked: notes.pinned });
  const dialog = el("dialog", { "aria-label": `Edit ${run.id}` });

  async function save(event) {
    event.preventDefault();
    const wanted = tags.value.split(",").map((text) => text.trim()).filter(Boolean);
    const body = { run: key, add_tags: wanted.filter((one) => !notes.tags.includes(one)), remove_tags: notes.tags.filter((one) => !wanted.includes(one)) };
    if (note.value !== notes.note) body.note = note.value;
    if (pinned.checked !== notes.pinned) body.pinned = pinned.checked;
    if (tag.value !== (run.tag ?? "")) body.tag = tag.value;
    try {
      await change("edit", body);
      dialog.close();
      await done?.();
    } catch (error) {
      showError(problem, error);
    }
  }

  fill(dialog, el("form", { class: "editor", onsubmit: save }, el("h2", {}, run.id),
    el("label", {}, "tag", tag), el("label", {}, "tags, separated by commas", tags), el("label", {}, "note", note),
    el("label", { class: "check" }, pinned, "pinned: prune never touches it"), problem,
    el("div", { class: "controls" }, el("button", { type: "submit" }, "Save"), el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"))));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  note.focus();
}
