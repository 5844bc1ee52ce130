// A surface to paint on: brush and eraser for mouse, pen and fingers, undo, zoom, pan, and a frame that can be extended.

import { clamp, h } from "../dom.js";

const MAX_UNDO = 60;
const SIDES = ["left", "top", "right", "bottom"];

/** Events: `change` (a stroke ended), `frame` (the margins changed), `zoom`. */
export class Painter extends EventTarget {
  width = 0;
  height = 0;
  background = null;
  tool = "brush";
  size = 24;
  color = "rgb(39 71 204)";
  hatched = true; // whether the layer marks a region, instead of being the picture itself
  margins = [0, 0, 0, 0];
  #view = { scale: 1, x: 0, y: 0 };
  #undo = [];
  #redo = [];
  #stroke = null;
  #pointers = new Map();
  #pinch = null;
  #pan = null;
  #dragged = null; // the handle that a pointer drags
  #space = false;
  #frame = 0;
  #fitted = true;

  /**
   * @param {{label: string, sideLabel?: (index: number) => string, signal: AbortSignal}} options With `sideLabel` the
   *   frame gets handles.
   */
  constructor({ label, sideLabel, signal }) {
    super();
    this.layer = document.createElement("canvas");
    this.marks = document.createElement("canvas");
    this.context = this.layer.getContext("2d", { willReadFrequently: true });
    this.canvas = h("canvas", { class: "painter-canvas", tabIndex: 0, role: "img", "aria-label": label });
    this.handles = sideLabel ? SIDES.map((side, index) => this.#handle(side, index, sideLabel(index))) : [];
    this.cursor = h("span", { class: "brush-cursor", "aria-hidden": "true" });
    this.element = h("div", { class: "painter" }, this.canvas, this.handles, this.cursor);
    this.canvas.addEventListener("pointerdown", (event) => this.#down(event));
    this.canvas.addEventListener("pointermove", (event) => this.#move(event));
    this.canvas.addEventListener("pointerup", (event) => this.#up(event));
    this.canvas.addEventListener("pointercancel", (event) => this.#up(event));
    this.canvas.addEventListener("pointerleave", () => this.cursor.classList.remove("on"));
    this.canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    new ResizeObserver(() => (this.#fitted ? this.fit() : this.paint())).observe(this.element);
    addEventListener("keyup", (event) => { if (event.key === " ") this.#setSpace(false); }, { signal });
    addEventListener("keydown", (event) => { if (event.key === "Escape" && this.#abandon()) event.preventDefault(); }, { signal, capture: true });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint(), { signal });
  }

  /** Start with an empty layer of this size over a background (a picture or a canvas) or over black, and with these margins. */
  open(width, height, background = null, margins = [0, 0, 0, 0]) {
    Object.assign(this, { width, height, background });
    this.layer.width = width;
    this.layer.height = height;
    this.#undo = [];
    this.#redo = [];
    this.margins = [...margins];
    this.fit();
  }

  get isEmpty() {
    const { data } = this.context.getImageData(0, 0, this.width || 1, this.height || 1);
    for (let index = 3; index < data.length; index += 4) if (data[index] > 127) return false;
    return true;
  }

  get canUndo() {
    return this.#undo.length > 0;
  }

  get canRedo() {
    return this.#redo.length > 0;
  }

  /** Change the layer by a function of its context, as one step that can be undone. */
  edit(action) {
    const before = this.#snapshot();
    action(this.context);
    this.#undo.push({ x: 0, y: 0, before, after: this.#snapshot() });
    this.#changed();
  }

  clear() {
    this.edit((context) => context.clearRect(0, 0, this.width, this.height));
  }

  invert() {
    this.edit((context) => {
      context.globalCompositeOperation = "source-out";
      context.fillStyle = this.color;
      context.fillRect(0, 0, this.width, this.height);
      context.globalCompositeOperation = "source-over";
    });
  }

  undo() {
    this.#step(this.#undo, this.#redo, "before");
  }

  redo() {
    this.#step(this.#redo, this.#undo, "after");
  }

  zoom(factor) {
    this.#zoomAt(factor, this.element.clientWidth / 2, this.element.clientHeight / 2);
  }

  /** Show the whole frame. */
  fit() {
    const { clientWidth, clientHeight } = this.element;
    if (!clientWidth || !this.width) return;
    const [left, top, right, bottom] = this.margins;
    const space = this.handles.length ? 44 : 0;
    const scale = Math.min((clientWidth - space) / (this.width + left + right), (clientHeight - space) / (this.height + top + bottom), 12);
    this.#view = { scale, x: (clientWidth - (this.width + right - left) * scale) / 2, y: (clientHeight - (this.height + bottom - top) * scale) / 2 };
    this.#fitted = true;
    this.paint();
  }

  /** Extend the frame on one side, by a multiple of 8 pixels. */
  setMargin(index, pixels) {
    this.#putMargin(index, Math.max(0, Math.round(pixels / 8) * 8));
  }

  #putMargin(index, pixels) {
    this.margins[index] = pixels;
    if (this.#fitted) this.fit();
    this.paint();
    this.dispatchEvent(new Event("frame"));
  }

  /** Handle the keys of painting. Returns whether the key was one of them. */
  key(event) {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
      if (event.shiftKey) this.redo();
      else this.undo();
      return true;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return false;
    if (event.key === " " && !/^(BUTTON|A|SUMMARY|INPUT)$/.test(event.target.tagName)) {
      this.#setSpace(true);
      return true;
    }
    const action = {
      b: () => this.setTool("brush"), e: () => this.setTool("eraser"), "[": () => this.setSize(this.size / 1.2), "]": () => this.setSize(this.size * 1.2),
      "+": () => this.zoom(1.25), "=": () => this.zoom(1.25), "-": () => this.zoom(0.8), 0: () => this.fit(),
    }[event.key];
    action?.();
    return Boolean(action);
  }

  setTool(tool) {
    this.tool = tool;
    this.element.dataset.tool = tool;
    this.dispatchEvent(new Event("tool"));
  }

  setSize(size) {
    this.size = clamp(Math.round(size), 1, 400);
    this.dispatchEvent(new Event("tool"));
  }

  paint() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    const { clientWidth, clientHeight } = this.element;
    const density = devicePixelRatio || 1;
    const { canvas } = this;
    if (canvas.width !== Math.round(clientWidth * density) || canvas.height !== Math.round(clientHeight * density)) {
      canvas.width = Math.round(clientWidth * density);
      canvas.height = Math.round(clientHeight * density);
    }
    if (!this.width) return;
    const context = canvas.getContext("2d");
    const { scale, x, y } = this.#view;
    const [left, top, right, bottom] = this.margins;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.setTransform(density * scale, 0, 0, density * scale, density * x, density * y);
    if (left || top || right || bottom) {
      context.fillStyle = this.#hatching(context, scale, density);
      context.fillRect(-left, -top, this.width + left + right, this.height + top + bottom);
    }
    context.fillStyle = "#000";
    if (!this.background) context.fillRect(0, 0, this.width, this.height);
    context.imageSmoothingEnabled = scale < 6;
    if (this.background) context.drawImage(this.background, 0, 0, this.width, this.height);
    if (this.hatched) this.#drawHatched(context, scale, density);
    else context.drawImage(this.layer, 0, 0);
    this.#placeHandles();
  }

  /** Draw the layer as stripes, which are visible over any picture. */
  #drawHatched(context, scale, density) {
    const { width, height } = this.canvas;
    if (this.marks.width !== width || this.marks.height !== height) Object.assign(this.marks, { width, height });
    const marks = this.marks.getContext("2d");
    marks.setTransform(1, 0, 0, 1, 0, 0);
    marks.clearRect(0, 0, width, height);
    marks.setTransform(context.getTransform());
    marks.imageSmoothingEnabled = scale < 6;
    marks.globalCompositeOperation = "source-over";
    marks.drawImage(this.layer, 0, 0);
    marks.globalCompositeOperation = "source-in";
    marks.fillStyle = this.#hatching(marks, scale, density);
    marks.fillRect(-this.margins[0], -this.margins[1], this.width + 4096, this.height + 4096);
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalAlpha = 0.82;
    context.drawImage(this.marks, 0, 0);
    context.restore();
  }

  /** Return slanted stripes of one width on the screen, whatever the zoom. */
  #hatching(context, scale, density) {
    const side = 12 * density;
    const tile = document.createElement("canvas");
    Object.assign(tile, { width: side, height: side });
    const brush = tile.getContext("2d");
    brush.fillStyle = "rgb(60 88 214)";
    brush.fillRect(0, 0, side, side);
    brush.strokeStyle = "rgb(226 231 255)";
    brush.lineWidth = side / 5;
    brush.beginPath();
    for (const offset of [-side, 0, side]) {
      brush.moveTo(offset - side / 2, side * 1.5);
      brush.lineTo(offset + side * 1.5, -side / 2);
    }
    brush.stroke();
    const pattern = context.createPattern(tile, "repeat");
    pattern.setTransform(new DOMMatrix().scale(1 / (scale * density)));
    return pattern;
  }

  #handle(side, index, label) {
    const handle = h("span", { class: `frame-handle at-${side}`, role: "slider", tabIndex: 0, "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "1024", "aria-valuenow": "0" });
    const horizontal = index % 2 === 0;
    const direction = index < 2 ? -1 : 1;
    let start = null;
    handle.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      handle.setPointerCapture(event.pointerId);
      start = { at: horizontal ? event.clientX : event.clientY, margin: this.margins[index], scale: this.#view.scale };
      this.#fitted = false;
      const { margin } = start;
      this.#dragged = { restore: () => { this.#putMargin(index, margin); end(); } };
    });
    handle.addEventListener("pointermove", (event) => {
      if (!start) return;
      this.setMargin(index, start.margin + (direction * ((horizontal ? event.clientX : event.clientY) - start.at)) / start.scale);
    });
    const end = () => {
      if (start) this.fit();
      start = null;
      this.#dragged = null;
    };
    handle.addEventListener("pointerup", end);
    handle.addEventListener("pointercancel", end);
    handle.addEventListener("keydown", (event) => {
      const towards = { ArrowLeft: horizontal ? -1 : 0, ArrowRight: horizontal ? 1 : 0, ArrowUp: horizontal ? 0 : -1, ArrowDown: horizontal ? 0 : 1 }[event.key];
      if (!towards) return;
      event.preventDefault();
      event.stopPropagation();
      this.setMargin(index, this.margins[index] + towards * direction * 8);
    });
    return handle;
  }

  #placeHandles() {
    const { scale, x, y } = this.#view;
    const [left, top, right, bottom] = this.margins;
    const middle = [x + ((this.width + right - left) * scale) / 2, y + ((this.height + bottom - top) * scale) / 2];
    const places = [[x - left * scale, middle[1]], [middle[0], y - top * scale], [x + (this.width + right) * scale, middle[1]], [middle[0], y + (this.height + bottom) * scale]];
    this.handles.forEach((handle, index) => {
      handle.style.setProperty("left", `${places[index][0]}px`);
      handle.style.setProperty("top", `${places[index][1]}px`);
      handle.setAttribute("aria-valuenow", String(this.margins[index]));
    });
  }

  #position(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  #toLayer({ x, y }) {
    return { x: (x - this.#view.x) / this.#view.scale, y: (y - this.#view.y) / this.#view.scale };
  }

  #down(event) {
    if (!this.width) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, this.#position(event));
    if (this.#pointers.size === 2) {
      this.#abandonStroke();
      this.#startPinch();
      return;
    }
    if (event.button === 1 || this.tool === "pan" || this.#space) {
      this.#pan = { at: this.#position(event), x: this.#view.x, y: this.#view.y };
      return;
    }
    if (event.button !== 0) return;
    this.#stroke = { id: event.pointerId, before: this.#snapshot(), last: null };
    this.#extendStroke(event);
  }

  #move(event) {
    const position = this.#position(event);
    this.#moveCursor(event, position);
    if (this.#pointers.has(event.pointerId)) this.#pointers.set(event.pointerId, position);
    if (this.#pinch) return this.#movePinch();
    if (this.#pan) {
      Object.assign(this.#view, { x: this.#pan.x + position.x - this.#pan.at.x, y: this.#pan.y + position.y - this.#pan.at.y });
      this.#fitted = false;
      return this.paint();
    }
    if (this.#stroke?.id === event.pointerId) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const one of events.length ? events : [event]) this.#extendStroke(one);
    }
  }

  #up(event) {
    this.#pointers.delete(event.pointerId);
    this.#pan = null;
    if (this.#pinch && this.#pointers.size < 2) this.#pinch = null;
    if (this.#stroke?.id !== event.pointerId) return;
    const { before } = this.#stroke;
    this.#stroke = null;
    this.#undo.push({ before, after: this.#snapshot() });
    this.#changed();
  }

  #extendStroke(event) {
    const point = this.#toLayer(this.#position(event));
    const { context } = this;
    const last = this.#stroke.last ?? point;
    context.save();
    context.globalCompositeOperation = this.tool === "eraser" ? "destination-out" : "source-over";
    context.strokeStyle = this.color;
    context.lineCap = "round";
    context.lineJoin = "round";
    // A pen paints broader when it is pressed harder.
    context.lineWidth = this.size * (event.pointerType === "pen" && event.pressure > 0 ? 0.3 + 0.7 * event.pressure : 1);
    context.beginPath();
    context.moveTo(last.x, last.y);
    context.lineTo(point.x + 0.01, point.y);
    context.stroke();
    context.restore();
    this.#stroke.last = point;
    this.paint();
  }

  /** End what a pointer does here; a stroke and the drag of a handle leave no trace. Returns whether there was anything. */
  #abandon() {
    const isBusy = Boolean(this.#stroke || this.#pan || this.#pinch || this.#dragged);
    this.#abandonStroke();
    this.#pan = null;
    this.#pinch = null;
    this.#dragged?.restore();
    return isBusy;
  }

  #abandonStroke() {
    if (!this.#stroke) return;
    this.context.putImageData(this.#stroke.before, 0, 0);
    this.#stroke = null;
    this.paint();
  }

  #startPinch() {
    const [one, other] = this.#pointers.values();
    this.#pinch = { distance: Math.hypot(one.x - other.x, one.y - other.y), x: (one.x + other.x) / 2, y: (one.y + other.y) / 2, view: { ...this.#view } };
    this.#pan = null;
  }

  #movePinch() {
    const [one, other] = this.#pointers.values();
    const { distance, view } = this.#pinch;
    const scale = clamp((view.scale * Math.hypot(one.x - other.x, one.y - other.y)) / Math.max(distance, 1), 0.05, 60);
    const ratio = scale / view.scale;
    const x = (one.x + other.x) / 2;
    const y = (one.y + other.y) / 2;
    this.#view = { scale, x: x - (this.#pinch.x - view.x) * ratio, y: y - (this.#pinch.y - view.y) * ratio };
    this.#fitted = false;
    this.paint();
  }

  #wheel(event) {
    if (!this.width) return;
    // A wheel alone scrolls the page, unless the surface has the focus.
    if (!event.ctrlKey && document.activeElement !== this.canvas) return;
    event.preventDefault();
    const { x, y } = this.#position(event);
    this.#zoomAt(Math.exp(-clamp(event.deltaY, -120, 120) / 300), x, y);
  }

  #zoomAt(factor, x, y) {
    const scale = clamp(this.#view.scale * factor, 0.05, 60);
    const ratio = scale / this.#view.scale;
    this.#view = { scale, x: x - (x - this.#view.x) * ratio, y: y - (y - this.#view.y) * ratio };
    this.#fitted = false;
    this.paint();
  }

  #moveCursor(event, { x, y }) {
    const shown = event.pointerType !== "touch" && this.tool !== "pan" && !this.#space;
    this.cursor.classList.toggle("on", shown);
    const diameter = this.size * this.#view.scale;
    for (const [name, value] of [["left", x], ["top", y], ["width", diameter], ["height", diameter]]) this.cursor.style.setProperty(name, `${value}px`);
  }

  #setSpace(on) {
    this.#space = on;
    this.element.classList.toggle("panning", on);
  }

  #snapshot() {
    return this.context.getImageData(0, 0, this.width, this.height);
  }

  #step(from, to, which) {
    const entry = from.pop();
    if (!entry) return;
    this.context.putImageData(entry[which], 0, 0);
    to.push(entry);
    this.paint();
    this.dispatchEvent(new Event("change"));
  }

  #changed() {
    // Each entry holds two copies of the layer: fewer of them for large pictures.
    const most = clamp(Math.floor(3e8 / (8 * this.width * this.height)), 5, MAX_UNDO);
    while (this.#undo.length > most) this.#undo.shift();
    this.#redo = [];
    this.paint();
    this.dispatchEvent(new Event("change"));
  }
}

/**
 * Return a mask: white where a layer is painted, black elsewhere, with a soft edge.
 *
 * @param {Painter} painter
 * @param {number} feather Width of the soft edge in pixels.
 */
export function maskCanvas(painter, feather) {
  const { width, height, margins } = painter;
  // The frame's extension counts as painted while the edge is softened: the seam along it becomes soft too.
  const [left, top, right, bottom] = margins.map((margin) => (feather ? Math.min(margin, 2 * feather) : 0));
  const wide = width + left + right;
  const high = height + top + bottom;
  const { data } = painter.context.getImageData(0, 0, width, height);
  const alpha = new Float32Array(wide * high).fill(255);
  for (let y = 0; y < height; y += 1) for (let x = 0; x < width; x += 1) alpha[(y + top) * wide + x + left] = data[4 * (y * width + x) + 3];
  for (let pass = 0; pass < 3 && feather; pass += 1) boxBlur(alpha, wide, high, Math.max(Math.round(feather / 3), 1));
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const mask = context.createImageData(width, height);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const index = 4 * (y * width + x);
      mask.data.fill(alpha[(y + top) * wide + x + left], index, index + 3);
      mask.data[index + 3] = 255;
    }
  }
  context.putImageData(mask, 0, 0);
  return canvas;
}

/** Replace each value by the mean of its neighbours up to a radius, along rows and then along columns. */
function boxBlur(values, width, height, radius) {
  const line = new Float32Array(Math.max(width, height));
  const along = (count, length, stride, step) => {
    for (let start = 0; start < count; start += 1) {
      const origin = start * stride;
      for (let index = 0; index < length; index += 1) line[index] = values[origin + index * step];
      let sum = 0;
      for (let offset = -radius; offset <= radius; offset += 1) sum += line[clamp(offset, 0, length - 1)];
      for (let index = 0; index < length; index += 1) {
        values[origin + index * step] = sum / (2 * radius + 1);
        sum += line[Math.min(index + radius + 1, length - 1)] - line[Math.max(index - radius, 0)];
      }
    }
  };
  along(height, width, width, 1);
  along(width, height, 1, width);
}

/** Paint a stored mask (white on black) onto a painter's layer. */
export function paintMask(painter, image) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: painter.width, height: painter.height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, painter.width, painter.height);
  const pixels = context.getImageData(0, 0, painter.width, painter.height);
  for (let index = 0; index < pixels.data.length; index += 4) {
    pixels.data[index + 3] = pixels.data[index];
    pixels.data.set([39, 71, 204], index);
  }
  painter.edit((target) => target.putImageData(pixels, 0, 0));
}
