// What this browser keeps for a labeler: drafts of prompts, and submissions until the server has stored them.
//
// They are in this browser's storage and not on the server, so that they also survive while the server is down. Another
// run may have had this address before, or its labels may have been made again, with the same prompts in another order.
// So the names hold the id under which a prompt was given to this person, which no other file of labels has.

import { element } from "./board.js";
import { insist, keep, kept, Refusal, say, stored } from "./link.js";

let labeler = "";

export const draftName = (id) => `draft ${labeler} ${id}`;
const outbox = (id = "") => `outbox ${labeler} ${id}`;

export function openOutbox(name) {
  labeler = name;
}

// Keep {run, about, said, submission} until it is released or forgotten.
export function hold(entry) {
  keep(outbox(entry.submission.id), entry);
}

export function release(submission) {
  keep(outbox(submission.id), null);
}

function forget(submission) {
  release(submission);
  keep(draftName(submission.task), null);
}

// The entries that wait; earlier pages kept the submission alone.
function waiting() {
  const names = stored().filter((name) => name.startsWith(outbox()));
  return names.map(kept).filter(Boolean).map((entry) => (entry.submission ? entry : { submission: entry }));
}

// Send a submission until there is an answer: the progress once it is stored, or the server's refusal.
export async function offer(submission) {
  try {
    const progress = await insist("submit", submission);
    forget(submission);
    return { progress };
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 409) release(submission); // another ranking of the prompt counts
    return { refused: error };
  }
}

// Send the submissions of pages that were closed before the server had answered; return a message about one, or "".
export async function catchUp() {
  let wrong = "";
  for (const { submission } of waiting()) {
    const { refused } = await offer(submission);
    if (refused?.status === 401) throw refused; // the link is invalid, so the others would be refused too
    if (refused?.status === 409) wrong = `Not stored: ${refused.message}.`;
  }
  return wrong;
}

// List the submissions that the server does not take; each stays until the person discards it.
export function showKept() {
  const lines = waiting().map(({ run = "", about = "", said = "", submission }) => {
    const discard = element("button", { type: "button" }, "Discard");
    discard.addEventListener("click", () => {
      forget(submission);
      showKept();
      say("Discarded.");
    });
    const text = [run && `Run ${run}`, about, said || submission.ranks?.join(", ") || submission.kind].filter(Boolean);
    return element("li", {}, element("span", { dir: "auto" }, text.join(" · ")), discard);
  });
  document.getElementById("kept-list").replaceChildren(...lines);
  document.getElementById("kept").hidden = lines.length === 0;
}
