import { Client } from "wsbroker";

const token = () => fetch("/token").then((response) => response.text());
const client = new Client("wss://broker.example/ws", { token });
client.addEventListener("state", ({ detail }) => console.log(detail.state));

const prices = client.subscribe("prices.*", { overflow: "latest", credit: 16 });
prices.on("gap", ({ missed }) => console.log("missed", missed));
for await (const { topic, data } of prices) {
  console.log(topic, data);
  await new Promise(requestAnimationFrame); // draws at its own pace; the broker keeps the newest price of each key
}
