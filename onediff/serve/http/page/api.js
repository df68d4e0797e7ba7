/** Requests to the server that this page comes from. */
import { PlainError } from "./errors.js";

const TITLES = {
  400: "The server cannot use these pictures.",
  413: "The pictures are too large for this server.",
  415: "The server cannot use these pictures.",
  422: "The server cannot use these pictures.",
  429: "The server is busy.",
  503: "The server is not ready.",
  504: "The server took too long.",
};
const BUSY = "Wait a few seconds, then try again.";
const DETAILS = { 429: BUSY, 503: BUSY, 504: BUSY };

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
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    const response = await fetch("v1/captions", { method: "POST", body: form, headers, signal });
    if (!response.ok) throw await refusal(response, key);
    return await response.json();
  } catch (error) {
    if (error instanceof PlainError || error.name === "AbortError") throw error;
    throw new PlainError("The server does not answer.", "Check that it is running and that you are online, then try again.");
  }
}

/** Return the picture of an example as a Blob. */
export async function fetchExample(name) {
  let response;
  try {
    response = await fetch(`page/examples/${name}.jpg`);
  } catch {
    throw new PlainError("The example cannot be loaded.", "Check that the server is running, then try again.");
  }
  if (!response.ok) throw new PlainError("The example cannot be loaded.", "Choose two pictures of your own.");
  return response.blob();
}

/** Turn an error response into a PlainError. */
async function refusal(response, key) {
  const { status } = response;
  if (status === 401 || status === 403) {
    const title = key ? "The server does not accept this API key." : "The server asks for an API key.";
    return new PlainError(title, "Enter the key above.", { needsKey: true });
  }
  if (DETAILS[status]) return new PlainError(TITLES[status], DETAILS[status]);
  if (TITLES[status]) return new PlainError(TITLES[status], await serverMessage(response));
  return new PlainError("The server failed.", `Its log says why (status ${status}).`);
}

/** Return the message of an error response as a sentence. The text is empty if there is no message. */
async function serverMessage(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? "";
  return message && message[0].toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}
