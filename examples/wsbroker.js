/**
 * A small client of the broker for browsers: the browser's own WebSocket, the wire protocol version 1, and the manners
 * of a good client: it comes back by itself, when the broker asked it to, and not at all when the broker said so.
 *
 *     const broker = new Broker({ onstate: (state) => console.log(state.name) });
 *     broker.subscribe("prices.*", (event) => console.log(event.topic, event.data));
 *     const receipt = await broker.publish("prices.eurusd", { bid: 1.0843 });   // { receivers: 3, queued: 0, dropped: 0 }
 */

const SUBPROTOCOL = "wsbroker.v1";

/** Milliseconds. The first wait after a lost connection, and the longest; it doubles in between. */
const FIRST_WAIT = 250;
const LONGEST_WAIT = 30_000;

/** Milliseconds that a connection has to last before the waits begin with the first again. */
const STEADY = 5_000;

/** Milliseconds that the broker has to answer a `ping`, and a new connection to say `welcome`. */
const ANSWER_TIME = 10_000;

/** A command that was answered with `error`. `code` is one of the protocol's error codes. */
export class CommandError extends Error {
  constructor({ code, message, retry }) {
    super(message);
    this.name = "CommandError";
    this.code = code;
    this.retry = retry;
  }
}

/** A command that cannot be answered, because there is no connection or it was lost. Whether it was done is not known. */
export class NotConnected extends Error {
  constructor() {
    super("there is no connection to the broker");
    this.name = "NotConnected";
  }
}

/** The broker of a page: `?broker=ws://…` in its address, or else port 8765 of the host that the page came from. */
export function brokerOfPage(location = window.location) {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  return new URLSearchParams(location.search).get("broker") ?? `${scheme}//${location.hostname}:8765/`;
}

/** Whether a topic belongs to a subscription: `*` stands for one token, `>` at the end for one or more. */
export function matches(pattern, topic) {
  if (topic.startsWith("$") && !pattern.startsWith("$")) return false;
  const wanted = pattern.split(".");
  const tokens = topic.split(".");
  for (const [place, token] of wanted.entries()) {
    if (token === ">") return tokens.length > place;
    if (token !== "*" && token !== tokens[place]) return false;
  }
  return wanted.length === tokens.length;
}

export class Broker {
  #url;
  #token;
  #onstate;
  #onerror;
  #socket = null;
  #open = false; // `welcome` has come
  #closed = false; // for good
  #subscriptions = new Map(); // pattern → { onevent, ongap, options }
  #waiting = new Map(); // id → { resolve, reject }
  #nextId = 1;
  #failures = 0; // connections lost or failed since the last steady one
  #openedAt = 0;
  #heardAt = 0;
  #retryAfter = null; // what `bye` asked for, milliseconds
  #timer = null; // the one timer: for `welcome`, then for silence, then for the next attempt
  #end = new AbortController(); // of the listener on the window

  /**
   * Connects at once, and again whenever the connection is lost.
   *
   * `onstate` is called with `{ name }`: "connecting"; "open"; "waiting", with `delay` in milliseconds; "closed", for
   * good, with the `code` and `reason` of the close. `onerror` is called with errors that no call waits for. `token` says
   * who this is: a function that gives a promise of a token, called for each connection.
   */
  constructor({ url = brokerOfPage(), token = null, onstate = () => {}, onerror = console.error } = {}) {
    this.#url = url;
    this.#token = token;
    this.#onstate = onstate;
    this.#onerror = onerror;
    const online = () => this.#socket === null && this.#connect();
    window.addEventListener("online", online, { signal: this.#end.signal });
    // Not at once, or `onstate` would be called before the caller has a name for this object.
    queueMicrotask(() => this.#closed || this.#connect());
  }

  /** Whether commands can be sent. */
  get open() {
    return this.#open;
  }

  /**
   * Calls `onevent` with each event (`{ topic, data, key }`) of a topic or pattern, and `ongap` with each announcement
   * of a loss; `onjoin` and `onleave` with members that come and go, and `onlive` when a replay is complete. `options` are the
   * protocol's: `max_queue`, `overflow`, `credit`, `echo`, `last`, `presence`, `info`. The subscription is made again after
   * every reconnection. On a topic with history it goes on where it was; its events have an `offset`. The promise is resolved
   * with the broker's answer to the first, or rejected with its error.
   */
  subscribe(topic, onevent, { ongap = ignore, onjoin = ignore, onleave = ignore, onlive = ignore, ...options } = {}) {
    return new Promise((resolve, reject) => {
      const callbacks = { onevent, ongap, onjoin, onleave, onlive };
      const subscription = { ...callbacks, options, resolve, reject, answered: false, since: null };
      this.#subscriptions.set(topic, subscription);
      if (this.#open) this.#renew(topic, subscription);
    });
  }

  /** Ends a subscription. Nothing is called for it any more from now on. */
  async unsubscribe(topic) {
    this.#subscriptions.delete(topic);
    if (this.#open) await this.#command({ op: "unsubscribe", topic });
  }

  /** Lets `add` more events come for a subscription that was made with `credit`. */
  credit(topic, add) {
    return this.#command({ op: "credit", topic, add });
  }

  /**
   * Publishes one event; `data` is anything that JSON can say. Gives the broker's receipt: `receivers`, `queued` and
   * `dropped`. Rejects with CommandError, or with NotConnected: nothing is kept here to be sent later.
   */
  publish(topic, data, { key } = {}) {
    return this.#command({ op: "publish", topic, key, data });
  }

  /** Gives the members of a topic with presence: `{ session, identity, info }`. */
  async members(topic) {
    const members = [];
    for (let after; ; ) {
      const page = await this.#command({ op: "presence", topic, after, limit: 1000 });
      members.push(...page.members);
      if (!page.more) return members;
      after = page.more;
    }
  }

  /** Closes the connection for good. */
  close() {
    this.#lose({ code: 1000, reason: "", forGood: true });
  }

  #connect() {
    clearTimeout(this.#timer);
    this.#retryAfter = null;
    this.#onstate({ name: "connecting" });
    if (this.#token === null) this.#start([SUBPROTOCOL]);
    else {
      const failed = (error) => this.#lose({ code: 1006, reason: `there is no token: ${error.message}` });
      this.#token().then((token) => this.#closed || this.#start([SUBPROTOCOL, `bearer.${token}`]), failed);
    }
  }

  #start(protocols) {
    const socket = new WebSocket(this.#url, protocols);
    this.#socket = socket;
    // A socket that was given up may still speak. Nobody listens then.
    socket.onmessage = ({ data }) => socket === this.#socket && this.#receive(JSON.parse(data));
    socket.onclose = ({ code, reason }) => {
      if (socket === this.#socket) this.#lose({ code, reason, forGood: code >= 4500 && code <= 4999 });
    };
    this.#timer = setTimeout(() => this.#lose({ code: 1006, reason: "the broker did not answer" }), ANSWER_TIME);
  }

  #receive(message) {
    this.#heardAt = performance.now();
    switch (message.op) {
      case "event":
        for (const [pattern, subscription] of this.#subscriptions) {
          if (!matches(pattern, message.topic)) continue;
          if (subscription.since !== null && pattern === message.topic) subscription.since.offset = message.offset;
          subscription.onevent(message);
        }
        break;
      case "live":
        this.#subscriptions.get(message.topic)?.onlive(message);
        break;
      case "join":
        this.#subscriptions.get(message.topic)?.onjoin(message);
        break;
      case "leave":
        this.#subscriptions.get(message.topic)?.onleave(message);
        break;
      case "gap":
        this.#subscriptions.get(message.topic)?.ongap(message);
        break;
      case "ok":
      case "pong":
        this.#answered(message.id)?.resolve(message);
        break;
      case "error": {
        const error = new CommandError(message);
        const command = this.#answered(message.id);
        if (command) command.reject(error);
        else this.#onerror(error);
        break;
      }
      case "welcome":
        this.#welcome(message);
        break;
      case "bye":
        this.#retryAfter = message.retry_after_ms;
        break;
      // Other messages are of a later version of the broker, which a client does not have to know.
    }
  }

  #welcome({ ping }) {
    this.#open = true;
    this.#openedAt = performance.now();
    for (const [topic, subscription] of this.#subscriptions) this.#renew(topic, subscription);
    this.#listen((ping || 25) * 1000);
    this.#onstate({ name: "open" });
  }

  #renew(topic, subscription) {
    const { last, ...options } = subscription.options;
    const since = subscription.since;
    const begin = since === null ? { last } : { since };
    const done = (answer) => {
      subscription.answered = true;
      // The answer may come behind the first events.
      if (answer.epoch !== undefined && (since === null || since.epoch !== answer.epoch)) {
        subscription.since = { epoch: answer.epoch, offset: last === undefined ? answer.offset : 0 };
      }
      subscription.resolve(answer);
    };
    const failed = (error) => {
      if (error instanceof NotConnected) return; // it is made again with the next connection
      this.#subscriptions.delete(topic);
      (subscription.answered ? this.#onerror : subscription.reject)(error);
    };
    this.#command({ op: "subscribe", topic, ...options, ...begin }).then(done, failed);
  }

  /**
   * The broker pings, but a page does not see that. So after `silence` milliseconds without a message the page asks,
   * and a broker that does not answer is given up: a laptop that slept, a network that changed.
   */
  #listen(silence) {
    clearTimeout(this.#timer);
    const quiet = performance.now() - this.#heardAt;
    if (quiet < silence) {
      this.#timer = setTimeout(() => this.#listen(silence), silence - quiet);
      return;
    }
    this.#timer = setTimeout(() => this.#lose({ code: 1006, reason: "the broker fell silent" }), ANSWER_TIME);
    this.#command({ op: "ping" }).then(
      () => this.#listen(silence),
      () => {}, // the connection was lost meanwhile, which has been dealt with
    );
  }

  #command(command) {
    if (!this.#open) return Promise.reject(new NotConnected());
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#socket.send(JSON.stringify({ ...command, id }));
    });
  }

  #answered(id) {
    const command = this.#waiting.get(id);
    this.#waiting.delete(id);
    return command;
  }

  #lose({ code, reason, forGood = false }) {
    if (this.#closed) return;
    const socket = this.#socket;
    const steady = this.#open && performance.now() - this.#openedAt >= STEADY;
    this.#socket = null;
    this.#open = false;
    this.#closed = forGood;
    clearTimeout(this.#timer);
    socket?.close(1000);
    for (const { reject } of this.#waiting.values()) reject(new NotConnected());
    this.#waiting.clear();
    if (forGood) {
      this.#end.abort();
      this.#onstate({ name: "closed", code, reason });
      return;
    }
    this.#failures = steady ? 1 : this.#failures + 1;
    const delay = this.#retryAfter ?? backOff(this.#failures);
    this.#timer = setTimeout(() => this.#connect(), delay);
    this.#onstate({ name: "waiting", delay, code, reason });
  }
}

function ignore() {}

/** Milliseconds to wait after so many failures: doubling, and by chance up to half as long, so that not all come at once. */
function backOff(failures) {
  const longest = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1));
  return longest * (0.5 + Math.random() / 2);
}

/** An `onstate` that writes the state of the connection into an element, and counts down to the next attempt. */
export function stateIn(element) {
  let countdown = null;
  return ({ name, delay, code, reason }) => {
    clearInterval(countdown);
    element.dataset.state = name;
    const words = { connecting: "connecting", open: "live", closed: `closed: ${reason || code}` }[name];
    if (words) {
      element.textContent = words;
      return;
    }
    const until = performance.now() + delay;
    const show = () => {
      const seconds = Math.ceil((until - performance.now()) / 1000);
      element.textContent = seconds > 0 ? `no connection, next try in ${seconds} s` : "no connection";
    };
    show();
    countdown = setInterval(show, 500);
  };
}
