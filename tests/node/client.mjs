/** What the tests do with `ws`: connect, send an object, await a message, a ping, a pong, the close. */

import { once } from "node:events";
import { WebSocket } from "ws";

export const url = process.env.BROKER_URL;

/** Milliseconds until a test gives up. Far more than anything takes, also on a busy machine. */
const PATIENCE = 20_000;

/** A client that has been welcomed. `options` are those of `ws`. */
export async function connect(options) {
  const client = new Client(new WebSocket(url, "wsbroker.v1", options));
  client.welcome = await client.next("welcome");
  return client;
}

/** The answer to a handshake that is refused: `{ status, text }`. */
export async function refusal(address, protocol, options) {
  const socket = new WebSocket(address, protocol, options);
  const [request, response] = await once(socket, "unexpected-response", { signal: AbortSignal.timeout(PATIENCE) });
  const parts = await response.setEncoding("utf8").toArray();
  request.destroy();
  return { status: response.statusCode, text: parts.join("") };
}

class Client {
  messages = [];
  waiting = [];
  lastId = 0;

  constructor(socket) {
    this.socket = socket;
    socket.on("error", (error) => (this.error = error));
    socket.on("message", (data, isBinary) => {
      if (isBinary) throw new Error("the broker sends text only");
      this.messages.push(JSON.parse(data));
      this.hand();
    });
    this.end = new Promise((resolve) => {
      socket.on("close", (code, reason) => resolve({ code, reason: reason.toString() }));
    });
  }

  /** `{ code, reason }` of the close. */
  get closed() {
    return this.soon("the close", (resolve) => this.end.then(resolve));
  }

  send(command) {
    this.socket.send(JSON.stringify(command));
  }

  /** The next message with this `op`. Others stay for who asks for them. */
  next(op) {
    return this.take(op, (message) => message.op === op);
  }

  /** Sends a command with an id and gives the answer, `ok`, `pong` or `error`. */
  ask(command) {
    const id = ++this.lastId;
    this.send({ ...command, id });
    return this.take(`the answer to ${command.op}`, (message) => message.id === id);
  }

  /** The payload of the next control frame of a kind, "ping" or "pong". */
  async control(kind) {
    const [payload] = await once(this.socket, kind, { signal: AbortSignal.timeout(PATIENCE) });
    return payload;
  }

  take(what, fits) {
    return this.soon(what, (resolve) => {
      this.waiting.push({ fits, resolve });
      this.hand();
    });
  }

  hand() {
    this.waiting = this.waiting.filter(({ fits, resolve }) => {
      const place = this.messages.findIndex(fits);
      if (place === -1) return true;
      resolve(...this.messages.splice(place, 1));
      return false;
    });
  }

  soon(what, executor) {
    return new Promise((resolve, reject) => {
      const late = () => reject(new Error(`${what} did not come; there is ${JSON.stringify(this.messages)}`));
      const timer = setTimeout(late, PATIENCE);
      const done = (value) => {
        clearTimeout(timer);
        resolve(value);
      };
      executor(done);
    });
  }
}
