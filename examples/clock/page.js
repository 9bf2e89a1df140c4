/** Shows the time that `examples/clock` publishes. The page's own clock moves nothing here. */

import { clientIn } from "../link.js";

const client = clientIn(document.querySelector("#link"));

// Only the newest time is of use: what a slow page could not take is not kept for it.
client.subscribe("clock.time", { maxQueue: 1, overflow: "drop_oldest" }).on("event", show);

/** The beginning of the day on which this page was opened, as `time + offset`. */
let midnight;

drawTicks();

/** `time` in seconds since 1970, `offset` in seconds from UTC to the server's local time. */
function show({ data: { time, offset } }) {
  // A Date that reads as the server's local time when it is asked for UTC.
  const local = new Date((time + offset) * 1000);
  midnight ??= Math.floor((time + offset) / 86_400) * 86_400;
  // Angles that only grow: at a full minute the hand goes on, and not all the way back.
  const seconds = time + offset - midnight;
  turn("#seconds", seconds * 6);
  turn("#minutes", seconds / 10);
  turn("#hours", seconds / 120);
  write("#time", local.toISOString().slice(11, 19));
  const day = { weekday: "long", day: "numeric", month: "long", year: "numeric", timeZone: "UTC" };
  write("#date", `${local.toLocaleDateString("en-GB", day)}, ${zone(offset)}`);
  const difference = Date.now() / 1000 - time;
  const side = difference < 0 ? "behind" : "ahead";
  write("#difference", `This device’s clock is ${Math.abs(difference).toFixed(3)} s ${side}.`);
}

function turn(hand, degrees) {
  document.querySelector(hand).style.transform = `rotate(${degrees}deg)`;
}

function write(place, words) {
  document.querySelector(place).textContent = words;
}

function zone(offset) {
  const minutes = Math.abs(offset) / 60;
  const two = (number) => String(number).padStart(2, "0");
  return offset ? `UTC${offset < 0 ? "−" : "+"}${two(Math.floor(minutes / 60))}:${two(minutes % 60)}` : "UTC";
}

function drawTicks() {
  for (let minute = 0; minute < 60; minute++) {
    const tick = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const hour = minute % 5 === 0;
    tick.setAttribute("y1", "-94");
    tick.setAttribute("y2", hour ? "-84" : "-90");
    tick.setAttribute("transform", `rotate(${minute * 6})`);
    if (hour) tick.classList.add("hour");
    document.querySelector("#ticks").append(tick);
  }
}
