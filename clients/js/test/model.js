/** Runs the model broker of the tests (tests/client/model.py), and steers it from another connection. */

import { spawn } from "node:child_process";
import { fileURLToPath } from "node:url";
import WebSocket from "ws";
import { Client } from "../wsbroker.js";

/** The WebSocket that the clients use: the one of `ws`, or with BUILT_IN_WEBSOCKET that of Node 22 and later. */
export const Socket = process.env.BUILT_IN_WEBSOCKET ? globalThis.WebSocket : WebSocket;

const ROOT = fileURLToPath(new URL("../../..", import.meta.url));

/** Errors that no call waited for, and rejections that nobody handled: every test ends with none. */
export const uncaught = [];
process.on("unhandledRejection", (error) => uncaught.push(error));

export async function model(t) {
  const child = spawn(process.env.PYTHON ?? "python3", ["-m", "tests.client.model"], {
    cwd: ROOT,
    stdio: ["pipe", "pipe", "inherit"],
  });
  const url = await new Promise((resolve) => child.stdout.once("data", (line) => resolve(String(line).trim())));
  const clients = [];
  const broker = {
    url,
    connect(options = {}) {
      const client = new Client(url, { WebSocket: Socket, ...options });
      client.states = [];
      client.errors = [];
      client.addEventListener("state", ({ detail }) => client.states.push(detail));
      client.addEventListener("error", (event) => {
        event.preventDefault();
        client.errors.push(event.detail);
      });
      clients.push(client);
      return client;
    },
    /** What `Broker.steer` understands. A new connection each time: some end all that there are. */
    async steer(what, data = null) {
      const socket = new WebSocket(url, "wsbroker.v1");
      const answer = await new Promise((resolve, reject) => {
        socket.on("error", reject);
        socket.on("message", (text) => {
          const message = JSON.parse(text);
          if (message.op === "welcome") socket.send(JSON.stringify({ op: "publish", id: 1, topic: `$test.${what}`, data }));
          if (message.id === 1) resolve(message);
        });
      });
      if (what !== "cut" && what !== "close") socket.close();
      return answer;
    },
    async commands(op) {
      const { commands } = await this.steer("received");
      return commands.filter((command) => command.op === op).map(({ id, ...rest }) => rest);
    },
  };
  t.after(async () => {
    await Promise.all(clients.map((client) => client.close()));
    child.stdin.end();
    await new Promise((resolve) => child.once("close", resolve));
  });
  return broker;
}

/** The next `detail` of a client's state that is this one. */
export function until(client, state) {
  return new Promise((resolve) => {
    const look = ({ detail }) => {
      if (detail.state !== state) return;
      client.removeEventListener("state", look);
      resolve(detail);
    };
    client.addEventListener("state", look);
  });
}

/** So many messages of a subscription. */
export async function take(subscription, count) {
  const found = [];
  for await (const message of subscription.messages()) {
    found.push(message);
    if (found.length === count) return found;
  }
  return found;
}

export const brief = (message) => (message.op === "event" ? message.data : message);
