// The frame around the screens: navigation, theme, queue, shortcuts, dropped recipes, the token.

import { api } from "./api.js";
import { recallRequest } from "./actions.js";
import { complain, toast } from "./components/feedback.js";
import { openDialog, openRecipe } from "./components/dialog.js";
import "./components/stage.js";
import { acceptDrops, fill, h, icon, iconButton, isTyping } from "./dom.js";
import { fraction } from "./jobs.js";
import { go, SCREENS } from "./router.js";
import { store } from "./store.js";
import { strings } from "./strings.js";

const texts = strings.app;
const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = { auto: "auto", light: "sun", dark: "moon" };

class App extends HTMLElement {
  #screens = new Map();
  #current = null;

  connectedCallback() {
    this.main = h("main", { id: "content", tabIndex: -1 });
    this.links = SCREENS.map((name) => h("a", { href: `#${name}`, class: "nav-link", dataset: { screen: name } }, icon(name), h("span", {}, texts[name])));
    this.queueButton = h("button", { type: "button", class: "queue-button", "aria-expanded": "false", onclick: () => this.#toggleQueue() }, icon("queue"), h("span", { class: "queue-count" }));
    this.themeButton = h("button", { type: "button", class: "icon-button", onclick: () => this.#nextTheme() });
    this.queue = h("k-queue", { hidden: true });
    this.queue.addEventListener("toggled", (event) => {
      this.queueButton.setAttribute("aria-expanded", String(event.detail));
      const { activeElement } = document;
      if (!event.detail && (activeElement === document.body || this.queue.contains(activeElement))) this.queueButton.focus({ preventScroll: true });
    });
    this.overall = h("div", { class: "overall", "aria-hidden": "true" }, h("span"));
    this.notice = h("div", { class: "notice", role: "status", hidden: true });
    this.append(
      h("a", { class: "skip", href: "#content", onclick: (event) => { event.preventDefault(); this.main.focus(); } }, texts.skip),
      this.overall,
      h("header", { class: "top" },
        h("a", { class: "logo", href: "#mix" }, h("img", { src: "/studio/icon.svg", alt: "", width: 30, height: 30 }), h("span", {}, texts.name)),
        h("nav", { class: "nav", "aria-label": texts.screens }, this.links),
        h("div", { class: "top-tools" }, this.queueButton, this.themeButton, iconButton("help", texts.help, () => showHelp(), { class: "help-button" }))),
      this.notice, this.main, this.queue,
      h("div", { class: "toasts" }),
      h("div", { id: "announcements", class: "visually-hidden", "aria-live": "polite" }));
    this.#paintTheme();
    addEventListener("hashchange", () => this.#show(location.hash.slice(1)));
    addEventListener("studio:go", ({ detail }) => { detail.received = this.#go(detail); });
    document.addEventListener("keydown", (event) => this.#key(event));
    acceptDrops(document.body, (files) => this.#readRecipe(files[0]), () => {});
    store.on("jobs", () => this.#progress());
    store.on("worker", () => this.#notice());
    store.on("connection", (connected) => this.#connection(connected));
    store.on("locked", () => showLogin());
    store.start();
    this.#show(location.hash.slice(1));
  }

  async #show(name) {
    const wanted = SCREENS.includes(name) ? name : "mix";
    if (wanted === this.#current) return this.#screens.get(wanted);
    this.#current = wanted;
    for (const link of this.links) {
      if (link.dataset.screen === wanted) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    document.title = `${texts.titles[wanted]} · ${texts.name}`;
    if (!this.#screens.has(wanted)) {
      this.#screens.set(wanted, import(`./screens/${wanted}.js`).then(() => {
        const screen = h(`k-${wanted}`, { class: `screen ${wanted}-screen`, hidden: true });
        this.main.append(screen);
        return screen;
      }));
    }
    const screen = await this.#screens.get(wanted);
    if (this.#current !== wanted) return screen;
    for (const other of this.main.children) {
      if (other !== screen && !other.hidden) {
        other.hidden = true;
        other.hide?.();
      }
    }
    screen.hidden = false;
    screen.show?.();
    scrollTo({ top: 0 });
    return screen;
  }

  async #go({ screen: name, payload }) {
    const shown = this.#show(name);
    if (location.hash !== `#${name}`) history.pushState(null, "", `#${name}`);
    const screen = await shown;
    return payload && screen.receive?.(payload);
  }

  async #toggleQueue() {
    await import("./components/queue.js"); // defines k-queue, which the first page does not need
    this.queue.toggle();
  }

  #progress() {
    const active = store.active();
    const running = active.find((job) => job.state === "running");
    this.queueButton.setAttribute("aria-label", strings.queue.open(active.length));
    this.queueButton.title = strings.queue.open(active.length);
    this.queueButton.classList.toggle("working", active.length > 0);
    this.queueButton.lastElementChild.textContent = active.length || "";
    this.overall.classList.toggle("on", Boolean(running));
    this.overall.firstElementChild.style.setProperty("width", `${running ? fraction(running) * 100 : 0}%`);
  }

  #connection(connected) {
    if (connected && this.notice.dataset.kind === "offline") toast(texts.back);
    if (connected) document.querySelector("dialog.login")?.close(); // another page may have opened the studio
    this.#notice();
  }

  #notice() {
    const kind = store.connected === false ? "offline" : store.info?.worker?.state === "restarting" ? "restarting" : "";
    this.notice.dataset.kind = kind;
    this.notice.hidden = !kind;
    this.notice.textContent = kind ? texts[kind] : "";
  }

  #nextTheme() {
    const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % THEMES.length];
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem("k22.theme", theme);
    } catch {
      // The theme then lasts until the page is closed.
    }
    this.#paintTheme();
  }

  #paintTheme() {
    const theme = document.documentElement.dataset.theme ?? "auto";
    fill(this.themeButton, icon(THEME_ICONS[theme]));
    this.themeButton.title = texts.theme[theme];
    this.themeButton.setAttribute("aria-label", texts.theme[theme]);
  }

  async #key(event) {
    // What is innermost has the key: a word that an input method composes, a window, a menu, a search. They close after this event.
    if (event.defaultPrevented || event.isComposing || event.keyCode === 229 || document.querySelector("dialog[open], :popover-open")) return;
    const isEscape = event.key === "Escape";
    if (isEscape && event.target.type === "search" && event.target.value) return;
    if (isEscape && !this.queue.hidden) return this.queue.toggle(false);
    const screen = await this.#screens.get(this.#current);
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
      event.preventDefault();
      screen?.run?.();
      return;
    }
    if (isEscape) return screen?.cancel?.();
    if (isTyping(event)) return;
    if (screen?.key?.(event)) return event.preventDefault();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const number = Number(event.key);
    if (number >= 1 && number <= SCREENS.length) return go(SCREENS[number - 1]);
    const action = { q: () => this.#toggleQueue(), t: () => this.#nextTheme(), "?": showHelp }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  }

  async #readRecipe(file) {
    if (!file) return complain(new Error(strings.errors.notPicture));
    try {
      const answer = await api.recipe(file);
      openRecipe(answer, file, () => recallRequest(answer));
    } catch (error) {
      complain(error);
    }
  }
}

function showHelp() {
  const dialog = h("dialog", { class: "sheet help", "aria-label": strings.shortcuts.title },
    h("h2", {}, strings.shortcuts.title),
    h("div", { class: "help-groups" }, strings.shortcuts.groups.map(([title, keys]) => h("section", {}, h("h3", {}, title),
      h("dl", {}, keys.map(([key, meaning]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, meaning))))))),
    iconButton("close", texts.close, () => dialog.close(), { class: "viewer-close" }));
  openDialog(dialog);
}

function showLogin() {
  if (document.querySelector("dialog.login")) return;
  const input = h("input", { type: "password", name: "token", autocomplete: "current-password", required: true, id: "token" });
  const error = h("p", { class: "warning", role: "alert" });
  const form = h("form", { onsubmit: async (event) => {
    event.preventDefault();
    try {
      await api.login(input.value.trim());
      dialog.close();
      store.start();
    } catch (failure) {
      error.textContent = failure.status === 401 || failure.status === 403 ? strings.login.wrong : failure.message;
    }
  } }, h("h2", {}, strings.login.title), h("p", { class: "muted" }, strings.login.text), h("label", { for: "token" }, strings.login.token), input, error, h("button", { class: "button" }, icon("key"), strings.login.open));
  const dialog = h("dialog", { class: "sheet login", "aria-label": strings.login.title, oncancel: (event) => event.preventDefault() }, form);
  document.body.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.showModal();
}

customElements.define("k-app", App);
