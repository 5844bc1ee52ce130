// The queue: what runs, what waits and what has ended, at the side of every screen.

import { arrange, h, iconButton } from "../dom.js";
import { fraction, jobTitle, progressText, timeLeft } from "../jobs.js";
import { isEnded, store } from "../store.js";
import { strings } from "../strings.js";
import { complain } from "./feedback.js";
import { openViewer } from "./dialog.js";
import { loadStyle } from "../styles.js";

await loadStyle("queue");

const texts = strings.queue;

export class Queue extends HTMLElement {
  #pending = false;

  connectedCallback() {
    if (this.childElementCount) return;
    this.current = h("ul", { class: "queue-list" });
    this.recent = h("ul", { class: "queue-list" });
    this.all = h("button", { type: "button", class: "button quiet small", onclick: () => store.active().reverse().forEach((job) => store.cancel(job.id).catch(complain)) }, texts.cancelAll);
    this.nothing = h("div", { class: "queue-empty" }, h("p", {}, texts.empty), h("p", { class: "muted" }, texts.emptyText));
    this.recentTitle = h("h3", {}, texts.recent);
    this.append(h("aside", { class: "queue", "aria-label": texts.title },
      h("header", {}, h("h2", {}, texts.title), this.all, iconButton("close", strings.app.close, () => this.toggle(false))),
      this.nothing, this.current, this.recentTitle, this.recent));
    this.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); this.toggle(false); } });
    const later = () => {
      if (this.#pending || this.hidden) return;
      this.#pending = true;
      requestAnimationFrame(() => { this.#pending = false; this.render(); });
    };
    store.on("jobs", later);
  }

  /** Show or hide the panel. */
  toggle(open = this.hidden) {
    this.hidden = !open;
    document.documentElement.classList.toggle("queue-open", open);
    if (open) {
      this.render();
      this.#focus();
    }
    this.dispatchEvent(new CustomEvent("toggled", { detail: open }));
  }

  #focus() {
    this.querySelector("button:not([hidden])").focus({ preventScroll: true });
  }

  render() {
    const hadFocus = this.contains(document.activeElement);
    const active = store.active();
    const ended = store.ended().slice(0, 20);
    this.all.hidden = active.length < 2;
    this.nothing.hidden = active.length > 0;
    this.recentTitle.hidden = ended.length === 0;
    sync(this.current, active);
    sync(this.recent, ended);
    if (hadFocus && !this.contains(document.activeElement)) this.#focus();
  }
}

/** Update a list in place: buttons that have the focus keep it. */
function sync(list, jobs) {
  const known = new Map([...list.children].map((row) => [row.dataset.job, row]));
  const rows = jobs.map((job) => {
    const old = known.get(job.id);
    const row = old?.kind === kindOf(job) ? old : makeRow(job);
    row.update(job);
    return row;
  });
  const focused = list.querySelector(":focus");
  const job = focused?.closest("li").dataset.job;
  arrange(list, rows);
  // The row of a job is another one when it has one more picture.
  if (job && !list.contains(focused)) rows.find((row) => row.dataset.job === job)?.querySelector(".icon-button")?.focus({ preventScroll: true });
}

/** Return what the elements of a row depend on. */
const kindOf = (job) => `${isEnded(job) ? job.state : ""} ${job.images.length}`;

function makeRow(job) {
  const picture = h("img", { alt: "", loading: "lazy" });
  const status = h("span", { class: "queue-status" });
  const bar = h("span", { class: "queue-bar" });
  const image = job.images.at(-1);
  const thumb = image
    ? h("button", { type: "button", class: "queue-thumb", "aria-label": texts.show, onclick: () => openViewer([...job.images].reverse(), 0) }, picture)
    : h("span", { class: "queue-thumb" }, picture);
  const action = !isEnded(job)
    ? iconButton("close", texts.cancel, () => store.cancel(job.id).catch(complain), { class: "small" })
    : job.state === "done" ? null : iconButton("retry", texts.retry, () => store.retry(job.id).catch(complain), { class: "small" });
  const row = h("li", { dataset: { job: job.id } }, thumb,
    h("div", { class: "queue-words" }, h("span", { class: "queue-title" }, jobTitle(job)), status), action, bar);
  row.kind = kindOf(job);
  row.update = (now) => {
    row.dataset.state = now.state;
    const source = now.images.at(-1)?.thumbnail ?? store.previews.get(now.id)?.url;
    picture.hidden = !source;
    if (source && picture.getAttribute("src") !== source) picture.src = source;
    status.textContent = now.state === "failed" ? now.error?.message ?? strings.progress.failed
      : [now.state === "done" ? strings.gallery.modes[now.mode] : progressText(now), timeLeft(now), now.attempts > 1 && !isEnded(now) ? texts.attempts(now.attempts) : ""].filter(Boolean).join(" · ");
    bar.style.setProperty("width", now.state === "running" ? `${fraction(now) * 100}%` : "0");
  };
  return row;
}

customElements.define("k-queue", Queue);
