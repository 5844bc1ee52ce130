// Which screen is shown, and what one screen hands to another.

export const SCREENS = ["mix", "draw", "canvas", "guide", "gallery", "compare"];

/** Screens that recall the settings of each mode. */
export const SCREEN_OF_MODE = { generate: "draw", img2img: "draw", variations: "draw", inpaint: "canvas", control: "guide", mix: "mix" };

/**
 * Show a screen and hand it something: `{picture}` to work with, `{request}` to recall, or nothing. Returns what the screen
 * answers, a promise.
 *
 * @param {string} screen
 * @param {object} [payload]
 */
export function go(screen, payload) {
  const detail = { screen, payload, received: null };
  dispatchEvent(new CustomEvent("studio:go", { detail }));
  return detail.received;
}
