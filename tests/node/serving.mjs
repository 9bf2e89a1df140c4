/** Node's `ws` with a broker that serves. Its pings come often, so that they can be awaited. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { connect, refusal, url } from "./client.mjs";

test("welcome comes first, the subprotocol is agreed, compression is not unless it is on", async () => {
  const { socket, welcome, messages } = await connect({ perMessageDeflate: true });
  assert.equal(welcome.version, 1);
  assert.equal(socket.protocol, "wsbroker.v1");
  assert.equal(socket.extensions, "");
  assert.deepEqual(messages, []);
  socket.close();
});

test("a client receives what it subscribed to, and a receipt for what it publishes", async () => {
  const client = await connect();
  assert.deepEqual(await client.ask({ op: "subscribe", topic: "node.>" }), { op: "ok", id: 1, topic: "node.>" });
  const receipt = await client.ask({ op: "publish", topic: "node.a.b", key: "k", data: { n: [1, null, "ü"] } });
  assert.deepEqual(receipt, { op: "ok", id: 2, receivers: 1, queued: 0, dropped: 0 });
  assert.deepEqual(await client.next("event"), { op: "event", topic: "node.a.b", key: "k", data: { n: [1, null, "ü"] } });
  client.socket.close();
});

test("one client receives what another publishes, in its order", async () => {
  const [one, other] = await Promise.all([connect(), connect()]);
  await one.ask({ op: "subscribe", topic: "order" });
  for (let data = 0; data < 1_000; data++) other.send({ op: "publish", topic: "order", data });
  for (let data = 0; data < 1_000; data++) assert.equal((await one.next("event")).data, data);
  one.socket.close();
  other.socket.close();
});

test("a client does not get its own events with echo false", async () => {
  const client = await connect();
  await client.ask({ op: "subscribe", topic: "echo", echo: false });
  assert.equal((await client.ask({ op: "publish", topic: "echo", data: 1 })).receivers, 0);
  client.socket.close();
});

test("a command may be a binary message, and may come in fragments with a ping in between", async () => {
  const client = await connect();
  client.socket.send(Buffer.from('{"op":"ping","id":"binary"}'), { binary: true });
  assert.deepEqual(await client.next("pong"), { op: "pong", id: "binary" });
  const pong = client.control("pong");
  client.socket.send('{"op":"ping",', { fin: false });
  client.socket.ping("between");
  client.socket.send('"id":"frag', { fin: false });
  client.socket.send('ments"}', { fin: true });
  assert.equal((await pong).toString(), "between");
  assert.deepEqual(await client.next("pong"), { op: "pong", id: "fragments" });
  client.socket.close();
});

test("a ping is answered with its own payload", async () => {
  const client = await connect();
  for (const payload of ["", "x", "ä€", "x".repeat(125)]) {
    const pong = client.control("pong");
    client.socket.ping(payload);
    assert.equal((await pong).toString(), payload);
  }
  client.socket.close();
});

test("the broker pings, and a client that answers stays", async () => {
  const client = await connect();
  for (let time = 0; time < 3; time++) await client.control("ping");
  assert.equal((await client.ask({ op: "ping" })).op, "pong");
  client.socket.close();
});

test("a client that answers no ping is closed", async () => {
  const client = await connect({ autoPong: false });
  assert.deepEqual(await client.closed, { code: 4001, reason: "ping_timeout" });
});

test("what is wrong is answered, and the connection stays open", async () => {
  const client = await connect();
  client.socket.send("{");
  assert.equal((await client.next("error")).code, "bad_json");
  for (const [command, code] of [
    [{ op: "dance" }, "bad_command"],
    [{ op: "publish", topic: "a" }, "bad_command"],
    [{ op: "publish", topic: "a.*", data: 1 }, "bad_topic"],
    [{ op: "publish", topic: "$a", data: 1 }, "bad_topic"],
    [{ op: "unsubscribe", topic: "a" }, "not_subscribed"],
  ]) {
    const answer = await client.ask(command);
    assert.deepEqual([answer.op, answer.code, answer.retry], ["error", code, false]);
  }
  assert.equal((await client.ask({ op: "ping" })).op, "pong");
  client.socket.close();
});

test("a large event passes, and one that is too large closes the connection", async () => {
  const client = await connect();
  const data = "x".repeat(client.welcome.max_size - 100);
  await client.ask({ op: "subscribe", topic: "large" });
  client.send({ op: "publish", topic: "large", data });
  assert.equal((await client.next("event")).data, data);
  client.send({ op: "publish", topic: "large", data: data + data });
  assert.equal((await client.closed).code, 1009);
});

test("text that is not UTF-8 closes the connection, and no subscriber notices", async () => {
  const [subscriber, publisher] = await Promise.all([connect(), connect()]);
  await subscriber.ask({ op: "subscribe", topic: "utf8" });
  const [before, after] = ['{"op":"publish","topic":"utf8","data":"', '"}'].map((part) => Buffer.from(part));
  publisher.socket.send(Buffer.concat([before, Buffer.from([0xed, 0xa0, 0x80]), after]), { binary: false });
  assert.equal((await publisher.closed).code, 1007);
  assert.equal((await subscriber.ask({ op: "publish", topic: "utf8", data: "good" })).receivers, 1);
  assert.equal((await subscriber.next("event")).data, "good");
  subscriber.socket.close();
});

test("a client closes with a code, and gets the same back", async () => {
  for (const [how, code] of [
    [[], 1005],
    [[1000], 1000],
    [[1000, "done"], 1000],
    [[3999, "x".repeat(123)], 3999],
  ]) {
    const client = await connect();
    client.socket.close(...how);
    assert.equal((await client.closed).code, code);
    assert.equal(client.error, undefined);
  }
});

test("a client that is cut off is no subscriber any more", async () => {
  const [one, other] = await Promise.all([connect(), connect()]);
  await one.ask({ op: "subscribe", topic: "cut" });
  one.socket.terminate();
  // The broker sees it when the kernel tells it, which nobody is told of.
  let receivers;
  do ({ receivers } = await other.ask({ op: "publish", topic: "cut", data: 0 }));
  while (receivers > 0);
  other.socket.close();
});

test("a handshake that is refused says why", async () => {
  for (const [address, protocol, options, status] of [
    [`${url}nowhere`, "wsbroker.v1", {}, 404],
    [url, "mqtt", {}, 400],
    [url, "wsbroker.v1", { origin: "https://foreign.example" }, 403],
  ]) {
    const answer = await refusal(address, protocol, options);
    assert.equal(answer.status, status);
    assert.match(answer.text, /\w/);
  }
});
