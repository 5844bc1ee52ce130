// Small controls: choices, sliders, switches, menus and the slot for one picture.

import { uploadPicture, pictureUrl } from "../api.js";
import { acceptDrops, clamp, fill, h, icon, iconButton, pictureFiles, uid } from "../dom.js";
import { store } from "../store.js";
import { strings } from "../strings.js";
import { complain } from "./feedback.js";

/**
 * Return a row of exclusive choices.
 *
 * @param {{label: string, options: [string, string|Node][], value: string, onchange: (value: string) => void, class?: string}} choice
 */
export function choices({ label, options, value, onchange, class: extra = "" }) {
  const name = uid("choice");
  const element = h("fieldset", { class: `choices ${extra}` }, h("legend", { class: "visually-hidden" }, label),
    options.map(([key, content]) => {
      const input = h("input", { type: "radio", name, value: key, checked: key === value, class: "visually-hidden", onchange: () => onchange(key) });
      return h("label", {}, input, h("span", {}, content));
    }));
  element.set = (key) => {
    for (const input of element.querySelectorAll("input")) input.checked = input.value === key;
  };
  return element;
}

/**
 * Return a slider with its number.
 *
 * @param {{label: string, min: number, max: number, step: number, value: number, oninput: (value: number) => void, hint?: string, hideLabel?: boolean, format?: (value: number) => string}} slider
 */
export function slider({ label, min, max, step, value, oninput, hint, hideLabel = false, format }) {
  const inputId = uid("slider");
  const range = h("input", { type: "range", id: inputId, min, max, step, value, class: min < 0 ? "signed" : "" });
  const number = h("input", { type: "number", class: "number", min, max, step, value, "aria-label": label, inputMode: "decimal" });
  const paint = () => {
    const position = (x) => (x - min) / (max - min);
    const zero = position(Math.max(min, Math.min(0, max)));
    const at = position(Number(range.value));
    range.style.setProperty("--from", `${100 * Math.min(zero, at)}%`);
    range.style.setProperty("--to", `${100 * Math.max(zero, at)}%`);
    range.classList.toggle("negative", Number(range.value) < 0);
    if (format) range.setAttribute("aria-valuetext", format(Number(range.value)));
  };
  range.addEventListener("input", () => {
    number.value = range.value;
    paint();
    oninput(Number(range.value));
  });
  number.addEventListener("input", () => {
    if (number.value === "" || !Number.isFinite(number.valueAsNumber)) return;
    const bounded = clamp(number.valueAsNumber, min, max);
    range.value = String(bounded);
    paint();
    oninput(bounded);
  });
  number.addEventListener("change", () => { number.value = range.value; });
  const name = h("label", { for: inputId, class: hideLabel ? "visually-hidden" : "" }, label);
  const element = h("div", { class: "slider", title: hint }, name, range, number);
  element.rename = (text) => {
    name.textContent = text;
    number.setAttribute("aria-label", text);
  };
  element.set = (next) => {
    range.value = String(next);
    number.value = String(next); // may lie between the steps of the slider
    paint();
  };
  element.disable = (disabled) => {
    range.disabled = disabled;
    number.disabled = disabled;
    element.classList.toggle("disabled", disabled);
  };
  paint();
  return element;
}

/**
 * Return a switch.
 *
 * @param {{label: string, checked: boolean, onchange: (checked: boolean) => void, hint?: string}} options
 */
export function toggle({ label, checked, onchange, hint }) {
  const input = h("input", { type: "checkbox", role: "switch", checked, onchange: () => onchange(input.checked) });
  const element = h("label", { class: "switch", title: hint }, input, h("span", { class: "track", "aria-hidden": "true" }), h("span", {}, label));
  element.set = (value) => { input.checked = value; };
  return element;
}

/**
 * Return a text area with a label that grows with its text.
 *
 * @param {{label: string, value: string, placeholder?: string, oninput: (value: string) => void, class?: string, rows?: number}} options
 */
export function textField({ label, value, placeholder = "", oninput, class: extra = "", rows = 1 }) {
  const id = uid("text");
  const area = h("textarea", { id, value, placeholder, rows, class: extra, oninput: () => { grow(); oninput(area.value); } });
  const grow = () => {
    area.style.setProperty("height", "auto");
    if (area.scrollHeight) area.style.setProperty("height", `${area.scrollHeight + 2}px`);
  };
  const element = h("div", { class: "field" }, h("label", { for: id }, label), area);
  element.area = area;
  element.set = (text) => { area.value = text; grow(); };
  new ResizeObserver(grow).observe(element);
  return element;
}

/**
 * Return a button that opens a menu.
 *
 * @param {{label: string, iconName: string, items: () => ({label: string, iconName: string, action: () => void}|null)[], text?: string, class?: string}} options
 */
export function menuButton({ label, iconName, items, text, class: extra = "" }) {
  const menuId = uid("menu");
  const button = h("button", {
    type: "button", class: text ? `button quiet ${extra}` : `icon-button ${extra}`, title: label, "aria-label": label, "aria-haspopup": "menu", "aria-expanded": "false", "aria-controls": menuId,
    onclick: (event) => { event.stopPropagation(); toggleMenu(); },
  }, icon(iconName), text && h("span", {}, text));
  const menu = h("div", { id: menuId, class: "menu", role: "menu", "aria-label": label, popover: "auto" });
  menu.addEventListener("toggle", (event) => {
    const open = event.newState === "open";
    button.setAttribute("aria-expanded", String(open));
    if (open) menu.querySelector("[role=menuitem]")?.focus();
  });
  menu.addEventListener("keydown", (event) => {
    const entries = [...menu.querySelectorAll("[role=menuitem]")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    entries.at((entries.indexOf(document.activeElement) + step) % entries.length).focus();
  });
  const toggleMenu = () => {
    if (menu.matches(":popover-open")) return menu.hidePopover();
    fill(menu, items().filter(Boolean).map((item) => h("button", {
      type: "button", role: "menuitem", onclick: () => { menu.hidePopover(); item.action(); },
    }, icon(item.iconName), h("span", {}, item.label))));
    menu.showPopover();
    const place = button.getBoundingClientRect();
    const box = menu.getBoundingClientRect();
    const below = place.bottom + 6 + box.height < innerHeight;
    menu.style.setProperty("top", `${below ? place.bottom + 6 : Math.max(place.top - 6 - box.height, 8)}px`);
    menu.style.setProperty("left", `${clamp(place.right - box.width, 8, innerWidth - box.width - 8)}px`);
  };
  return h("span", { class: "menu-holder" }, button, menu);
}

/** Open the file chooser for pictures. */
export function chooseFiles(onfiles, multiple = false) {
  const input = h("input", { type: "file", accept: "image/png,image/jpeg,image/webp", multiple, onchange: () => onfiles([...input.files]) });
  input.click();
}

/**
 * Return a slot for one picture: dropped, pasted (by the screen) or chosen.
 *
 * @param {{label: string, hint: string, onpicture: (picture: object|null) => void, removeLabel: string, class?: string}} options
 */
export function pictureSlot({ label, hint, onpicture, removeLabel, class: extra = "" }) {
  const element = h("div", { class: `picture-slot ${extra}` });
  let current = null;
  const show = (picture) => {
    current = picture;
    element.classList.toggle("filled", Boolean(picture));
    if (picture) {
      fill(element, h("img", { src: pictureUrl(picture), alt: label, draggable: false, onerror: () => forgetMissing(() => current === picture && set(null)) }), iconButton("close", removeLabel, () => set(null), { class: "on-picture" }));
    } else {
      fill(element, h("button", { type: "button", class: "slot-button", onclick: () => chooseFiles((files) => take(files)) },
        icon("image"), h("span", { class: "slot-title" }, label), h("span", { class: "slot-hint" }, hint)));
    }
  };
  const set = (picture) => {
    show(picture);
    onpicture(picture);
  };
  const take = async (files) => {
    if (!files.length) return complain(new Error(strings.errors.notPicture));
    element.classList.add("busy");
    try {
      set(await uploadPicture(files[0]));
    } catch (error) {
      complain(error);
    } finally {
      element.classList.remove("busy");
    }
  };
  acceptDrops(element, take, set);
  element.show = show;
  element.take = take;
  Object.defineProperty(element, "picture", { get: () => current });
  show(null);
  return element;
}

/** Call a function for a picture that the server no longer has: uploads are removed some time after their last use. */
export function forgetMissing(forget) {
  if (store.connected) forget();
}

/** Call a function with the files of each paste into a screen that is visible. */
export function onPaste(screen, signal, { files, text }) {
  document.addEventListener("paste", (event) => {
    if (!screen.isConnected || screen.hidden || document.querySelector("dialog[open]")) return;
    const pictures = pictureFiles(event.clipboardData);
    if (pictures.length) {
      event.preventDefault();
      files(pictures);
    } else if (text && !/^(TEXTAREA|INPUT)$/.test(event.target.tagName)) {
      const words = event.clipboardData.getData("text/plain").trim();
      if (words) { event.preventDefault(); text(words); }
    }
  }, { signal });
}
