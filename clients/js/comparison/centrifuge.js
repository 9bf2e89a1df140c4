import { Centrifuge } from "centrifuge";

const getToken = () => fetch("/token").then((response) => response.text());
const centrifuge = new Centrifuge("wss://broker.example/connection/websocket", { getToken });
centrifuge.on("state", ({ newState }) => console.log(newState));

const newest = new Map(); // the client takes all events; the page keeps the newest of each key
const prices = centrifuge.newSubscription("prices");
prices.on("subscribed", ({ wasRecovering, recovered }) => {
  if (wasRecovering && !recovered) console.log("missed some");
});
prices.on("publication", ({ data }) => newest.set(data.symbol, data));
prices.subscribe();
centrifuge.connect();

requestAnimationFrame(function draw() {
  for (const [symbol, data] of newest) console.log(symbol, data);
  newest.clear();
  requestAnimationFrame(draw);
});
