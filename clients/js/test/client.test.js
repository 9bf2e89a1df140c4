/** The client over its connections: what it asks for again, what it announces, what becomes of publishes. */

import assert from "node:assert/strict";
import { after, test as declare } from "node:test";
import WebSocket from "ws";
import {
  AlreadySubscribed,
  Client,
  ClientClosed,
  CommandError,
  ConnectionClosed,
  ConnectionLost,
  matches,
  NotConnected,
  SUBSCRIPTION_TRANSITIONS,
  TimeoutError,
  TRANSITIONS,
  TokenError,
} from "../wsbroker.js";
import { brief, model, take, uncaught, until } from "./model.js";

/** A test that hangs ends, and says which it was. */
const test = (name, work) => declare(name, { timeout: 20_000 }, work);

after(() => assert.deepEqual(uncaught, []));

/** Ends all connections, and waits until these clients have new ones. */
async function cut(broker, ...clients) {
  const waiting = clients.map((client) => until(client, "waiting"));
  await broker.steer("cut");
  await Promise.all(waiting);
  await Promise.all(clients.map((client) => client.connect()));
}

const GAP = (topic, missed, reason, more = {}) => ({ op: "gap", topic, missed, reason, ...more });

test("states are told in order", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  await client.connect();
  assert.equal(client.welcome.server, "model");
  await cut(broker, client);
  await client.close();
  assert.deepEqual(
    client.states.map(({ state }) => state),
    ["connecting", "connected", "waiting", "connecting", "connected", "closed"],
  );
  assert.ok(client.states[2].delay >= 0);
  assert.equal(client.states[2].code, 1006);
});

test("every state that is named in a table is in it", () => {
  for (const table of [TRANSITIONS, SUBSCRIPTION_TRANSITIONS]) {
    for (const targets of Object.values(table)) for (const target of targets) assert.ok(target in table);
  }
});

test("an address that is none ends the client", async () => {
  const client = new Client("nowhere:%", { WebSocket });
  await assert.rejects(client.connect(), SyntaxError);
});

for (const code of [4500, 4503, 4999]) {
  test(`close code ${code} ends the client`, async (t) => {
    const broker = await model(t);
    const client = broker.connect();
    const subscription = client.subscribe("t");
    await subscription.ready;
    const next = subscription[Symbol.asyncIterator]().next();
    const closed = until(client, "closed");
    await broker.steer("close", { code, reason: "enough" });
    assert.deepEqual(await closed, { state: "closed", code, reason: "enough", error: (await closed).error });
    await assert.rejects(next, ConnectionClosed);
    await assert.rejects(client.publish("t", 1), { closeCode: code, code: "closed", retry: false });
    assert.throws(() => client.subscribe("u"), ConnectionClosed);
  });
}

for (const code of [1000, 1001, 1011, 4000, 4499]) {
  test(`close code ${code} is followed by a reconnection`, async (t) => {
    const broker = await model(t);
    const client = broker.connect();
    await client.connect();
    const waiting = until(client, "waiting");
    await broker.steer("close", { code });
    assert.equal((await waiting).code, code);
    await until(client, "connected");
  });
}

test("bye says when to come back", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  await client.connect();
  const waiting = until(client, "waiting");
  await broker.steer("close", { code: 1001, retry_after_ms: 37 });
  assert.equal((await waiting).delay, 37);
  await until(client, "connected");
});

test("waits are anything up to a bound that doubles", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  t.mock.method(Math, "random", () => 0.999);
  class Refusing {
    constructor() {
      queueMicrotask(() => this.onclose({ code: 1006, reason: "" }));
    }
    close() {}
  }
  const client = new Client("ws://127.0.0.1:1", { WebSocket: Refusing });
  for (let losses = 0; losses < 10; losses++) {
    const { delay } = await until(client, "waiting");
    assert.equal(delay, 0.999 * Math.min(30_000, 250 * 2 ** losses));
    t.mock.timers.tick(Math.ceil(delay));
  }
  await client.close();
});

test("a broker that falls silent is given up", async (t) => {
  const broker = await model(t);
  await broker.steer("set", { ping: 0.05, swallow: ["ping"] });
  const client = broker.connect({ timeout: 100 });
  await client.connect();
  assert.equal((await until(client, "waiting")).reason, "the broker fell silent");
  await until(client, "connected");
});

test("close fails what is under way", async (t) => {
  const broker = await model(t);
  await broker.steer("set", { swallow: ["publish"] });
  const client = broker.connect();
  const subscription = client.subscribe("t");
  await subscription.ready;
  const publishing = assert.rejects(client.publish("t2", 1), ClientClosed);
  const iterating = take(subscription, 1);
  await client.close();
  await publishing;
  assert.deepEqual(await iterating, []);
  await assert.rejects(client.publish("t", 2), ClientClosed);
});

// Subscriptions

test("subscriptions are made again in the same order with the same options", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  client.subscribe("b.*", { overflow: "latest", maxQueue: 64, credit: 7, info: 1 });
  client.subscribe("a");
  await client.subscribe("c", { echo: false }).ready;
  await cut(broker, client);
  await client.ping();
  const commands = await broker.commands("subscribe");
  assert.deepEqual(commands.slice(0, 3), [
    { op: "subscribe", topic: "b.*", overflow: "latest", max_queue: 64, credit: 7, info: 1 },
    { op: "subscribe", topic: "a", credit: 256 },
    { op: "subscribe", topic: "c", echo: false, credit: 256 },
  ]);
  assert.deepEqual(commands.slice(3), commands.slice(0, 3));
});

test("a reconnection is a gap on topics without history", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  const subscription = client.subscribe("t.*");
  await subscription.ready;
  await client.publish("t.a", 1);
  assert.deepEqual((await take(subscription, 1)).map(brief), [1]);
  await cut(broker, client);
  await client.publish("t.a", 2);
  assert.deepEqual((await take(subscription, 2)).map(brief), [GAP("t.*", null, "disconnected"), 2]);
});

test("an event carries the gaps before it", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  const subscription = client.subscribe("t");
  await subscription.ready;
  const gap = GAP("t", 3, "overflow", { from: 4, to: 6 });
  await broker.steer("send", gap);
  await client.publish("t", 1);
  await client.publish("t", 2);
  const events = subscription[Symbol.asyncIterator]();
  assert.deepEqual((await events.next()).value.gaps, [gap]);
  assert.deepEqual((await events.next()).value.gaps, []);
});

test("a topic with history goes on where it was", async (t) => {
  const broker = await model(t);
  const [client, other] = [broker.connect(), broker.connect()];
  const subscription = client.subscribe("h.t");
  await subscription.ready;
  for (let n = 0; n < 3; n++) await other.publish("h.t", n);
  assert.deepEqual((await take(subscription, 3)).map(brief), [0, 1, 2]);
  assert.deepEqual(subscription.position, { epoch: "e1", offset: 3 });
  await cut(broker, client, other);
  for (let n = 3; n < 6; n++) await other.publish("h.t", n);
  const rest = (await take(subscription, 4)).filter(({ op }) => op !== "live");
  assert.deepEqual(rest.map(brief), [3, 4, 5]);
});

test("what history no longer has is a gap", async (t) => {
  const broker = await model(t);
  await broker.steer("set", { keep: 2 });
  const [client, other] = [broker.connect(), broker.connect()];
  const subscription = client.subscribe("h.t");
  await subscription.ready;
  await other.publish("h.t", 1);
  await take(subscription, 1);
  // The publisher comes back while the subscriber still waits.
  const waiting = [client, other].map((each) => until(each, "waiting"));
  await broker.steer("close", { code: 1001, retry_after_ms: 2_000 });
  await Promise.all(waiting);
  await other.connect();
  for (let n = 2; n < 7; n++) await other.publish("h.t", n);
  assert.deepEqual((await take(subscription, 3)).map(brief), [GAP("h.t", 3, "expired", { from: 2, to: 4 }), 5, 6]);
});

test("last replays, is live, and goes on from there", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  for (let n = 0; n < 5; n++) await client.publish("h.t", n);
  const subscription = client.subscribe("h.t", { last: 2 });
  assert.deepEqual((await take(subscription, 3)).map(brief), [3, 4, { op: "live", topic: "h.t", offset: 5 }]);
  await cut(broker, client);
  await client.ping();
  assert.deepEqual((await broker.commands("subscribe")).at(-1).since, { epoch: "e1", offset: 5 });
});

test("a slow consumer gets as many events as its credit", async (t) => {
  const broker = await model(t);
  const [client, other] = [broker.connect(), broker.connect()];
  const subscription = client.subscribe("t", { credit: 4 });
  await subscription.ready;
  for (let n = 0; n < 20; n++) await other.publish("t", n);
  await client.ping();
  assert.equal(subscription.core.inbox.length, 4);
  assert.deepEqual((await take(subscription, 20)).map(brief), [...Array(20).keys()]);
});

test("a handler that gives a promise is a slow consumer too", async (t) => {
  const broker = await model(t);
  const [client, other] = [broker.connect(), broker.connect()];
  const subscription = client.subscribe("t", { credit: 2 });
  const seen = [];
  const finish = [];
  subscription.on("event", ({ data }) => {
    seen.push(data);
    return new Promise((resolve) => finish.push(resolve));
  });
  await subscription.ready;
  for (let n = 0; n < 6; n++) await other.publish("t", n);
  await client.ping();
  assert.deepEqual(seen, [0, 1]);
  while (seen.length < 6) {
    for (const done of finish.splice(0)) done();
    await client.ping();
  }
  assert.deepEqual(seen, [0, 1, 2, 3, 4, 5]);
});

test("overlapping subscriptions get each event once, and each gap", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  const all = ["t.a", "t.*", ">"].map((topic) => client.subscribe(topic));
  await all[2].ready;
  await client.publish("t.a", 1);
  await client.publish("t.b", 2);
  await broker.steer("send", GAP("t.a", 1, "overflow"));
  await client.ping();
  assert.deepEqual((await take(all[0], 2)).map(brief), [1, GAP("t.a", 1, "overflow")]);
  assert.deepEqual((await take(all[1], 3)).map(brief), [1, 2, GAP("t.a", 1, "overflow")]);
  assert.deepEqual((await take(all[2], 3)).map(brief), [1, 2, GAP("t.a", 1, "overflow")]);
  all[0].unsubscribe();
  assert.deepEqual(await take(all[1], 1), [GAP("t.a", null, "unsubscribed")]);
});

test("a second subscription to a topic is refused", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  const subscription = client.subscribe("t");
  assert.throws(() => client.subscribe("t"), AlreadySubscribed);
  subscription.unsubscribe();
  await client.subscribe("t").ready;
});

test("a refused subscription says so to who waits, iterates or listens; else to the client", async (t) => {
  const broker = await model(t);
  const error = { code: "forbidden" };
  for (let n = 0; n < 4; n++) await broker.steer("refuse", { op: "subscribe", error });
  const client = broker.connect();
  await assert.rejects(client.subscribe("a").ready, { name: "CommandError", code: "forbidden", retry: false });
  await assert.rejects(take(client.subscribe("b"), 1), CommandError);
  assert.equal((await new Promise((resolve) => client.subscribe("c").on("error", resolve))).code, "forbidden");
  client.subscribe("d");
  await client.ping();
  assert.equal(client.errors.at(-1).code, "forbidden");
});

test("a subscription is asked for again when it may succeed", async (t) => {
  const broker = await model(t);
  await broker.steer("refuse", { op: "subscribe", error: { code: "unavailable", retry: true } });
  const client = broker.connect();
  await client.subscribe("t").ready;
  assert.equal((await broker.commands("subscribe")).length, 2);
});

test("a right that is taken away ends the subscription", async (t) => {
  const broker = await model(t);
  const subscription = broker.connect().subscribe("t");
  await subscription.ready;
  await broker.steer("send", { op: "error", code: "forbidden", topic: "t", message: "no more", retry: false });
  await assert.rejects(take(subscription, 1), /no more/);
});

test("an error that concerns no call is reported, but for what the application knows", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  await client.connect();
  const send = (message) => broker.steer("send", { op: "error", message: "", retry: true, ...message });
  await send({ id: 999, code: "unavailable" });
  await send({ code: "draining" });
  await send({ code: "internal" });
  await client.ping();
  assert.deepEqual(client.errors.map(({ code }) => code), ["internal"]);
});

test("a handler that throws is reported and stops nobody", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  const subscription = client.subscribe("t");
  subscription.on("event", () => {
    throw new RangeError("mine");
  });
  subscription.on("event", async () => {
    throw new RangeError("mine too");
  });
  const seen = [];
  const off = subscription.on("event", ({ data }) => seen.push(data));
  await subscription.ready;
  await client.publish("t", 1);
  await client.ping();
  off();
  await client.publish("t", 2);
  await client.ping();
  assert.deepEqual(seen, [1]);
  assert.equal(client.errors.length, 4);
});

// Publish

test("a publish waits for the connection and gives the receipt", async (t) => {
  const broker = await model(t);
  const receipt = await broker.connect().publish("h.t", { x: 1 }, { key: "k" });
  assert.deepEqual(receipt, { receivers: 0, queued: 0, dropped: 0, epoch: "e1", offset: 1, duplicate: false });
  assert.deepEqual(await broker.commands("publish"), [
    { op: "publish", topic: "h.t", key: "k", data: { x: 1 } },
    { op: "publish", topic: "$test.received", data: null },
  ]);
});

test("a publish without a connection fails at once, or in time", async () => {
  const client = new Client("ws://127.0.0.1:1", { WebSocket });
  await assert.rejects(client.publish("t", 1, { queue: false }), NotConnected);
  await assert.rejects(client.publish("t", 1, { timeout: 30 }), { name: "TimeoutError", sent: false });
  await client.close();
});

test("a publish without an answer times out", async (t) => {
  const broker = await model(t);
  await broker.steer("set", { swallow: ["publish"] });
  const client = broker.connect();
  await client.connect();
  await assert.rejects(client.publish("t", 1, { timeout: 50 }), (error) => error instanceof TimeoutError && error.sent);
});

test("a publish under way at a loss is not repeated, a reliable one is, and is published once", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  await client.connect();
  await broker.steer("set", { swallow: ["publish"] });
  const plain = assert.rejects(client.publish("h.t", "plain"), ConnectionLost);
  const reliable = client.publish("h.t", "reliable", { reliable: true });
  await client.ping();
  await broker.steer("set", { swallow: [] });
  await cut(broker, client);
  await plain;
  assert.deepEqual([(await reliable).offset, (await reliable).duplicate], [2, true]);
  const history = [];
  for await (const { data } of client.history("h.t")) history.push(data);
  assert.deepEqual(history, ["plain", "reliable"]);
});

test("a reliable publish is repeated when it may succeed", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  await client.connect();
  await broker.steer("refuse", { op: "publish", error: { code: "unavailable", retry: true } });
  assert.equal((await client.publish("h.t", 1, { reliable: true })).offset, 1);
});

test("a publish that is too large is not sent", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  await client.connect();
  await assert.rejects(client.publish("t", "ü".repeat(40_000)), { code: "limit" });
  await assert.rejects(client.publish("t", undefined), TypeError);
});

// Tokens

test("a token is fetched for each connection, and before it expires", async (t) => {
  const broker = await model(t);
  await broker.steer("set", { expires_in: 0.3 });
  let count = 0;
  const client = broker.connect({ token: async () => `t${++count}` });
  await client.connect();
  while (count < 3) await new Promise((resolve) => setTimeout(resolve, 20));
  await client.ping();
  const { tokens } = await broker.steer("received");
  assert.deepEqual(tokens.filter(Boolean).slice(0, 2), ["t1", "t2"]);
  assert.equal(client.states.length, 2);
});

test("a refused token is fetched once more, and then it is the end", async (t) => {
  const broker = await model(t);
  await broker.steer("set", { valid_tokens: ["good"] });
  const tokens = ["bad", "good"];
  const client = broker.connect({ token: () => tokens.shift() });
  await client.connect();
  const hopeless = broker.connect({ token: () => "bad" });
  await assert.rejects(hopeless.connect(), { name: "CommandError", code: "unauthorized" });
});

test("a failing token function is tried again", async (t) => {
  const broker = await model(t);
  let count = 0;
  const client = broker.connect({
    token: () => {
      if (++count === 1) throw new RangeError("mine");
      return "good";
    },
  });
  await client.connect();
  const { error } = client.states.find(({ state }) => state === "waiting");
  assert.ok(error instanceof TokenError && error.cause instanceof RangeError);
});

// History and presence

test("history and presence page by themselves", async (t) => {
  const broker = await model(t);
  const client = broker.connect();
  await client.connect();
  await Promise.all(Array.from({ length: 30 }, (_, n) => client.publish("h.t", n)));
  const seen = [];
  for await (const { data } of client.history("h.t", { last: 10 })) seen.push(data);
  assert.deepEqual(seen, [...Array(30).keys()].slice(20));
  const others = [broker.connect(), broker.connect()];
  const [joined, left] = [[], []];
  const watching = client.subscribe("p.t", {
    info: 0,
    onJoin: ({ info }) => joined.push(info),
    onLeave: ({ info }) => left.push(info),
  });
  await watching.ready;
  for (const [n, other] of others.entries()) await other.subscribe("p.t", { info: n + 1 }).ready;
  const infos = [];
  for await (const { info } of client.presence("p.t")) infos.push(info);
  assert.deepEqual(infos, [0, 1, 2]);
  await others[0].close();
  assert.deepEqual((await take(watching, 3)).map(({ op }) => op), ["join", "join", "leave"]);
  assert.deepEqual(joined, [1, 2]);
  assert.equal(left.length, 1);
});

test("patterns match as in the protocol", () => {
  const pairs = [["a.*", "a.b"], ["a.*", "a.b.c"], [">", "a"], ["a.>", "a"], [">", "$s.a"], ["$s.>", "$s.a"], ["*", "a.b"]];
  assert.deepEqual(pairs.map((pair) => matches(...pair)), [true, false, true, false, false, true, false]);
});
