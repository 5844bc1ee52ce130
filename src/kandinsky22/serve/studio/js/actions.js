// What can be done with a finished picture, the same on every screen.

import { api, imagePicture, pictureUrl } from "./api.js";
import { loadPicture } from "./dom.js";
import { complain, toast } from "./components/feedback.js";
import { go, SCREEN_OF_MODE } from "./router.js";
import { store } from "./store.js";
import { strings } from "./strings.js";

const texts = strings.actions;

/** Star a picture, or remove its star. The picture's object changes at once. */
export async function star(image) {
  image.starred = !image.starred;
  try {
    await api.star(image.id, image.starred);
  } catch (error) {
    image.starred = !image.starred;
    complain(error);
  }
  return image.starred;
}

/** Move a picture to the trash; the message offers to take it back. */
export async function remove(image) {
  try {
    await api.remove(image.id);
  } catch (error) {
    complain(error);
    return false;
  }
  toast(texts.removed, { action: strings.app.undo, onaction: () => restore(image) });
  return true;
}

/** Take a picture out of the trash. */
export async function restore(image) {
  try {
    await api.restore(image.id);
    toast(texts.restored);
  } catch (error) {
    complain(error);
  }
}

/** Save a picture's file. */
export function download(image) {
  const link = document.createElement("a");
  link.href = `${image.url}?download=1`;
  link.download = `${image.title.slice(0, 60).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "picture"}-${image.seed}.png`;
  link.click();
}

/** Put a picture on the mixing table. */
export function alike(image) {
  go("mix", { picture: imagePicture(image), title: image.title });
}

/** Open the screen that made a picture, with all its settings. */
export async function recall(image) {
  try {
    await recallRequest(await requestOf(image));
  } catch (error) {
    complain(error);
  }
}

/**
 * Open the screen of a request with its settings, and say which of them it could not take.
 *
 * @param {{request: object, missing?: string[], recipe?: object}} origin `missing` are names of input pictures that the
 *   server does not have; the recipe is that of a file.
 */
export async function recallRequest({ request, missing = [], recipe }) {
  try {
    const lost = await go(SCREEN_OF_MODE[request.mode] ?? "draw", { request });
    const names = [...new Set([...missing.map(inputName), ...(recipe ? unknownOf(recipe, request) : []), ...lost])];
    if (names.length) toast(texts.recalledExcept(names.join("; ")), { kind: "error", seconds: 12 });
    else toast(texts.recalled);
  } catch (error) {
    complain(error);
  }
}

/** Return the settings of a recipe that the request of this server cannot repeat, in words. */
function unknownOf(recipe, request) {
  const isDistilled = store.info.presets.some((preset) => preset.name === request.quality && preset.steps === null);
  return [
    !request.model && strings.settings.noModel(recipe.model),
    !request.quality && !request.scheduler && texts.sampler(recipe.scheduler),
    !request.quality && !request.prior_scheduler && recipe.prior_scheduler && texts.sampler(recipe.prior_scheduler),
    recipe.lora && !isDistilled && texts.adapters, recipe.subject && texts.subject, recipe.cache_every && texts.cache,
  ].filter(Boolean);
}

/** Return what an input picture is called, such as `mask` or `parts.1`. */
export const inputName = (name) => texts.inputs[name] ?? texts.part(Number(name.split(".")[1]) + 1);

/** Return the request that makes a picture again, with what is known about it. */
async function requestOf(image) {
  if (image.job) {
    try {
      const job = store.jobs.get(image.job) ?? (await api.job(image.job));
      return { request: { ...job.request, seed: image.seed, count: 1 } };
    } catch {
      // The queue may be newer than the picture: its file holds the recipe.
    }
  }
  const file = await (await fetch(image.url, { credentials: "same-origin" })).blob();
  return api.recipe(file);
}

/** Return the entries of a picture's menu. */
export function sendItems(image) {
  const picture = () => imagePicture(image);
  return [
    { label: texts.recall, iconName: "sliders", action: () => recall(image) },
    { label: texts.toMix, iconName: "mix", action: () => alike(image) },
    { label: texts.toDraw, iconName: "draw", action: () => go("draw", { picture: picture(), as: "img2img" }) },
    { label: texts.variation, iconName: "alike", action: () => go("draw", { picture: picture(), as: "variations" }) },
    { label: texts.toCanvas, iconName: "canvas", action: () => go("canvas", { picture: picture() }) },
    { label: texts.toGuide, iconName: "guide", action: () => go("guide", { picture: picture() }) },
  ];
}

/** Return a picture with its size from the reference in a request, or null if the server no longer has it. */
export async function resolvePicture(reference) {
  if (!reference?.upload && !reference?.image) return null;
  const picture = reference.upload ? { upload: reference.upload } : { image: reference.image };
  try {
    const { naturalWidth, naturalHeight } = await loadPicture(pictureUrl(picture));
    return { ...picture, width: naturalWidth, height: naturalHeight };
  } catch {
    return null;
  }
}
