/** A page of the shared counter. It asks `examples/counter` to count, and shows nothing but what that says. */

import { clientIn } from "../link.js";

const value = document.querySelector("#value");
const online = document.querySelector("#online");
const trouble = document.querySelector("#trouble");
const buttons = document.querySelectorAll("button");

/** The name of this page, as long as it is open: the same over all its connections, so that it is counted once. */
const page = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("");

/**
 * Whether the program has told its state over this connection. Only then a click is sure to be heard: when the broker
 * was away, the program may come back later than the page, and a click in between would be lost.
 */
let told = false;

const client = clientIn(document.querySelector("#link"));
client.subscribe("counter.state").on("event", ({ data }) => {
  setTold(true);
  showState(data);
});
// Where nobody heard the hello, it is said again as soon as somebody asks who is there.
client.subscribe("counter.roll").on("event", () => tell(told ? "here" : "hello"));
client.addEventListener("state", ({ detail }) => {
  setTold(false);
  // Commands are carried out in their order: the subscriptions are made first, so the answer cannot be missed.
  if (detail.state === "connected") queueMicrotask(() => tell("hello"));
});

document.querySelector("#up").addEventListener("click", () => tell("add", { by: 1 }));
document.querySelector("#down").addEventListener("click", () => tell("add", { by: -1 }));
window.addEventListener("pagehide", () => tell("bye"));

/** Tells the program something. The receipt says whether it was there to hear. */
async function tell(what, more = {}) {
  try {
    const { receivers } = await client.publish(`counter.page.${what}`, { page, ...more }, { queue: false });
    trouble.textContent = receivers ? "" : "Nobody counts: start the program with python -m examples.counter";
  } catch (error) {
    trouble.textContent = error.message;
  }
}

function setTold(value) {
  told = value;
  for (const button of buttons) button.disabled = !told;
}

function showState(state) {
  const text = String(state.value).replace("-", "−");
  if (value.textContent !== text) {
    value.textContent = text;
    value.classList.remove("changed");
    void value.offsetWidth; // or the animation would not begin anew
    value.classList.add("changed");
  }
  online.textContent = state.online === 1 ? "1 page online" : `${state.online} pages online`;
}
