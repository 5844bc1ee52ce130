// State of the studio: what the server says about itself and its jobs, and the drafts of inputs in this browser.

import { api, ApiError, parseJson } from "./api.js";

const EVENT_NAMES = ["state", "progress", "preview", "image", "end", "gallery", "worker"];
const ENDED = new Set(["done", "failed", "cancelled"]);

export const isEnded = (job) => ENDED.has(job.state);

/**
 * The server's state. Events: `info` (models, presets, samplers or limits changed), `worker` (its state changed), `jobs` (any
 * job changed), `job` (detail: the job), `gallery` (detail: added, removed, changed; or `all`, `missed`: what changed is
 * unknown), `connection` (detail: whether the server answers), `locked` (a token is needed).
 */
class Store extends EventTarget {
  info = null;
  jobs = new Map();
  previews = new Map();
  connected = null;
  #source = null;
  #retry = 0;
  #sequence = 0; // number of events so far
  #lastEvent = new Map(); // job to the number of its last event
  #loading = new Set();
  #starting = false;
  #retryTimer = 0; // of the next start; 0 if none is planned
  #restTimer = 0;
  #rested = false; // whether the connection was given back

  constructor() {
    super();
    document.addEventListener("visibilitychange", () => this.#rest());
  }

  /** Read the state and listen. A server that does not answer is asked again until it does. */
  async start() {
    if (this.#starting) return;
    this.#starting = true;
    try {
      this.#learn(await api.info());
      await this.refresh();
      this.#listen();
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) {
        this.#emit("locked");
        return;
      }
      this.#setConnected(false);
      this.#later();
    } finally {
      this.#starting = false;
    }
  }

  /** Store what the server says about itself. Forms are built from it: only a change of what they show is an `info`. */
  #learn(info) {
    const facts = ({ worker, device, ...others }) => JSON.stringify(others);
    const isNew = !this.info || facts(this.info) !== facts(info);
    this.info = info;
    if (isNew) this.#emit("info");
    this.#emit("worker");
  }

  /** Read all recent jobs again. Events that were missed while the server was away are in them. */
  async refresh() {
    const start = this.#sequence;
    const { items } = await api.jobs({ limit: 100 });
    const known = new Set(items.map((job) => job.id));
    for (const job of items.reverse()) this.#answered(job, start);
    // Jobs beyond the newest hundred, which this page still believes to be running.
    const missing = [...this.jobs.values()].filter((job) => !known.has(job.id) && !isEnded(job));
    await Promise.all(missing.map((job) => this.load(job.id).catch(() => this.jobs.delete(job.id))));
    this.#emit("jobs");
  }

  /** Return a job from the server. */
  async load(jobId) {
    return this.#ask(() => api.job(jobId));
  }

  /** Store what the server says about a job, and tell everyone. */
  update(job) {
    this.jobs.set(job.id, job);
    if (isEnded(job)) this.previews.delete(job.id);
    this.#emit("job", job);
    this.#emit("jobs");
    return job;
  }

  /** Post a job. */
  async submit(request) {
    return this.#ask(() => api.createJob(request));
  }

  async cancel(jobId) {
    return this.#ask(() => api.cancel(jobId));
  }

  async retry(jobId) {
    return this.#ask(() => api.retry(jobId));
  }

  async #ask(question) {
    const start = this.#sequence;
    return this.#answered(await question(), start);
  }

  /** Store an answer, unless events that came after its question know more. */
  #answered(job, start) {
    return (this.#lastEvent.get(job.id) ?? 0) > start ? this.jobs.get(job.id) ?? this.update(job) : this.update(job);
  }

  /** Return the jobs that wait or run, the running one first. */
  active() {
    const order = (job) => (job.state === "running" ? -1 : job.position ?? 1e9);
    return [...this.jobs.values()].filter((job) => !isEnded(job)).sort((one, other) => order(one) - order(other));
  }

  /** Return the jobs that have ended, the newest first. */
  ended() {
    return [...this.jobs.values()].filter(isEnded).sort((one, other) => (other.finished_at ?? "").localeCompare(one.finished_at ?? ""));
  }

  /** Listen for events of this store until a signal aborts. */
  on(name, listener, signal) {
    this.addEventListener(name, (event) => listener(event.detail), { signal });
  }

  #listen() {
    this.#source?.close();
    const source = new EventSource("/api/events");
    this.#source = source;
    source.addEventListener("open", () => {
      const wasAway = this.connected === false;
      this.#retry = 0;
      this.#setConnected(true);
      // Between the first reading and the stream, and while the server was away, events may have been missed.
      this.refresh().catch(() => {});
      if (this.#rested) this.#emit("gallery", { missed: true });
      this.#rested = false;
      if (wasAway) {
        api.info().then((info) => this.#learn(info)).catch(() => {});
        this.#emit("gallery", { added: [], removed: [], changed: [], all: true });
      }
    });
    source.addEventListener("error", () => {
      this.#setConnected(false);
      // A refused connection closes the source for good in some browsers; start over then.
      if (source.readyState === EventSource.CLOSED) this.#later();
    });
    for (const name of EVENT_NAMES) source.addEventListener(name, (event) => this.#receive(name, parseJson(event.data)));
    this.#rest(); // a page may have gone to the background before the connection began
  }

  #receive(name, data) {
    if (name === "gallery") return this.#emit("gallery", data);
    if (name === "worker") {
      if (this.info) this.info.worker = { ...this.info.worker, ...data };
      return this.#emit("worker");
    }
    if (name === "state" || name === "end") return this.#stored(data);
    const job = this.jobs.get(data.job);
    if (!job) return this.#loadOnce(data.job);
    this.#count(job.id);
    if (name === "preview" && !isEnded(job)) this.previews.set(job.id, data);
    if (name === "progress") {
      job.progress = data;
      if (job.state === "queued") job.state = "running";
    }
    if (name === "image" && !job.images.some((image) => image.id === data.id)) job.images.push(data);
    this.#emit("job", job);
    if (name !== "preview") this.#emit("jobs");
  }

  #stored(data) {
    if (!data.id) return this.#loadOnce(data.job);
    this.#count(data.id);
    const { state } = this.jobs.get(data.id) ?? {};
    this.update(data);
    // The positions of all that wait change when one starts or ends.
    if (state !== data.state) for (const job of this.jobs.values()) if (job.state === "queued" && job.position > 0 && data.state === "running") job.position -= 1;
  }

  #count(jobId) {
    this.#sequence += 1;
    this.#lastEvent.set(jobId, this.#sequence);
  }

  async #loadOnce(jobId) {
    if (this.#loading.has(jobId)) return;
    this.#loading.add(jobId);
    await this.load(jobId).catch(() => {});
    this.#loading.delete(jobId);
  }

  /** Give the connection back while the page is in the background: browsers allow six for each server. */
  #rest() {
    clearTimeout(this.#restTimer);
    if (document.hidden) this.#restTimer = setTimeout(() => { this.#source?.close(); this.#rested = true; }, 60_000);
    else if (this.#source?.readyState === EventSource.CLOSED && !this.#retryTimer) this.start();
  }

  #later() {
    this.#source?.close();
    this.#retry = Math.min(this.#retry + 1, 5);
    clearTimeout(this.#retryTimer);
    this.#retryTimer = setTimeout(() => { this.#retryTimer = 0; this.start(); }, 400 * this.#retry);
  }

  #setConnected(connected) {
    if (this.connected === connected) return;
    this.connected = connected;
    this.#emit("connection", connected);
  }

  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

export const store = new Store();

/**
 * Return a stored draft: the inputs of a screen, which survive a reload.
 *
 * @param {string} name
 * @param {Record<string, any>} defaults Values of fields that are not stored.
 */
export function loadDraft(name, defaults) {
  try {
    return { ...structuredClone(defaults), ...JSON.parse(localStorage.getItem(`k22.${name}`) ?? "{}") };
  } catch {
    return structuredClone(defaults);
  }
}

/** Store a draft. Storage that is full or switched off loses the draft, never the work. */
export function saveDraft(name, draft) {
  try {
    localStorage.setItem(`k22.${name}`, JSON.stringify(draft));
  } catch {
    // Nothing depends on it.
  }
}
