// Canvas: repaint parts of a picture, and extend its frame.

import { canvasBlob, h, icon, iconButton, loadPicture } from "../dom.js";
import { pictureReference, pictureUrl, uploadPicture } from "../api.js";
import { resolvePicture } from "../actions.js";
import { choices, onPaste, pictureSlot, slider, textField, toggle } from "../components/controls.js";
import { complain } from "../components/feedback.js";
import { maskCanvas, Painter, paintMask } from "../components/painter.js";
import { DEFAULT_SETTINGS, modelOf, settingsForm, settingsRequest } from "../components/settings.js";
import { imagePicture } from "../api.js";
import { compact } from "../jobs.js";
import { loadDraft, saveDraft } from "../store.js";
import { strings } from "../strings.js";
import { loadStyle } from "../styles.js";

await loadStyle("canvas");

const texts = strings.canvas;
const CROP_PADDING = 32; // pixels of the picture around the mask that the model sees, as the command's default

class Canvas extends HTMLElement {
  #abort = new AbortController();

  connectedCallback() {
    if (this.childElementCount) return;
    const { signal } = this.#abort;
    this.draft = loadDraft("canvas", { prompt: "", picture: null, margins: [0, 0, 0, 0], feather: 0, keep: true, brush: 24, settings: DEFAULT_SETTINGS });
    this.stage = h("k-stage");
    this.stage.setAttribute("name", "canvas");
    this.stage.addEventListener("ended", () => this.#reflect());
    this.painter = new Painter({ label: texts.surface, sideLabel: (index) => texts.sideHandle(texts.sides[index]), signal });
    this.choice = pictureSlot({ label: texts.choose, hint: texts.chooseHint, removeLabel: strings.app.close, class: "canvas-slot", onpicture: (picture) => picture && this.#open(picture) });
    this.prompt = textField({ label: texts.prompt, value: this.draft.prompt, placeholder: texts.placeholder, class: "prompt", rows: 2, oninput: (text) => { this.draft.prompt = text; this.#save(); } });
    this.toolChoice = choices({ label: texts.tools, value: "brush", class: "tools", options: [["brush", "brush"], ["eraser", "eraser"], ["pan", "hand"]].map(([tool, name]) => [tool, h("span", { title: texts[tool] }, icon(name), h("span", { class: "visually-hidden" }, texts[tool]))]), onchange: (tool) => this.painter.setTool(tool) });
    this.size = slider({ label: texts.size, min: 2, max: 200, step: 1, value: this.draft.brush, oninput: (value) => { this.draft.brush = value; this.painter.size = value; this.#save(); } });
    this.feather = slider({ label: texts.feather, hint: texts.featherHint, min: 0, max: 64, step: 1, value: this.draft.feather, oninput: (value) => { this.draft.feather = value; this.#save(); } });
    this.keep = toggle({ label: texts.keep, hint: texts.keepHint, checked: this.draft.keep, onchange: (value) => { this.draft.keep = value; this.#save(); this.#reflect(); } });
    this.sides = texts.sides.map((side, index) => h("input", { type: "number", class: "number", min: 0, max: 1024, step: 8, value: 0, onchange: (event) => this.painter.setMargin(index, event.target.valueAsNumber || 0) }));
    this.undoButton = iconButton("undo", texts.undo, () => this.painter.undo());
    this.redoButton = iconButton("redo", texts.redo, () => this.painter.redo());
    this.settings = settingsForm({ value: this.draft.settings, onchange: () => this.#save(), kind: "inpaint", size: false, signal });
    this.work = h("div", { class: "canvas-work" },
      h("div", { class: "toolbar", role: "toolbar", "aria-label": texts.tools }, this.toolChoice, this.undoButton, this.redoButton,
        iconButton("invert", texts.invert, () => this.painter.invert()), iconButton("trash", texts.clear, () => this.painter.clear()),
        h("span", { class: "spacer" }),
        iconButton("zoomout", texts.zoomOut, () => this.painter.zoom(0.8), { class: "zoom" }), iconButton("zoomin", texts.zoomIn, () => this.painter.zoom(1.25), { class: "zoom" }), iconButton("fit", texts.fit, () => this.painter.fit()),
        iconButton("image", texts.other, () => this.#close())),
      this.painter.element);
    this.useResult = h("button", { type: "button", class: "button quiet", onclick: () => this.stage.image && this.#open(imagePicture(this.stage.image)) }, icon("retry"), texts.useResult);
    this.append(h("h1", { class: "visually-hidden" }, texts.title),
      h("div", { class: "canvas-layout" },
        h("div", { class: "canvas-main" }, this.choice, this.work),
        h("div", { class: "canvas-side" }, this.prompt,
          h("div", { class: "run-row" }, h("button", { type: "button", class: "button primary", onclick: () => this.run() }, icon("brush"), texts.paint), h("kbd", { class: "key-hint" }, "Ctrl Enter")),
          this.stage, this.useResult,
          h("div", { class: "options" }, this.size, this.feather, this.keep,
            h("fieldset", { class: "setting" }, h("legend", { class: "setting-label" }, texts.extend), h("div", { class: "sides" }, this.sides.map((input, index) => h("label", { class: "labelled" }, texts.sides[index], input)))),
            this.settings))));
    this.painter.size = this.draft.brush;
    this.painter.setTool("brush");
    this.painter.addEventListener("tool", () => { this.toolChoice.set(this.painter.tool); this.size.set(this.painter.size); });
    this.painter.addEventListener("change", () => { this.#reflect(); this.#saveMask(); });
    this.painter.addEventListener("frame", () => { this.draft.margins = [...this.painter.margins]; this.#save(); this.#reflect(); });
    onPaste(this, signal, { files: (files) => this.choice.take(files) });
    this.#restore();
    this.#reflect();
  }

  show() {
    this.painter.fit();
  }

  #save() {
    saveDraft("canvas", this.draft);
  }

  #saveMask() {
    const mask = this.painter.layer.toDataURL("image/png");
    saveDraft("canvas.mask", mask.length < 1e6 ? { mask } : {});
  }

  async #restore() {
    const { picture, margins } = this.draft;
    if (!picture) return;
    const { mask } = loadDraft("canvas.mask", { mask: null });
    await this.#open(picture, margins);
    if (mask) {
      const stored = await loadPicture(mask);
      this.painter.edit((context) => context.drawImage(stored, 0, 0, this.painter.width, this.painter.height));
    }
  }

  async #open(picture, margins = [0, 0, 0, 0]) {
    try {
      const image = await loadPicture(pictureUrl(picture));
      this.draft.picture = { ...picture, width: image.naturalWidth, height: image.naturalHeight };
      this.#reflect();
      this.painter.open(image.naturalWidth, image.naturalHeight, image);
      this.size.set(Math.max(4, Math.round(image.naturalWidth / 8)));
      this.painter.size = Math.max(4, Math.round(image.naturalWidth / 8));
      margins.forEach((margin, index) => this.painter.setMargin(index, margin));
      this.#saveMask();
    } catch {
      this.draft.picture = null;
    }
    this.#save();
    this.#reflect();
  }

  #close() {
    this.draft.picture = null;
    this.choice.show(null);
    this.#save();
    this.#reflect();
  }

  #reflect() {
    const { picture, keep, margins } = this.draft;
    this.choice.hidden = Boolean(picture);
    this.work.hidden = !picture;
    this.undoButton.disabled = !this.painter.canUndo;
    this.redoButton.disabled = !this.painter.canRedo;
    this.feather.disable(!keep);
    this.feather.title = keep ? texts.featherHint : texts.featherNeedsKeep;
    this.sides.forEach((input, index) => { if (input !== document.activeElement) input.value = String(margins[index]); });
    this.useResult.hidden = !this.stage.image || this.stage.busy;
  }

  async run() {
    const { picture, keep, margins } = this.draft;
    const prompt = this.draft.prompt.trim();
    if (!picture) return complain(new Error(texts.needPicture));
    if (!prompt) {
      this.prompt.area.focus();
      return complain(new Error(texts.needPrompt));
    }
    const extended = margins.some(Boolean);
    const feather = keep ? this.draft.feather : 0;
    if (this.painter.isEmpty && !extended) return complain(new Error(texts.needMask));
    try {
      const mask = this.painter.isEmpty && !feather ? null : await uploadPicture(await canvasBlob(maskCanvas(this.painter, feather)));
      await this.stage.run(compact({
        mode: "inpaint", prompt, image: pictureReference(picture), mask: mask && pictureReference(mask), extend: extended ? margins : null,
        ...this.#keeping(keep, feather, picture, extended), ...settingsRequest(this.draft.settings, { kind: "inpaint", size: false }), previews: true,
      }), this.draft.settings);
      this.#reflect();
    } catch (error) {
      complain(error);
    }
  }

  /** Return the setting that keeps the pixels outside the mask: a crop blends soft edges and works at the picture's own size. */
  #keeping(keep, feather, picture, extended) {
    if (!keep) return {};
    const model = modelOf("inpaint");
    const isLarge = picture.width * picture.height > 1.1 * model.default_width * model.default_height;
    return feather || (isLarge && !extended) ? { crop: CROP_PADDING } : { keep_pixels: true };
  }

  cancel() {
    return this.stage.cancel();
  }

  key(event) {
    return Boolean(this.draft.picture) && this.painter.key(event);
  }

  /** Take a picture to repaint, or the settings of an earlier one. */
  async receive({ picture, request }) {
    if (picture) return this.#open(picture);
    const base = await resolvePicture(request.image);
    this.draft.prompt = request.prompt ?? "";
    this.prompt.set(this.draft.prompt);
    this.draft.keep = Boolean(request.keep_pixels || request.crop !== undefined);
    this.keep.set(this.draft.keep);
    this.settings.recall(request);
    if (base) await this.#open(base, request.extend ?? undefined);
    if (base && request.mask) {
      const mask = await resolvePicture(request.mask);
      if (mask) paintMask(this.painter, await loadPicture(pictureUrl(mask)));
    }
    this.#save();
    this.#reflect();
  }
}

customElements.define("k-canvas", Canvas);
