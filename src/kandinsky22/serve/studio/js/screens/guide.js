// Guide: a picture whose composition follows edges, depth, or a drawing by hand.

import { canvasBlob, fill, h, icon, iconButton, loadPicture } from "../dom.js";
import { api, pictureReference, pictureUrl, uploadPicture } from "../api.js";
import { inputName, resolvePicture } from "../actions.js";
import { choices, onPaste, pictureSlot, slider, textField, toggle } from "../components/controls.js";
import { complain } from "../components/feedback.js";
import { Painter } from "../components/painter.js";
import { DEFAULT_SETTINGS, modelOf, settingsForm, settingsRequest } from "../components/settings.js";
import { drawEdges } from "../edges.js";
import { compact } from "../jobs.js";
import { loadDraft, saveDraft, store } from "../store.js";
import { strings } from "../strings.js";
import { loadStyle } from "../styles.js";

await loadStyle("canvas");

const texts = strings.guide;
const DEFAULT_STRENGTH = 0.3; // the server's, for requests without one

class Guide extends HTMLElement {
  #abort = new AbortController();
  #image = null;
  #depth = null;
  #measuring = null; // the picture whose depth the server estimates
  #frame = 0;

  connectedCallback() {
    if (this.childElementCount) return;
    const { signal } = this.#abort;
    this.draft = loadDraft("guide", { prompt: "", kind: "edges", picture: null, start: null, low: 20, high: 50, blur: 1, over: false, strength: 0.8, tone: 255, settings: DEFAULT_SETTINGS });
    this.stage = h("k-stage");
    this.stage.setAttribute("name", "guide");
    this.prompt = textField({ label: texts.prompt, value: this.draft.prompt, placeholder: texts.placeholder, class: "prompt", rows: 2, oninput: (text) => { this.draft.prompt = text; this.#save(); } });
    this.kind = choices({ label: texts.kind, options: Object.entries(texts.kinds), value: this.draft.kind, onchange: (kind) => { this.draft.kind = kind; this.#changed(); } });
    this.source = pictureSlot({ label: texts.choose, hint: texts.chooseHint, removeLabel: strings.draw.remove, class: "guide-slot", onpicture: (picture) => { this.settings.forget("width", "height"); this.#take(picture); } });
    const edge = (name, max, step) => slider({ label: texts[name], min: 0, max, step, value: this.draft[name], oninput: (value) => { this.draft[name] = value; this.#save(); this.#drawEdges(); } });
    this.thresholds = h("div", { class: "options" }, edge("low", 255, 1), edge("high", 255, 1), edge("blur", 5, 0.1));
    this.surface = h("div", { class: "guide-surface" });
    this.painter = new Painter({ label: texts.surface, signal });
    Object.assign(this.painter, { hatched: false, size: 10 });
    this.#setTone(this.draft.tone);
    this.tool = choices({ label: strings.canvas.tools, value: "brush", class: "tools", options: [["brush", "brush"], ["eraser", "eraser"]].map(([tool, name]) => [tool, h("span", { title: texts[tool] }, icon(name), h("span", { class: "visually-hidden" }, texts[tool]))]), onchange: (tool) => this.painter.setTool(tool) });
    this.size = slider({ label: texts.size, min: 1, max: 80, step: 1, value: 10, oninput: (value) => { this.painter.size = value; } });
    this.tone = slider({ label: texts.tone, min: 20, max: 255, step: 1, value: this.draft.tone, oninput: (value) => { this.#setTone(value); this.#save(); } });
    this.paintTools = h("div", { class: "options" },
      h("div", { class: "toolbar", role: "toolbar", "aria-label": strings.canvas.tools }, this.tool, iconButton("undo", strings.canvas.undo, () => this.painter.undo()), iconButton("redo", strings.canvas.redo, () => this.painter.redo()), iconButton("trash", texts.clear, () => this.painter.clear())),
      this.size, this.tone,
      h("button", { type: "button", class: "button quiet", onclick: () => this.#paintEdges() }, icon("guide"), texts.paintFrom));
    this.over = toggle({ label: texts.strengthHint, checked: this.draft.over, onchange: (value) => { this.draft.over = value; this.#changed(); } });
    this.strength = slider({ label: texts.strength, min: 0.05, max: 1, step: 0.05, value: this.draft.strength, oninput: (value) => { this.draft.strength = value; this.#save(); } });
    this.settings = settingsForm({ value: this.draft.settings, onchange: () => this.#save(), kind: "control", size: false, signal });
    this.append(h("h1", { class: "visually-hidden" }, texts.title),
      h("div", { class: "guide-layout" },
        h("div", { class: "composer" }, this.prompt, h("div", { class: "run-row" }, h("button", { type: "button", class: "button primary", onclick: () => this.run() }, icon("guide"), texts.draw), h("kbd", { class: "key-hint" }, "Ctrl Enter"))),
        h("div", { class: "guide-source" }, this.kind, this.source, this.surface, this.thresholds, this.paintTools),
        this.stage,
        h("div", { class: "options" }, this.over, this.strength, this.settings)));
    this.painter.setTool("brush");
    this.painter.addEventListener("tool", () => { this.tool.set(this.painter.tool); this.size.set(this.painter.size); });
    this.painter.addEventListener("change", () => {
      const painted = this.painter.layer.toDataURL("image/png");
      saveDraft("guide.layer", painted.length < 1e6 ? { painted } : {});
    });
    onPaste(this, signal, { files: (files) => this.source.take(files) });
    store.on("info", () => this.#reflect(), signal);
    this.restored = this.#restore().catch(() => {});
  }

  show() {
    this.painter.fit();
  }

  async #restore() {
    const { painted } = loadDraft("guide.layer", { painted: null });
    await this.#take(this.draft.picture, this.draft.start);
    this.source.show(this.draft.picture);
    if (!painted) return;
    const stored = await loadPicture(painted);
    this.#openPainter();
    this.painter.edit((context) => context.drawImage(stored, 0, 0, this.painter.width, this.painter.height));
  }

  #save() {
    saveDraft("guide", this.draft);
  }

  #changed() {
    this.#save();
    this.#reflect();
  }

  #setTone(tone) {
    this.draft.tone = tone;
    this.painter.color = `rgb(${tone} ${tone} ${tone})`;
  }

  /** Take the picture of the guide, and the one under it if it is another one. */
  async #take(picture, start = null) {
    Object.assign(this.draft, { picture, start });
    this.#depth = null;
    this.#image = picture ? await loadPicture(pictureUrl(picture)).catch(() => null) : null;
    if (!this.#image) this.draft.picture = null;
    this.#changed();
  }

  /** Return the size at which a guide is drawn: the picture's shape with the area of the model's default size. */
  #size() {
    const model = modelOf("control", this.draft.settings);
    const side = Math.sqrt((model?.default_width ?? 512) * (model?.default_height ?? 512));
    const ratio = this.#image ? this.#image.naturalWidth / this.#image.naturalHeight : 1;
    return { width: Math.round(side * Math.sqrt(ratio)), height: Math.round(side / Math.sqrt(ratio)) };
  }

  #openPainter() {
    const { width, height } = this.#size();
    if (this.painter.width !== width || this.painter.height !== height) this.painter.open(width, height);
  }

  #reflect() {
    if (!store.info) return;
    const { kind, picture, over } = this.draft;
    const painting = kind === "paint";
    this.source.hidden = painting && !picture;
    this.thresholds.hidden = kind !== "edges" || !picture;
    this.paintTools.hidden = !painting;
    this.paintTools.lastElementChild.hidden = !picture;
    this.over.hidden = !picture;
    this.strength.hidden = !picture || !over;
    this.surface.hidden = !painting && !(picture && kind !== "image") && !(kind === "depth" && !hasDepth());
    const { width, height } = this.#size();
    this.surface.style.setProperty("--ratio", String(width / height));
    if (painting) {
      this.#openPainter();
      if (!this.surface.contains(this.painter.element)) {
        fill(this.surface, this.painter.element);
        this.painter.fit();
      }
    } else if (kind === "edges") this.#drawEdges();
    else if (kind === "depth") this.#measureDepth();
  }

  #drawEdges() {
    cancelAnimationFrame(this.#frame);
    if (!this.#image || this.draft.kind !== "edges") return;
    this.#frame = requestAnimationFrame(() => {
      const canvas = this.#edges();
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", texts.hint);
      fill(this.surface, canvas);
    });
  }

  #edges() {
    const { low, high, blur } = this.draft;
    return drawEdges(this.#image, { ...this.#size(), low: Math.min(low, high), high, blur });
  }

  #paintEdges() {
    const edges = this.#edges();
    this.#openPainter();
    const context = edges.getContext("2d");
    const pixels = context.getImageData(0, 0, edges.width, edges.height);
    for (let index = 0; index < pixels.data.length; index += 4) pixels.data[index + 3] = pixels.data[index];
    this.painter.edit((target) => target.putImageData(pixels, 0, 0));
  }

  async #measureDepth() {
    const { picture } = this.draft;
    const note = (text) => fill(this.surface, h("p", { class: "surface-note" }, text));
    const show = () => fill(this.surface, h("img", { src: pictureUrl(this.#depth), alt: texts.hint }));
    if (!hasDepth()) return note(texts.depthNone);
    if (!picture) return;
    if (this.#depth) return show();
    note(texts.depthWait);
    if (this.#measuring === picture) return;
    this.#measuring = picture;
    const isCurrent = () => this.draft.picture === picture;
    try {
      const upload = await api.hint({ kind: "depth", image: pictureReference(picture) });
      if (!isCurrent()) return;
      this.#depth = { upload: upload.id, width: upload.width, height: upload.height };
      if (this.draft.kind === "depth") show();
    } catch (error) {
      if (isCurrent() && this.draft.kind === "depth") note(error.message);
    } finally {
      if (this.#measuring === picture) this.#measuring = null;
    }
  }

  /** Return the guide as a picture of the server, or null. */
  async #hint() {
    const { kind, picture } = this.draft;
    if (kind === "paint") {
      if (!this.painter.width || this.painter.isEmpty) return null;
      const canvas = document.createElement("canvas");
      Object.assign(canvas, { width: this.painter.width, height: this.painter.height });
      const context = canvas.getContext("2d");
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(this.painter.layer, 0, 0);
      return uploadPicture(await canvasBlob(canvas));
    }
    if (!picture) return null;
    if (kind === "edges") return uploadPicture(await canvasBlob(this.#edges()));
    return kind === "depth" ? this.#depth : picture;
  }

  async run() {
    const prompt = this.draft.prompt.trim();
    if (!prompt) {
      this.prompt.area.focus();
      return complain(new Error(texts.needPrompt));
    }
    try {
      const hint = await this.#hint();
      if (!hint) throw new Error(texts.needHint);
      const { picture, start: recalled, over, strength } = this.draft;
      const from = recalled ?? picture; // a recalled guide says nothing about the picture that it was taken from
      const start = over && from ? { image: pictureReference(from), strength } : {};
      await this.stage.run(compact({ mode: "control", prompt, hint: pictureReference(hint), ...start, ...settingsRequest(this.draft.settings, { kind: "control", size: false }), previews: true }), this.draft.settings);
    } catch (error) {
      complain(error);
    }
  }

  cancel() {
    return this.stage.cancel();
  }

  key(event) {
    return this.draft.kind === "paint" && this.painter.key(event);
  }

  /**
   * Take a picture whose edges guide, or the settings of an earlier one: its guide is then used as it is. Returns which of them
   * could not be taken.
   */
  async receive({ picture, request }) {
    await this.restored;
    if (picture) {
      this.settings.forget("width", "height");
      if (this.draft.kind === "image" || this.draft.kind === "paint") this.draft.kind = "edges";
      this.kind.set(this.draft.kind);
      await this.#take(picture);
      this.source.show(this.draft.picture);
      return [];
    }
    const [hint, start] = await Promise.all([resolvePicture(request.hint), resolvePicture(request.image)]);
    const lost = [["hint", hint], ["image", start]].filter(([name, picture]) => request[name] && !picture).map(([name]) => inputName(name));
    Object.assign(this.draft, { prompt: request.prompt ?? "", kind: "image", over: Boolean(start) });
    if (start) this.draft.strength = request.strength ?? DEFAULT_STRENGTH;
    this.prompt.set(this.draft.prompt);
    this.kind.set("image");
    this.over.set(this.draft.over);
    this.strength.set(this.draft.strength);
    lost.push(...this.settings.recall(request, ["prompt", "hint", "image", "strength"]));
    await this.#take(hint, start);
    this.source.show(this.draft.picture);
    return lost;
  }
}

/** Return whether the server has a model for depth. */
const hasDepth = () => store.info.hints.includes("depth");

customElements.define("k-guide", Guide);
