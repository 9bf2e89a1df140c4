/** Node's `ws` with a broker that agrees to compression. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { connect } from "./client.mjs";

const TEXT = "much of the same, much of the same, and a ☃".repeat(200);

/** Bytes that have come from the broker so far. */
const received = ({ socket }) => socket._socket.bytesRead;

test("an event comes compressed, and is what was published compressed", async () => {
  const client = await connect({ perMessageDeflate: { threshold: 0 } });
  assert.equal(client.socket.extensions, "permessage-deflate");
  await client.ask({ op: "subscribe", topic: "compressed" });
  const before = received(client);
  for (let number = 0; number < 50; number++) client.send({ op: "publish", topic: "compressed", data: [number, TEXT] });
  for (let number = 0; number < 50; number++) {
    assert.deepEqual((await client.next("event")).data, [number, TEXT]);
  }
  assert.ok(received(client) - before < 50 * 1_000, "a tenth of what the events are");
  client.socket.close();
});

test("a client that did not agree, or to a smaller window, gets it as it is", async () => {
  const clients = await Promise.all([
    connect({ perMessageDeflate: false }),
    connect({ perMessageDeflate: { serverMaxWindowBits: 10 } }),
    connect({ perMessageDeflate: true }),
  ]);
  for (const client of clients) await client.ask({ op: "subscribe", topic: "mixed" });
  const before = clients.map(received);
  clients[0].send({ op: "publish", topic: "mixed", data: TEXT });
  for (const client of clients) assert.equal((await client.next("event")).data, TEXT);
  const sizes = clients.map((client, i) => received(client) - before[i]);
  assert.ok(sizes[0] > TEXT.length && sizes[1] > TEXT.length && sizes[2] < 1_000, sizes.join());
  for (const client of clients) client.socket.close();
});

test("what inflates beyond max_size closes the connection with 1009", async () => {
  const client = await connect({ perMessageDeflate: { threshold: 0 } });
  client.socket.send(" ".repeat(client.welcome.max_size + 1));
  assert.equal((await client.closed).code, 1009);
});
