// Compare: the same picture by several samplers and numbers of steps, as a table that fills while it is drawn.

import { randomGroup } from "../api.js";
import { cancelAll, cell } from "../components/board.js";
import { textField } from "../components/controls.js";
import { complain } from "../components/feedback.js";
import { DEFAULT_SETTINGS, settingsForm, settingsRequest } from "../components/settings.js";
import { openViewer } from "../components/dialog.js";
import { recallRequest } from "../actions.js";
import { arrange, clamp, fill, h, icon, iconButton } from "../dom.js";
import { compact } from "../jobs.js";
import { isEnded, loadDraft, saveDraft, store } from "../store.js";
import { strings } from "../strings.js";
import { loadStyle } from "../styles.js";

await loadStyle("compare");

const texts = strings.compare;

const maxSteps = () => store.info?.limits.max_steps ?? 1000;

class Compare extends HTMLElement {
  #abort = new AbortController();
  #tableAbort = null;

  connectedCallback() {
    if (this.childElementCount) return;
    const { signal } = this.#abort;
    this.draft = loadDraft("compare", { prompt: "", schedulers: ["dpm", "unipc", "euler", "ddim"], steps: [4, 8, 16], settings: { ...DEFAULT_SETTINGS, quality: undefined }, table: null });
    this.prompt = textField({ label: texts.prompt, value: this.draft.prompt, placeholder: strings.draw.placeholder, class: "prompt", rows: 2, oninput: (text) => { this.draft.prompt = text; this.#save(); } });
    this.chips = h("div", { class: "chips", role: "group", "aria-label": texts.samplers });
    this.stepInput = h("input", { type: "number", class: "number", min: 1, "aria-label": texts.addSteps, placeholder: "+", onchange: () => this.#addSteps() });
    this.stepChips = h("div", { class: "chips", role: "group", "aria-label": texts.steps });
    this.runLabel = h("span");
    this.count = h("span", { class: "muted" });
    this.stop = h("button", { type: "button", class: "button quiet", onclick: () => this.cancel() }, strings.stage.cancel);
    this.settings = settingsForm({ value: this.draft.settings, onchange: () => this.#save(), quality: false, count: false, sampler: false, signal });
    this.holder = h("div", { class: "table-holder" });
    this.append(h("h1", { class: "visually-hidden" }, texts.title),
      h("div", { class: "compare-layout" },
        h("div", { class: "composer" }, this.prompt,
          h("div", { class: "run-row" }, h("button", { type: "button", class: "button primary", onclick: () => this.run() }, icon("compare"), texts.run), this.count),
          h("div", { class: "setting" }, h("span", { class: "setting-label" }, texts.samplers), this.chips),
          h("div", { class: "setting" }, h("span", { class: "setting-label" }, texts.steps), this.stepChips),
          this.settings),
        h("div", { class: "compare-result" }, this.stop, this.holder)));
    store.on("info", () => this.#renderChips(), signal);
    store.on("jobs", () => this.#reflect(), signal);
    this.#renderChips();
    this.#renderTable();
  }

  #save() {
    saveDraft("compare", this.draft);
  }

  /** Show the samplers and the numbers of steps. Chips that are there stay: they keep the focus. */
  #renderChips() {
    const { schedulers, steps } = this.draft;
    const reuse = (chips, name, make) => chips.querySelector(`[data-name="${name}"]`) ?? make();
    arrange(this.chips, (store.info?.schedulers ?? []).map((name) => {
      const chip = reuse(this.chips, name, () => h("button", { type: "button", class: "chip", dataset: { name }, onclick: () => this.#flip(name) }, name));
      chip.setAttribute("aria-pressed", String(schedulers.includes(name)));
      return chip;
    }));
    this.stepInput.max = String(maxSteps());
    const stepChips = steps.map((count) => reuse(this.stepChips, count, () => h("button", { type: "button", class: "chip", "aria-pressed": "true", title: texts.remove(count), "aria-label": texts.remove(count), dataset: { name: count }, onclick: () => this.#removeSteps(count) }, String(count), icon("close"))));
    arrange(this.stepChips, [...stepChips, this.stepInput]);
    this.#reflect();
  }

  #flip(name) {
    const { schedulers } = this.draft;
    this.draft.schedulers = schedulers.includes(name) ? schedulers.filter((one) => one !== name) : [...schedulers, name];
    this.#save();
    this.#renderChips();
  }

  #addSteps() {
    const value = clamp(Math.round(this.stepInput.valueAsNumber), 1, maxSteps());
    if (!Number.isFinite(value)) return;
    this.stepInput.value = "";
    this.draft.steps = [...new Set([...this.draft.steps, value])].sort((one, other) => one - other);
    this.#save();
    this.#renderChips();
  }

  #removeSteps(count) {
    this.draft.steps = this.draft.steps.filter((one) => one !== count);
    this.#save();
    this.stepChips.querySelector(`[data-name="${count}"]`).nextElementSibling.focus();
    this.#renderChips();
  }

  #reflect() {
    const { schedulers, steps, table } = this.draft;
    this.count.textContent = texts.cells(schedulers.length * steps.length);
    this.stop.hidden = !table?.jobs.some((id) => store.jobs.has(id) && !isEnded(store.jobs.get(id)));
  }

  async run() {
    const prompt = this.draft.prompt.trim();
    // Rows are in the order of the server's list, whatever the order of choosing was.
    const rows = store.info.schedulers.filter((name) => this.draft.schedulers.includes(name));
    const { steps } = this.draft;
    if (!prompt) {
      this.prompt.area.focus();
      return complain(new Error(texts.needPrompt));
    }
    if (!rows.length || !steps.length) return complain(new Error(texts.need));
    const group = randomGroup("compare");
    const request = (scheduler, count, seed) => compact({ mode: "generate", prompt, ...settingsRequest(this.draft.settings), scheduler, steps: count, seed, group, previews: true });
    try {
      const { seed, locked } = this.draft.settings;
      const first = await store.submit(request(rows[0], steps[0], locked ? seed : undefined));
      const jobs = [first.id];
      for (const [index, [scheduler, count]] of rows.flatMap((row) => steps.map((column) => [row, column])).entries()) {
        if (index > 0) jobs.push((await store.submit(request(scheduler, count, first.request.seed))).id);
      }
      this.draft.table = { rows, columns: steps, jobs };
      this.#save();
      this.#renderTable();
    } catch (error) {
      complain(error);
    }
  }

  #renderTable() {
    this.#tableAbort?.abort();
    this.#tableAbort = new AbortController();
    const { table } = this.draft;
    if (!table) return fill(this.holder, h("div", { class: "compare-empty" }, icon("compare"), h("p", {}, texts.lead)));
    const { rows, columns, jobs } = table;
    const images = () => jobs.map((id) => store.jobs.get(id)?.images[0]).filter(Boolean);
    const cells = jobs.map((id, index) => cell(id, { times: true, label: `${rows[Math.floor(index / columns.length)]}, ${texts.stepsHead(columns[index % columns.length])}`, onopen: (job) => openViewer(images(), images().findIndex((image) => image.id === job.images[0]?.id)) }));
    store.on("job", (job) => { const index = jobs.indexOf(job.id); if (index >= 0) cells[index].render(); }, this.#tableAbort.signal);
    for (const id of jobs) if (!store.jobs.has(id)) store.load(id).catch(() => {});
    fill(this.holder, h("table", {}, h("caption", { class: "visually-hidden" }, texts.table),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, texts.sampler), columns.map((count) => h("th", { scope: "col" }, texts.stepsHead(count))))),
      h("tbody", {}, rows.map((row, y) => h("tr", {}, h("th", { scope: "row" }, row), columns.map((count, x) => {
        const index = y * columns.length + x;
        return h("td", {}, h("div", { class: "cell-holder" }, cells[index], iconButton("draw", `${texts.use}: ${row}, ${texts.stepsHead(count)}`, () => {
          const job = store.jobs.get(jobs[index]);
          if (job) recallRequest({ request: job.request });
        }, { class: "on-picture cell-add" })));
      }))))));
    this.#reflect();
  }

  cancel() {
    cancelAll(this.draft.table?.jobs ?? []);
  }
}

customElements.define("k-compare", Compare);
