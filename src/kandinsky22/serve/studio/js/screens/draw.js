// Draw: from words, over a picture, or as a variation of one.

import { choices, onPaste, pictureSlot, slider, textField } from "../components/controls.js";
import { complain } from "../components/feedback.js";
import { DEFAULT_SETTINGS, settingsForm, settingsRequest } from "../components/settings.js";
import { pictureReference } from "../api.js";
import { inputName, resolvePicture } from "../actions.js";
import { h, icon } from "../dom.js";
import { compact } from "../jobs.js";
import { loadDraft, saveDraft } from "../store.js";
import { strings } from "../strings.js";

const texts = strings.draw;
const DEFAULT_STRENGTH = 0.3; // the server's, for requests without one

class Draw extends HTMLElement {
  #abort = new AbortController();

  connectedCallback() {
    if (this.childElementCount) return;
    const { signal } = this.#abort;
    this.draft = loadDraft("draw", { prompt: "", negative: "", picture: null, as: "img2img", strength: 0.5, settings: DEFAULT_SETTINGS });
    const save = () => { saveDraft("draw", this.draft); this.#reflect(); };
    this.stage = h("k-stage", { name: "draw" });
    this.stage.setAttribute("name", "draw");
    this.prompt = textField({ label: texts.prompt, value: this.draft.prompt, placeholder: texts.placeholder, class: "prompt", rows: 2, oninput: (text) => { this.draft.prompt = text; save(); } });
    this.negative = textField({ label: texts.negative, value: this.draft.negative, placeholder: texts.negativePlaceholder, oninput: (text) => { this.draft.negative = text; save(); } });
    this.start = pictureSlot({ label: texts.start, hint: texts.startHint, removeLabel: texts.remove, class: "small", onpicture: (picture) => { this.draft.picture = picture; this.settings.forget("width", "height"); save(); } });
    this.as = choices({ label: texts.how, options: Object.entries(texts.modes), value: this.draft.as, onchange: (value) => { this.draft.as = value; this.settings.forget("width", "height"); save(); } });
    this.asHint = h("p", { class: "hint" });
    this.strength = slider({ label: texts.strength, hint: texts.strengthHint, min: 0.05, max: 1, step: 0.05, value: this.draft.strength, oninput: (value) => { this.draft.strength = value; save(); } });
    this.pictureOptions = h("div", { class: "picture-options" }, this.as, this.asHint, this.strength);
    this.settings = settingsForm({ value: this.draft.settings, onchange: () => saveDraft("draw", this.draft), signal });
    this.append(h("h1", { class: "visually-hidden" }, texts.title),
      h("div", { class: "split" },
        h("div", { class: "composer" }, this.prompt,
          h("div", { class: "run-row" }, h("button", { type: "button", class: "button primary", onclick: () => this.run() }, icon("draw"), texts.draw), h("kbd", { class: "key-hint" }, "Ctrl Enter"))),
        this.stage,
        h("div", { class: "options" }, this.negative, h("div", { class: "start-picture" }, this.start, this.pictureOptions), this.settings)));
    if (this.draft.picture) this.start.show(this.draft.picture);
    onPaste(this, signal, { files: (files) => this.start.take(files) });
    this.#reflect();
  }

  #reflect() {
    const { picture, as } = this.draft;
    this.pictureOptions.hidden = !picture;
    this.asHint.textContent = texts.modeHints[as];
    this.strength.hidden = as === "variations" && !this.draft.prompt.trim();
  }

  async run() {
    const { picture, as, strength } = this.draft;
    const prompt = this.draft.prompt.trim();
    const mode = picture ? as : "generate";
    if (!prompt && mode !== "variations") {
      this.prompt.area.focus();
      return complain(new Error(texts.needPrompt));
    }
    const hasSize = mode !== "img2img";
    try {
      await this.stage.run(compact({
        mode, prompt, negative_prompt: this.draft.negative.trim(), image: picture && pictureReference(picture),
        strength: mode === "img2img" || (mode === "variations" && prompt) ? strength : null, ...settingsRequest(this.draft.settings, { size: hasSize }), previews: true,
      }), this.draft.settings);
    } catch (error) {
      complain(error);
    }
  }

  cancel() {
    return this.stage.cancel();
  }

  /** Take a picture to start from, or the settings of an earlier one. Returns which of them could not be taken. */
  async receive({ picture, as = "img2img", request }) {
    const lost = [];
    if (picture) {
      Object.assign(this.draft, { picture, as });
      this.start.show(picture);
      this.as.set(as);
      this.settings.forget("width", "height");
    }
    if (request) {
      const start = await resolvePicture(request.image);
      if (request.image && !start) lost.push(inputName("image"));
      Object.assign(this.draft, { prompt: request.prompt ?? "", negative: request.negative_prompt ?? "", picture: start, as: request.mode === "variations" ? "variations" : "img2img" });
      if (start) this.draft.strength = request.strength ?? DEFAULT_STRENGTH;
      this.prompt.set(this.draft.prompt);
      this.negative.set(this.draft.negative);
      this.start.show(start);
      this.as.set(this.draft.as);
      this.strength.set(this.draft.strength);
      const sizes = request.mode === "img2img" ? [] : ["width", "height"]; // the form has no size of a picture over another one
      lost.push(...this.settings.recall(request, ["prompt", "negative_prompt", "image", "strength", ...sizes]));
    }
    saveDraft("draw", this.draft);
    this.#reflect();
    return lost;
  }
}

customElements.define("k-draw", Draw);
