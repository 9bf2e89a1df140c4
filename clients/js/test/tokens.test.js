/** Tokens against the real broker, whose address and secret are in BROKER and SECRET (tests/client/test_tokens.py). */

import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { after, test as declare } from "node:test";
import WebSocket from "ws";
import { Client, ConnectionClosed, TokenError } from "../wsbroker.js";
import { uncaught, until } from "./model.js";

const { BROKER, SECRET } = process.env;
const test = (name, work) => declare(name, { timeout: 20_000 }, work);

after(() => assert.deepEqual(uncaught, []));

const encode = (value) => Buffer.from(value).toString("base64url");

function token({ sub = "alice", roles = ["user"], ttl = 3600 } = {}) {
  const claims = JSON.stringify({ sub, roles, exp: Date.now() / 1000 + ttl });
  const signed = `${encode('{"alg":"HS256","typ":"JWT"}')}.${encode(claims)}`;
  return `${signed}.${createHmac("sha256", SECRET).update(signed).digest("base64url")}`;
}

function connect(t, given, options = {}) {
  const client = new Client(BROKER, { WebSocket, token: given, ...options });
  Object.assign(client, { states: [], errors: [] });
  client.addEventListener("state", ({ detail }) => client.states.push(detail));
  client.addEventListener("error", (event) => {
    event.preventDefault();
    client.errors.push(event.detail);
  });
  t.after(() => client.close());
  return client;
}

test("a token is shown in the handshake, as a subprotocol", async (t) => {
  const offered = [];
  class Watched extends WebSocket {
    constructor(url, protocols) {
      super(url, protocols);
      offered.push(protocols);
    }
  }
  const shown = token();
  const client = connect(t, shown, { WebSocket: Watched });
  await client.connect();
  assert.deepEqual(offered, [["wsbroker.v1", `bearer.${shown}`]]);
  assert.equal(client.welcome.identity, "alice");
  await client.subscribe("user.alice.>").ready;
  assert.equal((await client.publish("user.alice.a", 1)).receivers, 1);
});

test("a missing right ends a subscription and refuses a publish", async (t) => {
  const client = connect(t, token());
  await assert.rejects(client.subscribe("secret").ready, { code: "forbidden" });
  await assert.rejects(client.publish("secret", 1), { code: "forbidden" });
});

test("a token that does not verify closes the client, with the reason", async (t) => {
  await assert.rejects(connect(t, "wrong").connect(), { code: "unauthorized" });
});

test("a token that no subprotocol can hold is shown by auth", async (t) => {
  await assert.rejects(connect(t, "a/b=").connect(), { code: "unauthorized" });
});

test("a refused token is fetched again", async (t) => {
  const tokens = [token({ ttl: -10 }), token()];
  const client = connect(t, () => tokens.shift());
  await client.connect();
  await client.publish("chat.a", 1);
});

test("a client without a token is closed where the broker wants one", async (t) => {
  const client = connect(t, undefined);
  await client.connect();
  await assert.rejects(client.publish("chat.a", 1), { code: "unauthorized" });
  const { code, error } = await until(client, "closed");
  assert.equal(code, 4500);
  assert.ok(error instanceof ConnectionClosed);
});

test("a token is renewed before it expires", async (t) => {
  const started = Date.now();
  let count = 0;
  const client = connect(t, async () => token({ ttl: (count += 1) && 2 }));
  while (count < 3 || Date.now() < started + 2_500) await new Promise((resolve) => setTimeout(resolve, 20));
  await client.publish("chat.a", 1);
  assert.deepEqual(client.states.map(({ state }) => state), ["connecting", "connected"]);
});

test("a token that was not renewed ends the connection, and the next has a new one", async (t) => {
  let count = 0;
  const client = connect(t, () => {
    count += 1;
    if (count > 1 && !client.states.some(({ state }) => state === "waiting")) throw new RangeError("away");
    return token({ ttl: count === 1 ? 1.5 : 3600 });
  });
  const { code, delay } = await until(client, "waiting");
  assert.deepEqual([code, delay], [4501, 0]);
  await until(client, "connected");
  await client.publish("chat.a", 1);
  assert.ok(client.errors.length > 0);
});

test("an expired token that cannot be renewed closes the client", async (t) => {
  const client = connect(t, token({ ttl: 0.5 }));
  assert.equal((await until(client, "closed")).code, 4501);
});

test("a renewed token with fewer rights ends subscriptions", async (t) => {
  const tokens = [token({ roles: ["admin"], ttl: 1.5 })];
  const client = connect(t, () => tokens.shift() ?? token());
  const subscription = client.subscribe("secret");
  await subscription.ready;
  await assert.rejects(subscription[Symbol.asyncIterator]().next(), { code: "forbidden" });
  assert.equal(client.state, "connected");
});

test("a renewal for another identity is told, and tried again", async (t) => {
  const tokens = [token({ ttl: 1.5 }), token({ sub: "bob" }), token()];
  const client = connect(t, () => tokens.shift());
  while (tokens.length > 0) await new Promise((resolve) => setTimeout(resolve, 20));
  await client.ping();
  assert.equal(client.state, "connected");
  assert.deepEqual(client.errors.map(({ code }) => code), ["forbidden"]);
});

test("a failing token function is told with its cause", async (t) => {
  let count = 0;
  const client = connect(t, () => {
    count += 1;
    if (count === 1) throw new RangeError("mine");
    return token();
  });
  await client.connect();
  const { error } = client.states.find(({ state }) => state === "waiting");
  assert.ok(error instanceof TokenError && error.cause instanceof RangeError);
});
