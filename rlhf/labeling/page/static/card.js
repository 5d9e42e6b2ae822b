// The card of an output.

import { element } from "./board.js";
import { letter } from "./order.js";

// A row of radio buttons that looks like one control.
function choices(legend, name, values, describe, chosen) {
  const inputs = values.map((value) => {
    const input = element("input", { type: "radio", name, value: String(value), "aria-label": describe(value) });
    input.addEventListener("change", () => chosen(value));
    return input;
  });
  const marks = inputs.map((input, v) =>
    element("label", { class: "mark" }, input, element("span", { "aria-hidden": "true" }, String(values[v]))),
  );
  const root = element("fieldset", { class: "choices" }, element("legend", {}, legend), ...marks);
  return { root, show: (value) => inputs.forEach((input, v) => (input.checked = values[v] === value)) };
}

// One output of k: its text, rank, quality and flags. `set` has a function for each of the three that the person may
// change, and `show(answer)` shows the present answer.
export function makeCard(output, i, k, form, board, set) {
  const name = letter(i);
  const rows = Array.from({ length: k }, (_, r) => r + 1);
  const grip = element("span", { class: "grip", "aria-hidden": "true", title: "Drag it onto the board" }, name);
  board.drag(grip, i);
  const cut = output.finished ? "" : element("span", { class: "hint" }, "cut off at the length limit");
  const rank = choices("Rank", `rank-${i}`, rows, (r) => `Rank ${r}`, (r) => set.rank(i, r));
  const head = element("div", { class: "head" }, grip, element("h3", {}, `Output ${name}`), cut);
  const text = element("p", { class: "text", dir: "auto" }, output.text);
  const root = element("article", { class: "card", tabindex: "0", "aria-label": `Output ${name}` }, head, text, rank.root);
  const parts = [(value) => rank.show(value.place[i])];
  if (form.quality !== "off") {
    const scale = Array.from({ length: form.highest }, (_, q) => q + 1);
    const legend = `Quality, 1 bad to ${form.highest} excellent${form.quality === "required" ? "" : " (optional)"}`;
    const words = (q) => `Quality ${q} of ${form.highest}`;
    const quality = choices(legend, `quality-${i}`, scale, words, (q) => set.quality(i, q));
    root.append(quality.root);
    parts.push((value) => quality.show(value.quality[i]));
  }
  const flags = Object.entries(form.flags);
  if (flags.length) {
    const summary = element("summary");
    const boxes = flags.map(([flag, label]) => {
      const box = element("input", { type: "checkbox", value: flag });
      box.addEventListener("change", () => set.flag(i, flag, box.checked));
      return { flag, box, line: element("label", {}, box, element("span", {}, label)) };
    });
    const group = element("div", { class: "flags", role: "group", "aria-label": `Flags of output ${name}` });
    group.append(...boxes.map(({ line }) => line));
    root.append(element("details", {}, summary, group));
    parts.push((value) => {
      for (const { flag, box } of boxes) box.checked = value.flags[i].includes(flag);
      summary.textContent = value.flags[i].length ? `Flags: ${value.flags[i].length} set` : "Flags";
    });
  }
  return { root, show: (value) => parts.forEach((part) => part(value)) };
}
