// Compiled by `tsc`, never run: the types say what the client does.
import { Client, CommandError, type Gap, type Receipt } from "wsbroker";
import { useTopic } from "wsbroker/react";

const client = new Client("ws://127.0.0.1:8765", { token: async () => "t" });
client.addEventListener("state", ({ detail }) => detail.state satisfies string);
const prices = client.subscribe<{ bid: number }>("prices.*", { overflow: "latest", last: "all", credit: 4 });
prices.on("event", ({ data, gaps }) => [data.bid satisfies number, gaps satisfies Gap[]]);
for await (const { data } of prices) data.bid.toFixed(2);
const receipt: Receipt = await client.publish("t", 1, { reliable: true });
const seen = useTopic<{ bid: number }>("prices.eurusd", { client });
seen.data?.bid.toFixed(receipt.receivers);
// @ts-expect-error: no such policy
client.subscribe("t", { overflow: "newest" });
// @ts-expect-error: no such event
prices.on("message", () => {});
new CommandError("m").retryAfter?.toFixed();
