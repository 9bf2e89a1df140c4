import { connect, JSONCodec } from "nats.ws";

let token = await fetch("/token").then((response) => response.text());
const refresh = async () => (token = await fetch("/token").then((response) => response.text()));
setInterval(refresh, 60_000); // the authenticator cannot wait for a new one
const connection = await connect({
  servers: "wss://broker.example",
  authenticator: () => ({ auth_token: token }),
  maxReconnectAttempts: -1,
  waitOnFirstConnect: true,
});
(async () => {
  for await (const { type } of connection.status()) console.log(type);
})();

// An ordered consumer of a stream (JetStream) goes on at its place, and takes as many messages as the page allows.
const consumer = await connection.jetstream().consumers.get("PRICES", { filterSubjects: ["prices.*"] });
const { decode } = JSONCodec();
let last = null;
for await (const message of await consumer.consume({ max_messages: 16 })) {
  if (last !== null && message.seq > last + 1) console.log("missed", message.seq - last - 1);
  last = message.seq;
  console.log(message.subject, decode(message.data));
  await new Promise(requestAnimationFrame);
}
