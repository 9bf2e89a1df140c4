/** The JavaScript client as the chaos test drives it. See subject.py, which is the same in Python. */

import { createInterface } from "node:readline";
import WebSocket from "../../clients/js/node_modules/ws/wrapper.mjs";
import { Client, TimeoutError } from "../../clients/js/wsbroker.js";

const CREDIT = 16;
const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);
process.on("unhandledRejection", (error) => say({ uncaught: String(error?.stack ?? error) }));
process.on("uncaughtException", (error) => say({ uncaught: String(error?.stack ?? error) }));

class Round {
  pending = 0;
  errors = [];

  constructor(url, topics) {
    this.client = new Client(url, { WebSocket, timeout: 2_000 });
    this.client.addEventListener("error", (event) => {
      event.preventDefault();
      say({ uncaught: String(event.detail) });
    });
    for (const topic of topics) {
      // Of `n.…` so few events wait at the broker that it must drop some.
      const options = topic.startsWith("n.") ? { credit: 4, maxQueue: 8 } : { credit: CREDIT };
      this.wait(this.read(this.client.subscribe(topic, options)));
    }
  }

  /** Counts what is not settled. */
  wait(promise) {
    this.pending += 1;
    promise.catch((error) => this.errors.push(String(error))).finally(() => (this.pending -= 1));
  }

  async read(subscription) {
    await subscription.ready;
    say({ ready: subscription.topic });
    for await (const { op, topic, data, missed, reason } of subscription.messages()) {
      if (op === "event") say({ sub: subscription.topic, topic, data });
      else if (op === "gap") say({ sub: subscription.topic, gap: topic, missed, reason });
    }
  }

  async publish(topic, number, reliable) {
    let outcome = "ok";
    try {
      await this.client.publish(topic, number, reliable ? { reliable, timeout: 20_000 } : {});
    } catch (error) {
      outcome = error instanceof TimeoutError ? (error.sent ? "unknown" : "no") : error.code;
    }
    say({ published: number, outcome });
  }

  async end() {
    await this.client.close();
    for (let turn = 0; turn < 50 && this.pending > 0; turn++) await new Promise((resolve) => setTimeout(resolve, 20));
    say({ ended: true, pending: this.pending, errors: this.errors });
  }
}

let current = null;
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  if (command.do === "round") current = new Round(command.url, command.topics);
  else if (command.do === "publish") current.wait(current.publish(command.topic, command.data, command.reliable));
  else if (command.do === "end") {
    await current.end();
    current = null;
  } else if (command.do === "memory") {
    await new Promise((resolve) => setTimeout(resolve, 50));
    globalThis.gc();
    say({ objects: process.memoryUsage().heapUsed, alive: [] });
  }
}
process.exit(0);
