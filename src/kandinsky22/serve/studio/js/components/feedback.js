// Messages at the edge of the page, and announcements for screen readers.

import { fill, h, iconButton } from "../dom.js";
import { strings } from "../strings.js";

const region = () => document.querySelector(".toasts");

/**
 * Show a message for a few seconds.
 *
 * @param {string} text
 * @param {{action?: string, onaction?: () => void, kind?: "note"|"error", seconds?: number}} [options]
 */
export function toast(text, { action, onaction, kind = "note", seconds = action ? 12 : kind === "error" ? 8 : 5 } = {}) {
  const remove = () => message.remove();
  const message = h("div", { class: `toast ${kind}`, role: kind === "error" ? "alert" : "status" },
    h("span", {}, text),
    action && h("button", { type: "button", class: "link", onclick: () => { remove(); onaction(); } }, action),
    iconButton("close", strings.app.close, remove, { class: "small" }));
  const list = region();
  // Dialogs lie above everything else; a message about what happens inside one must be there too.
  const dialog = [...document.querySelectorAll("dialog[open]")].at(-1);
  (dialog ?? list).append(message);
  if (dialog) message.classList.add("in-dialog");
  while (list.children.length > 3) list.firstElementChild.remove();
  let timer = setTimeout(remove, seconds * 1000);
  message.addEventListener("pointerenter", () => clearTimeout(timer));
  message.addEventListener("pointerleave", () => { timer = setTimeout(remove, 2000); });
}

/** Show what went wrong. */
export const complain = (error) => toast(error.message ?? String(error), { kind: "error" });

/** Tell screen readers something that is visible elsewhere. */
export function announce(text) {
  const live = document.querySelector("#announcements");
  if (live && live.textContent !== text) fill(live, text);
}
