// The mixing table: cards of words and pictures, their weights, and the ways between them.

import { pictureThumbnail, pictureUrl, randomGroup, uploadPicture } from "../api.js";
import { choices, chooseFiles, forgetMissing, onPaste, slider, textField, toggle } from "../components/controls.js";
import { announce, complain, toast } from "../components/feedback.js";
import { DEFAULT_SETTINGS, settingsForm, settingsRequest } from "../components/settings.js";
import { inputName, resolvePicture } from "../actions.js";
import { dragCards } from "../components/card-drag.js";
import { acceptDrops, arrange, fill, h, icon, iconButton } from "../dom.js";
import { compact } from "../jobs.js";
import { isEnded, loadDraft, saveDraft, store } from "../store.js";
import { strings } from "../strings.js";
import { bilinear, linear, normalised, partsOf } from "../weights.js";

const texts = strings.mix;

class Mix extends HTMLElement {
  #abort = new AbortController();
  #boardAbort = null;

  connectedCallback() {
    if (this.childElementCount) return;
    const { signal } = this.#abort;
    this.draft = loadDraft("mix", { cards: [], next: 1, normalise: true, negative: "", length: 5, side: 4, settings: DEFAULT_SETTINGS, board: null });
    this.chosen = [];
    this.stage = h("k-stage");
    this.stage.setAttribute("name", "mix");
    this.table = h("div", { class: "table", role: "list", "aria-label": texts.title });
    this.hint = h("span", { class: "table-hint" });
    this.stripButton = h("button", { type: "button", class: "button quiet", title: texts.stripHint, onclick: () => this.strip() }, icon("strip"), texts.strip);
    this.gridButton = h("button", { type: "button", class: "button quiet", title: texts.gridHint, onclick: () => this.grid() }, icon("grid"), texts.grid);
    this.normalise = toggle({ label: texts.normalise, hint: texts.normaliseHint, checked: this.draft.normalise, onchange: (value) => { this.draft.normalise = value; this.#changed(); } });
    this.negative = textField({ label: texts.negative, value: this.draft.negative, placeholder: texts.negativePlaceholder, oninput: (text) => { this.draft.negative = text; this.#save(); } });
    this.length = slider({ label: texts.length, min: 3, max: 9, step: 1, value: this.draft.length, oninput: (value) => { this.draft.length = value; this.#save(); } });
    this.side = h("div", { class: "setting" }, h("span", { class: "setting-label", "aria-hidden": "true" }, texts.side), choices({ label: texts.side, value: String(this.draft.side), options: [3, 4, 5].map((side) => [String(side), texts.sideOf(side)]), onchange: (side) => { this.draft.side = Number(side); this.#save(); } }));
    this.settings = settingsForm({ value: this.draft.settings, onchange: () => this.#save(), signal });
    this.boardHolder = h("div", { class: "board-holder" });
    this.append(h("h1", { class: "visually-hidden" }, texts.title),
      h("div", { class: "mix-layout" },
        h("div", { class: "table-side" }, this.table,
          h("div", { class: "table-bar" }, this.normalise,
            h("button", { type: "button", class: "button quiet", onclick: () => this.#equal() }, texts.equal),
            h("span", { class: "spacer" }), this.stripButton, this.gridButton,
            iconButton("trash", texts.clear, () => this.#clear())),
          this.hint, this.boardHolder),
        h("div", { class: "mix-result" },
          h("div", { class: "run-row" }, h("button", { type: "button", class: "button primary", onclick: () => this.run() }, icon("mix"), texts.mix), h("kbd", { class: "key-hint" }, "Ctrl Enter")),
          this.stage,
          h("div", { class: "options" }, this.settings, this.negative, this.length, this.side))));
    acceptDrops(this.table, (files) => this.#addFiles(files), (picture) => this.#add({ picture, title: picture.title }));
    onPaste(this, signal, { files: (files) => this.#addFiles(files), text: (text) => this.#add({ text }) });
    dragCards(this.table, { onorder: (from, to) => this.#move(from, to), onstack: (one, other) => this.#stack(one, other) });
    this.#renderCards();
    this.#showBoard();
  }

  #save() {
    saveDraft("mix", this.draft);
  }

  #changed() {
    this.#save();
    this.#reflect();
  }

  #add(card, focus = false) {
    const number = this.draft.next;
    this.draft.next += 1;
    this.draft.cards.push({ id: number, weight: 1, text: null, picture: null, ...card });
    this.#renderCards();
    this.#changed();
    const element = this.table.querySelector(`[data-card="${number}"]`);
    if (focus) element.querySelector("textarea")?.focus();
    else element.scrollIntoView({ block: "nearest", behavior: "smooth" });
    element.classList.add("fresh");
  }

  async #addFiles(files) {
    if (!files.length) return complain(new Error(strings.errors.notPicture));
    for (const file of files) {
      try {
        this.#add({ picture: await uploadPicture(file), title: file.name.replace(/\.\w+$/, "") });
      } catch (error) {
        complain(error);
      }
    }
  }

  #removeCard(card) {
    const index = this.draft.cards.indexOf(card);
    this.draft.cards.splice(index, 1);
    this.chosen = this.chosen.filter((id) => id !== card.id);
    const hadFocus = this.table.querySelector(`[data-card="${card.id}"]`)?.contains(document.activeElement);
    this.#renderCards();
    this.#changed();
    if (hadFocus) (this.table.querySelectorAll(".card-remove")[index] ?? this.table.querySelector(".add-button")).focus({ preventScroll: true });
    toast(texts.removed, { action: strings.app.undo, onaction: () => { this.draft.cards.splice(index, 0, card); this.#renderCards(); this.#changed(); } });
  }

  #clear() {
    if (!this.draft.cards.length) return;
    const { cards } = this.draft;
    this.draft.cards = [];
    this.chosen = [];
    this.#renderCards();
    this.#changed();
    toast(texts.cleared, { action: strings.app.undo, onaction: () => { this.draft.cards = cards; this.#renderCards(); this.#changed(); } });
  }

  #equal() {
    for (const card of this.draft.cards) card.weight = 1;
    this.#renderCards();
    this.#changed();
  }

  #move(from, to) {
    const { cards } = this.draft;
    if (to < 0 || to >= cards.length || from === to) return;
    cards.splice(to, 0, ...cards.splice(from, 1));
    this.#renderCards();
    this.#changed();
    announce(`${texts.card(to + 1)}: ${this.#name(cards[to])}`);
    this.table.querySelector(`[data-card="${cards[to].id}"] .grip`)?.focus();
  }

  #stack(one, other) {
    this.chosen = [this.draft.cards[other].id, this.draft.cards[one].id];
    this.#renderCards();
    this.strip();
  }

  #choose(card) {
    this.chosen = this.chosen.includes(card.id) ? this.chosen.filter((id) => id !== card.id) : [...this.chosen, card.id].slice(-4);
    this.#reflect();
  }

  #name(card) {
    return card.text?.trim() || card.title || texts.pictureCard;
  }

  /** Show the cards. Those that are there stay: what is typed, dragged or focused goes on. */
  #renderCards() {
    const known = new Map([...this.table.children].map((element) => [element.dataset.card, element]));
    const cards = this.draft.cards.map((card, index) => {
      const element = known.get(String(card.id)) ?? this.#card(card);
      element.update(index);
      return element;
    });
    this.welcome ??= this.#welcome();
    this.addCard ??= h("div", { class: "card add-card", role: "listitem" },
      h("button", { type: "button", class: "add-button", onclick: () => this.#add({ text: "" }, true) }, icon("text"), texts.words),
      h("button", { type: "button", class: "add-button", onclick: () => chooseFiles((files) => this.#addFiles(files), true) }, icon("image"), texts.picture),
      h("p", { class: "muted" }, texts.addHint));
    arrange(this.table, [...(cards.length ? cards : [this.welcome]), this.addCard]);
    this.#reflect();
  }

  #welcome() {
    return h("div", { class: "welcome", role: "listitem" }, h("h2", {}, texts.title), h("p", {}, texts.lead),
      h("button", { type: "button", class: "button quiet", onclick: () => texts.examples.forEach((text) => this.#add({ text })) }, texts.example));
  }

  #card(card) {
    const name = this.#name(card);
    const content = card.picture
      ? h("img", { src: card.picture.image ? pictureThumbnail(card.picture) : pictureUrl(card.picture), alt: name, draggable: false, class: "card-picture", onerror: () => forgetMissing(() => this.#removeCard(card)) })
      : h("textarea", { class: "card-words", value: card.text, placeholder: texts.wordsPlaceholder, oninput: (event) => { card.text = event.target.value; this.#changed(); } });
    const choose = h("button", { type: "button", class: "card-choose", title: texts.select, "aria-pressed": "false", onclick: () => this.#choose(card) }, icon("check"), h("span", { class: "card-order" }));
    const grip = h("button", { type: "button", class: "grip", title: texts.move(name), onkeydown: (event) => {
      const offset = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!offset) return;
      event.preventDefault();
      const index = this.draft.cards.indexOf(card);
      this.#move(index, index + offset);
    } }, icon("grip"));
    const remove = iconButton("close", texts.remove, () => this.#removeCard(card), { class: "card-remove" });
    let shownWeight = card.weight;
    const weight = slider({ label: "", hideLabel: true, min: -1, max: 2, step: 0.05, value: card.weight, oninput: (value) => { card.weight = shownWeight = value; this.#changed(); } });
    const element = h("article", { class: `card ${card.picture ? "picture-card" : "words-card"}`, role: "listitem", dataset: { card: card.id }, onanimationend: () => element.classList.remove("fresh") },
      h("div", { class: "card-face" }, content),
      h("div", { class: "card-head" }, choose, grip, remove),
      h("div", { class: "card-foot" }, weight, h("span", { class: "share" })));
    element.update = (index) => {
      const number = texts.card(index + 1);
      if (!card.picture) content.setAttribute("aria-label", `${texts.words}: ${number}`);
      choose.setAttribute("aria-label", `${texts.select}: ${number}`);
      grip.setAttribute("aria-label", texts.move(number));
      remove.setAttribute("aria-label", `${texts.remove}: ${number}`);
      remove.title = `${texts.remove}: ${number}`;
      weight.rename(texts.weightOf(number));
      if (card.weight !== shownWeight) weight.set(shownWeight = card.weight);
    };
    return element;
  }

  /** Show shares, choices and what can be done with them. */
  #reflect() {
    const { cards } = this.draft;
    const weights = cards.map((card) => card.weight);
    const shares = normalised(weights);
    cards.forEach((card, index) => {
      const element = this.table.querySelector(`[data-card="${card.id}"]`);
      const order = this.chosen.indexOf(card.id);
      element.classList.toggle("chosen", order >= 0);
      element.classList.toggle("against", card.weight < 0);
      element.querySelector(".card-choose").setAttribute("aria-pressed", String(order >= 0));
      element.querySelector(".card-order").textContent = order >= 0 ? String(order + 1) : "";
      element.querySelector(".share").textContent = this.draft.normalise ? texts.share(Math.round(shares[index] * 100)) : "";
    });
    const pool = this.#pool();
    this.stripButton.disabled = pool.length !== 2;
    this.gridButton.disabled = pool.length !== 4;
    this.hint.textContent = this.chosen.length ? texts.chosen(this.chosen.length) : cards.length > 1 ? texts.chooseTwo : "";
  }

  /** Return the cards of a strip or a grid: the chosen ones, or all. */
  #pool() {
    return this.chosen.length ? this.chosen.map((id) => this.draft.cards.find((card) => card.id === id)) : this.draft.cards;
  }

  #request(cards, weights, more = {}) {
    const parts = partsOf(cards, weights);
    if (!parts.length) throw new Error(texts.needCards);
    if (parts.every((part) => part.weight === 0)) throw new Error(texts.allZero);
    return compact({ mode: "mix", parts, negative_prompt: this.draft.negative.trim(), ...settingsRequest(this.draft.settings), previews: true, ...more });
  }

  async run() {
    const cards = this.draft.cards.filter((card) => card.picture || card.text?.trim());
    const weights = cards.map((card) => card.weight);
    try {
      await this.stage.run(this.#request(cards, this.draft.normalise ? normalised(weights) : weights), this.draft.settings);
    } catch (error) {
      complain(error);
    }
  }

  /** Show the way from one card to another. */
  strip() {
    const pool = this.#pool();
    if (pool.length === 2) this.#makeBoard(pool, linear(this.draft.length), this.draft.length, texts.stripTitle(...pool.map((card) => this.#name(card))));
  }

  /** Show the pictures between four cards. */
  grid() {
    const pool = this.#pool();
    if (pool.length === 4) this.#makeBoard(pool, bilinear(this.draft.side), this.draft.side, texts.gridTitle);
  }

  async #makeBoard(cards, weights, columns, title) {
    const group = randomGroup("mix");
    try {
      // One seed for all: only the mixture changes along the way.
      const first = await store.submit(this.#request(cards, weights[0], { group, count: 1 }));
      const rest = await Promise.all(weights.slice(1).map((row) => store.submit(this.#request(cards, row, { group, count: 1, seed: first.request.seed }))));
      this.draft.board = { title, columns, jobs: [first, ...rest].map((job) => job.id) };
      this.#save();
      await this.#showBoard();
      this.boardHolder.scrollIntoView({ block: "nearest", behavior: "smooth" });
    } catch (error) {
      complain(error);
    }
  }

  async #showBoard() {
    this.#boardAbort?.abort();
    const { signal } = (this.#boardAbort = new AbortController());
    const { board: shown } = this.draft;
    fill(this.boardHolder);
    if (!shown) return;
    const { board } = await import("../components/board.js"); // the first page does not need it
    if (!signal.aborted) fill(this.boardHolder, board({ ...shown, signal, onclear: () => { this.draft.board = null; this.#save(); this.#showBoard(); } }));
  }

  cancel() {
    if (this.stage.cancel()) return true;
    const running = (this.draft.board?.jobs ?? []).filter((id) => store.jobs.has(id) && !isEnded(store.jobs.get(id)));
    for (const id of running.reverse()) store.cancel(id).catch(complain);
    return running.length > 0;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return false;
    const action = { w: () => this.#add({ text: "" }, true), p: () => chooseFiles((files) => this.#addFiles(files), true), s: () => this.strip(), g: () => this.grid() }[event.key];
    action?.();
    return Boolean(action);
  }

  /** Take a picture as a card, or the cards of an earlier mixture. Returns which of its settings could not be taken. */
  async receive({ picture, title, request }) {
    if (picture) {
      this.#add({ picture, title });
      toast(strings.actions.alikeDone);
    }
    if (!request) return [];
    const cards = await Promise.all(request.parts.map(async (part) => ({ weight: part.weight, text: part.text ?? null, picture: await resolvePicture(part) })));
    const isLost = (card) => !card.picture && card.text === null;
    const lost = cards.flatMap((card, index) => (isLost(card) ? [inputName(`parts.${index}`)] : []));
    this.draft.cards = cards.filter((card) => !isLost(card)).map((card) => ({ ...card, id: this.draft.next++ }));
    // Recalled weights are those that were mixed: nothing may scale them again.
    Object.assign(this.draft, { normalise: false, negative: request.negative_prompt ?? "" });
    this.chosen = [];
    this.normalise.set(false);
    this.negative.set(this.draft.negative);
    lost.push(...this.settings.recall(request, ["parts", "negative_prompt", "width", "height"]));
    this.#renderCards();
    this.#changed();
    return lost;
  }
}

customElements.define("k-mix", Mix);
