/** Connects the parts of the page: pictures come in, the server is asked, the answer is shown. */
import { fetchExample, requestCaption } from "./api.js";
import { PlainError } from "./errors.js";
import { remember, startHistory } from "./history.js";
import { SIDES, blobOf, closePicture, inOrder, openPicture, smallCopy } from "./pictures.js";
import { clearResult, showAnswer, showError, showNote, showWaiting } from "./result.js";
import { showPictures, startStage } from "./stage.js";
import { store } from "./store.js";

const KEY = "onediff.key";
const SENT_PX = 1024; // largest width or height of the copies that are sent if the originals are too large
const part = id => document.getElementById(id);
let pictures = [null, null];
const turns = [0, 0]; // how often a picture was chosen for each slot; only the last choice counts
let request = null; // the AbortController of the running request

/**
 * Open pictures and put them into their slots. `loads` maps a slot (0, 1) to a function that returns [blob, name].
 *
 * If a slot gets another picture in the meantime, the earlier one is dropped. If both slots are full, the pair is
 * captioned, unless its `answer` is known. `note` tells the user something about the choice.
 */
async function place(loads, { answer = null, note = "" } = {}) {
  const sides = Object.keys(loads).map(Number);
  const mine = sides.map(side => ++turns[side]);
  const isLast = () => sides.every((side, k) => turns[side] === mine[k]);
  stop();
  try {
    const opened = await Promise.all(sides.map(async side => openPicture(...await loads[side]())));
    const wanted = sides.filter((side, k) => turns[side] === mine[k]);
    sides.forEach((side, k) => {
      closePicture(wanted.includes(side) ? pictures[side] : opened[k]);
      if (wanted.includes(side)) pictures[side] = opened[k];
    });
    if (!wanted.length) return;
    if (answer && isLast()) present(answer);
    else if (pictures.every(Boolean)) await compare();
    else present(null);
    if (note && isLast()) showNote(note);
  } catch (error) {
    if (isLast()) report(error);
  }
}

/** Show the pictures with an answer, or without one. */
function present(answer) {
  showPictures(pictures, answer);
  if (answer) showAnswer(answer);
  else clearResult();
}

/** Ask the server what changed between the two pictures, and show the answer. */
async function compare() {
  stop();
  const mine = request = new AbortController();
  const pair = [...pictures];
  showPictures(pair, null);
  showWaiting();
  try {
    const { answer, note } = await ask(pair, { key: store.getItem(KEY), signal: mine.signal });
    if (mine !== request) return;
    present(answer);
    if (note) showNote(note);
    await remember(pair, answer);
  } catch (error) {
    if (mine === request) report(error);
  }
}

/** Request the caption of a pair, and a second time with smaller copies if the pictures are too large for the server. */
async function ask(pair, options) {
  try {
    return { answer: await requestCaption(pair, options) };
  } catch (error) {
    if (!error.isTooLarge) throw error;
    const copies = pair.map(async picture => ({ name: picture.name, blob: blobOf(await smallCopy(picture, SENT_PX)) }));
    const answer = await requestCaption(await Promise.all(copies), options);
    return { answer, note: "The pictures are too large for this server, so it got smaller copies." };
  }
}

/** Forget the running request. The server notices that nobody waits for it. */
function stop() {
  request?.abort();
  request = null;
}

/** Show an error that has a text for the user, and throw every other error. */
function report(error) {
  if (!(error instanceof PlainError)) throw error;
  showError(error);
  if (error.needsKey) askForKey();
}

function askForKey() {
  part("key-form").hidden = false;
  part("key").focus();
}

/** Take files that the user chose, dropped or pasted. `side` is the slot they were given to, if there is one. */
function take(files, side = freeSide()) {
  if (!files.length) return;
  const [first, second] = files.length > 1 ? inOrder(files) : files;
  const load = file => async () => [file, file.name];
  const note = files.length > 2 ? `You gave ${files.length} files. The first two are compared.` : "";
  place(second ? { 0: load(first), 1: load(second) } : { [side]: load(first) }, { note });
}

/** Return the slot that has the focus, or else the first empty slot, or else the slot of the picture after. */
function freeSide() {
  const focused = SIDES.findIndex(name => part(`${name}-file`) === document.activeElement);
  if (focused >= 0) return focused;
  return pictures[0] ? 1 : 0;
}

function sideOf(node) {
  const side = SIDES.findIndex(name => part(name).contains(node));
  return side >= 0 && part("stage").dataset.view === "side" ? side : undefined;
}

function startFiles() {
  SIDES.forEach((name, side) => part(`${name}-file`).addEventListener("change", event => {
    take([...event.target.files], side);
    event.target.value = ""; // so that the user can choose the same file again
  }));
  document.addEventListener("paste", event => take([...event.clipboardData.files]));
  const mark = node => SIDES.forEach((name, side) => part(name).classList.toggle("over", side === sideOf(node)));
  document.addEventListener("dragover", event => {
    event.preventDefault();
    mark(event.target);
  });
  document.addEventListener("dragleave", () => mark(null));
  document.addEventListener("drop", event => {
    event.preventDefault();
    mark(null);
    const files = [...event.dataTransfer.files];
    if (files.length) take(files, sideOf(event.target));
    else showNote("This was not a file. Save the picture first, or copy it and paste it here.");
  });
}

function startButtons() {
  part("swap").addEventListener("click", () => {
    pictures.reverse();
    compare();
  });
  part("again").addEventListener("click", compare);
  part("cancel").addEventListener("click", () => {
    stop();
    showError(new PlainError("You stopped waiting.", "There is no caption for this pair."));
    part("again").focus();
  });
  part("examples").addEventListener("click", event => {
    const name = event.target.closest("[data-example]")?.dataset.example;
    if (!name) return;
    const load = side => async () => [await fetchExample(`${name}_${side}`), `example, ${side}`];
    place({ 0: load("before"), 1: load("after") });
    part("stage").scrollIntoView({ block: "nearest" });
  });
  part("key-form").addEventListener("submit", event => {
    event.preventDefault();
    store.setItem(KEY, part("key").value.trim());
    if (pictures.every(Boolean)) compare();
  });
}

startStage();
startFiles();
startButtons();
startHistory(([before, after], names, answer) => {
  place({ 0: async () => [before, names[0]], 1: async () => [after, names[1]] }, { answer });
  part("stage").scrollIntoView({ block: "nearest" });
});
if (document.documentElement.dataset.key === "needed") part("key-form").hidden = false;
