// The stage: the picture that a screen makes. It shows previews, progress, the result and earlier results.

import { imagePicture } from "../api.js";
import { alike, download, remove, sendItems, star } from "../actions.js";
import { arrange, h, icon, iconButton, PICTURE_TYPE } from "../dom.js";
import { fraction, progressText, timeLeft } from "../jobs.js";
import { isEnded, loadDraft, saveDraft, store } from "../store.js";
import { strings } from "../strings.js";
import { menuButton } from "./controls.js";
import { announce, complain } from "./feedback.js";
import { openViewer } from "./dialog.js";

const MAX_JOBS = 12;

export class Stage extends HTMLElement {
  #abort = new AbortController();
  #jobs = [];
  #current = null; // the job that is shown
  #image = null; // the finished image that is shown, or null for the job's newest
  #halfway = false;

  connectedCallback() {
    if (this.childElementCount) return;
    this.name = this.getAttribute("name");
    const draft = loadDraft(`stage.${this.name}`, { jobs: [], current: null });
    this.#jobs = draft.jobs;
    this.#current = draft.current;
    this.#build();
    const { signal } = this.#abort;
    store.on("job", (job) => { if (this.#jobs.includes(job.id)) this.#update(job); }, signal);
    store.on("gallery", (change) => this.#galleryChanged(change), signal);
    store.on("connection", (connected) => { if (connected) this.#loadMissing(); }, signal);
    if (store.connected) this.#loadMissing();
  }

  /** The job that is shown, or undefined. */
  get job() {
    return store.jobs.get(this.#current);
  }

  /** The finished image that is shown, or undefined. */
  get image() {
    return this.#image ?? this.job?.images.at(-1);
  }

  /** Whether the job that is shown has not ended. */
  get busy() {
    return Boolean(this.job && !isEnded(this.job));
  }

  /** Post a job and show it. The settings remember its seed, which the lock can keep. */
  async run(request, settings) {
    const job = await store.submit(request);
    settings.lastSeed = job.request.seed;
    this.watch(job);
    announce(strings.progress.announceStart);
    return job;
  }

  /** Show a job. */
  watch(job) {
    this.#jobs = [job.id, ...this.#jobs.filter((id) => id !== job.id)].slice(0, MAX_JOBS);
    this.#current = job.id;
    this.#image = null;
    this.#halfway = false;
    this.#save();
    this.#render();
  }

  /** Cancel the job that is shown. Returns whether there was one to cancel. */
  cancel() {
    if (!this.busy) return false;
    store.cancel(this.#current).catch(complain);
    return true;
  }

  async #loadMissing() {
    for (const id of [...this.#jobs]) {
      if (store.jobs.has(id)) continue;
      await store.load(id).catch((error) => {
        if (error.status === 404) this.#jobs = this.#jobs.filter((other) => other !== id);
      });
    }
    this.#render();
  }

  #save() {
    saveDraft(`stage.${this.name}`, { jobs: this.#jobs, current: this.#current });
  }

  #update(job) {
    if (job.id === this.#current) {
      const half = fraction(job) >= 0.5;
      if (half && !this.#halfway && !isEnded(job)) announce(strings.progress.announceHalf);
      if (isEnded(job) && this.dataset.state === "running") {
        announce(job.state === "done" ? strings.progress.announceDone : strings.progress[job.state]);
        this.dispatchEvent(new CustomEvent("ended", { detail: job }));
      }
      this.#halfway = half;
    }
    this.#render();
  }

  #galleryChanged({ removed = [] }) {
    if (!removed.length) return;
    for (const id of this.#jobs) {
      const job = store.jobs.get(id);
      if (job) job.images = job.images.filter((image) => !removed.includes(image.id));
    }
    if (removed.includes(this.#image?.id)) this.#image = null;
    this.#render();
  }

  #build() {
    // The button over the picture lets the pointer through, which drags the picture or opens it.
    this.picture = h("img", { class: "stage-picture", alt: "", hidden: true, draggable: true, ondragstart: (event) => this.#drag(event), onclick: () => this.open.hidden || this.#openViewer() });
    this.open = h("button", { type: "button", class: "stage-open", "aria-label": strings.stage.open, hidden: true, onclick: () => this.#openViewer() });
    this.empty = h("div", { class: "stage-empty" }, composition(), h("p", {}, strings.stage.empty));
    this.bar = h("div", { class: "bar", role: "progressbar", "aria-label": strings.stage.preview, "aria-valuemin": "0", "aria-valuemax": "100" }, h("span"));
    this.status = h("span", { class: "stage-status" });
    this.left = h("span", { class: "stage-left" });
    this.cancelButton = h("button", { type: "button", class: "button quiet", onclick: () => this.cancel() }, strings.stage.cancel);
    this.retryButton = h("button", { type: "button", class: "button quiet", onclick: () => store.retry(this.#current).catch(complain) }, icon("retry"), strings.stage.tryAgain);
    this.progressRow = h("div", { class: "stage-progress" }, this.bar, this.status, this.left, this.retryButton, this.cancelButton);
    this.starButton = iconButton("star", strings.actions.star, () => star(this.image).then(() => this.#render()));
    this.actionRow = h("div", { class: "stage-actions" },
      h("button", { type: "button", class: "button quiet", onclick: () => alike(this.image) }, icon("alike"), h("span", {}, strings.actions.alike)),
      this.starButton,
      iconButton("download", strings.actions.download, () => download(this.image)),
      menuButton({ label: strings.actions.sendTo, iconName: "send", items: () => sendItems(this.image) }),
      iconButton("trash", strings.actions.remove, () => remove(this.image)));
    this.film = h("div", { class: "film", role: "group", "aria-label": strings.stage.earlier });
    this.frame = h("div", { class: "stage-frame" }, this.empty, this.picture, this.open);
    this.append(this.frame, this.progressRow, this.actionRow, this.film);
    this.#render();
  }

  #render() {
    const { job, image } = this;
    const preview = store.previews.get(this.#current);
    const running = this.busy;
    const source = !job ? null : running && preview && !this.#image ? preview.url : image?.url ?? preview?.url ?? null;
    this.dataset.state = !job ? "empty" : job.state;
    this.classList.toggle("is-preview", Boolean(running && !this.#image && preview));
    // Until the first preview comes, the picture before stays as a shadow.
    const isShadow = Boolean(running && !source && this.picture.getAttribute("src"));
    this.picture.classList.toggle("shadow", isShadow);
    this.picture.hidden = !source && !isShadow;
    if (source && this.picture.getAttribute("src") !== source) this.picture.src = source;
    this.picture.alt = image && !running ? `${strings.stage.result}: ${image.title}` : strings.stage.preview;
    this.open.hidden = !image || (running && !this.#image);
    this.empty.hidden = Boolean(source);
    if (!running && !source) this.picture.removeAttribute("src");
    this.empty.classList.toggle("waiting", Boolean(running));
    const { width, height } = image ?? job?.request ?? {};
    this.frame.style.setProperty("--ratio", String((width || 1) / (height || 1)));
    const failed = job?.state === "failed";
    this.progressRow.hidden = !running && !failed && job?.state !== "cancelled";
    if (job) {
      const percent = Math.round(fraction(job) * 100);
      this.bar.hidden = !running;
      this.bar.setAttribute("aria-valuenow", String(percent));
      this.bar.firstElementChild.style.setProperty("width", `${percent}%`);
      this.bar.classList.toggle("unknown", job.state === "queued" || !job.progress);
      this.status.textContent = failed ? job.error?.message ?? strings.errors.failed : progressText(job);
      this.left.textContent = timeLeft(job);
      this.cancelButton.hidden = !running;
      this.retryButton.hidden = running || !isEnded(job) || job.state === "done";
    }
    this.actionRow.hidden = !image || (running && !this.#image);
    if (image) {
      this.starButton.classList.toggle("starred", image.starred);
      this.starButton.setAttribute("aria-pressed", String(image.starred));
    }
    this.#renderFilm();
  }

  #renderFilm() {
    const entries = this.#jobs.flatMap((id) => {
      const job = store.jobs.get(id);
      return !job ? [] : [...(isEnded(job) ? [] : [{ job }]), ...[...job.images].reverse().map((image) => ({ job, image }))];
    });
    const shown = this.image;
    const known = new Map([...this.film.children].map((item) => [item.dataset.key, item]));
    this.film.hidden = entries.length < 2;
    arrange(this.film, entries.map(({ job, image }) => {
      const isCurrent = image ? image.id === shown?.id && !(this.busy && !this.#image) : job.id === this.#current && !this.#image;
      const key = image?.id ?? job.id;
      const item = known.get(key) ?? h("button", {
        type: "button", class: "film-item", "aria-label": image ? image.title : strings.stage.preview, dataset: { key },
        onclick: () => { this.#current = job.id; this.#image = image ?? null; this.#save(); this.#render(); },
      }, image ? h("img", { src: image.thumbnail, alt: "", loading: "lazy" }) : h("span", { class: "spinner" }));
      item.setAttribute("aria-pressed", String(isCurrent));
      return item;
    }));
  }

  #openViewer() {
    const images = this.#jobs.flatMap((id) => [...(store.jobs.get(id)?.images ?? [])].reverse());
    openViewer(images, Math.max(images.findIndex((image) => image.id === this.image?.id), 0));
  }

  #drag(event) {
    if (!this.image) return;
    event.dataTransfer.setData(PICTURE_TYPE, JSON.stringify({ ...imagePicture(this.image), title: this.image.title }));
  }
}

/** Return the drawing of an empty stage: point, line and plane. */
function composition() {
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  svg.setAttribute("viewBox", "0 0 200 200");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("composition");
  for (const [tag, attributes] of [
    ["circle", { cx: 82, cy: 84, r: 46, class: "shape-a" }],
    ["path", { d: "M128 62 172 142H84Z", class: "shape-b" }],
    ["rect", { x: 46, y: 122, width: 44, height: 44, transform: "rotate(-14 68 144)", class: "shape-c" }],
    ["path", { d: "M22 178 182 26", class: "line" }],
    ["circle", { cx: 164, cy: 44, r: 5, class: "point" }],
  ]) {
    const shape = document.createElementNS(namespace, tag);
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, String(value));
    svg.append(shape);
  }
  return svg;
}

customElements.define("k-stage", Stage);
