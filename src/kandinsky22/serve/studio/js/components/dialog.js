// Modal windows. The viewer is loaded when it is first needed.

/** Show a modal window; it is removed when it closes. */
export function openDialog(dialog) {
  document.body.append(dialog);
  dialog.addEventListener("close", () => {
    // Messages in the window, with what they offer, outlive it.
    const list = document.querySelector(".toasts");
    for (const message of dialog.querySelectorAll(".toast")) {
      message.classList.remove("in-dialog");
      list.append(message);
    }
    dialog.remove();
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.showModal();
  return dialog;
}

let isLoading = false;

/** Call a function of `viewer.js`, unless a call before is waiting for the module: a double click opens one window. */
async function callViewer(name, values) {
  if (isLoading) return;
  isLoading = true;
  try {
    (await import("./viewer.js"))[name](...values);
  } finally {
    isLoading = false;
  }
}

/** Show a picture large; see `viewer.js`. */
export const openViewer = (...values) => callViewer("openViewer", values);

/** Show two pictures under a divider; see `viewer.js`. */
export const openComparison = (...values) => callViewer("openComparison", values);

/** Show the recipe of a dropped picture; see `viewer.js`. */
export const openRecipe = (...values) => callViewer("openRecipe", values);
