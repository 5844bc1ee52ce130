// Settings of a generation: quality, shape, seed, number of pictures; samplers, steps and guidance are folded away.

import { clamp, fill, h, iconButton, uid } from "../dom.js";
import { compact } from "../jobs.js";
import { store } from "../store.js";
import { strings } from "../strings.js";
import { choices, toggle } from "./controls.js";

const texts = strings.settings;
const RATIOS = { square: [1, 1], portrait: [3, 4], landscape: [4, 3], tall: [9, 16], wide: [16, 9] };

/** Settings that a request and this form share. */
const FIELDS = ["quality", "scheduler", "steps", "guidance", "prior_scheduler", "prior_steps", "prior_guidance", "prompt_weights", "guidance_rescale"];

export const DEFAULT_SETTINGS = { quality: "draft", shape: "square", width: null, height: null, count: 1, seed: null, locked: false };

/** Return the model that a screen uses: the first of its kind. */
export const modelOf = (kind) => store.info?.models.find((model) => model.kind === kind) ?? store.info?.models[0];

/**
 * Return a form of settings.
 *
 * @param {{value: object, onchange: () => void, kind?: string, size?: boolean, count?: boolean, quality?: boolean, sampler?: boolean, signal: AbortSignal}} options
 */
export function settingsForm({ value, onchange, kind = "decoder", size = true, count = true, quality = true, sampler = true, signal }) {
  const element = h("div", { class: "settings" });
  const set = (name, next) => {
    if (next === null || next === "" || Number.isNaN(next)) delete value[name];
    else value[name] = next;
    onchange();
  };
  const render = () => {
    if (!store.info) return;
    const wasOpen = element.querySelector("details")?.open;
    const model = modelOf(kind);
    if (value.quality && !model.presets.includes(value.quality)) value.quality = DEFAULT_SETTINGS.quality;
    fill(element,
      quality && field(texts.quality, choices({
        label: texts.quality, value: value.quality ?? "", options: [...model.presets.map((name) => [name, texts.qualities[name] ?? name]), ["", texts.qualities[""]]],
        onchange: (next) => { set("quality", next); render(); },
      })),
      size && shapeField(value, model, set, onchange),
      h("div", { class: "pair" },
        seedField(value, onchange),
        count && field(texts.count, stepper(texts.count, value.count ?? 1, 1, Math.min(store.info.limits.max_count, 16), (next) => set("count", next)))),
      sampler && advanced(value, model, set, wasOpen));
  };
  store.on("info", render, signal);
  render();
  element.recall = (request) => {
    for (const name of FIELDS) delete value[name];
    Object.assign(value, compact(Object.fromEntries(FIELDS.map((name) => [name, request[name]]))));
    Object.assign(value, { seed: request.seed ?? null, locked: request.seed !== undefined && request.seed !== null, count: request.count ?? 1 });
    if (size && request.width && request.height) Object.assign(value, shapeOf(request.width, request.height, modelOf(kind)));
    onchange();
    render();
  };
  element.render = render;
  return element;
}

/** Return the part of a request that the settings are. A seed that is not locked is rolled by the server. */
export function settingsRequest(value, { kind = "decoder", size = true } = {}) {
  const request = Object.fromEntries(FIELDS.map((name) => [name, value[name]]));
  if (!request.prompt_weights) delete request.prompt_weights;
  const model = modelOf(kind);
  const [width, height] = size && model ? sizeOf(value, model) : [];
  // A square of the model's default side needs no size.
  const isDefault = width === model?.default_width && height === model?.default_height;
  return compact({ ...request, model: model?.id, seed: value.locked ? value.seed : null, count: value.count > 1 ? value.count : null, width: isDefault ? null : width, height: isDefault ? null : height });
}

/** Return width and height for a shape: the area of the model's default size, sides that the decoder can make. */
function sizeOf(value, model) {
  if (value.shape === "custom") return [value.width ?? model.default_width, value.height ?? model.default_height];
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
  const custom = h("div", { class: "pair custom-size" });
  const note = h("span", { class: "setting-note" });
  const { max_side: maxSide } = store.info.limits;
  const update = () => {
    const [width, height] = sizeOf(value, model);
    note.textContent = `${width} × ${height}`;
    fill(custom, value.shape === "custom" && [["width", texts.width], ["height", texts.height]].map(([name, label]) =>
      h("label", { class: "labelled" }, label, h("input", { type: "number", class: "number", min: 16, max: maxSide, step: 16, value: value[name] ?? model[`default_${name}`], onchange: (event) => { set(name, clamp(event.target.valueAsNumber || 16, 16, maxSide)); update(); } }))));
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
  const input = h("input", { type: "text", inputMode: "numeric", class: "seed", value: value.seed ?? "", placeholder: texts.seedRandom, "aria-label": texts.seed, onchange: () => {
    const text = input.value.trim();
    // A number that JavaScript would round remains a text.
    const seed = !/^\d{1,19}$/.test(text) ? null : Number.isSafeInteger(Number(text)) ? Number(text) : text;
    Object.assign(value, { seed, locked: seed !== null });
    update();
  } });
  const lock = h("span");
  const update = () => {
    input.value = value.locked && value.seed !== null ? String(value.seed) : "";
    fill(lock, iconButton(value.locked ? "lock" : "unlock", value.locked ? texts.unlock : texts.lock, () => {
      value.locked = !value.locked;
      if (value.locked && value.seed === null) value.seed = value.lastSeed ?? randomSeed();
      update();
    }, { "aria-pressed": String(value.locked), class: "small" }));
    onchange();
  };
  const element = h("div", { class: "setting seed-field" }, h("span", { class: "setting-label", "aria-hidden": "true" }, texts.seed), h("span", { class: "seed-box" }, input, lock,
    iconButton("dice", texts.dice, () => { Object.assign(value, { seed: randomSeed(), locked: true }); update(); }, { class: "small" })));
  update();
  return element;
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function advanced(value, model, set, open) {
  const defaults = model?.defaults ?? {};
  const schedulers = [["", texts.own()], ...store.info.schedulers.map((name) => [name, name])];
  const select = (label, name) => {
    const id = uid("select");
    return h("div", { class: "setting" }, h("label", { for: id, class: "setting-label" }, label),
      h("select", { id, onchange: (event) => set(name, event.target.value) }, schedulers.map(([key, text]) => h("option", { value: key, selected: key === (value[name] ?? "") }, text))));
  };
  const number = (label, name, attributes) => {
    const id = uid("number");
    return h("div", { class: "setting" }, h("label", { for: id, class: "setting-label" }, label),
      h("input", { id, type: "number", class: "number", ...attributes, value: value[name] ?? "", placeholder: placeholder(value, name, defaults), onchange: (event) => set(name, event.target.valueAsNumber) }));
  };
  const steps = { min: 1, max: store.info.limits.max_steps, step: 1 };
  return h("details", { class: "advanced", open: Boolean(open) }, h("summary", {}, texts.more),
    h("div", { class: "advanced-grid" },
      select(texts.scheduler, "scheduler"), number(texts.steps, "steps", steps), number(texts.guidance, "guidance", { min: 0, max: 30, step: 0.1 }),
      select(texts.priorScheduler, "prior_scheduler"), number(texts.priorSteps, "prior_steps", steps), number(texts.priorGuidance, "prior_guidance", { min: 0, max: 30, step: 0.1 })),
    toggle({ label: texts.promptWeights, hint: texts.promptWeightsHint, checked: Boolean(value.prompt_weights), onchange: (next) => set("prompt_weights", next || null) }));
}

/** Return what applies if a number is left empty: the preset's steps, or the model's own value. */
function placeholder(value, name, defaults) {
  const preset = store.info.presets.find((one) => one.name === value.quality);
  if (preset?.[name] === null) return texts.ofAdapter;
  return texts.own(preset?.[name] ?? defaults[name]);
}

