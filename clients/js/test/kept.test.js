/** History, `dedup` and presence of the real broker, whose address is in BROKER (tests/client/test_kept.py). */

import assert from "node:assert/strict";
import { after, test as declare } from "node:test";
import WebSocket from "ws";
import { Client } from "../wsbroker.js";
import { uncaught } from "./model.js";

const { BROKER } = process.env;
const test = (name, work) => declare(name, { timeout: 20_000 }, work);
const numbers = (from, to) => Array.from({ length: to - from }, (_, n) => from + n);

after(() => assert.deepEqual(uncaught, []));

function connect(t) {
  const client = new Client(BROKER, { WebSocket });
  t.after(() => client.close());
  return client;
}

async function publish(client, topic, count) {
  const receipts = await Promise.all(numbers(0, count).map((number) => client.publish(topic, number)));
  return { epoch: receipts.at(-1).epoch, offset: receipts.at(-1).offset };
}

async function all(iterable) {
  const found = [];
  for await (const each of iterable) found.push(each);
  return found;
}

/** The data of the events up to `live`. */
async function kept(messages) {
  const seen = [];
  for (;;) {
    const { value } = await messages.next();
    if (value.op === "live") return seen;
    assert.equal(value.op, "event");
    seen.push(value.data);
  }
}

test("history comes in pages", async (t) => {
  const client = connect(t);
  const top = await publish(client, "h.pages", 2_500);
  const data = async (options) => (await all(client.history("h.pages", options))).map((event) => event.data);
  assert.deepEqual(await data(), numbers(0, 2_500));
  assert.deepEqual(await data({ last: 1_700 }), numbers(800, 2_500));
  assert.deepEqual(await data({ since: { ...top, offset: 1_234 } }), numbers(1_234, 2_500));
  assert.deepEqual(await data({ since: top }), []);
  await assert.rejects(all(client.history("none.t")), { code: "no_history" });
});

test("a subscription begins where it is told", async (t) => {
  const client = connect(t);
  const { epoch } = await publish(client, "h.start", 1_000);
  for (const [options, first] of [[{ last: 3 }, 997], [{ last: "all" }, 0], [{ since: { epoch, offset: 500 } }, 500]]) {
    const subscription = client.subscribe("h.start", options);
    assert.deepEqual(await kept(subscription.messages()), numbers(first, 1_000));
    assert.deepEqual(subscription.position, { epoch, offset: 1_000 });
    subscription.unsubscribe();
  }
});

test("a gap says what is no longer kept", async (t) => {
  const client = connect(t);
  const { epoch } = await publish(client, "short.t", 10);
  const messages = client.subscribe("short.t", { since: { epoch, offset: 2 } }).messages();
  const { value: gap } = await messages.next();
  assert.deepEqual([gap.op, gap.missed, gap.reason, gap.from, gap.to], ["gap", 5, "expired", 3, 7]);
  assert.deepEqual(await kept(messages), [7, 8, 9]);
});

test("a repeated publish is one event", async (t) => {
  const client = connect(t);
  const receipts = [];
  for (let turn = 0; turn < 3; turn++) receipts.push(await client.publish("h.dedup", "x", { dedup: "one" }));
  assert.deepEqual(receipts.map(({ duplicate }) => duplicate), [false, true, true]);
  assert.equal((await all(client.history("h.dedup"))).length, 1);
});

test("members are listed and told", async (t) => {
  const [client, other] = [connect(t), connect(t)];
  const joined = [];
  const room = client.subscribe("p.room", { info: { me: true }, onJoin: ({ info }) => joined.push(info) });
  await room.ready;
  const messages = room.messages();
  await other.subscribe("p.room", { info: { n: 1 } }).ready;
  assert.equal((await messages.next()).value.op, "join");
  assert.deepEqual(joined, [{ n: 1 }]);
  assert.deepEqual((await all(client.presence("p.room"))).map(({ info }) => info), [{ me: true }, { n: 1 }]);
  const session = other.welcome.session;
  await other.close();
  const { value: left } = await messages.next();
  assert.deepEqual([left.op, left.session], ["leave", session]);
  await assert.rejects(all(client.presence("h.t")), { code: "no_presence" });
});
