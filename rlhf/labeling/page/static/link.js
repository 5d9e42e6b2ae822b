// Messages to the person, requests to the server, and the browser's storage.

// The part of the link after #. The browser never sends it by itself. It stays in the link, so that a bookmark works.
export const token = location.hash.slice(1);

// Show what keeps the person from working; "" when nothing does any more.
export function alert(text) {
  const box = document.getElementById("alert");
  if (box.textContent !== text) box.textContent = text;
}

// Let a screen reader speak.
export function say(text) {
  const live = document.getElementById("live");
  live.textContent = "";
  requestAnimationFrame(() => (live.textContent = text));
}

// --- the server ------------------------------------------------------------------------------------------------------

export const LONG = 60000; // milliseconds without an answer after which it is unlikely that the server is just being restarted

export class Refusal extends Error {}

export async function ask(path, body) {
  const headers = { Authorization: `Bearer ${token}` };
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(`api/${path}`, { ...options, headers });
  if (response.ok) return response.json();
  const answer = await response.json().catch(() => ({}));
  const detail = typeof answer.detail === "string" ? answer.detail : `the server answered ${response.status}`;
  if (response.status >= 500) throw new Error(detail);
  throw Object.assign(new Refusal(detail), { status: response.status });
}

// The message when the server has not answered for so many milliseconds.
export function silence(time) {
  if (time < LONG) return "The server does not answer; trying again.";
  return "The server has not answered for a minute: the run may have gone on. Ask whoever gave you the link; trying again.";
}

// Ask until there is an answer. A submission has an id, so sending it again changes nothing.
export async function insist(path, body) {
  const begin = Date.now();
  for (let wait = 1; ; wait = Math.min(10, wait * 2)) {
    try {
      const found = await ask(path, body);
      alert("");
      return found;
    } catch (error) {
      if (error instanceof Refusal) throw error;
      const kept = body ? "Not stored yet: your answer is kept in this browser. " : "";
      alert(`${kept}${silence(Date.now() - begin)}`);
      await new Promise((done) => setTimeout(done, wait * 1000));
    }
  }
}

export function newId() {
  // Browsers have no crypto.randomUUID on a page that came without encryption from another machine.
  const hex = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

// --- the browser's storage -------------------------------------------------------------------------------------------

export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, JSON.stringify(value));
  } catch {
    alert("This browser keeps no drafts: closing the tab loses the order of this prompt.");
  }
}

export function kept(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // no storage here: `keep` says so
  }
}

export function stored() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}
