/** Two subscriptions to what `examples/slow` publishes, on a page that takes too long over each event. */

import { brokerOfPage, clientIn } from "../link.js";
import { Client } from "../wsbroker.js";

const TOPIC = "slow.gauges";
const GAUGES = 8;

/** Events that may be in flight to the page. Few: what is under way cannot be replaced by something newer. */
const CREDIT = 16;

const slider = document.querySelector("#busy");
slider.oninput = () => {
  document.querySelector("#busy-words").textContent = `${slider.value} ms`;
};

const latest = panel(document.querySelector("#latest"));
const fresh = clientIn(document.querySelector("#link"));
const careful = fresh.subscribe(TOPIC, { overflow: "latest", credit: CREDIT });
// An event counts as taken when its promise is settled, and only then the broker sends another one.
const work = slowly(latest.show);
careful.on("event", (event) => new Promise((done) => work(event, done)));
careful.on("gap", latest.lose);

const backlog = panel(document.querySelector("#backlog"));
const plain = new Client(brokerOfPage());
const careless = plain.subscribe(TOPIC, { credit: 1_000_000 });
const later = slowly(backlog.show);
careless.on("event", (event) => later(event, () => {}));
careless.on("gap", backlog.lose);

/**
 * Deals with events one by one, for as long over each as the slider says. The page is not really busy meanwhile, or the
 * two sides would be in each other's way: both have one thread.
 */
function slowly(work) {
  const waiting = [];
  let free = 0; // when the event that is worked on will be done
  const go = () => {
    const now = performance.now();
    while (waiting.length > 0 && free <= now) {
      free = Math.max(free, now - 50) + Number(slider.value);
      const [event, done] = waiting.shift();
      work(event);
      done();
    }
    if (waiting.length > 0) setTimeout(go, Math.max(0, free - now));
  };
  return (event, done) => {
    waiting.push([event, done]);
    if (waiting.length === 1) go();
  };
}

function panel(element) {
  const gauges = element.querySelector(".gauges");
  for (let gauge = 0; gauge < GAUGES; gauge++) gauges.append(document.createElement("div"));
  const counts = { shown: 0, lost: 0 };
  let drawing = false;
  let newest = null;
  const values = [];
  const draw = () => {
    drawing = false;
    for (const [gauge, value] of values.entries()) gauges.children[gauge].style.height = `${value * 100}%`;
    const age = Math.max(0, Date.now() / 1000 - newest.at);
    element.dataset.age = age;
    element.dataset.round = newest.round;
    element.querySelector(".age").textContent = `${age.toFixed(2)} s old`;
    element.querySelector(".counts").textContent = `${counts.shown} shown, ${counts.lost} passed over`;
  };
  const soon = () => {
    if (!drawing && newest !== null) requestAnimationFrame(draw);
    drawing = newest !== null;
  };
  return {
    show({ key, data }) {
      counts.shown += 1;
      values[Number(key.slice(1))] = data.value;
      newest = data;
      soon();
    },
    lose({ missed }) {
      counts.lost += missed ?? 0;
      soon();
    },
  };
}
