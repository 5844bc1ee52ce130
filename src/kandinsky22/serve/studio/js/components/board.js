// A board: pictures of one group in rows and columns, filled while they are made.

import { alike } from "../actions.js";
import { h, iconButton } from "../dom.js";
import { duration, fraction, progressText, seconds } from "../jobs.js";
import { isEnded, store } from "../store.js";
import { strings } from "../strings.js";
import { complain } from "./feedback.js";
import { openViewer } from "./dialog.js";
import { loadStyle } from "../styles.js";

await loadStyle("board");

/**
 * Return a cell that shows a job: its preview, its progress, then its picture.
 *
 * @param {() => string} jobId
 * @param {{times?: boolean, onopen?: (job: object) => void, label?: string}} [options]
 */
export function cell(jobId, { times = false, onopen, label = "" } = {}) {
  const picture = h("img", { alt: "", hidden: true });
  const bar = h("span", { class: "cell-bar" });
  const note = h("span", { class: "cell-note" });
  const element = h("button", { type: "button", class: "cell", onclick: () => onopen?.(store.jobs.get(jobId)) }, picture, bar, note);
  element.render = () => {
    const job = store.jobs.get(jobId);
    if (!job) return;
    const image = job.images[0];
    const source = image?.url ?? store.previews.get(jobId)?.url;
    picture.hidden = !source;
    if (source && picture.getAttribute("src") !== source) picture.src = source;
    element.dataset.state = job.state;
    element.disabled = !image;
    element.setAttribute("aria-label", [label, image ? image.title : progressText(job)].filter(Boolean).join(": "));
    bar.style.setProperty("width", `${Math.round(fraction(job) * 100)}%`);
    bar.hidden = job.state !== "running";
    const time = times && job.state === "done" ? seconds(job) : null;
    note.textContent = time !== null ? duration(time) : job.state === "failed" || job.state === "cancelled" ? strings.progress[job.state] : "";
    note.title = job.error?.message ?? "";
  };
  element.render();
  return element;
}

/**
 * Return a board of jobs.
 *
 * @param {{title: string, columns: number, jobs: string[], onclear: () => void, signal: AbortSignal, ends?: boolean}} board
 */
export function board({ title, columns, jobs, onclear, signal }) {
  const open = (job) => {
    const images = jobs.map((id) => store.jobs.get(id)?.images[0]).filter(Boolean);
    openViewer(images, images.findIndex((image) => image.id === job.images[0]?.id));
  };
  const cells = jobs.map((id) => {
    const picture = cell(id, { onopen: open });
    const add = iconButton("plus", strings.mix.boardAdd, () => {
      const image = store.jobs.get(id)?.images[0];
      if (image) alike(image);
    }, { class: "on-picture cell-add" });
    return h("div", { class: "cell-holder" }, picture, add);
  });
  const stop = h("button", { type: "button", class: "button quiet small", onclick: () => cancelAll(jobs) }, strings.stage.cancel);
  const count = h("span", { class: "muted" });
  const render = () => {
    for (const holder of cells) {
      holder.firstElementChild.render();
      holder.lastElementChild.hidden = holder.firstElementChild.disabled;
    }
    const known = jobs.map((id) => store.jobs.get(id)).filter(Boolean);
    const done = known.filter((job) => job.state === "done").length;
    stop.hidden = known.every(isEnded);
    count.textContent = stop.hidden ? "" : `${done} / ${jobs.length}`;
  };
  const rows = h("div", { class: `board-cells ${columns === jobs.length ? "one-row" : ""}` }, cells);
  rows.style.setProperty("--columns", String(columns));
  store.on("job", (job) => { if (jobs.includes(job.id)) render(); }, signal);
  for (const id of jobs) if (!store.jobs.has(id)) store.load(id).catch(() => {});
  const element = h("section", { class: "board" }, h("header", {}, h("h2", {}, title), count, stop,
    iconButton("close", strings.mix.clearBoard, () => { cancelAll(jobs); onclear(); })), rows);
  render();
  return element;
}

/** Cancel those of some jobs that have not ended. */
export function cancelAll(jobs) {
  for (const id of [...jobs].reverse()) {
    const job = store.jobs.get(id);
    if (job && !isEnded(job)) store.cancel(id).catch(complain);
  }
}

