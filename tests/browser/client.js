/**
 * What the tests do with the browser's own WebSocket: send an object, await a message, await the close. It is in every
 * page before the test begins.
 */

/** Milliseconds until a test gives up. Far more than anything takes, also on a busy machine. */
const PATIENCE = 20_000;

window.connect = async (url, protocols = ["wsbroker.v1"]) => {
  const client = new Client(url, protocols);
  await client.opened;
  client.welcome = await client.next("welcome");
  return client;
};

class Client {
  /** What has come and was not asked for yet, and who waits for what. */
  messages = [];
  waiting = [];
  lastId = 0;

  constructor(url, protocols) {
    this.socket = new WebSocket(url, protocols);
    this.opened = this.soon("the opening", (resolve, reject) => {
      this.socket.onopen = () => resolve();
      this.socket.onerror = () => reject(new Error("refused"));
    });
    this.end = new Promise((resolve) => {
      this.socket.onclose = ({ code, reason, wasClean }) => resolve({ code, reason, wasClean });
    });
    this.socket.onmessage = ({ data }) => {
      if (typeof data !== "string") throw new Error("the broker sends text only");
      this.messages.push(JSON.parse(data));
      this.hand();
    };
  }

  /** `{ code, reason, wasClean }` of the close. */
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
      setTimeout(() => reject(new Error(`${what} did not come; there is ${JSON.stringify(this.messages)}`)), PATIENCE);
      executor(resolve, reject);
    });
  }
}
