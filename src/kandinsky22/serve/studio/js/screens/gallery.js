// Gallery: everything that was made.

import { api, imagePicture } from "../api.js";
import { restore, star } from "../actions.js";
import { choices } from "../components/controls.js";
import { complain } from "../components/feedback.js";
import { openComparison, openViewer } from "../components/dialog.js";
import { debounce, fill, h, icon, PICTURE_TYPE } from "../dom.js";
import { loadDraft, saveDraft, store } from "../store.js";
import { strings } from "../strings.js";
import { loadStyle } from "../styles.js";

await loadStyle("gallery");

const texts = strings.gallery;
const PAGE = 60;

class Gallery extends HTMLElement {
  #abort = new AbortController();
  #images = [];
  #next = null;
  #loading = false;
  #generation = 0;
  #chosen = [];

  connectedCallback() {
    if (this.childElementCount) return;
    const { signal } = this.#abort;
    this.draft = loadDraft("gallery", { mode: "", model: "", starred: false, large: false });
    this.filter = { search: "", trash: false };
    this.search = h("input", { type: "search", placeholder: texts.search, "aria-label": texts.search, oninput: debounce(() => { this.filter.search = this.search.value.trim(); this.#reload(); }, 200) });
    this.modes = h("select", { "aria-label": texts.mode, onchange: () => this.#set("mode", this.modes.value) },
      h("option", { value: "" }, `${texts.mode}: ${texts.all}`), Object.entries(texts.modes).map(([mode, name]) => h("option", { value: mode, selected: this.draft.mode === mode }, name)));
    this.models = h("select", { "aria-label": texts.model, onchange: () => this.#set("model", this.models.value) });
    this.views = choices({ label: texts.title, class: "views", value: this.draft.starred ? "starred" : "all", options: [["all", texts.all], ["starred", texts.starred], ["trash", texts.trash]], onchange: (view) => {
      this.filter.trash = view === "trash";
      this.#set("starred", view === "starred");
    } });
    this.compare = h("button", { type: "button", class: "button quiet", "aria-pressed": "false", onclick: () => this.#toggleComparing() }, icon("split"), texts.compare);
    this.larger = h("button", { type: "button", class: "icon-button", title: texts.large, "aria-label": texts.large, "aria-pressed": String(this.draft.large), onclick: () => this.#set("large", !this.draft.large, false) }, icon("zoomin"));
    this.hint = h("p", { class: "gallery-hint", role: "status" });
    this.wall = h("div", { class: "wall", role: "list" });
    this.foot = h("p", { class: "gallery-foot muted" });
    this.append(h("h1", { class: "visually-hidden" }, texts.title),
      h("div", { class: "gallery-bar" }, h("label", { class: "search" }, icon("search"), this.search), this.views, this.modes, this.models, h("span", { class: "spacer" }), this.compare, this.larger),
      this.hint, this.wall, this.foot);
    new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) this.#more(); }, { rootMargin: "900px" }).observe(this.foot);
    store.on("info", () => this.#models(), signal);
    store.on("gallery", (change) => this.#changed(change), signal);
    this.#models();
    this.#reload();
  }

  #models() {
    const models = store.info?.models ?? [];
    fill(this.models, h("option", { value: "" }, `${texts.model}: ${texts.all}`), models.map((model) => h("option", { value: model.id, selected: this.draft.model === model.id }, model.name)));
    this.models.hidden = models.length < 2;
  }

  #set(name, value, reload = true) {
    this.draft[name] = value;
    saveDraft("gallery", this.draft);
    this.larger.setAttribute("aria-pressed", String(this.draft.large));
    this.wall.classList.toggle("large", this.draft.large);
    if (reload) this.#reload();
  }

  #query(more = {}) {
    const { mode, model, starred } = this.draft;
    return { ...this.filter, mode, model, starred: starred && !this.filter.trash, limit: PAGE, ...more };
  }

  async #reload() {
    this.#generation += 1;
    this.#images = [];
    this.#next = null;
    this.#loading = false;
    this.#ended = false;
    this.wall.classList.toggle("large", this.draft.large);
    await this.#more(true);
  }

  #ended = false;

  async #more(first = false) {
    if (this.#loading || this.#ended) return;
    this.#loading = true;
    const generation = this.#generation;
    this.foot.textContent = texts.loading;
    try {
      const { items, next } = await api.images(this.#query({ cursor: this.#next }));
      if (generation !== this.#generation) return;
      const known = new Set(this.#images.map((image) => image.id));
      const fresh = items.filter((image) => !known.has(image.id));
      this.#images.push(...fresh);
      this.#next = next;
      this.#ended = !next;
      if (first) fill(this.wall, fresh.map((image) => this.#tile(image)));
      else this.wall.append(...fresh.map((image) => this.#tile(image)));
    } catch (error) {
      this.#ended = true;
      complain(error);
    } finally {
      if (generation === this.#generation) {
        this.#loading = false;
        this.#reflect();
        // A short page may leave the end in sight, which the observer has reported already.
        if (!this.#ended && this.foot.getBoundingClientRect().top < innerHeight + 900 && !this.hidden) this.#more();
      }
    }
  }

  #reflect() {
    const none = this.#images.length === 0;
    this.foot.textContent = none ? "" : this.#ended ? texts.end(this.#images.length) : texts.loading;
    if (none && !this.#loading) {
      const filtered = this.filter.search || this.draft.mode || this.draft.model || this.draft.starred || this.filter.trash;
      fill(this.wall, h("div", { class: "gallery-empty", role: "listitem" }, h("h2", {}, filtered ? texts.nothing : texts.empty), !filtered && h("p", { class: "muted" }, texts.emptyText)));
    }
    this.hint.textContent = this.comparing ? texts.compareHint : "";
    this.compare.setAttribute("aria-pressed", String(Boolean(this.comparing)));
    this.wall.classList.toggle("choosing", Boolean(this.comparing));
    for (const tile of this.wall.querySelectorAll(".tile")) tile.classList.toggle("chosen", this.#chosen.includes(tile.dataset.image));
  }

  #tile(image) {
    const starButton = h("button", { type: "button", class: "icon-button small on-picture tile-star", onclick: () => star(image).then(mark) }, icon("star"));
    const mark = () => {
      starButton.classList.toggle("starred", image.starred);
      starButton.setAttribute("aria-pressed", String(image.starred));
      starButton.setAttribute("aria-label", texts.starOf(image.title));
      starButton.title = strings.actions[image.starred ? "unstar" : "star"];
    };
    mark();
    const tools = this.filter.trash
      ? h("button", { type: "button", class: "icon-button small on-picture tile-star", title: strings.actions.restore, "aria-label": `${strings.actions.restore}: ${image.title}`, onclick: () => restore(image) }, icon("restore"))
      : starButton;
    const tile = h("div", { class: "tile", role: "listitem", dataset: { image: image.id } },
      h("button", { type: "button", class: "tile-open", "aria-label": texts.open(image.title), draggable: true, onclick: () => this.#open(image), ondragstart: (event) => event.dataTransfer.setData(PICTURE_TYPE, JSON.stringify({ ...imagePicture(image), title: image.title })) },
        h("img", { src: image.thumbnail, alt: "", loading: "lazy", decoding: "async", draggable: false }), h("span", { class: "tile-words" }, image.title)), tools);
    tile.style.setProperty("--ratio", String(image.width / image.height));
    tile.mark = mark;
    return tile;
  }

  #open(image) {
    if (!this.comparing) return openViewer(this.#images, this.#images.indexOf(image), { trash: this.filter.trash });
    this.#chosen = this.#chosen.includes(image.id) ? this.#chosen.filter((id) => id !== image.id) : [...this.#chosen, image.id];
    if (this.#chosen.length === 2) {
      openComparison(...this.#chosen.map((id) => this.#images.find((one) => one.id === id)));
      this.#toggleComparing();
    }
    this.#reflect();
  }

  #toggleComparing() {
    this.comparing = !this.comparing;
    this.#chosen = [];
    this.#reflect();
  }

  /** Follow the server: new pictures come to the front, removed ones leave, stars change. */
  async #changed({ added = [], removed = [], changed = [], all, missed }) {
    if (all) return this.#reload();
    if (missed) return this.#refresh();
    if (removed.length && !this.filter.trash) {
      this.#images = this.#images.filter((image) => !removed.includes(image.id));
      for (const id of removed) this.wall.querySelector(`[data-image="${id}"]`)?.remove();
    }
    for (const id of changed) {
      const image = this.#images.find((one) => one.id === id);
      if (!image) continue;
      const { starred } = await api.image(id).catch(() => image);
      image.starred = starred;
      this.wall.querySelector(`[data-image="${id}"]`)?.mark();
    }
    if (added.length || (removed.length && this.filter.trash)) this.#refresh();
    else this.#reflect();
  }

  #refresh = debounce(async () => {
    const generation = this.#generation;
    const { items } = await api.images(this.#query()).catch(() => ({ items: [] }));
    if (generation !== this.#generation) return;
    if (this.filter.trash) return this.#reload();
    const known = new Set(this.#images.map((image) => image.id));
    const fresh = items.filter((image) => !known.has(image.id));
    if (!fresh.length) return this.#reflect();
    this.wall.querySelector(".gallery-empty")?.remove();
    // Restored pictures return to their place in time.
    this.#images = [...fresh, ...this.#images].sort((one, other) => other.created_at.localeCompare(one.created_at));
    for (const image of fresh) {
      const after = this.#images[this.#images.indexOf(image) + 1];
      const place = after && this.wall.querySelector(`[data-image="${after.id}"]`);
      this.wall.insertBefore(this.#tile(image), place ?? null);
    }
    this.#reflect();
  }, 250);

  cancel() {
    if (this.comparing) this.#toggleComparing();
  }

  key(event) {
    if (event.key !== "/" || event.ctrlKey || event.metaKey) return false;
    this.search.focus();
    return true;
  }
}

customElements.define("k-gallery", Gallery);
