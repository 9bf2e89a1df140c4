import { io } from "socket.io-client";

const auth = (give) => fetch("/token").then((response) => response.text()).then((token) => give({ token }));
let known = false;
const socket = io("wss://broker.example", { auth });
socket.on("connect", () => {
  console.log("connected");
  if (!socket.recovered) socket.emit("subscribe", "prices"); // a room: the server's own code joins it
  if (!socket.recovered && known) console.log("missed some");
  known = true;
});
socket.on("disconnect", (reason) => console.log(reason));
socket.on("connect_error", () => {
  if (!socket.active) setTimeout(() => socket.connect(), 1000 + 1000 * Math.random()); // refused, for its token
});

const newest = new Map(); // the client takes all events; the page keeps the newest of each key
socket.on("price", (data) => newest.set(data.symbol, data));

requestAnimationFrame(function draw() {
  for (const [symbol, data] of newest) console.log(symbol, data);
  newest.clear();
  requestAnimationFrame(draw);
});
