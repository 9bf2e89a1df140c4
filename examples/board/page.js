/** A page of the board. It shows the newest event of each key, and changes nothing by itself: what it drags, it publishes. */

import { clientIn } from "../link.js";

const TOPIC = "board.things";
const board = document.querySelector("#board");
const trouble = document.querySelector("#trouble");

/** The things on the board: key → element. */
const things = new Map();

const client = clientIn(document.querySelector("#link"));

// `latest`: a page that is too slow skips to where the things are now.
const shown = client.subscribe(TOPIC, { last: "all", overflow: "latest" });
shown.on("event", showThing);
shown.on("gap", begin);
shown.on("live", () => (board.dataset.live = ""));
shown.on("error", (error) => (trouble.textContent = error.message));

/** What was here may be gone by now: everything that is kept comes again. */
function begin({ reason }) {
  if (reason !== "epoch" && reason !== "expired") return;
  for (const key of things.keys()) remove(key);
}

function showThing({ key, data }) {
  if (data === null) {
    remove(key);
    return;
  }
  const thing = things.get(key) ?? make(key, data);
  if (thing.classList.contains("held")) return; // it is under this page's pointer
  thing.style.left = `${100 * data.x}%`;
  thing.style.top = `${100 * data.y}%`;
  if (data.kind === "boat") thing.style.transform = `translate(-50%, -50%) rotate(${data.heading}deg)`;
  else thing.firstChild.textContent = data.text;
}

function make(key, { kind }) {
  const thing = document.createElement("div");
  thing.className = `thing ${kind === "boat" ? "boat" : "note"}`;
  thing.dataset.key = key;
  if (kind !== "boat") {
    const close = document.createElement("button");
    close.type = "button";
    close.textContent = "×";
    close.setAttribute("aria-label", "Remove this note");
    close.addEventListener("click", () => publish(key, null));
    thing.append(document.createElement("span"), close);
    thing.addEventListener("pointerdown", (event) => event.target === close || drag(key, thing, event));
  }
  things.set(key, thing);
  board.append(thing);
  showCount();
  return thing;
}

function remove(key) {
  things.get(key)?.remove();
  things.delete(key);
  showCount();
}

function showCount() {
  document.querySelector("#count").textContent = `${things.size} things`;
}

/** Moves a note with the pointer, and tells where it is at most once for each picture. */
function drag(key, thing, event) {
  thing.classList.add("held");
  thing.setPointerCapture(event.pointerId);
  let place = null;
  let asked = false;
  const tell = () => {
    asked = false;
    if (place) publish(key, place);
  };
  thing.onpointermove = ({ clientX, clientY }) => {
    const area = board.getBoundingClientRect();
    const part = (value, from, size) => Math.min(1, Math.max(0, (value - from) / size));
    const [x, y] = [part(clientX, area.left, area.width), part(clientY, area.top, area.height)];
    place = { kind: "note", text: thing.firstChild.textContent, x, y };
    thing.style.left = `${100 * x}%`;
    thing.style.top = `${100 * y}%`;
    if (!asked) requestAnimationFrame(tell);
    asked = true;
  };
  thing.onpointerup = thing.onpointercancel = () => {
    thing.classList.remove("held");
    thing.onpointermove = thing.onpointerup = thing.onpointercancel = null;
    tell();
  };
}

document.querySelector("#put").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = document.querySelector("#text");
  const key = `note-${Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("")}`;
  publish(key, { kind: "note", text: field.value, x: 0.2 + 0.6 * Math.random(), y: 0.2 + 0.6 * Math.random() });
  field.value = "";
});

async function publish(key, data) {
  try {
    await client.publish(TOPIC, data, { key });
    trouble.textContent = "";
  } catch (error) {
    trouble.textContent = error.message;
  }
}
