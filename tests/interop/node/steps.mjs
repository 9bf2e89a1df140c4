/**
 * What each JavaScript library does with the broker, step by step, also in a browser. All have the WebSocket of the
 * browser's API. `report` takes the lines that tests/interop/python/steps.py describes.
 */

export const SUBPROTOCOL = "wsbroker.v1";

/** Milliseconds that the steps may take together. Far more than they need, also on a busy machine. */
const PATIENCE = 20_000;

const SMALL = { bid: 1.0843, name: "Zürich 🚀" };
/** Characters of the fragmented event: more than the write buffer of a library. */
const FRAGMENTED = 30_000;

/** `open()` gives a WebSocket that connects. `sendFragments(socket, parts)` is left out where the library makes none. */
export async function run(open, topic, report, sendFragments) {
  let step = "connect";
  const late = new Promise((_, reject) => setTimeout(reject, PATIENCE, new Error("timed out")));
  const steps = async () => {
    const talk = new Talk(open());
    const welcome = await talk.message(() => true);
    check(welcome.op === "welcome" && welcome.version === 1, `no welcome, but ${JSON.stringify(welcome)}`);
    check(talk.socket.protocol === SUBPROTOCOL, `the subprotocol is ${JSON.stringify(talk.socket.protocol)}`);
    report("ok connect");

    step = "subscribe";
    talk.socket.send(JSON.stringify({ op: "subscribe", id: 1, topic }));
    same(await talk.answer(1), { op: "ok", id: 1, topic });
    report("ok subscribe");

    step = "publish";
    talk.socket.send(publish(2, topic, SMALL));
    same(await talk.answer(2), { op: "ok", id: 2, receivers: 1, queued: 0, dropped: 0 });
    report("ok publish");

    step = "receive";
    await talk.event(topic, SMALL);
    report("ok receive");

    step = "large";
    const text = numbers(welcome.max_size - publish(3, topic, "").length);
    talk.socket.send(publish(3, topic, text));
    await talk.event(topic, text);
    report("ok large");

    if (sendFragments) {
      step = "fragments";
      const text = publish(4, topic, numbers(FRAGMENTED));
      sendFragments(talk.socket, [text.slice(0, 10_000), text.slice(10_000, 20_000), text.slice(20_000)]);
      await talk.event(topic, numbers(FRAGMENTED));
      report("ok fragments");
    }

    step = "close";
    talk.socket.close(1000);
    const { code } = await talk.closed;
    report(`ok close ${code}`);
  };
  try {
    await Promise.race([steps(), late]);
  } catch (error) {
    report(`failed ${step}: ${error}`.replaceAll("\n", " "));
  }
}

/** A connection, with the messages that came before somebody waited for them. */
class Talk {
  early = [];
  waiting = null;

  constructor(socket) {
    this.socket = socket;
    socket.addEventListener("message", ({ data }) => {
      this.early.push(JSON.parse(data));
      this.waiting?.resolve();
    });
    socket.addEventListener("error", ({ error, message }) => {
      this.waiting?.reject(error ?? new Error(message ?? "the connection failed"));
    });
    this.closed = new Promise((resolve) => socket.addEventListener("close", resolve));
    this.closed.then(({ code }) => this.waiting?.reject(new Error(`closed with ${code}`)));
  }

  /** Waits for the first message that fits. An error fails the step. */
  async message(fits) {
    for (;;) {
      const place = this.early.findIndex(fits);
      if (place !== -1) return this.early.splice(place, 1)[0];
      const error = this.early.find(({ op }) => op === "error");
      check(error === undefined, `an error came: ${JSON.stringify(error)}`);
      await new Promise((resolve, reject) => (this.waiting = { resolve, reject }));
    }
  }

  answer(id) {
    return this.message((message) => message.id === id);
  }

  async event(topic, data) {
    same(await this.message(({ op }) => op === "event"), { op: "event", topic, data });
  }
}

function publish(id, topic, data) {
  return JSON.stringify({ op: "publish", id, topic, data });
}

/** A text of this length which compression makes smaller, but not small: 0 1 2 3 … */
function numbers(length) {
  return Array.from({ length: Math.floor(length / 2) }, (_, number) => number).join(" ").slice(0, length);
}

function same(found, expected) {
  const text = JSON.stringify(found);
  check(text === JSON.stringify(expected), `another message came: ${text.slice(0, 200)}`);
}

function check(holds, otherwise) {
  if (!holds) throw new Error(otherwise);
}
