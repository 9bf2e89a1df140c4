/**
 * A client of wsbroker: it connects, reconnects, goes on where it was, and announces missed events.
 *
 *     import { Client } from "wsbroker";
 *     const client = new Client("wss://broker.example/ws");
 *     client.subscribe("prices.*").on("event", ({ topic, data }) => console.log(topic, data));
 *     const { receivers } = await client.publish("prices.eurusd", { bid: 1.0843 });
 *
 * It runs as it is, from a `<script type="module">` too. Times are in milliseconds, but for the protocol's own.
 */

const SUBPROTOCOL = "wsbroker.v1";

/** The first wait after a lost connection is up to this long, the longest up to that; the bound doubles in between. */
const FIRST_DELAY = 250;
const MAX_DELAY = 30_000;

/** How long a connection must last before the waits begin with the first again. */
const LASTED = 5_000;

/** How long the broker has to answer a `ping`, when nothing was heard of it or the network may have changed. */
const PROBE = 5_000;

/** Events that may be on their way to a subscription and not yet taken. */
const WINDOW = 256;

const MAX_ROUTES = 1_000;
const PAGE = 1_000;

/** From which state a client, and a subscription, may go to which. `#move` and `Subscription.move` hold to it. */
export const TRANSITIONS = {
  idle: ["connecting", "closed"],
  connecting: ["connected", "waiting", "closed"],
  connected: ["waiting", "closed"],
  waiting: ["connecting", "closed"],
  closed: [],
};
export const SUBSCRIPTION_TRANSITIONS = {
  offline: ["asked", "ended"],
  asked: ["replaying", "live", "offline", "ended"],
  replaying: ["live", "offline", "ended"],
  live: ["offline", "ended"],
  ended: [],
};

function check(table, from, to) {
  if (!table[from].includes(to)) throw new Error(`${from} → ${to}`);
  return to;
}

/** Anything that fails in this library. `code` is a word for programs, `retry` whether it may work a little later. */
export class WsbrokerError extends Error {
  code = "client";
  retry = false;
  constructor(message, fields) {
    super(message);
    Object.assign(this, fields);
    this.name = new.target.name;
  }
}

/** The broker answered a command with an error; `code` is the broker's, `retryAfter` in milliseconds where it gave it. */
export class CommandError extends WsbrokerError {}

/** The broker ended the connection for good: `closeCode` and `reason` are those of the close frame. */
export class ConnectionClosed extends WsbrokerError {
  code = "closed";
  constructor(closeCode, reason) {
    super(`the broker closed the connection: ${closeCode} ${reason}`.trim(), { code: "closed", closeCode, reason });
  }
}

/** The connection ended while a command was under way. Whether it was carried out is not known. */
export class ConnectionLost extends WsbrokerError {}

/** There is no connection, and the call did not want to wait for one. Nothing was sent. */
export class NotConnected extends WsbrokerError {}

/** No answer came in time. `sent` says whether the command was sent, so that it may have been carried out. */
export class TimeoutError extends WsbrokerError {}

/** The application's token function failed; `cause` is its error. */
export class TokenError extends WsbrokerError {}

/** The application closed this client. */
export class ClientClosed extends WsbrokerError {}

/** This client has a subscription to that topic or pattern. */
export class AlreadySubscribed extends WsbrokerError {}

const failure = (kind, code, message, fields) => new kind(message, { code, ...fields });
const gone = () => failure(ClientClosed, "client_closed", "the application closed this client");

/** Whether a subscription to `pattern` gets the events of `topic`: `*` is one token, `>` at the end one or more. */
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

/** Whether some topic is matched by both. */
function overlap(one, other) {
  const [left, right] = [one.split("."), other.split(".")];
  if (one.startsWith("$") !== other.startsWith("$")) return false;
  for (let place = 0; place < Math.min(left.length, right.length); place++) {
    const pair = [left[place], right[place]];
    if (pair.includes(">")) return true;
    if (pair[0] !== pair[1] && !pair.includes("*")) return false;
  }
  return left.length === right.length;
}

/** A sort key: the most specific pattern has the smallest. A name comes before `*` before `>`. */
const rank = (pattern) => pattern.split(".").map((token) => Math.max(0, ["*", ">"].indexOf(token) + 1)).join("");

/** Anything up to a bound that doubles with each attempt. */
const backOff = (attempts) => Math.random() * Math.min(MAX_DELAY, FIRST_DELAY * 2 ** (attempts - 1));

const gap = (topic, reason) => ({ op: "gap", topic, missed: null, reason });

/** One subscription, over as many connections as it takes. `Client.subscribe` makes it. */
export class Subscription {
  /** The topic or pattern. */
  topic;
  /** "offline", "asked", "replaying", "live" or "ended". */
  state = "offline";
  /** Why it has ended, if not by `unsubscribe` or `close`. */
  error = null;
  /** Resolved when the broker has confirmed it for the first time; rejected where it does not. */
  ready;

  #client;
  #handlers = new Map();
  #waiters = [];
  #gaps = [];
  #draining = false;
  #watched = false; // an iterator gets the errors

  /** For the client. */
  constructor(client, topic, { since, last, credit = WINDOW, ...options }) {
    this.#client = client;
    this.topic = topic;
    this.core = {
      options,
      start: since ? { since } : last === undefined ? {} : { last },
      window: credit,
      granted: 0, // events that the broker may still send
      held: 0, // events that came and were not taken
      doubt: 0, // events counted for a more specific subscription, that the broker may have counted for this one
      inbox: [],
      epoch: undefined,
      offset: undefined, // of the newest event that came
      top: -1, // the newest offset when the replay began
      confirmed: false,
      refusals: 0,
    };
    this.ready = new Promise((resolve, reject) => Object.assign(this.core, { resolve, reject }));
    this.ready.catch(() => {}); // not every application waits for it
  }

  /** The newest event that came, as `since` for another time; null where the topic keeps no history. */
  get position() {
    const { epoch, offset } = this.core;
    return epoch !== undefined && offset !== undefined ? { epoch, offset } : null;
  }

  /** Whether events that are published now come. */
  get live() {
    return this.state === "live" || this.state === "replaying";
  }

  /**
   * Calls `handler` with each "event", "gap", "live", "join", "leave", or with the "error" that ends the subscription.
   * An event counts as taken when the handler returns or, if that gives a promise, when it is settled. Returns a
   * function that takes the handler away.
   */
  on(type, handler) {
    const handlers = this.#handlers.get(type) ?? new Set();
    this.#handlers.set(type, handlers.add(handler));
    queueMicrotask(() => this.drain());
    return () => handlers.delete(handler);
  }

  /** Ends the subscription: iterators end, and events that were not taken are dropped. */
  unsubscribe() {
    this.#client.unsubscribe(this);
  }

  /** The events. An iteration takes them one by one, and the broker sends more only as they are taken. */
  [Symbol.asyncIterator]() {
    return this.#iterate((message) => message.op === "event");
  }

  /** Everything in its order: `op` is "event", "gap", "live", "join" or "leave". */
  messages() {
    return this.#iterate(() => true);
  }

  #iterate(wanted) {
    this.#watched = true;
    return {
      [Symbol.asyncIterator]() {
        return this;
      },
      next: async () => {
        for (;;) {
          const message = this.#take();
          if (message && wanted(message)) return { done: false, value: message };
          if (message) continue;
          if (this.state === "ended") {
            if (this.error) throw this.error;
            return { done: true, value: undefined };
          }
          await new Promise((resolve) => this.#waiters.push(resolve));
        }
      },
      return: async () => ({ done: true, value: undefined }),
    };
  }

  /** Takes the next message out of the inbox, and calls its handlers. */
  #take() {
    const item = this.core.inbox.shift();
    if (!item) return null;
    const { message, owner } = item;
    if (message.op === "gap") this.#gaps.push(message);
    if (message.op === "event") {
      message.gaps = this.#gaps;
      this.#gaps = [];
    }
    const under = this.#emit(message.op, message);
    const taken = () => owner && this.#client.taken(item);
    if (under.length > 0) Promise.allSettled(under).then(taken);
    else taken();
    return message;
  }

  /** For the client: something was put into the inbox, or the state has changed. */
  drain() {
    if (this.#handlers.get("event")?.size && !this.#draining) {
      this.#draining = true; // a handler may cause another message
      while (this.#take());
      this.#draining = false;
    }
    for (const resolve of this.#waiters.splice(0)) resolve();
  }

  /** For the client: the end. */
  end(error) {
    this.move("ended");
    this.error = error;
    this.core.reject(error ?? gone());
    this.drain();
    if (!error) return;
    if (this.#handlers.get("error")?.size) this.#emit("error", error);
    else if (!this.#watched) this.#client.report(error);
  }

  /** For the client: the one place where the state changes. */
  move(state) {
    this.state = check(SUBSCRIPTION_TRANSITIONS, this.state, state);
  }

  /** Calls handlers; one that throws stops nobody else. Returns the promises that they gave. */
  #emit(type, value) {
    const promises = [];
    for (const handler of [...(this.#handlers.get(type) ?? [])]) {
      try {
        const result = handler(value);
        if (typeof result?.then === "function") {
          promises.push(result);
          result.then(undefined, (error) => this.#client.report(error));
        }
      } catch (error) {
        this.#client.report(error);
      }
    }
    return promises;
  }
}

/**
 * A client of one broker. It is an EventTarget: "state" tells each state (`detail`: `state`, and with "waiting" `delay`,
 * `code`, `reason`), "error" each error that no call waits for (`detail`); one that nobody prevents is also reported as
 * an uncaught one is.
 */
export class Client extends EventTarget {
  #url;
  #token;
  #timeout;
  #WebSocket;
  #state = "idle";
  #welcome = {};
  #socket = null;
  #subscriptions = new Map();
  #ending = new Set(); // ended here, while the broker has confirmed no `unsubscribe` yet: it still sends their events
  #requests = new Map();
  #routes = new Map();
  #nextId = 1;
  #attempts = 0; // connections that failed since the last one that lasted
  #tokenRefusals = 0;
  #renewalFailures = 0;
  #tokenAfterOpen = false; // the last handshake failed, maybe for its token: `auth` would tell why
  #connectedAt = 0;
  #heardAt = 0;
  #retryAfter = null; // milliseconds, from `bye`
  #timer; // one for each state: for `welcome`, for silence, for the next attempt
  #renewal;
  #failure = null;
  #hidden = false; // in the back-forward cache
  #listeners = new AbortController();

  /**
   * Connects at once, unless `connect` is false. `token` is one, or a function that fetches one. `timeout` is how long
   * calls wait for their answer. `WebSocket` is for where there is none built in (`ws` on Node 20).
   */
  constructor(url, { token, timeout = 10_000, WebSocket = globalThis.WebSocket, connect = true } = {}) {
    super();
    if (!WebSocket) throw new TypeError("there is no WebSocket here: hand one in as an option");
    this.#url = String(url);
    this.#token = token;
    this.#timeout = timeout;
    this.#WebSocket = WebSocket;
    this.#watchPage();
    // Not at once: the caller shall be able to listen for the first state.
    if (connect) queueMicrotask(() => this.#state === "idle" && this.#connect());
  }

  /** "idle", "connecting", "connected", "waiting" or "closed". */
  get state() {
    return this.#state;
  }

  /** What the broker said of itself when the last connection began. */
  get welcome() {
    return this.#welcome;
  }

  /** Connects, at once where the client waits. The promise is for the connection; it is rejected if the client is closed. */
  connect() {
    if (this.#state === "idle" || this.#state === "waiting") this.#connect();
    return new Promise((resolve, reject) => {
      const look = () => {
        if (this.#state === "connected") resolve();
        else if (this.#state === "closed") reject(this.#failure);
        else return;
        this.removeEventListener("state", look);
      };
      this.addEventListener("state", look);
      look();
    });
  }

  /** Says goodbye with 1000, ends iterators, rejects all calls. The promise is for the end of the connection. */
  close() {
    const socket = this.#socket;
    if (this.#state !== "closed") this.#end(null);
    return new Promise((resolve) => {
      if (!socket?.addEventListener || socket.readyState === 3) resolve();
      else {
        socket.addEventListener("close", () => resolve());
        setTimeout(resolve, 2_000);
      }
    });
  }

  /**
   * Subscribes to a topic or pattern, now and after each reconnection. `credit` is how many events may be under way and
   * not taken; `onJoin` and `onLeave` are handlers, and ask for `presence`; the other options are the protocol's.
   * Throws AlreadySubscribed, or the error that closed the client.
   */
  subscribe(topic, options = {}) {
    this.#checkOpen();
    if (this.#subscriptions.has(topic)) {
      throw failure(AlreadySubscribed, "already_subscribed", `this client has a subscription to ${topic}: use that one`);
    }
    const { maxQueue: max_queue, onJoin, onLeave, presence = onJoin || onLeave ? true : undefined } = options;
    const renamed = { max_queue, ...options, presence, maxQueue: undefined };
    const subscription = new Subscription(this, topic, renamed);
    if (onJoin) subscription.on("join", onJoin);
    if (onLeave) subscription.on("leave", onLeave);
    this.#subscriptions.set(topic, subscription);
    if (this.#state === "connected") this.#ask(subscription);
    return subscription;
  }

  /**
   * Publishes one event, and gives the broker's receipt. With `reliable` (or a `dedup` of the application's) it is
   * repeated until the broker answers, which does not deliver it twice; otherwise a connection that is lost before the
   * answer rejects with ConnectionLost. Without a connection it waits up to `timeout`, or with `queue: false` not.
   */
  async publish(topic, data, { key, dedup, reliable = false, timeout, queue = true } = {}) {
    if (JSON.stringify(data) === undefined) throw new TypeError("the data is nothing that JSON can say");
    if (reliable) dedup ??= Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("");
    const repeat = dedup !== undefined;
    timeout ??= repeat ? Math.max(this.#timeout, 60_000) : this.#timeout;
    const { op, id, ...receipt } = await this.#request({ op: "publish", topic, key, dedup, data }, { repeat, timeout, queue });
    return { duplicate: false, ...receipt };
  }

  /** The kept events of a topic, the oldest first: after `since`, or the `last` ones, or all. */
  async *history(topic, { since, last } = {}) {
    if (!since) {
      const { epoch, offset } = await this.#read({ op: "history", topic, last: 1, limit: 1 });
      since = { epoch, offset: last === undefined ? 0 : Math.max(0, offset - last) };
    }
    for (;;) {
      const page = await this.#read({ op: "history", topic, since, limit: PAGE });
      if (page.epoch !== since.epoch) throw failure(CommandError, "epoch", `the history of ${topic} has begun anew`);
      for (const event of page.events) yield { topic, ...event };
      if (!page.more || page.events.length === 0) return;
      since = { ...since, offset: page.events.at(-1).offset };
    }
  }

  /** Who is subscribed to a topic: `session`, `identity`, `info`. */
  async *presence(topic) {
    let after;
    do {
      const page = await this.#read({ op: "presence", topic, after, limit: PAGE });
      yield* page.members;
      after = page.more;
    } while (after);
  }

  /** Asks the broker for an answer. */
  async ping() {
    await this.#read({ op: "ping" });
  }

  // For Subscription

  unsubscribe(subscription) {
    const { state, live, topic } = subscription;
    if (state === "ended") return;
    if (live) this.#ending.add(subscription);
    this.#finish(subscription, null);
    for (const item of subscription.core.inbox.splice(0)) this.taken(item);
    if (state === "offline" || this.#state !== "connected") return;
    const done = () => {
      // The broker has forgotten the events that it had queued. Broader subscriptions miss them too.
      if (!this.#ending.delete(subscription)) return;
      this.#routes.clear();
      this.#putBroader(gap(topic, "unsubscribed"));
    };
    this.#start({ op: "unsubscribe", topic }, { timeout: Infinity }, done, done);
  }

  /** Gives the credit of an event back to its owner, when all that got it have taken it. */
  taken({ owner, shares }) {
    if (!owner || --shares.left > 0) return;
    owner.core.held -= 1;
    this.#settle(owner, shares.matching);
  }

  report(error) {
    const event = new CustomEvent("error", { detail: error, cancelable: true });
    if (this.dispatchEvent(event)) (globalThis.reportError ?? console.error)(error);
  }

  // The connection

  async #connect() {
    clearTimeout(this.#timer);
    this.#retryAfter = null;
    this.#move("connecting");
    let token = this.#token;
    const attempt = (this.#socket = {}); // stands for the socket that will be
    const current = () => this.#socket === attempt && this.#state === "connecting";
    if (typeof token === "function") {
      try {
        token = await token();
      } catch (cause) {
        const error = failure(TokenError, "token", `the token function failed: ${cause}`, { cause, retry: true });
        if (current()) this.#lose(1006, error.message, error);
        return;
      }
      if (!current()) return;
    }
    const inHandshake = !this.#tokenAfterOpen && /^[\w.~+-]+$/.test(token ?? "");
    let socket;
    try {
      // A page cannot set headers: the token is a second subprotocol, which the broker does not echo.
      socket = this.#socket = new this.#WebSocket(this.#url, [SUBPROTOCOL, ...(inHandshake ? [`bearer.${token}`] : [])]);
    } catch (error) {
      this.#end(error); // an address that is none
      return;
    }
    const mine = (work) => (event) => socket === this.#socket && work(event);
    // A socket that was given up may still speak. Nobody listens then.
    socket.onmessage = mine(({ data }) => this.#receive(data, inHandshake ? null : token));
    socket.onclose = mine(({ code, reason }) => this.#lose(code, reason));
    // `close` follows; but not in every runtime where the handshake failed (Node 22).
    socket.onerror = mine(() => socket.readyState !== 1 && this.#lose(1006));
    this.#timer = setTimeout(() => this.#lose(1006, "the broker did not answer"), this.#timeout);
  }

  #lose(code, reason = "", error = null) {
    if (this.#state !== "connecting" && this.#state !== "connected") return;
    const socket = this.#socket;
    this.#socket = null;
    this.#tokenAfterOpen = this.#state === "connecting";
    if (this.#state === "connected" && performance.now() - this.#connectedAt >= LASTED) {
      this.#attempts = this.#tokenRefusals = 0;
    }
    this.#attempts += 1;
    clearTimeout(this.#timer);
    clearTimeout(this.#renewal);
    if (socket?.close) socket.close(1000);
    let delay = this.#retryAfter ?? backOff(this.#attempts);
    const refused = code === 4500 || code === 4501;
    if (refused && typeof this.#token === "function" && this.#tokenRefusals++ < 1) {
      delay = 0; // a fresh token may be accepted
    } else if (code >= 4500 && code <= 4999) {
      this.#end(error ?? new ConnectionClosed(code, reason));
      return;
    }
    this.#routes.clear();
    this.#ending.clear();
    this.#move("waiting", { delay, code, reason, ...(error && { error }) });
    for (const subscription of this.#subscriptions.values()) {
      clearTimeout(subscription.core.timer);
      if (subscription.state !== "offline") subscription.move("offline");
      subscription.core.granted = 0;
    }
    for (const request of [...this.#requests.values()]) {
      if (!request.sent) continue;
      if (request.repeat) request.sent = false;
      else {
        const words = `the connection was lost (${code} ${reason}); whether the command was carried out is not known`;
        request.reject(failure(ConnectionLost, "connection_lost", words, { retry: true }));
      }
    }
    if (this.#state === "waiting" && !this.#hidden) this.#timer = setTimeout(() => this.#connect(), delay);
  }

  /** Ends for good: by the application where `error` is null. */
  #end(error) {
    const socket = this.#socket;
    this.#socket = null;
    this.#failure = error ?? gone();
    clearTimeout(this.#timer);
    clearTimeout(this.#renewal);
    this.#listeners.abort();
    this.#move("closed", error ? { code: error.closeCode, reason: error.reason, error } : { code: 1000, reason: "" });
    for (const subscription of [...this.#subscriptions.values()]) this.#finish(subscription, error);
    for (const request of [...this.#requests.values()]) request.reject(this.#failure);
    if (socket?.close) socket.close(1000);
  }

  #receive(text, token) {
    this.#heardAt = performance.now();
    let message;
    try {
      message = JSON.parse(text);
    } catch {
      this.#lose(1006, "the broker sent a message that is not JSON");
      return;
    }
    const subscription = this.#subscriptions.get(message.topic);
    switch (message.op) {
      case "event":
        this.#event(message);
        break;
      case "ok":
      case "pong":
        this.#requests.get(message.id)?.resolve(message);
        break;
      case "error":
        this.#error(message, subscription);
        break;
      case "gap":
        this.#gap(message);
        break;
      case "live":
        if (subscription?.state !== "replaying") break;
        subscription.move("live");
        subscription.core.start = {};
        subscription.core.offset = Math.max(message.offset, subscription.core.offset ?? 0);
        this.#put(subscription, { message });
        break;
      case "join":
      case "leave":
        if (subscription?.live) this.#put(subscription, { message });
        break;
      case "welcome":
        this.#welcomed(message, token);
        break;
      case "bye":
        this.#retryAfter = message.retry_after_ms;
        break;
      // Other messages are of a later version of the broker.
    }
  }

  #welcomed(message, token) {
    if (this.#state !== "connecting") return;
    this.#welcome = message;
    if (token === undefined || token === null) {
      this.#open(message.expires_in);
      return;
    }
    this.#auth(token).then(
      ({ identity, expires_in }) => {
        message.identity = identity;
        this.#open(expires_in);
      },
      (error) => {
        if (error instanceof CommandError && !error.retry) this.#lose(4500, error.message, error);
        else this.#lose(1006, error.message, error);
      },
    );
  }

  #auth(token) {
    return this.#request({ op: "auth", token }, { timeout: this.#timeout, now: true });
  }

  #open(expiresIn) {
    if (this.#state !== "connecting") return;
    this.#connectedAt = performance.now();
    this.#planRenewal(expiresIn);
    this.#move("connected");
    for (const subscription of [...this.#subscriptions.values()]) this.#ask(subscription);
    for (const request of [...this.#requests.values()]) if (!request.sent) this.#submit(request);
    this.#listen();
  }

  #planRenewal(expiresIn) {
    clearTimeout(this.#renewal);
    this.#renewalFailures = 0;
    if (expiresIn === undefined || typeof this.#token !== "function") return;
    // Some time before, and not all clients whose tokens are of one moment at once. A longer timer would be none.
    const early = Math.min(30, expiresIn * (0.1 + Math.random() / 10));
    const delay = Math.max(FIRST_DELAY, (expiresIn - early) * 1000);
    this.#renewal = setTimeout(() => this.#renew(), Math.min(delay, 2 ** 31 - 1));
  }

  async #renew() {
    const socket = this.#socket;
    try {
      const token = await this.#token();
      if (socket === this.#socket) this.#planRenewal((await this.#auth(token)).expires_in);
    } catch (error) {
      if (socket !== this.#socket) return;
      this.report(error);
      this.#renewal = setTimeout(() => this.#renew(), backOff(++this.#renewalFailures));
    }
  }

  /**
   * A page does not see the broker's pings. So after a time without a message it asks, and a broker that does not answer
   * is given up: a laptop that slept, a network that changed. Timers may be late: they never end a connection unasked.
   */
  #listen() {
    clearTimeout(this.#timer);
    const silence = (this.#welcome.ping || 25) * 1000;
    const quiet = performance.now() - this.#heardAt;
    if (quiet < silence) this.#timer = setTimeout(() => this.#listen(), silence - quiet);
    else this.#probe();
  }

  #probe() {
    clearTimeout(this.#timer);
    const asked = performance.now();
    this.#send({ op: "ping", id: this.#nextId++ });
    this.#timer = setTimeout(() => {
      if (this.#heardAt >= asked) this.#listen();
      else this.#lose(1006, "the broker fell silent");
    }, Math.min(PROBE, this.#timeout));
  }

  /** The machine may be back online, or the page visible again: then there is no reason to wait. */
  #watchPage() {
    const { document } = globalThis;
    if (!globalThis.addEventListener || !document) return;
    const back = () => {
      if (this.#state === "waiting") this.#connect();
      else if (this.#state === "connected" && performance.now() - this.#heardAt > 1000) this.#probe();
    };
    const signal = { signal: this.#listeners.signal };
    addEventListener("online", back, signal);
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && back(), signal);
    document.addEventListener("resume", back, signal); // a tab that was frozen
    // A page with an open WebSocket is not kept in the back-forward cache, or its socket is closed there unseen.
    addEventListener("pagehide", ({ persisted }) => {
      this.#hidden = persisted;
      if (persisted) this.#lose(1001, "the page is in the back-forward cache");
      if (persisted) clearTimeout(this.#timer);
    }, signal);
    addEventListener("pageshow", ({ persisted }) => {
      this.#hidden = false;
      if (persisted) back();
    }, signal);
  }

  // Subscriptions

  #ask(subscription) {
    const { core, position } = subscription;
    const start = position ? { since: position } : core.start;
    core.granted = Math.max(0, core.window - core.held);
    subscription.move("asked");
    const command = { op: "subscribe", topic: subscription.topic, ...core.options, ...start, credit: core.granted };
    // No promise: it would be settled a moment later, and an event may directly follow the answer.
    this.#start(
      command,
      { timeout: Infinity },
      (answer) => this.#subscribed(subscription, answer, "since" in start || "last" in start),
      (error) => error instanceof CommandError && this.#refused(subscription, error),
    );
  }

  #subscribed(subscription, { epoch, offset = 0 }, replays) {
    const { core } = subscription;
    const replaying = replays && epoch !== undefined;
    const missed = core.confirmed && !replaying;
    // Another epoch: the numbering has begun anew, and no event of it has come.
    if (epoch !== core.epoch && core.offset !== undefined) core.offset = 0;
    core.epoch = epoch;
    if (epoch === undefined) Object.assign(core, { offset: undefined, start: {} });
    else if (!replays) core.offset = offset;
    core.top = replaying ? offset : -1;
    this.#routes.clear();
    if (subscription.state !== "asked") {
      this.#ending.add(subscription); // its `unsubscribe` is on its way
      return;
    }
    Object.assign(core, { refusals: 0, confirmed: true });
    subscription.move(replaying ? "replaying" : "live");
    core.resolve();
    if (missed) this.#put(subscription, { message: gap(subscription.topic, "disconnected") });
    // What the broker has queued for broader subscriptions cannot be told from the replay, and is not given to them.
    if (replaying) this.#putBroader(gap(subscription.topic, "overlap"));
    this.#grant(subscription);
  }

  #refused(subscription, error) {
    if (subscription.state !== "asked") return;
    const { core } = subscription;
    core.refusals += 1;
    if (error.code === "no_history" && subscription.position) {
      core.epoch = core.offset = undefined; // the next answer puts a gap for the missed events
      subscription.move("offline");
      this.#ask(subscription);
    } else if (error.retry || (error.code === "unauthorized" && typeof this.#token === "function" && core.refusals < 4)) {
      subscription.move("offline");
      const again = () => subscription.state === "offline" && this.#state === "connected" && this.#ask(subscription);
      core.timer = setTimeout(again, (error.retryAfter ?? 0) + backOff(core.refusals));
    } else this.#finish(subscription, error);
  }

  #finish(subscription, error) {
    this.#subscriptions.delete(subscription.topic);
    this.#routes.clear();
    clearTimeout(subscription.core.timer);
    subscription.end(error);
  }

  #event(message) {
    const route = this.#routes.get(message.topic) ?? this.#route(message.topic);
    if (!route) return; // it was on its way when the subscription ended
    const { owner, matching } = route;
    let receivers = matching;
    const { core } = owner;
    core.granted -= 1;
    if (message.offset !== undefined && core.epoch !== undefined) {
      if (message.offset <= core.offset) receivers = [];
      // For the others a replay is not new: it was published before the owner subscribed.
      else if (message.offset <= core.top) receivers = owner.live ? [owner] : [];
      core.offset = Math.max(message.offset, core.offset ?? 0);
    }
    if (receivers.length === 0) {
      this.#settle(owner, matching);
      return;
    }
    core.held += 1;
    const shares = { left: receivers.length, matching };
    for (const receiver of receivers) this.#put(receiver, { message: { ...message }, owner, shares });
  }

  /** Under which subscription the broker sends the events of a topic, and which get them. */
  #route(topic) {
    const matching = [...this.#subscriptions.values()].filter((each) => each.live && matches(each.topic, topic));
    const known = matching.concat([...this.#ending].filter((each) => matches(each.topic, topic)));
    if (known.length === 0) return null;
    const owner = known.reduce((best, each) => (rank(each.topic) < rank(best.topic) ? each : best));
    if (this.#routes.size >= MAX_ROUTES) this.#routes.clear();
    this.#routes.set(topic, { owner, matching });
    return this.#routes.get(topic);
  }

  #gap(message) {
    const owner = this.#subscriptions.get(message.topic);
    if (owner?.live) {
      const { core } = owner;
      // Or it would come after all, by recovery.
      if (core.epoch !== undefined && message.to >= 0) core.offset = Math.max(message.to, core.offset ?? 0);
      this.#put(owner, { message: { ...message } });
      if (owner.state === "replaying" && (message.to ?? 0) <= core.top) return; // it is not new for the others
    }
    this.#putBroader(message);
  }

  /** Broader subscriptions get the events of a more specific one too, and so have missed the same. */
  #putBroader(message) {
    for (const each of [...this.#subscriptions.values()]) {
      const broader = rank(each.topic) > rank(message.topic) && overlap(each.topic, message.topic);
      if (each.live && broader) this.#put(each, { message: { ...message } });
    }
  }

  #put(subscription, item) {
    subscription.core.inbox.push(item);
    subscription.drain();
  }

  /** Lets more events come, if half of the window is free. */
  #grant(subscription) {
    const { core, live, topic } = subscription;
    const add = core.window - core.granted - core.held;
    if (!live || add < Math.max(1, core.window >> 1)) return;
    core.granted += add;
    this.#send({ op: "credit", topic, add });
  }

  /**
   * An event is dealt with, and more may come. Events that were queued for a broader subscription when a more specific one
   * began come after its `ok`, and cannot be told from those of the specific one. The broker counts them for the broader
   * one, which would run out of credit. So `subscribe` sets the remaining credit now and then.
   */
  #settle(owner, matching) {
    this.#grant(owner);
    for (const { core, live, topic } of matching.filter((each) => each !== owner)) {
      if (!live || ++core.doubt < core.window >> 1) continue;
      core.doubt = 0;
      if (core.granted > 0) this.#send({ op: "subscribe", topic, credit: core.granted });
    }
  }

  // Commands

  #read(command) {
    return this.#request(command, { repeat: true, timeout: this.#timeout });
  }

  /** Sends a command and gives the answer. `now`: also before the state is "connected". */
  #request(command, options) {
    return new Promise((resolve, reject) => this.#start(command, options, resolve, reject));
  }

  #start(command, { repeat = false, timeout, queue = true, now = false }, resolve, reject) {
    this.#checkOpen();
    if (!queue && this.#state !== "connected") {
      throw failure(NotConnected, "not_connected", "there is no connection to the broker", { retry: true });
    }
    const id = this.#nextId++;
    const done = (settle) => (value) => {
      clearTimeout(request.timer);
      clearTimeout(request.again);
      this.#requests.delete(id);
      settle(value);
    };
    const request = { text: JSON.stringify({ ...command, id }), repeat, sent: false, tried: false, refusals: 0 };
    Object.assign(request, { resolve: done(resolve), reject: done(reject) });
    this.#requests.set(id, request);
    if (timeout < Infinity) request.timer = setTimeout(() => this.#timeOut(request, command.op), timeout);
    if (now || this.#state === "connected") this.#submit(request);
  }

  #submit(request) {
    const { text } = request;
    const most = this.#welcome.max_size;
    if (text.length * 3 > most && new TextEncoder().encode(text).length > most) {
      request.reject(failure(CommandError, "limit", `the command is larger than the ${most} bytes that the broker takes`));
      return;
    }
    request.sent = request.tried = true;
    this.#socket.send(text);
  }

  #timeOut(request, op) {
    const words = request.tried ? "was not answered in time; whether it was carried out is not known" : "was not sent in time";
    request.reject(failure(TimeoutError, "timeout", `\`${op}\` ${words}`, { sent: request.tried, retry: true }));
  }

  #error({ id, code, message, retry = false, retry_after_ms: retryAfter }, subscription) {
    const error = new CommandError(`${code}: ${message}`, { code, retry, retryAfter });
    const request = this.#requests.get(id);
    if (code === "unauthorized" && typeof this.#token === "function" && this.#state === "connected") {
      clearTimeout(this.#renewal);
      this.#renewal = setTimeout(() => this.#renew());
    }
    if (request && retry && request.repeat) {
      request.sent = false;
      request.refusals += 1;
      const again = () => this.#state === "connected" && !request.sent && this.#submit(request);
      request.again = setTimeout(again, (retryAfter ?? 0) + backOff(request.refusals));
    } else if (request) request.reject(error);
    else if (subscription && code === "forbidden") this.#finish(subscription, error);
    // Not reported: a late answer to a call that has timed out, and what the client sent by itself to a broker that is
    // shutting down.
    else if (id === undefined && code !== "draining") this.report(error);
  }

  #send(command) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(command));
  }

  #checkOpen() {
    if (this.#state === "closed") throw this.#failure;
  }

  #move(state, detail = {}) {
    this.#state = check(TRANSITIONS, this.#state, state);
    this.dispatchEvent(new CustomEvent("state", { detail: { state, ...detail } }));
  }
}
