// Settings of a generation: quality, shape, seed, number of pictures; samplers, steps and guidance are folded away.

import { clamp, fill, h, icon, iconButton, uid } from "../dom.js";
import { compact } from "../jobs.js";
import { store } from "../store.js";
import { strings } from "../strings.js";
import { choices, toggle } from "./controls.js";

const texts = strings.settings;
const RATIOS = { square: [1, 1], portrait: [3, 4], landscape: [4, 3], tall: [9, 16], wide: [16, 9] };

/** Settings that a request and this form share. */
const FIELDS = ["quality", "scheduler", "steps", "guidance", "prior_scheduler", "prior_steps", "prior_guidance", "prompt_weights"];

/** Parts of a request that have a control of another kind, or that belong to one job and not to its picture. */
const NOT_RECALLED = ["mode", "model", "seed", "count", "group", "priority", "previews"];

/** Settings without a control that a choice of quality replaces. */
const OF_QUALITY = ["scheduler_settings", "prior_scheduler_settings", "guidance_interval", "prior_guidance_interval", "guidance_rescale", "guidance_threshold"];

export const DEFAULT_SETTINGS = { quality: "draft", shape: "square", width: null, height: null, count: 1, seed: null, locked: false };

/** Return the model that a screen uses: the recalled one, or else the first of its kind. */
export function modelOf(kind, value = {}) {
  const models = store.info?.models ?? [];
  const fitting = models.filter((model) => model.kind === kind);
  return fitting.find((model) => model.id === value.recalled?.model) ?? fitting[0] ?? models[0];
}

/**
 * Return a form of settings.
 *
 * @param {{value: object, onchange: () => void, kind?: string, size?: boolean, count?: boolean, quality?: boolean, sampler?: boolean, signal: AbortSignal}} options
 */
export function settingsForm({ value, onchange, kind = "decoder", size = true, count = true, quality = true, sampler = true, signal }) {
  const element = h("div", { class: "settings" });
  let more = null; // sampler, steps, guidance
  let rest = null; // recalled settings without a control
  const set = (name, next) => {
    if (next === null || next === "" || Number.isNaN(next)) delete value[name];
    else value[name] = next;
    if (name === "quality") forget(...OF_QUALITY);
    else if (name.endsWith("scheduler")) forget(`${name}_settings`);
    more?.update();
    onchange();
  };
  const forget = (...names) => {
    for (const name of names) delete value.recalled?.[name];
    rest?.update();
  };
  const forgetAll = () => {
    value.recalled = {};
    onchange();
    render();
    element.querySelector("summary")?.focus();
  };
  // Built anew only when the models or the limits change, or settings are recalled. All else changes in place: controls in use keep the focus.
  const render = () => {
    if (!store.info) return;
    const wasOpen = element.querySelector("details")?.open;
    const model = modelOf(kind, value);
    if (value.recalled?.model && value.recalled.model !== model.id) delete value.recalled.model;
    if (value.quality && !model.presets.includes(value.quality)) value.quality = DEFAULT_SETTINGS.quality;
    more = sampler ? advanced(value, model, set, wasOpen) : null;
    rest = recalledField(value, forgetAll);
    fill(element,
      quality && field(texts.quality, choices({
        label: texts.quality, value: value.quality ?? "", options: [...model.presets.map((name) => [name, texts.qualities[name] ?? name]), ["", texts.qualities[""]]],
        onchange: (next) => set("quality", next),
      })),
      size && shapeField(value, model, set, onchange),
      h("div", { class: "pair" },
        seedField(value, onchange),
        count && field(texts.count, stepper(texts.count, value.count ?? 1, 1, Math.min(store.info.limits.max_count, 16), (next) => set("count", next)))),
      more, rest);
  };
  const rebuild = () => {
    const controls = () => [...element.querySelectorAll("input, select, button, summary")];
    const before = controls();
    const place = before.indexOf(document.activeElement);
    if (place >= 0) before[place].blur(); // what was typed counts
    render();
    if (place >= 0) controls().at(place - before.length)?.focus({ preventScroll: true });
  };
  store.on("info", rebuild, signal);
  render();

  /**
   * Take the settings of a request, except those that the screen takes itself. What has no control is kept too, and is part of
   * requests until it is removed or replaced. Returns what could not be recalled, in words.
   */
  element.recall = (request, own) => {
    for (const name of FIELDS) delete value[name];
    Object.assign(value, compact(Object.fromEntries(FIELDS.map((name) => [name, request[name]]))));
    Object.assign(value, { seed: request.seed ?? null, locked: request.seed !== undefined && request.seed !== null, count: request.count ?? 1 });
    const taken = new Set([...FIELDS, ...NOT_RECALLED, ...own]);
    value.recalled = compact(Object.fromEntries(Object.entries(request).filter(([name]) => !taken.has(name))));
    if (request.model && request.model !== modelOf(kind).id) value.recalled.model = request.model;
    const model = modelOf(kind, value);
    const lost = [
      request.model && request.model !== model.id && texts.noModel(request.model),
      request.quality && !model.presets.includes(request.quality) && texts.noQuality(texts.qualities[request.quality] ?? request.quality),
    ].filter(Boolean);
    if (own.includes("width")) Object.assign(value, shapeOf(request.width ?? model.default_width, request.height ?? model.default_height, model));
    onchange();
    render();
    return lost;
  };
  element.forget = (...names) => {
    forget(...names);
    onchange();
  };
  return element;
}

/** Return the part of a request that the settings are. A seed that is not locked is rolled by the server. */
export function settingsRequest(value, { kind = "decoder", size = true } = {}) {
  const request = Object.fromEntries(FIELDS.map((name) => [name, value[name]]));
  if (!request.prompt_weights) delete request.prompt_weights;
  const model = modelOf(kind, value);
  const [width, height] = size && model ? sizeOf(value, model) : [];
  // A square of the model's default side needs no size.
  const isDefault = width === model?.default_width && height === model?.default_height;
  const sides = size ? { width: isDefault ? null : width, height: isDefault ? null : height } : {};
  return compact({ ...value.recalled, ...compact(request), model: model?.id, seed: value.locked ? value.seed : null, count: value.count > 1 ? value.count : null, ...sides });
}

/** Return width and height for a shape: the area of the model's default size, sides that the decoder can make. */
function sizeOf(value, model) {
  if (value.shape === "custom") return [value.width ?? model.default_width, value.height ?? model.default_height];
  if (value.shape === "square" && model.default_width === model.default_height) return [model.default_width, model.default_height];
  const [wide, high] = RATIOS[value.shape] ?? RATIOS.square;
  const multiple = model.default_width % 64 === 0 && model.default_width > 256 ? 64 : 16;
  const side = Math.sqrt(model.default_width * model.default_height);
  const round = (length) => Math.max(Math.round(length / multiple), 1) * multiple;
  return [round(side * Math.sqrt(wide / high)), round(side * Math.sqrt(high / wide))];
}

function shapeOf(width, height, model) {
  const shape = Object.keys(RATIOS).find((name) => {
    const [wide, high] = sizeOf({ shape: name }, model);
    return wide === width && high === height;
  });
  return shape ? { shape, width: null, height: null } : { shape: "custom", width, height };
}

function field(label, control) {
  return h("div", { class: "setting" }, h("span", { class: "setting-label", "aria-hidden": "true" }, label), control);
}

function shapeField(value, model, set, onchange) {
  const note = h("span", { class: "setting-note" });
  const { max_side: maxSide } = store.info.limits;
  const side = (name) => h("input", { type: "number", class: "number", min: 16, max: maxSide, step: 16, onchange: (event) => { set(name, clamp(event.target.valueAsNumber || 16, 16, maxSide)); update(); } });
  const inputs = [side("width"), side("height")];
  const custom = h("div", { class: "pair custom-size" }, inputs.map((input, index) => h("label", { class: "labelled" }, [texts.width, texts.height][index], input)));
  const update = () => {
    const size = sizeOf(value, model);
    note.textContent = size.join(" × ");
    custom.hidden = value.shape !== "custom";
    inputs.forEach((input, index) => { input.value = String(size[index]); });
  };
  const options = [...Object.keys(RATIOS), "custom"].map((name) => [name, shapeIcon(name)]);
  const control = choices({ label: texts.shape, value: value.shape, options, class: "shapes", onchange: (next) => { value.shape = next; onchange(); update(); } });
  update();
  return h("div", { class: "setting" }, h("span", { class: "setting-label" }, texts.shape, note), control, custom);
}

function shapeIcon(name) {
  const [wide, high] = RATIOS[name] ?? [1, 1];
  const box = h("span", { class: `shape ${name}`, "aria-hidden": "true" }, name === "custom" ? "…" : "");
  const side = 15;
  box.style.setProperty("width", `${side * Math.sqrt(wide / high)}px`);
  box.style.setProperty("height", `${side * Math.sqrt(high / wide)}px`);
  return h("span", { class: "shape-choice", title: texts.shapes[name] }, box, h("span", { class: "visually-hidden" }, texts.shapes[name]));
}

function stepper(label, start, low, high, onchange) {
  const input = h("input", { type: "number", class: "number", min: low, max: high, step: 1, value: start, "aria-label": label, onchange: () => put(input.valueAsNumber || low) });
  const put = (next) => {
    input.value = String(clamp(Math.round(next), low, high));
    onchange(Number(input.value));
  };
  return h("span", { class: "stepper" }, h("button", { type: "button", "aria-label": `${label} −`, onclick: () => put(Number(input.value) - 1) }, "−"), input,
    h("button", { type: "button", "aria-label": `${label} +`, onclick: () => put(Number(input.value) + 1) }, "+"));
}

function seedField(value, onchange) {
  const show = () => { input.value = value.locked && value.seed !== null ? String(value.seed) : ""; };
  const input = h("input", { type: "text", inputMode: "numeric", class: "seed", placeholder: texts.seedRandom, "aria-label": texts.seed, onchange: show, oninput: () => {
    const text = input.value.trim();
    // A number that JavaScript would round remains a text.
    const seed = !/^\d{1,19}$/.test(text) ? null : Number.isSafeInteger(Number(text)) ? Number(text) : text;
    Object.assign(value, { seed, locked: seed !== null });
    mark();
    onchange();
  } });
  const lock = iconButton("unlock", texts.lock, () => {
    value.locked = !value.locked;
    if (value.locked && value.seed === null) value.seed = value.lastSeed ?? randomSeed();
    changed();
  }, { class: "small" });
  const mark = () => {
    fill(lock, icon(value.locked ? "lock" : "unlock"));
    lock.title = value.locked ? texts.unlock : texts.lock;
    lock.setAttribute("aria-label", lock.title);
    lock.setAttribute("aria-pressed", String(value.locked));
  };
  const changed = () => {
    show();
    mark();
    onchange();
  };
  show();
  mark();
  return h("div", { class: "setting seed-field" }, h("span", { class: "setting-label", "aria-hidden": "true" }, texts.seed), h("span", { class: "seed-box" }, input, lock,
    iconButton("dice", texts.dice, () => { Object.assign(value, { seed: randomSeed(), locked: true }); changed(); }, { class: "small" })));
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function advanced(value, model, set, open) {
  const defaults = model?.defaults ?? {};
  const inputs = {};
  const select = (label, name) => {
    const id = uid("select");
    const current = value[name] ?? "";
    const names = [...new Set(["", ...store.info.schedulers, current])]; // a recalled sampler may have its class's name
    return h("div", { class: "setting" }, h("label", { for: id, class: "setting-label" }, label),
      h("select", { id, onchange: (event) => set(name, event.target.value) }, names.map((key) => h("option", { value: key, selected: key === current }, key || texts.own()))));
  };
  const number = (label, name, attributes) => {
    const id = uid("number");
    inputs[name] = h("input", { id, type: "number", class: "number", ...attributes, value: value[name] ?? "", onchange: (event) => set(name, event.target.valueAsNumber) });
    return h("div", { class: "setting" }, h("label", { for: id, class: "setting-label" }, label), inputs[name]);
  };
  const steps = { min: 1, max: store.info.limits.max_steps, step: 1 };
  const element = h("details", { class: "advanced", open: Boolean(open) }, h("summary", {}, texts.more),
    h("div", { class: "advanced-grid" },
      select(texts.scheduler, "scheduler"), number(texts.steps, "steps", steps), number(texts.guidance, "guidance", { min: 0, max: 30, step: 0.1 }),
      select(texts.priorScheduler, "prior_scheduler"), number(texts.priorSteps, "prior_steps", steps), number(texts.priorGuidance, "prior_guidance", { min: 0, max: 30, step: 0.1 })),
    toggle({ label: texts.promptWeights, hint: texts.promptWeightsHint, checked: Boolean(value.prompt_weights), onchange: (next) => set("prompt_weights", next || null) }));
  element.update = () => {
    for (const [name, input] of Object.entries(inputs)) input.placeholder = placeholder(value, name, defaults);
  };
  element.update();
  return element;
}

/** Return the recalled settings that have no control, with a button that removes them. */
function recalledField(value, onremove) {
  const list = h("p", { class: "hint" });
  const element = h("div", { class: "setting recalled" },
    h("span", { class: "setting-label" }, texts.recalled, h("button", { type: "button", class: "link", onclick: onremove }, texts.remove)), list);
  const shown = (setting) => (Array.isArray(setting) ? setting.join(" – ")
    : typeof setting === "object" ? Object.entries(setting).map((pair) => pair.join(" ")).join(", ") : String(setting));
  element.update = () => {
    const entries = Object.entries(value.recalled ?? {});
    element.hidden = !entries.length;
    list.textContent = entries.map(([name, setting]) => `${texts.names[name] ?? strings.viewer.fields[name] ?? name}: ${shown(setting)}`).join(" · ");
  };
  element.update();
  return element;
}

/** Return what applies if a number is left empty: the preset's steps, or the model's own value. */
function placeholder(value, name, defaults) {
  const preset = store.info.presets.find((one) => one.name === value.quality);
  if (preset?.[name] === null) return texts.ofAdapter;
  return texts.own(preset?.[name] ?? defaults[name]);
}

