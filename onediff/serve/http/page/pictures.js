/** The pictures of the user. A picture is {name, blob, url, width, height}; `url` is only valid in this page. */
import { PlainError } from "./errors.js";

export const SIDES = ["before", "after"];

/** Open a file as a picture. Throws PlainError if the browser cannot show it. */
export async function openPicture(blob, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new PlainError(`“${name}” cannot be opened.`, "Use a PNG, JPEG, WebP or GIF file.", { canRetry: false });
  }
  const { width, height } = bitmap;
  bitmap.close();
  return { name, blob, url: URL.createObjectURL(blob), width, height };
}

/** Free the memory of a picture that is no longer shown. */
export function closePicture(picture) {
  if (picture) URL.revokeObjectURL(picture.url);
}

/** Put the two files of a drop in order: names that contain "before" come first, then "img2" before "img10". */
export function inOrder(files) {
  const isLater = file => !/before/i.test(file.name);
  return [...files].sort((a, b) =>
    isLater(a) - isLater(b) || a.name.localeCompare(b.name, undefined, { numeric: true }));
}

/**
 * Return a JPEG copy of a picture as a data URI, whose longer side has at most `longest` pixels.
 *
 * Transparent parts become white, as for the model.
 */
export async function smallCopy(picture, longest) {
  const scale = Math.min(1, longest / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const bitmap = await createImageBitmap(picture.blob);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.9);
}

/** Return the bytes of a JPEG data URI as a Blob. */
export function blobOf(dataUri) {
  const bytes = Uint8Array.from(atob(dataUri.split(",")[1]), character => character.charCodeAt(0));
  return new Blob([bytes], { type: "image/jpeg" });
}
