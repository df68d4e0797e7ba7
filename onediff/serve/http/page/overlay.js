/** Draws the attention of the model and the changed regions on a canvas that lies over a picture. */

const OVERLAY_PX = 1024; // largest width or height of a canvas
// Share of the attention -> red, green, blue, opacity.
const HEAT = [[0, 59, 26, 120, 0], [0.25, 90, 30, 120, 90], [0.6, 215, 45, 80, 160], [1, 255, 230, 90, 205]];

/**
 * Draw over a picture.
 *
 * `grid` has rows of numbers from 0 to 1. It covers the square to which the model pads the picture, so a part of it can
 * lie outside the picture. `boxes` are [left, top, right, bottom] as shares of the width and the height of the picture.
 */
export function drawOverlay(canvas, { width, height }, { grid = null, boxes = [] }) {
  const scale = OVERLAY_PX / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.hidden = !grid && !boxes.length;
  const context = canvas.getContext("2d");
  if (grid) {
    const side = Math.max(canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(heatImage(grid), (canvas.width - side) / 2, (canvas.height - side) / 2, side, side);
  }
  const shrinking = canvas.width / (canvas.parentElement.clientWidth || canvas.width);
  for (const [left, top, right, bottom] of boxes) {
    const { width: across, height: down } = canvas;
    const box = [left * across, top * down, (right - left) * across, (bottom - top) * down];
    for (const [color, linePx] of [["#000a", 5], ["#ffcf33", 2.5]]) {
      Object.assign(context, { strokeStyle: color, lineWidth: linePx * shrinking, lineJoin: "round" });
      context.strokeRect(...box);
    }
  }
}

/** Return a canvas with one pixel for each number of the grid. */
function heatImage(grid) {
  const canvas = document.createElement("canvas");
  canvas.width = grid[0].length;
  canvas.height = grid.length;
  const pixels = new ImageData(canvas.width, canvas.height);
  pixels.data.set(grid.flat().flatMap(heatColor));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** Return [red, green, blue, opacity], each from 0 to 255, of a number from 0 to 1. */
function heatColor(value) {
  const share = Math.min(Math.max(value, 0), 1);
  const last = Math.max(1, HEAT.findIndex(([stop]) => stop >= share));
  const [low, high] = [HEAT[last - 1], HEAT[last]];
  const part = (share - low[0]) / (high[0] - low[0]);
  return [1, 2, 3, 4].map(channel => Math.round(low[channel] + part * (high[channel] - low[channel])));
}
