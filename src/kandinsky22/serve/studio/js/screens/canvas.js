// Canvas: repaint parts of a picture, and extend its frame.

import { canvasBlob, h, icon, iconButton, loadPicture } from "../dom.js";
import { pictureReference, pictureUrl, uploadPicture } from "../api.js";
import { inputName, resolvePicture } from "../actions.js";
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
const MAX_FEATHERED = 20;

class Canvas extends HTMLElement {
  #abort = new AbortController();

  connectedCallback() {
    if (this.childElementCount) return;
    const { signal } = this.#abort;
    this.draft = loadDraft("canvas", { prompt: "", picture: null, margins: [0, 0, 0, 0], feather: 0, keep: true, keeping: null, mask: null, brush: 24, settings: DEFAULT_SETTINGS });
    this.stage = h("k-stage");
    this.stage.setAttribute("name", "canvas");
    this.stage.addEventListener("ended", () => this.#reflect());
    this.painter = new Painter({ label: texts.surface, sideLabel: (index) => texts.sideHandle(texts.sides[index]), signal });
    this.choice = pictureSlot({ label: texts.choose, hint: texts.chooseHint, removeLabel: strings.app.close, class: "canvas-slot", onpicture: (picture) => picture && this.#take(picture) });
    this.prompt = textField({ label: texts.prompt, value: this.draft.prompt, placeholder: texts.placeholder, class: "prompt", rows: 2, oninput: (text) => { this.draft.prompt = text; this.#save(); } });
    this.toolChoice = choices({ label: texts.tools, value: "brush", class: "tools", options: [["brush", "brush"], ["eraser", "eraser"], ["pan", "hand"]].map(([tool, name]) => [tool, h("span", { title: texts[tool] }, icon(name), h("span", { class: "visually-hidden" }, texts[tool]))]), onchange: (tool) => this.painter.setTool(tool) });
    this.size = slider({ label: texts.size, min: 2, max: 200, step: 1, value: this.draft.brush, oninput: (value) => { this.draft.brush = value; this.painter.size = value; this.#save(); } });
    this.feather = slider({ label: texts.feather, hint: texts.featherHint, min: 0, max: 64, step: 1, value: this.draft.feather, oninput: (value) => { Object.assign(this.draft, { feather: value, mask: null }); this.#save(); } });
    this.keep = toggle({ label: texts.keep, hint: texts.keepHint, checked: this.draft.keep, onchange: (value) => { Object.assign(this.draft, { keep: value, keeping: null, mask: null }); this.#save(); this.#reflect(); } });
    this.crop = h("p", { class: "hint" });
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
    this.useResult = h("button", { type: "button", class: "button quiet", onclick: () => this.stage.image && this.#take(imagePicture(this.stage.image)) }, icon("retry"), texts.useResult);
    this.append(h("h1", { class: "visually-hidden" }, texts.title),
      h("div", { class: "canvas-layout" },
        h("div", { class: "canvas-main" }, this.choice, this.work),
        h("div", { class: "canvas-side" }, this.prompt,
          h("div", { class: "run-row" }, h("button", { type: "button", class: "button primary", onclick: () => this.run() }, icon("brush"), texts.paint), h("kbd", { class: "key-hint" }, "Ctrl Enter")),
          this.stage, this.useResult,
          h("div", { class: "options" }, this.size, this.feather, this.keep, this.crop,
            h("fieldset", { class: "setting" }, h("legend", { class: "setting-label" }, texts.extend), h("div", { class: "sides" }, this.sides.map((input, index) => h("label", { class: "labelled" }, texts.sides[index], input)))),
            this.settings))));
    this.painter.size = this.draft.brush;
    this.painter.setTool("brush");
    this.painter.addEventListener("tool", () => { this.toolChoice.set(this.painter.tool); this.size.set(this.painter.size); });
    this.painter.addEventListener("change", () => { this.draft.mask = null; this.#save(); this.#saveMask(); this.#reflect(); });
    this.painter.addEventListener("frame", () => {
      // A soft edge continues into the extension, and the size of the result changes.
      Object.assign(this.draft, { margins: [...this.painter.margins], mask: this.draft.feather ? null : this.draft.mask });
      this.settings.forget("width", "height");
      this.#save();
      this.#reflect();
    });
    onPaste(this, signal, { files: (files) => this.choice.take(files) });
    this.restored = this.#restore().catch(() => {});
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
    const { picture, margins, mask: recalled } = this.draft;
    if (!picture) return;
    const { mask } = loadDraft("canvas.mask", { mask: null });
    await this.#open(picture, margins);
    if (mask) await this.#paintLayer(mask);
    this.draft.mask = recalled;
    this.#save();
  }

  async #paintLayer(url) {
    const stored = await loadPicture(url);
    this.painter.edit((context) => context.drawImage(stored, 0, 0, this.painter.width, this.painter.height));
  }

  /** Take another picture: what was recalled belonged to the one before. */
  #take(picture) {
    this.#forget();
    return this.#open(picture);
  }

  #forget() {
    Object.assign(this.draft, { mask: null, keeping: null });
    this.settings.forget("width", "height");
  }

  async #open(picture, margins = [0, 0, 0, 0]) {
    try {
      const image = await loadPicture(pictureUrl(picture));
      this.draft.picture = { ...picture, width: image.naturalWidth, height: image.naturalHeight };
      this.#reflect();
      this.painter.open(image.naturalWidth, image.naturalHeight, image, margins);
      this.draft.margins = [...margins];
      this.size.set(Math.max(4, Math.round(image.naturalWidth / 8)));
      this.painter.size = Math.max(4, Math.round(image.naturalWidth / 8));
      this.#saveMask();
    } catch {
      this.draft.picture = null;
    }
    this.#save();
    this.#reflect();
  }

  #close() {
    this.#forget();
    this.draft.picture = null;
    this.choice.show(null);
    this.#save();
    this.#reflect();
  }

  #reflect() {
    const { picture, keep, keeping, margins } = this.draft;
    this.choice.hidden = Boolean(picture);
    this.work.hidden = !picture;
    this.undoButton.disabled = !this.painter.canUndo;
    this.redoButton.disabled = !this.painter.canRedo;
    this.feather.disable(!keep);
    this.feather.title = keep ? texts.featherHint : texts.featherNeedsKeep;
    this.crop.hidden = (keeping?.crop ?? CROP_PADDING) === CROP_PADDING;
    this.crop.textContent = texts.crop(keeping?.crop);
    this.sides.forEach((input, index) => { if (input !== document.activeElement) input.value = String(margins[index]); });
    this.useResult.hidden = !this.stage.image || this.stage.busy;
  }

  async run() {
    const { picture, keep, margins, mask: recalled } = this.draft;
    const prompt = this.draft.prompt.trim();
    if (!picture) return complain(new Error(texts.needPicture));
    if (!prompt) {
      this.prompt.area.focus();
      return complain(new Error(texts.needPrompt));
    }
    const extended = margins.some(Boolean);
    const feather = keep ? this.draft.feather : 0;
    const isEmpty = !recalled && this.painter.isEmpty;
    if (isEmpty && !extended) return complain(new Error(texts.needMask));
    try {
      const mask = recalled ?? (isEmpty && !feather ? null : await this.#uploadMask(feather));
      await this.stage.run(compact({
        mode: "inpaint", prompt, image: pictureReference(picture), mask, extend: extended ? margins : null,
        ...this.#keeping(keep, feather, picture, extended), ...settingsRequest(this.draft.settings, { kind: "inpaint", size: false }), previews: true,
      }), this.draft.settings);
      this.#reflect();
    } catch (error) {
      complain(error);
    }
  }

  /** Upload the mask. What its soft edge was made from stays in this browser: the server knows the result only. */
  async #uploadMask(feather) {
    const mask = pictureReference(await uploadPicture(await canvasBlob(maskCanvas(this.painter, feather))));
    const layer = this.painter.layer.toDataURL("image/png");
    if (feather && layer.length < 1e5) {
      const others = feathered().filter((one) => one.mask !== mask.upload);
      saveDraft("canvas.feathered", { masks: [{ mask: mask.upload, feather, layer }, ...others].slice(0, MAX_FEATHERED) });
    }
    return mask;
  }

  /**
   * Return the setting that keeps the pixels outside the mask: a crop blends soft edges and works at the picture's own size.
   * A recalled one stays until another picture comes, or “Keep pixels” is switched.
   */
  #keeping(keep, feather, picture, extended) {
    if (!keep) return {};
    const { keeping } = this.draft;
    if (keeping?.crop !== undefined || (keeping?.keep_pixels && !feather)) return keeping;
    const model = modelOf("inpaint", this.draft.settings);
    const isLarge = picture.width * picture.height > 1.1 * model.default_width * model.default_height;
    return feather || (isLarge && !extended) ? { crop: CROP_PADDING } : { keep_pixels: true };
  }

  cancel() {
    return this.stage.cancel();
  }

  key(event) {
    return Boolean(this.draft.picture) && this.painter.key(event);
  }

  /** Take a picture to repaint, or the settings of an earlier one. Returns which of them could not be taken. */
  async receive({ picture, request }) {
    await this.restored;
    if (picture) {
      await this.#take(picture);
      return [];
    }
    const [base, mask] = await Promise.all([resolvePicture(request.image), resolvePicture(request.mask)]);
    const lost = [["image", base], ["mask", mask]].filter(([name, picture]) => request[name] && !picture).map(([name]) => inputName(name));
    const soft = feathered().find((one) => one.mask === request.mask?.upload);
    if (base) this.#forget();
    else this.#close();
    Object.assign(this.draft, { prompt: request.prompt ?? "", feather: soft?.feather ?? 0, keep: Boolean(request.keep_pixels || request.crop !== undefined) });
    this.prompt.set(this.draft.prompt);
    this.feather.set(this.draft.feather);
    this.keep.set(this.draft.keep);
    lost.push(...this.settings.recall(request, ["prompt", "image", "mask", "extend", "keep_pixels", "crop"]));
    if (base) {
      await this.#open(base, request.extend ?? undefined);
      if (soft) await this.#paintLayer(soft.layer);
      else if (mask) paintMask(this.painter, await loadPicture(pictureUrl(mask)));
      // Until something is painted, this very mask is part of requests: drawing it again would be another one.
      Object.assign(this.draft, { mask: mask && request.mask, keeping: compact({ crop: request.crop, keep_pixels: request.keep_pixels || null }) });
    }
    this.#save();
    this.#reflect();
    return lost;
  }
}

/** Return the masks with a soft edge of this browser: names of their uploads, width of the edge, what was painted. */
const feathered = () => loadDraft("canvas.feathered", { masks: [] }).masks;

customElements.define("k-canvas", Canvas);
