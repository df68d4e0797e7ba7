/** The part of the page below the pictures: waiting, caption, warning, error and facts. */

const SLOW_MS = 4000; // After this time, the page says that it still waits, and offers to stop.
const part = id => document.getElementById(id);
const PARTS = ["caption", "waiting", "warning", "note", "progress", "cancel", "error", "facts"];
let slow;

/** Hide everything, for example when a picture is missing. */
export function clearResult() {
  clearTimeout(slow);
  if (part("result").contains(document.activeElement)) part("result").focus(); // A hidden button would lose the focus.
  for (const id of PARTS) part(id).hidden = true;
}

/** Show that a caption is on the way. */
export function showWaiting() {
  clearResult();
  say("waiting", "Looking for the change …");
  part("progress").hidden = false;
  slow = setTimeout(() => {
    say("waiting", "Still looking. The server is slow or busy.");
    part("cancel").hidden = false;
  }, SLOW_MS);
}

/** Show an answer of `POST v1/captions`. Facts that the model does not give are left out. */
export function showAnswer({ caption, changed, confidence, familiar, model, milliseconds }) {
  clearResult();
  say("caption", caption);
  part("warning").hidden = familiar !== false;
  fact("confidence", confidence, value => `${Math.round(100 * value)}%`);
  part("meter").value = confidence ?? 0;
  fact("verdict", changed, value => (value ? "Something changed" : "Nothing changed"));
  fact("time", milliseconds, value => `${(value / 1000).toFixed(2)} s`);
  fact("model", model, ({ version, digest }) =>
    [version && `version ${version}`, digest?.slice(0, 8)].filter(Boolean).join(", "));
  part("facts").hidden = false;
}

/** Show a PlainError, and offer another try if that can help. */
export function showError({ title, detail, canRetry }) {
  clearResult();
  part("error-title").textContent = title;
  part("error-detail").textContent = detail;
  part("again").hidden = !canRetry;
  part("error").hidden = false;
}

/** Tell the user something that is no error, below the caption if there is one. */
export function showNote(text) {
  say("note", text);
}

function say(id, text) {
  part(id).textContent = text;
  part(id).hidden = false;
}

function fact(id, value, format) {
  const text = value === null || value === undefined ? "" : format(value);
  part(id).textContent = text;
  part(id).closest("div").hidden = !text;
}
