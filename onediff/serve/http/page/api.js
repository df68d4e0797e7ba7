/** Requests to the server that this page comes from. */
import { PlainError } from "./errors.js";

// What the page says for the status of an error response. After a title without a detail, it says what the server says.
const UNUSABLE = ["The server cannot use these pictures."];
const WAIT = "Wait a few seconds, then try again.";
const TEXTS = {
  400: UNUSABLE,
  408: ["The pictures arrived too slowly.", "Check your connection, then try again."],
  413: ["The pictures are too large for this server."],
  415: UNUSABLE,
  422: UNUSABLE,
  429: ["The server is busy.", WAIT],
  503: ["The server is not ready.", `It may still load the model. ${WAIT}`],
  504: ["The server took too long.", WAIT],
};

/**
 * Ask for the caption of a pair, and return the answer of `POST v1/captions`.
 *
 * Throws PlainError if there is no answer, and the AbortError of `fetch` if `signal` aborts the request.
 */
export async function requestCaption([before, after], { key, signal }) {
  const form = new FormData();
  form.append("before", before.blob, before.name);
  form.append("after", after.blob, after.name);
  form.append("heat_map", "true");
  if (!/^[!-~]*$/.test(key ?? "")) throw wrongKey(key); // The browser cannot send it in a header.
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    const response = await fetch("v1/captions", { method: "POST", body: form, headers, signal });
    if (!response.ok) throw await refusal(response, key);
    return await response.json();
  } catch (error) {
    if (error instanceof PlainError || error.name === "AbortError") throw error;
    throw new PlainError("The server does not answer.", "Check that it is running, then try again.");
  }
}

/** Return the picture of an example as a Blob. */
export async function fetchExample(name) {
  const response = await fetch(`page/examples/${name}.jpg`).catch(() => null);
  if (response?.ok) return response.blob();
  throw new PlainError("The example cannot be loaded.", "Check that the server is running.", { canRetry: false });
}

/** Turn an error response into a PlainError. */
async function refusal(response, key) {
  const { status } = response;
  if (status === 401 || status === 403) return wrongKey(key);
  const [title, detail] = TEXTS[status] ?? ["The server failed.", `Its log says why (status ${status}).`];
  if (detail) return new PlainError(title, detail);
  return new PlainError(title, await serverMessage(response), { canRetry: false, isTooLarge: status === 413 });
}

function wrongKey(key) {
  const title = key ? "The server does not accept this API key." : "The server asks for an API key.";
  return new PlainError(title, "Enter the key above.", { canRetry: false, needsKey: true });
}

/** Return the message of an error response as a sentence. The text is empty if there is no message. */
async function serverMessage(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? "";
  return message && message[0].toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}
