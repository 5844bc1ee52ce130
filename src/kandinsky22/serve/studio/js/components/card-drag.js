// Dragging of cards with mouse, pen or finger: between others to order them, onto another one to join them.

const THRESHOLD = 6; // pixels before a press becomes a drag

/**
 * Make the cards of a table draggable.
 *
 * @param {HTMLElement} table Contains elements with `data-card`.
 * @param {{onorder: (from: number, to: number) => void, onstack: (dragged: number, target: number) => void}} listeners
 */
export function dragCards(table, { onorder, onstack }) {
  let drag = null;

  const cards = () => [...table.querySelectorAll("[data-card]")];

  table.addEventListener("pointerdown", (event) => {
    const card = event.target.closest("[data-card]");
    // Fingers scroll the page over a picture; they drag by the grip.
    const handle = event.target.closest(event.pointerType === "mouse" ? ".grip, .card-picture" : ".grip");
    if (!card || !handle || event.button !== 0) return;
    drag = { card, x: event.clientX, y: event.clientY, id: event.pointerId, active: false, target: null, to: null };
  });

  addEventListener("pointermove", (event) => {
    if (!drag || event.pointerId !== drag.id) return;
    const dx = event.clientX - drag.x;
    const dy = event.clientY - drag.y;
    if (!drag.active && Math.hypot(dx, dy) < THRESHOLD) return;
    if (!drag.active) {
      drag.active = true;
      table.classList.add("dragging");
      drag.card.classList.add("dragged");
    }
    event.preventDefault();
    drag.card.style.setProperty("transform", `translate(${dx}px, ${dy}px) rotate(2deg)`);
    aim(event.clientX, event.clientY);
  }, { passive: false });

  function aim(x, y) {
    const list = cards();
    drag.target?.classList.remove("stack-target", "before-target", "after-target");
    Object.assign(drag, { target: null, to: null, stack: false });
    for (const [index, card] of list.entries()) {
      if (card === drag.card) continue;
      const box = card.getBoundingClientRect();
      if (x < box.left - 12 || x > box.right + 12 || y < box.top || y > box.bottom) continue;
      const across = (x - box.left) / box.width;
      const from = list.indexOf(drag.card);
      drag.target = card;
      drag.stack = across > 0.28 && across < 0.72;
      drag.to = index + (across >= 0.5 ? 1 : 0) - (from < index + (across >= 0.5 ? 1 : 0) ? 1 : 0);
      drag.other = index;
      card.classList.add(drag.stack ? "stack-target" : across < 0.5 ? "before-target" : "after-target");
    }
  }

  const end = (event, dropped) => {
    if (!drag || event.pointerId !== drag.id) return;
    const { card, target, active, stack, to, other } = drag;
    const from = cards().indexOf(card);
    drag = null;
    card.classList.remove("dragged");
    card.style.removeProperty("transform");
    table.classList.remove("dragging");
    target?.classList.remove("stack-target", "before-target", "after-target");
    if (!active || !dropped || !target) return;
    if (stack) onstack(from, other);
    else onorder(from, to);
  };
  addEventListener("pointerup", (event) => end(event, true));
  addEventListener("pointercancel", (event) => end(event, false));
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !drag) return;
    event.preventDefault(); // the key is used up: it cancels no job
    end({ pointerId: drag.id }, false);
  }, { capture: true });
}
