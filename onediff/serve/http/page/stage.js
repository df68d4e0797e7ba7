/** The two pictures: beside each other or under a slider, with attention and boxes drawn over them. */
import { drawOverlay } from "./overlay.js";
import { SIDES } from "./pictures.js";

const part = id => document.getElementById(id);
const stage = part("stage");
const slots = SIDES.map(part);
const choices = ["heat", "boxes"].map(part);
let shown = { pictures: [null, null], answer: null };

/** Let the user change how the pictures are shown. */
export function startStage() {
  for (const radio of document.getElementsByName("view")) radio.addEventListener("change", () => setView(radio.value));
  part("slider").addEventListener("input", slide);
  for (const choice of choices) choice.addEventListener("change", drawOverlays);
  slide();
}

/** Show the pictures (null for an empty slot) and, over them, what the answer says (null: nothing yet). */
export function showPictures(pictures, answer) {
  shown = { pictures, answer };
  const isPair = pictures.every(Boolean);
  const first = pictures.find(Boolean);
  const ratio = Math.min(Math.max(first.width / first.height, 0.5), 2.5);
  stage.style.setProperty("--ratio", ratio);
  stage.classList.toggle("wide", ratio > 1.2); // On a phone, wide pictures are shown one above the other.
  pictures.forEach(showPicture);
  part("tools").hidden = !isPair;
  part("heat-choice").hidden = !answer?.heat_map;
  part("boxes-choice").hidden = !answer?.regions;
  if (!isPair) document.querySelector("[name=view][value=side]").click();
  drawOverlays();
}

function showPicture(picture, side) {
  const [slot, name] = [slots[side], SIDES[side]];
  const image = slot.querySelector("img");
  slot.classList.toggle("full", Boolean(picture));
  image.hidden = !picture;
  if (picture && image.src !== picture.url) image.src = picture.url;
  image.alt = picture ? `${name}: ${picture.name}` : "";
  slot.querySelector(".act").textContent = picture ? "Replace" : "Choose a picture";
}

function drawOverlays() {
  const { pictures, answer } = shown;
  pictures.forEach((picture, side) => {
    const canvas = slots[side].querySelector("canvas");
    canvas.hidden = true;
    if (!picture || !answer) return;
    const grid = part("heat").checked ? answer.heat_map?.[SIDES[side]] : null;
    const boxes = part("boxes").checked ? answer.regions?.[SIDES[side]] ?? [] : [];
    drawOverlay(canvas, picture, { grid, boxes });
  });
}

function setView(view) {
  stage.dataset.view = view;
  part("slider").hidden = view !== "slider";
  drawOverlays(); // The width of the lines depends on the size of the pictures on the screen.
}

function slide() {
  const share = part("slider").value;
  stage.style.setProperty("--share", share / 100);
  part("slider").ariaValueText = `${share}% before, ${100 - share}% after`;
}
