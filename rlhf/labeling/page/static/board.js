// The board: K rows and a tray, with a chip for each output that is moved by dragging, by touch or by keys.

import { insert, letter, put, spoken, step } from "./order.js";

const DRAG = 6; // pixels that the pointer moves before a press becomes a drag
const EDGE = 70; // pixels from the edge of the window within which a drag scrolls it
const BORDER = 0.28; // share of a row, at its top and bottom, that means "between two rows"

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children); // strings become text nodes, never markup
  return made;
}

// Board for `texts` in `rows` (a list) and `tray`. `change(place, i)` is called when the person moves output i.
export function makeBoard(rows, tray, texts, change) {
  let place = texts.map(() => null);
  const slots = texts.map((_, r) => {
    const name = r === 0 ? "best" : r === texts.length - 1 ? "worst" : "";
    const chips = element("div", { class: "chips" });
    const number = element("span", { class: "number" }, element("b", {}, String(r + 1)), element("small", {}, name));
    return { row: element("li", { class: "row", "data-row": String(r + 1) }, number, chips), chips };
  });
  rows.replaceChildren(...slots.map((slot) => slot.row));
  const chips = texts.map((text, i) => {
    const grip = element("span", { class: "grip", "aria-hidden": "true" }, letter(i));
    const snippet = element("span", { class: "snippet", dir: "auto" }, text.trim().slice(0, 120));
    const chip = element("button", { type: "button", class: "chip", "data-output": String(i) }, grip, snippet);
    chip.setAttribute("aria-describedby", "board-help");
    chip.addEventListener("keydown", (event) => key(event, i));
    drag(chip, i);
    return chip;
  });

  function show(next) {
    place = next;
    const focused = document.activeElement;
    chips.forEach((chip, i) => {
      const home = place[i] === null ? tray : slots[place[i] - 1].chips;
      if (chip.parentElement !== home) home.append(chip);
      chip.setAttribute("aria-label", spoken(place, i));
    });
    slots.forEach((slot, r) => slot.row.classList.toggle("empty", !place.includes(r + 1)));
    tray.parentElement.classList.toggle("empty", !place.includes(null));
    if (chips.includes(focused)) focused.focus(); // an element that moves in the document loses the focus
  }

  function move(next, i) {
    if (next.some((row, j) => row !== place[j])) change(next, i);
  }

  function key(event, i) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const digit = Number(event.key);
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      move(step(place, i, event.key === "ArrowUp" ? -1 : 1), i);
    } else if (event.key !== " " && digit >= 1 && digit <= texts.length) move(put(place, i, digit), i);
    else if (event.key === "Backspace" || event.key === "Delete") move(put(place, i, null), i);
    else return;
    event.preventDefault();
  }

  // Return where a drop at this point of the window puts output i: {next, mark, how}, or null for nowhere.
  function target(x, y, i) {
    const under = document.elementFromPoint(x, y);
    const row = under?.closest(".row");
    if (row) {
      const r = Number(row.dataset.row);
      const box = row.getBoundingClientRect();
      const height = (y - box.top) / box.height;
      if (place.some((other, j) => other === r && j !== i)) {
        if (height < BORDER) return { next: insert(place, i, r - 1), mark: row, how: "before" };
        if (height > 1 - BORDER) return { next: insert(place, i, r), mark: row, how: "after" };
      }
      return { next: put(place, i, r), mark: row, how: "onto" };
    }
    if (under?.closest("#tray-box")) return { next: put(place, i, null), mark: tray.parentElement, how: "onto" };
    return null;
  }

  // Let a pointer drag output i by this element. A touch drags by the grip (touch-action: none there), and scrolls
  // elsewhere: the browser then takes the pointer away, which ends the drag.
  function drag(handle, i) {
    handle.addEventListener("pointerdown", (down) => {
      if (down.button !== 0 || !down.isPrimary) return;
      let ghost = null;
      let found = null;
      let frame = 0;
      let at = down;
      const unmark = () => found?.mark.classList.remove("before", "after", "onto");
      const look = () => {
        unmark();
        found = target(at.clientX, at.clientY, i);
        found?.mark.classList.add(found.how);
      };
      const scroll = () => {
        const below = at.clientY - (window.innerHeight - EDGE);
        const speed = at.clientY < EDGE ? at.clientY - EDGE : Math.max(0, below);
        if (speed) {
          window.scrollBy(0, speed / 5);
          look();
        }
        frame = requestAnimationFrame(scroll);
      };
      const moved = (event) => {
        at = event;
        if (!ghost) {
          if (Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) < DRAG) return;
          handle.setPointerCapture(down.pointerId);
          ghost = element("div", { class: "ghost", "aria-hidden": "true" }, letter(i));
          document.body.append(ghost);
          document.body.classList.add("dragging");
          chips[i].classList.add("lifted");
          frame = requestAnimationFrame(scroll);
        }
        ghost.style.transform = `translate(${event.clientX}px, ${event.clientY}px)`;
        look();
      };
      const end = (event) => {
        for (const [name, listener] of listeners) window.removeEventListener(name, listener, true);
        cancelAnimationFrame(frame);
        unmark();
        ghost?.remove();
        document.body.classList.remove("dragging");
        chips[i].classList.remove("lifted");
        if (ghost && found && event.type === "pointerup") move(found.next, i);
      };
      const escape = (event) => {
        if (event.key === "Escape") end(event);
      };
      const listeners = [["pointermove", moved], ["pointerup", end], ["pointercancel", end], ["keydown", escape]];
      for (const [name, listener] of listeners) window.addEventListener(name, listener, true);
    });
    handle.addEventListener("dragstart", (event) => event.preventDefault());
  }

  show(place);
  return { show, drag };
}
