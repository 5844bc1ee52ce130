// A picture at full size with its recipe, and two pictures under a divider.

import { api } from "../api.js";
import { alike, download, inputName, recall, remove, restore, sendItems, star } from "../actions.js";
import { clamp, fill, h, icon, iconButton, isTyping } from "../dom.js";
import { jobTitle } from "../jobs.js";
import { strings } from "../strings.js";
import { loadStyle } from "../styles.js";
import { menuButton } from "./controls.js";
import { openDialog } from "./dialog.js";
import { complain, toast } from "./feedback.js";

await loadStyle("viewer");

const texts = strings.viewer;

/**
 * Show a picture large.
 *
 * @param {object[]} images Pictures that the arrow keys go through.
 * @param {number} index
 * @param {{trash?: boolean, onindex?: (index: number) => void}} [options]
 */
export function openViewer(images, index, { trash = false } = {}) {
  const list = [...images];
  let at = index;
  const picture = h("img", { class: "viewer-picture", alt: "" });
  const details = h("div", { class: "viewer-details" });
  const counter = h("span", { class: "viewer-counter" });
  const previous = iconButton("left", texts.previous, () => step(-1), { class: "viewer-step before" });
  const next = iconButton("right", texts.next, () => step(1), { class: "viewer-step after" });
  const dialog = h("dialog", { class: "viewer", "aria-label": texts.title },
    h("div", { class: "viewer-stage" }, picture, previous, next, counter),
    details,
    iconButton("close", strings.app.close, () => dialog.close(), { class: "viewer-close" }));

  const show = () => {
    const image = list[at];
    picture.src = image.url;
    picture.alt = image.title;
    picture.width = image.width;
    picture.height = image.height;
    previous.hidden = at === 0;
    next.hidden = at === list.length - 1;
    counter.textContent = list.length > 1 ? `${at + 1} / ${list.length}` : "";
    fill(details, describe(image, null, controls(image)));
    api.image(image.id).then((full) => {
      if (list[at] === image) fill(details, describe(image, full, controls(image)));
    }).catch(complain);
  };
  const step = (offset) => {
    at = clamp(at + offset, 0, list.length - 1);
    show();
  };
  const drop = async (image, action) => {
    if (await action(image) === false) return;
    list.splice(at, 1);
    if (!list.length) return dialog.close();
    at = clamp(at, 0, list.length - 1);
    show();
  };
  const leave = (action) => () => { dialog.close(); action(); };
  const controls = (image) => {
    if (trash) return [h("button", { type: "button", class: "button", onclick: () => drop(image, restore) }, icon("restore"), strings.actions.restore)];
    const starButton = iconButton("star", strings.actions.star, async () => mark(await star(image)));
    const mark = (starred) => {
      starButton.classList.toggle("starred", starred);
      starButton.setAttribute("aria-pressed", String(starred));
    };
    mark(image.starred);
    return [
      h("button", { type: "button", class: "button", onclick: leave(() => recall(image)) }, icon("sliders"), strings.actions.recall),
      h("button", { type: "button", class: "button quiet", onclick: leave(() => alike(image)) }, icon("alike"), strings.actions.alike),
      h("span", { class: "row" }, starButton,
        iconButton("download", strings.actions.download, () => download(image)),
        menuButton({ label: strings.actions.sendTo, iconName: "send", items: () => sendItems(image).map((item) => ({ ...item, action: leave(item.action) })) }),
        iconButton("trash", strings.actions.remove, () => drop(image, remove))),
    ];
  };
  // Keys count wherever the focus is: buttons are replaced when another picture is shown.
  const keys = new AbortController();
  dialog.addEventListener("close", () => keys.abort());
  document.addEventListener("keydown", (event) => {
    if (dialog !== [...document.querySelectorAll("dialog[open]")].at(-1) || isTyping(event) || event.ctrlKey || event.metaKey || event.target.closest("[role=menu]")) return;
    const image = list[at];
    const action = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1), d: () => download(image),
      s: () => star(image).then(show), r: leave(() => recall(image)), Delete: () => drop(image, trash ? restore : remove),
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }, { signal: keys.signal });
  let start = null;
  picture.addEventListener("pointerdown", (event) => { start = event.clientX; });
  picture.addEventListener("pointerup", (event) => {
    if (event.pointerType !== "mouse" && start !== null && Math.abs(event.clientX - start) > 50) step(event.clientX < start ? 1 : -1);
    start = null;
  });
  show();
  return openDialog(dialog);
}

/** Return the description of a picture: its words, its settings, and what can be done with it. */
function describe(image, full, controls) {
  const recipe = full?.recipe ?? {};
  const entries = [
    [texts.mode, strings.gallery.modes[image.mode] ?? image.mode],
    [texts.seed, String(image.seed)],
    [texts.size, `${image.width} × ${image.height}`],
    [texts.model, image.model],
    [texts.made, new Date(image.created_at).toLocaleString()],
    ...Object.entries(texts.fields).filter(([key]) => recipe[key] !== undefined && recipe[key] !== null).map(([key, label]) => [label, shorten(recipe[key])]),
  ];
  return [
    h("h2", { class: "viewer-words" }, image.title),
    h("div", { class: "viewer-controls" }, controls),
    recipe.parts && h("section", {}, h("h3", {}, texts.ingredients), h("ul", { class: "ingredients" }, recipe.parts.map((part) => h("li", {}, h("b", {}, Number(part.weight.toFixed(2))), " ", part.text ?? strings.mix.pictureCard)))),
    h("section", {}, h("h3", {}, texts.recipe), h("dl", { class: "recipe" }, entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))))),
    navigator.clipboard && h("button", { type: "button", class: "link", onclick: () => copyText(image.title) }, texts.copy),
  ];
}

function shorten(value) {
  if (typeof value === "string") return value.replace(/Scheduler$/, "").slice(0, 40);
  if (typeof value === "number") return String(Number(value.toFixed(4)));
  return Array.isArray(value) ? value.join(", ") : String(value);
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast(texts.copied);
  } catch (error) {
    complain(error);
  }
}

/** Show two pictures, one over the other, with a divider between them. */
export function openComparison(one, other) {
  const range = h("input", { type: "range", min: 0, max: 100, step: 0.5, value: 50, class: "divider-range", "aria-label": texts.divider });
  const place = () => frame.style.setProperty("--divider", `${range.value}%`);
  range.addEventListener("input", place);
  const frame = h("div", { class: "comparison" },
    h("img", { src: one.url, alt: one.title, class: "comparison-a", draggable: false }),
    h("img", { src: other.url, alt: other.title, class: "comparison-b", draggable: false }),
    h("span", { class: "divider", "aria-hidden": "true" }), range);
  frame.style.setProperty("--ratio", String(one.width / one.height));
  const label = (image) => h("p", {}, h("b", {}, image.title), h("span", { class: "muted" }, `${strings.viewer.seed} ${image.seed}`));
  const dialog = h("dialog", { class: "viewer comparing", "aria-label": strings.gallery.compare },
    h("div", { class: "viewer-stage" }, frame),
    h("div", { class: "comparison-labels" }, label(one), label(other)),
    iconButton("close", strings.app.close, () => dialog.close(), { class: "viewer-close" }));
  place();
  return openDialog(dialog);
}

/** Show the recipe that a dropped picture contains, and offer to recall it. */
export function openRecipe(answer, blob, onrecall) {
  const url = URL.createObjectURL(blob);
  const { request, recipe, missing } = answer;
  const entries = Object.entries(texts.fields).filter(([key]) => recipe[key] !== undefined && recipe[key] !== null).map(([key, label]) => [label, shorten(recipe[key])]);
  const dialog = h("dialog", { class: "viewer", "aria-label": texts.fromFile, onclose: () => URL.revokeObjectURL(url) },
    h("div", { class: "viewer-stage" }, h("img", { class: "viewer-picture", src: url, alt: texts.fromFile })),
    h("div", { class: "viewer-details" },
      h("h2", { class: "viewer-words" }, jobTitle({ request, mode: request.mode })),
      missing.length > 0 && h("p", { class: "warning" }, texts.missing(missing.map(inputName).join(", "))),
      h("div", { class: "viewer-controls" }, h("button", { type: "button", class: "button", onclick: () => { dialog.close(); onrecall(); } }, icon("sliders"), strings.actions.recall)),
      h("section", {}, h("h3", {}, texts.recipe), h("dl", { class: "recipe" },
        [[texts.seed, String(request.seed)], ...entries].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))))),
    iconButton("close", strings.app.close, () => dialog.close(), { class: "viewer-close" }));
  return openDialog(dialog);
}
