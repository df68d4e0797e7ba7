/** The pairs that were captioned in this tab. The browser keeps them over a reload and forgets them with the tab. */
import { SIDES, blobOf, smallCopy } from "./pictures.js";
import { store } from "./store.js";

const STORE = "onediff.history";
const MAX_ENTRIES = 12;
const STORED_PX = 640; // largest width or height of a stored picture
const section = document.getElementById("history");
const list = document.getElementById("entries");
const entries = JSON.parse(store.getItem(STORE) ?? "[]"); // each {names, copies, answer}; the newest first

/** Show the history. `open` is called with the two files, their names and the answer when the user chooses an entry. */
export function startHistory(open) {
  list.append(...entries.map(entryItem));
  list.addEventListener("click", event => {
    const entry = entries[[...list.children].indexOf(event.target.closest("li"))];
    if (entry) open(entry.copies.map(blobOf), entry.names, entry.answer);
  });
  document.getElementById("clear").addEventListener("click", () => {
    entries.length = 0;
    save();
    document.querySelector("#examples button").focus();
  });
  save();
}

/** Add a pair with its answer. Copies of the pictures are stored, because originals can be too large for the store. */
export async function remember(pair, answer) {
  const copies = await Promise.all(pair.map(picture => smallCopy(picture, STORED_PX)));
  const entry = { names: pair.map(picture => picture.name), copies, answer };
  entries.unshift(entry);
  list.prepend(entryItem(entry));
  save();
}

/** Write the history to the store of the tab. The oldest entries are dropped if there are too many for the store. */
function save() {
  entries.splice(MAX_ENTRIES);
  while (!isStored() && entries.length) entries.pop();
  while (list.children.length > entries.length) list.lastElementChild.remove();
  section.hidden = !entries.length;
}

/** Try to write the history to the store, and return false if the store has too little room. */
function isStored() {
  try {
    store.setItem(STORE, JSON.stringify(entries));
    return true;
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    return false;
  }
}

function entryItem({ copies, answer }) {
  const thumbs = element("span", { className: "thumbs" });
  thumbs.append(...copies.map((src, side) => element("img", { src, alt: SIDES[side] })));
  const button = element("button", { type: "button" });
  button.append(thumbs, element("span", { className: "words", textContent: answer.caption }));
  const item = element("li");
  item.append(button);
  return item;
}

function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}
