// The page: asks the server for a prompt, keeps the draft, and sends the submission until it is acknowledged.
// Prompt and outputs are set as text nodes.

import { element, makeBoard } from "./board.js";
import { makeCard } from "./card.js";
import { LONG, alert, ask, insist, keep, kept, newId, Refusal, say, silence, token } from "./link.js";
import { letter, put, ranks, spoken, words } from "./order.js";
import { catchUp, draftName, hold, offer, openOutbox, release, showKept } from "./outbox.js";

const $ = (id) => document.getElementById(id);
const POLL = 15000; // milliseconds between looks at how far the others are
const NEARLY_OVER = "All rankings that the run wanted are in, and it goes on in a few seconds. Submit what you have begun"
  + " now if it is to count; it stays in this browser otherwise.";
const SPEAKERS = { system: "System", user: "Person", assistant: "Assistant" };

let form; // questions of the server: flags, quality, reasons to skip
let task = null;
let answer = null; // {place, quality, flags, seconds} of the task
let history = []; // answers before the last changes
let board = null;
let cards = [];
let last = null; // id of the submission that may be taken back
let complete = false; // whether the end screen says that all rankings are in
let sending = false;
let worry = ""; // last alert of `look`
let silent = null; // time of the first look since when the server has not answered
let since = performance.now(); // time up to which the seconds on this task have been counted

// --- messages --------------------------------------------------------------------------------------------------------

function minutes(seconds) {
  if (seconds < 90) return "about a minute";
  return seconds < 5400 ? `about ${Math.round(seconds / 60)} min` : `about ${(seconds / 3600).toFixed(1)} h`;
}

function showProgress(progress) {
  last = progress.last;
  $("progress").max = Math.max(1, progress.wanted);
  $("progress").value = progress.rankings;
  const parts = [`${progress.mine} by you`, `${progress.rankings} of ${progress.wanted} in all`];
  if (progress.seconds_each > 0) {
    const rate = 60 / progress.seconds_each;
    parts.push(rate >= 1 ? `${rate.toFixed(1)} a minute` : `${(60 * rate).toFixed(0)} an hour`);
    if (!progress.complete) parts.push(`${minutes(progress.seconds_left)} left`);
  }
  $("pace").textContent = parts.join(" · ");
  for (const id of ["back", "end-back"]) $(id).hidden = last === null;
}

// --- one prompt ------------------------------------------------------------------------------------------------------

function showTask(next) {
  task = next;
  history = [];
  const k = task.outputs.length;
  const before = task.answer;
  answer = kept(draftName(task.id)) ?? {
    place: before?.ranks ?? Array(k).fill(null), // the ranks are the first rows
    quality: before?.quality ?? Array(k).fill(null),
    flags: before?.flags ?? Array.from({ length: k }, () => []),
    seconds: 0,
  };
  since = performance.now();
  $("messages").replaceChildren(
    ...task.messages.map((message) => {
      const words = element("p", { class: "text", dir: "auto" }, message.content);
      if (task.messages.length === 1 && message.role === "user") return words;
      return element("div", { class: `turn ${message.role}` }, element("p", { class: "label" }, SPEAKERS[message.role]), words);
    }),
  );
  board = makeBoard($("rows"), $("tray"), task.outputs.map((output) => output.text), (place, i) => {
    change({ place });
    say(spoken(place, i));
  });
  const set = { rank: setRank, quality: setQuality, flag: setFlag };
  cards = task.outputs.map((output, i) => {
    const card = makeCard(output, i, k, form, board, set);
    card.root.addEventListener("keydown", (event) => cardKey(event, i));
    return card;
  });
  $("outputs").replaceChildren(...cards.map((card) => card.root));
  $("end").hidden = true;
  $("work").hidden = false;
  render();
  $("prompt").focus();
  window.scrollTo(0, 0);
}

function render() {
  board.show(answer.place);
  cards.forEach((card, i) => {
    card.show(answer);
    card.root.classList.toggle("ranked", answer.place[i] !== null);
  });
  const missing = answer.place.filter((row) => row === null).length;
  const rest = missing === 0 ? "" : missing === answer.place.length ? "Nothing ranked yet" : `${missing} to rank`;
  $("summary").replaceChildren(words(answer.place), element("span", { class: "hint" }, rest));
  $("undo").disabled = history.length === 0;
}

// --- changes ---------------------------------------------------------------------------------------------------------

function change(parts) {
  history.push({ ...answer });
  answer = { ...answer, ...parts };
  saveDraft();
  render();
}

function setRank(i, row) {
  if (answer.place[i] === row) return;
  change({ place: put(answer.place, i, row) });
  say(spoken(answer.place, i));
}

function setQuality(i, value) {
  if (answer.quality[i] !== value) change({ quality: answer.quality.map((old, j) => (j === i ? value : old)) });
}

function setFlag(i, flag, on) {
  const set = answer.flags[i].filter((other) => other !== flag);
  change({ flags: answer.flags.map((old, j) => (j === i ? (on ? [...set, flag] : set) : old)) });
}

function undo() {
  if (!history.length) return;
  answer = { ...history.pop(), seconds: answer.seconds };
  saveDraft();
  render();
  say(`Undone. ${words(answer.place) || "Nothing is ranked."}`);
}

function count() {
  const now = performance.now();
  if (answer) answer.seconds += (now - since) / 1000;
  since = now;
}

function saveDraft() {
  if (!document.hidden) count();
  keep(draftName(task.id), answer);
}

// --- keys ------------------------------------------------------------------------------------------------------------

function cardKey(event, i) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const digit = Number(/^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1] ?? event.key);
  if (event.shiftKey) {
    if (form.quality === "off" || !(digit >= 1 && digit <= form.highest)) return;
    setQuality(i, digit);
    say(`Output ${letter(i)}: quality ${digit}.`);
  } else if (digit >= 1 && digit <= task.outputs.length) setRank(i, digit);
  else if (event.key === "j" || event.key === "k") focusCard(i + (event.key === "j" ? 1 : -1));
  else if (event.key === "f") openFlags(i);
  else if (event.key === "Backspace" || event.key === "Delete") setRank(i, null);
  else return;
  event.preventDefault();
}

function focusCard(i) {
  if (i < 0) $("prompt").focus();
  else cards[Math.min(i, cards.length - 1)].root.focus();
}

function openFlags(i) {
  const details = cards[i].root.querySelector("details");
  if (!details) return;
  details.open = true;
  details.querySelector("input").focus();
}

document.addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || $("work").hidden || $("skip-dialog").open) return;
  if (event.key === "Enter") submit();
  else if (event.key.toLowerCase() === "z" && !event.shiftKey) undo();
  else return;
  event.preventDefault();
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "j") focusCard(0);
});

// --- sending ---------------------------------------------------------------------------------------------------------

function submit() {
  const unranked = answer.place.indexOf(null);
  const unrated = form.quality === "required" ? answer.quality.indexOf(null) : -1;
  if (unranked >= 0 || unrated >= 0) {
    const i = unranked >= 0 ? unranked : unrated;
    alert(`Output ${letter(i)} has no ${unranked >= 0 ? "rank" : "quality"} yet.`);
    cards[i].root.focus();
    return;
  }
  const given = { kind: "ranking", ranks: ranks(answer.place) };
  if (form.quality !== "off" && answer.quality.some((value) => value !== null)) given.quality = answer.quality;
  if (Object.keys(form.flags).length) given.flags = answer.flags;
  send(given);
}

// Store the submission in the browser and then on the server, and show the next prompt.
async function send(given) {
  if (sending) return;
  saveDraft();
  const submission = { id: newId(), task: task.id, seconds: Math.round(answer.seconds * 10) / 10, ...given };
  const about = task.messages.at(-1).content.slice(0, 100);
  const said = given.kind === "skip" ? "skipped" : words(answer.place);
  hold({ run: form.title, about, said, submission });
  busy(true);
  try {
    const { progress, refused } = await offer(submission);
    if (progress) say(submission.kind === "skip" ? "Skipped." : "Stored.");
    // A submission that can be corrected (422) is on the screen and in the draft.
    if (refused?.status === 422) release(submission);
    if (progress?.complete) showEnd(progress); // without another request, since the server may have ended
    else if (progress || refused.status === 409) await following();
    if (refused) alert(`Not stored: ${refused.message}.`);
    showKept();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    alert(`${error.message}.`);
  } finally {
    busy(false);
  }
}

function busy(on) {
  sending = on;
  for (const id of ["submit", "skip", "back", "end-back"]) $(id).disabled = on;
  $("submit").textContent = on ? "Storing…" : "Submit";
}

async function following() {
  const found = await insist("next");
  showProgress(found.progress);
  if (found.task && !found.progress.complete) showTask(found.task);
  else showEnd(found.progress);
}

async function takeBack() {
  if (sending || last === null) return;
  busy(true);
  try {
    if (task && answer && !$("work").hidden) saveDraft();
    const found = await insist("take-back", { id: last });
    showProgress(found.progress);
    showTask(found.task);
    say("Taken back. It counts again once you submit it.");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    alert(error.message);
  } finally {
    busy(false);
  }
}

function showEnd(progress) {
  showProgress(progress);
  task = null;
  answer = null;
  complete = progress.complete;
  $("work").hidden = true;
  $("end").hidden = false;
  $("end-title").textContent = progress.complete ? "All rankings are in" : "Nothing for you right now";
  $("end-text").textContent = progress.complete
    ? "Thank you. You can close this page; the run goes on by itself."
    : "Other labelers have the prompts that are left. This page looks again every few seconds.";
  $("end-title").focus();
}

async function look() {
  if (document.hidden || sending) return;
  if (task === null) {
    const found = await ask("next");
    showProgress(found.progress);
    if (found.task && !found.progress.complete) showTask(found.task);
    else if (found.progress.complete !== complete) showEnd(found.progress);
    return worried("");
  }
  const progress = await ask("progress");
  if (sending || task === null) return; // the person has submitted meanwhile
  showProgress(progress);
  if (!progress.complete) return worried("");
  const begun = answer.place.concat(answer.quality, answer.flags.flat()).some((value) => value !== null);
  if (begun) return worried(NEARLY_OVER);
  const found = await ask("next"); // tells the server that nothing more comes from here
  if (found.progress.complete && !sending) showEnd(found.progress);
  worried("");
}

// Show or clear an alert of `look`; an alert about a submission stays.
function worried(text) {
  if (text || $("alert").textContent === worry) alert(text);
  worry = text;
}

async function tick() {
  try {
    await look();
    silent = null;
  } catch (error) {
    // Submissions are repeated by `insist`, and the next look may succeed. When all is in, the server may have ended.
    if (error instanceof Refusal) worried(`${error.message}.`);
    else if (task !== null || !complete) {
      silent ??= Date.now();
      if (Date.now() - silent >= LONG) worried(silence(Date.now() - silent));
    }
  }
}

// --- skipping --------------------------------------------------------------------------------------------------------

function setUpSkip() {
  $("note").maxLength = form.note;
  $("reasons").replaceChildren(
    ...Object.entries(form.skips).map(([reason, label], i) => {
      const input = element("input", { type: "radio", name: "reason", value: reason, required: true });
      input.checked = i === 0;
      return element("label", {}, input, element("span", {}, label));
    }),
  );
  $("skip").addEventListener("click", () => $("skip-dialog").showModal());
  $("skip-no").addEventListener("click", () => $("skip-dialog").close());
  $("skip-dialog").querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("skip-dialog").close();
    const reason = $("reasons").querySelector("input:checked").value;
    send({ kind: "skip", reason, note: $("note").value.trim() });
    $("note").value = "";
  });
}

// --- start -----------------------------------------------------------------------------------------------------------

async function start() {
  if (!token) {
    alert("Open the link that you were given: this address alone does not say who you are.");
    return;
  }
  try {
    form = await insist("form");
    openOutbox(form.labeler);
    $("who").textContent = `${form.title} · ${form.labeler}`;
    $("network").hidden = !form.network;
    setUpSkip();
    const wrong = await catchUp();
    await following();
    if (wrong) alert(wrong);
    showKept();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    alert(`${error.message}.`);
    return;
  }
  setInterval(tick, POLL);
}

document.addEventListener("visibilitychange", () => {
  if (answer && document.hidden) {
    count();
    keep(draftName(task.id), answer);
  } else since = performance.now();
});
window.addEventListener("hashchange", () => location.reload());
for (const [id, action] of [["submit", submit], ["undo", undo], ["back", takeBack], ["end-back", takeBack]]) {
  $(id).addEventListener("click", action);
}
start();
