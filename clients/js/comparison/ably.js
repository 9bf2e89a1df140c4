import { Realtime } from "ably";

const authCallback = (_params, give) =>
  fetch("/token")
    .then((response) => response.text())
    .then((token) => give(null, token), (error) => give(String(error), null));
const client = new Realtime({ authCallback });
client.connection.on(({ current }) => console.log(current));

const newest = new Map(); // the client takes all events; the page keeps the newest of each key
const prices = client.channels.get("prices");
prices.on(["attached", "update"], ({ current, previous, resumed }) => {
  if (previous !== "attaching" && !resumed) console.log("missed some", current);
});
await prices.subscribe(({ data }) => newest.set(data.symbol, data));

requestAnimationFrame(function draw() {
  for (const [symbol, data] of newest) console.log(symbol, data);
  newest.clear();
  requestAnimationFrame(draw);
});
