// Style sheets of screens other than the first one, which are loaded with their screens.

/** Load a style sheet; resolves when it applies. */
export function loadStyle(name) {
  const href = `/studio/css/${name}.css`;
  if (document.querySelector(`link[href="${href}"]`)) return Promise.resolve();
  return new Promise((resolve) => {
    const link = document.createElement("link");
    Object.assign(link, { rel: "stylesheet", href, onload: resolve, onerror: resolve });
    document.head.append(link);
  });
}
