// What a job's state is called, and how jobs are posted.

import { strings } from "./strings.js";

/** Return a duration in words. */
export function duration(seconds) {
  if (seconds < 60) return strings.progress.seconds(seconds < 10 ? Math.max(seconds, 0.1).toFixed(1).replace(/\.0$/, "") : Math.round(seconds));
  if (seconds < 3600) return strings.progress.minutes(Math.round(seconds / 60));
  return strings.progress.hours((seconds / 3600).toFixed(1));
}

/** Return how far a job is, in words. */
export function progressText(job) {
  const texts = strings.progress;
  if (job.state === "queued") return texts.queued(job.position ?? 0);
  if (job.state !== "running") return texts[job.state];
  const { progress } = job;
  if (!progress) return texts.loading;
  const parts = [texts[progress.stage] ?? progress.stage];
  if (progress.images > 1) parts.push(texts.of(progress.image + 1, progress.images));
  if (progress.steps > 1) parts.push(texts.steps(progress.step, progress.steps));
  return parts.join(" · ");
}

/** Return the time that a job still needs, in words, or an empty text. */
export function timeLeft(job) {
  const left = job.state === "running" ? job.progress?.seconds_left : null;
  return left === null || left === undefined ? "" : strings.progress.left(duration(Math.ceil(left)));
}

/** Return how much of a job is done, from 0 to 1. */
export const fraction = (job) => (job.state === "done" ? 1 : job.progress?.fraction ?? 0);

/** Return the seconds that a finished job ran. */
export function seconds(job) {
  return job.started_at && job.finished_at ? (Date.parse(job.finished_at) - Date.parse(job.started_at)) / 1000 : null;
}

/** Return the words or the ingredients of a job. */
export function jobTitle(job) {
  const { prompt, parts } = job.request;
  if (prompt) return prompt;
  if (parts) return parts.map((part) => part.text ?? strings.mix.pictureCard).join(" + ");
  return strings.gallery.modes[job.mode] ?? job.mode;
}

/** Return a request without empty fields. */
export function compact(request) {
  return Object.fromEntries(Object.entries(request).filter(([, value]) => value !== undefined && value !== null && value !== ""));
}
