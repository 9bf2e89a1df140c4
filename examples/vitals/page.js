/** Draws the figures that `examples/vitals` publishes, as they come. */

import { clientIn } from "../link.js";
import { Chart } from "./chart.js";

const percent = (value) => `${value.toFixed(value < 9.95 ? 1 : 0)} %`;
const bytes = (value) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const rate = (value) => scaled(value, 1000, ["B/s", "kB/s", "MB/s", "GB/s"]);

const charts = {
  cpu: new Chart(document.querySelector("#cpu canvas"), {
    series: [
      { name: "system", colour: "--violet" },
      { name: "user", colour: "--indigo" },
      { name: "waiting", colour: "--amber" },
    ],
    stacked: true,
    top: 100,
    say: (value) => `${Math.round(value)} %`,
  }),
  memory: new Chart(document.querySelector("#memory canvas"), {
    series: [
      { name: "used", colour: "--teal" },
      { name: "cache", colour: "--lime" },
    ],
    stacked: true,
    say: bytes,
  }),
  network: new Chart(document.querySelector("#network canvas"), {
    series: [
      { name: "received", colour: "--blue" },
      { name: "sent", colour: "--orange" },
    ],
    least: 1000,
    say: rate,
  }),
};

/** What a chart shows of the figures of a topic. */
const valuesOf = {
  cpu: ({ system, user, waiting }) => [system, user, waiting],
  memory: ({ used, cache }) => [used, cache],
  network: ({ received, sent }) => [received, sent],
};

/** What stands in words beside the charts. */
const write = {
  cpu({ system, user, waiting, cores }) {
    figures("cpu", {
      busy: percent(system + user),
      user: percent(user),
      system: percent(system),
      waiting: percent(waiting),
    });
    drawCores(cores);
  },
  memory({ total, used, cache, swap_total, swap_used }) {
    charts.memory.top = total;
    document.querySelector("[data-when=swap]").hidden = !swap_total;
    figures("memory", {
      share: percent((100 * used) / total),
      used: bytes(used),
      cache: bytes(cache),
      total: bytes(total),
      swap: `${bytes(swap_used)} of ${bytes(swap_total)}`,
    });
  },
  network({ received, sent, interfaces }) {
    figures("network", {
      rate: rate(received + sent),
      received: rate(received),
      sent: rate(sent),
      interfaces: interfaces.join(", "),
    });
  },
  system({ host, kernel, uptime, load, running, threads }) {
    document.title = `${host} – vitals`;
    document.querySelector("#host").textContent = host;
    document.querySelector("#system").textContent = [
      kernel,
      `up ${span(uptime)}`,
      `load ${load.map((average) => average.toFixed(2)).join(" ")}`,
      `${running} of ${threads} threads running`,
    ].join(" · ");
  },
};

/** Events that did not reach this page, because it was too slow. */
let missed = 0;

/** The name under which this page asks for what happened before it came. */
const page = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("");

const client = clientIn(document.querySelector("#link"));
const now = client.subscribe("vitals.now.*", { maxQueue: 64 });
now.on("event", take);
now.on("gap", lost);
client.subscribe(`vitals.past.${page}`).on("event", fillIn);
client.addEventListener("state", ({ detail }) => {
  if (detail.state === "connected") queueMicrotask(() => ask().catch(console.error));
});

/** Asks for the last minutes: at first, and again after the connection was lost for a while. */
async function ask() {
  const { receivers } = await client.publish("vitals.past", { page });
  if (!receivers) document.querySelector("#system").textContent = "The program is not running: python -m examples.vitals";
}

function take({ topic, data }) {
  const kind = topic.slice("vitals.now.".length);
  write[kind]?.(data);
  charts[kind]?.add(data.at, valuesOf[kind](data));
}

function fillIn({ data }) {
  for (const [kind, chart] of Object.entries(charts)) {
    chart.fill(data[kind].map((figures) => ({ at: figures.at, values: valuesOf[kind](figures) })));
  }
}

function lost({ missed: count, reason }) {
  if (reason === "disconnected") return; // the past is asked for
  missed += count ?? 0;
  const note = document.querySelector("#missed");
  note.hidden = false;
  note.textContent = `${missed} events did not reach this page in time`;
}

function figures(id, texts) {
  const card = document.getElementById(id);
  for (const [name, text] of Object.entries(texts)) card.querySelector(`[data-figure=${name}]`).textContent = text;
}

function drawCores(cores) {
  const board = document.querySelector("#cores");
  while (board.childElementCount < cores.length) {
    const core = document.createElement("div");
    core.className = "core";
    core.append(`core ${board.childElementCount}`, document.createElement("i"), document.createElement("b"));
    board.append(core);
  }
  for (const [index, busy] of cores.entries()) {
    const [bar, figure] = board.children[index].children;
    bar.style.setProperty("--busy", `${busy}%`);
    figure.textContent = percent(busy);
  }
}

function scaled(value, step, units) {
  let unit = 0;
  while (value >= step * 0.9995 && unit + 1 < units.length) {
    value /= step;
    unit++;
  }
  return `${value < 99.95 && unit > 0 ? value.toFixed(1).replace(/\.0$/, "") : Math.round(value)} ${units[unit]}`;
}

function span(seconds) {
  const minutes = Math.floor(seconds / 60);
  const [days, hours] = [Math.floor(minutes / 1440), Math.floor(minutes / 60) % 24];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return `${minutes} min`;
}
