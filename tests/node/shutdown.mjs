/** Node's `ws` with a broker that is told to shut down. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { connect } from "./client.mjs";

test("what was sent before is done, then comes bye, then the close", async () => {
  const [one, other] = await Promise.all([connect(), connect()]);
  await one.ask({ op: "subscribe", topic: "end" });
  const receipts = [];
  for (let data = 0; data < 10; data++) receipts.push(other.ask({ op: "publish", topic: "end", data }));
  await Promise.all(receipts);
  process.kill(Number(process.env.BROKER_PID), "SIGTERM");
  for (const client of [one, other]) {
    const bye = await client.next("bye");
    assert.match(bye.reason, /\w/);
    assert.ok(bye.retry_after_ms >= 0);
    const { code, reason } = await client.closed;
    assert.equal(code, 1001);
    assert.match(reason, /\w/);
    assert.equal(client.error, undefined);
  }
  const events = one.messages.filter(({ op }) => op === "event");
  assert.deepEqual(events.map(({ data }) => data), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
});
