// Elements without a framework: a builder, icons, and small helpers that every part of the studio uses.

/**
 * Create an element.
 *
 * Properties: `class`, `dataset`, `style` (set through the CSSOM, which the content security policy allows), `on*`
 * (listeners), attributes with a dash or of SVG, and everything else as a property of the element.
 *
 * @param {string} tag
 * @param {Record<string, any>} [properties]
 * @param {...(Node|string|number|null|false|undefined|Array)} children
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null) continue;
    if (name === "class") element.className = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for" || name === "list") element.setAttribute(name, value);
    else element[name] = value;
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (Array.isArray(child)) append(element, child);
    else if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/** Replace all children of an element. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

/** Make elements the children of another one, in this order. Those that are its children stay in place: the focus remains. */
export function arrange(element, children) {
  for (const child of [...element.children]) if (!children.includes(child)) child.remove();
  children.forEach((child, index) => { if (element.children[index] !== child) element.insertBefore(child, element.children[index] ?? null); });
}

const ICONS = {
  mix: "M9 15a6 6 0 1 0 0-12 6 6 0 0 0 0 12ZM15 21a6 6 0 1 0 0-12 6 6 0 0 0 0 12Z",
  draw: "M4 20l1-4.5L16.5 4a2.1 2.1 0 0 1 3 0l.5.5a2.1 2.1 0 0 1 0 3L8.5 19 4 20ZM14.5 6l3.5 3.5",
  canvas: "M4 8V5a1 1 0 0 1 1-1h3M16 4h3a1 1 0 0 1 1 1v3M20 16v3a1 1 0 0 1-1 1h-3M8 20H5a1 1 0 0 1-1-1v-3M8.5 14.5c2-5 5-2 7-5",
  guide: "M3 19l6-11 4 7 2.5-4L21 19ZM17.5 7.5a1.5 1.5 0 1 0 0-3 1.5 1.5 0 0 0 0 3Z",
  gallery: "M4 4h7v9H4ZM14 4h6v5h-6ZM14 12h6v8h-6ZM4 16h7v4H4Z",
  compare: "M4 5h16M4 12h16M4 19h16M9 5v14M15 5v14",
  queue: "M4 6h16M4 12h16M4 18h10",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8ZM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6 19 19M5 19l1.4-1.4M17.6 6.4 19 5",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5Z",
  auto: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18ZM12 3v18M12 8l4.5-2.5M12 13l7-4M12 18l7.5-4.3",
  help: "M9 9a3 3 0 1 1 4.5 2.6c-1 .6-1.5 1.2-1.5 2.4M12 17.5v.01M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18Z",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6 6 18",
  star: "M12 3.5l2.6 5.4 5.9.8-4.3 4.1 1 5.9-5.2-2.8-5.2 2.8 1-5.9L3.5 9.7l5.9-.8Z",
  download: "M12 4v11M7.5 11l4.5 4.5 4.5-4.5M5 20h14",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l.8 13h8.4L17 7M10.5 11v5M13.5 11v5",
  dice: "M5 4h14a1 1 0 0 1 1 1v14a1 1 0 0 1-1 1H5a1 1 0 0 1-1-1V5a1 1 0 0 1 1-1ZM8.5 8.5v.01M15.5 8.5v.01M12 12v.01M8.5 15.5v.01M15.5 15.5v.01",
  lock: "M6 11h12v9H6ZM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  unlock: "M6 11h12v9H6ZM8.5 11V7.5A3.5 3.5 0 0 1 15.3 6.5",
  undo: "M8 5 4 9l4 4M4 9h10a5.5 5.5 0 0 1 0 11h-3",
  redo: "M16 5l4 4-4 4M20 9H10a5.5 5.5 0 0 0 0 11h3",
  brush: "M14 4l6 6-7.5 7.5-6-6ZM6.5 11.5C4 13 5.5 17 3 20c4 .5 7.5-.5 9.5-2.5",
  eraser: "M9 20h11M5.6 16.4a1.5 1.5 0 0 1 0-2.1L14.3 5.6a1.5 1.5 0 0 1 2.1 0l3 3a1.5 1.5 0 0 1 0 2.1L10.5 19.5H8.7ZM9.5 10.5l5 5",
  hand: "M7.5 13V6.5a1.5 1.5 0 0 1 3 0V11 4.5a1.5 1.5 0 0 1 3 0V11 6a1.5 1.5 0 0 1 3 0v6-3a1.5 1.5 0 0 1 3 0v5a7 7 0 0 1-7 7c-3 0-4.5-1.5-6-4l-2.3-3.7a1.5 1.5 0 0 1 2.5-1.5Z",
  zoomin: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13ZM15.5 15.5 20 20M10.5 7.5v6M7.5 10.5h6",
  zoomout: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13ZM15.5 15.5 20 20M7.5 10.5h6",
  fit: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
  invert: "M12 3a9 9 0 1 0 0 18ZM12 3a9 9 0 0 1 0 18",
  upload: "M12 16V5M7.5 9 12 4.5 16.5 9M5 20h14",
  image: "M4 5h16v14H4ZM4 16l5-5 4 4 3-3 4 4M15.5 9.5v.01",
  text: "M5 7V5h14v2M12 5v14M9 19h6",
  more: "M6 12v.01M12 12v.01M18 12v.01",
  check: "M5 12.5l4.5 4.5L19 7.5",
  retry: "M19 12a7 7 0 1 1-2-5M19 3.5V8h-4.5",
  left: "M14.5 5l-7 7 7 7",
  right: "M9.5 5l7 7-7 7",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 10a2 2 0 1 0 0-4 2 2 0 0 0 0 4ZM9 18a2 2 0 1 0 0-4 2 2 0 0 0 0 4Z",
  send: "M5 12h14M13 6l6 6-6 6",
  strip: "M3 8h5v8H3ZM9.5 8h5v8h-5ZM16 8h5v8h-5Z",
  grid: "M4 4h6.5v6.5H4ZM13.5 4H20v6.5h-6.5ZM4 13.5h6.5V20H4ZM13.5 13.5H20V20h-6.5Z",
  search: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13ZM15.5 15.5 20 20",
  split: "M12 3v18M4 6h5v12H4M20 6h-5v12h5",
  grip: "M9 6v.01M15 6v.01M9 12v.01M15 12v.01M9 18v.01M15 18v.01",
  restore: "M4 7v5h5M4.5 12a8 8 0 1 1 2 5.5",
  key: "M14.5 13.5a5 5 0 1 0-4-4L4 16v4h4v-2.5h2.5V15l1-1.5Z",
  alike: "M12 8.5l1.2 2.3 2.3 1.2-2.3 1.2L12 15.5l-1.2-2.3L8.5 12l2.3-1.2ZM5 5h4M5 5v4M19 19h-4M19 19v-4M19 5h-4M19 5v4M5 19h4M5 19v-4",
};

/** Return an icon: decoration, hidden from screen readers. */
export function icon(name, properties = {}) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const attributes = { viewBox: "0 0 24 24", "aria-hidden": "true", focusable: "false", class: "icon", ...properties };
  for (const [key, value] of Object.entries(attributes)) svg.setAttribute(key, value);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name] ?? ICONS.more);
  svg.append(path);
  return svg;
}

/** Return a button with an icon and a name for screen readers, which is also its tooltip. */
export function iconButton(name, label, onclick, properties = {}) {
  const { class: extra = "", ...others } = properties;
  return h("button", { type: "button", class: `icon-button ${extra}`, title: label, "aria-label": label, onclick, ...others }, icon(name));
}

let counter = 0;

/** Return an id that no other element of the page has. */
export function uid(prefix = "k") {
  counter += 1;
  return `${prefix}-${counter}`;
}

/** Return a function that runs after a pause of this many milliseconds without further calls. */
export function debounce(action, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

export const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Return whether a key press belongs to a field in which the user writes. */
export function isTyping(event) {
  const target = event.composedPath()[0];
  return target instanceof HTMLElement && (target.isContentEditable || /^(TEXTAREA|SELECT)$/.test(target.tagName)
    || (target.tagName === "INPUT" && !/^(checkbox|radio|range|button)$/.test(target.type)));
}

/** Return the picture files of a drop or a paste. */
export function pictureFiles(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

/** Load a picture that the server has, for drawing it on a canvas. */
export function loadPicture(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error(url));
    image.src = url;
  });
}

/** Return the PNG of a canvas. */
export function canvasBlob(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** Make an element accept dropped pictures: files, and pictures of the studio itself. */
export function acceptDrops(element, onfiles, onpicture) {
  let depth = 0;
  const accepts = (event) => event.dataTransfer.types.includes("Files") || event.dataTransfer.types.includes(PICTURE_TYPE);
  element.addEventListener("dragenter", (event) => {
    if (!accepts(event)) return;
    event.preventDefault();
    depth += 1;
    element.classList.add("drop-target");
  });
  element.addEventListener("dragover", (event) => {
    if (!accepts(event)) return;
    event.preventDefault();
    event.stopPropagation();
  });
  element.addEventListener("dragleave", () => {
    depth = Math.max(depth - 1, 0);
    if (depth === 0) element.classList.remove("drop-target");
  });
  element.addEventListener("drop", (event) => {
    depth = 0;
    element.classList.remove("drop-target");
    if (!accepts(event)) return;
    event.preventDefault();
    event.stopPropagation();
    const picture = event.dataTransfer.getData(PICTURE_TYPE);
    if (picture) onpicture(JSON.parse(picture));
    else onfiles(pictureFiles(event.dataTransfer));
  });
}

/** Type of a dragged picture of the studio. */
export const PICTURE_TYPE = "application/x-kandinsky22-picture";
