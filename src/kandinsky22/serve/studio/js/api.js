// The client of the native API. Nothing else in the studio makes a request.

import { strings } from "./strings.js";

/** An answer of the server that is not a success, or no answer at all (status 0). */
export class ApiError extends Error {
  constructor(status, message, argument = null) {
    super(message);
    this.status = status;
    this.argument = argument;
  }
}

/**
 * Parse JSON. Whole numbers beyond JavaScript's precision, such as some seeds, remain texts, which the server reads as numbers.
 *
 * @param {string} text
 */
export function parseJson(text) {
  return JSON.parse(text, (key, value, context) =>
    Number.isInteger(value) && !Number.isSafeInteger(value) && /^\d+$/.test(context?.source ?? "") ? context.source : value);
}

async function request(method, path, { json, body, headers = {} } = {}) {
  const options = { method, headers: { Accept: "application/json", ...headers }, credentials: "same-origin" };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers["Content-Type"] = "application/json";
  } else if (body !== undefined) {
    options.body = body;
    options.headers["Content-Type"] = body.type || "application/octet-stream";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ApiError(0, strings.errors.offline);
  }
  const hasBody = response.status !== 204;
  const answer = hasBody && response.headers.get("Content-Type")?.includes("json") ? parseJson(await response.text()) : null;
  if (!response.ok) {
    const error = answer?.error ?? {};
    throw new ApiError(response.status, error.message ?? answer?.detail ?? strings.errors.status(response.status), error.argument ?? null);
  }
  return answer;
}

/** Return a query string without empty values. */
function query(values) {
  const entries = Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined && value !== false);
  return entries.length ? `?${new URLSearchParams(entries)}` : "";
}

const id = encodeURIComponent;

export const api = {
  login: (token) => request("POST", "/login", { json: { token } }),
  info: () => request("GET", "/api/info"),
  upload: (blob) => request("POST", "/api/uploads", { body: blob }),
  createJob: (job) => request("POST", "/api/jobs", { json: job, headers: { "Idempotency-Key": randomKey() } }),
  jobs: (filter = {}) => request("GET", `/api/jobs${query(filter)}`),
  job: (job) => request("GET", `/api/jobs/${id(job)}`),
  cancel: (job) => request("DELETE", `/api/jobs/${id(job)}`),
  retry: (job) => request("POST", `/api/jobs/${id(job)}/retry`),
  images: (filter = {}) => request("GET", `/api/images${query(filter)}`),
  image: (image) => request("GET", `/api/images/${id(image)}`),
  star: (image, starred) => request("PATCH", `/api/images/${id(image)}`, { json: { starred } }),
  remove: (image) => request("DELETE", `/api/images/${id(image)}`),
  restore: (image) => request("POST", `/api/images/${id(image)}/restore`),
  recipe: (blob) => request("POST", "/api/recipes", { body: blob }),
  hint: (hint) => request("POST", "/api/hints", { json: hint }),
};

function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Return a random name for jobs that belong together. */
export const randomGroup = (prefix) => `${prefix}-${randomKey().slice(0, 12)}`;

/**
 * A picture that the server has: an upload or an image of the gallery.
 *
 * @typedef {{upload?: string, image?: string, width: number, height: number}} Picture
 */

/** Return the address of a picture's file. */
export const pictureUrl = (picture) => (picture.upload ? `/api/uploads/${id(picture.upload)}` : `/api/images/${id(picture.image)}/file`);

/** Return the address of a small version, where the server has one. */
export const pictureThumbnail = (picture) => (picture.upload ? pictureUrl(picture) : `/api/images/${id(picture.image)}/thumbnail`);

/** Return the reference that a job contains. */
export const pictureReference = (picture) => (picture.upload ? { upload: picture.upload } : { image: picture.image });

/** Upload a file and return it as a picture. */
export async function uploadPicture(blob) {
  const upload = await api.upload(blob);
  return { upload: upload.id, width: upload.width, height: upload.height };
}

/** Return an image of the gallery as a picture. */
export const imagePicture = (image) => ({ image: image.id, width: image.width, height: image.height });
