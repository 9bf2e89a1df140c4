export type State = "idle" | "connecting" | "connected" | "waiting" | "closed";
export type SubscriptionState = "offline" | "asked" | "replaying" | "live" | "ended";
export type Overflow = "drop_oldest" | "drop_newest" | "latest" | "replay" | "block" | "close";

/** A place in a topic's history: after the event with this offset. */
export interface Position {
  epoch: string;
  offset: number;
}

export interface Gap {
  op: "gap";
  topic: string;
  /** null where it is not known. */
  missed: number | null;
  /** The broker's word; or "disconnected", "unsubscribed", "overlap". */
  reason: string;
  from?: number;
  to?: number;
}

export interface BrokerEvent<T = any> {
  op: "event";
  topic: string;
  data: T;
  key?: string;
  offset?: number;
  /** What was missed directly before this event. */
  gaps: Gap[];
}

export interface Live {
  op: "live";
  topic: string;
  offset: number;
}

export interface Presence {
  op: "join" | "leave";
  topic: string;
  session: string;
  identity?: string;
  info?: unknown;
}

export type Message<T = any> = BrokerEvent<T> | Gap | Live | Presence;

export interface Member {
  session: string;
  identity?: string;
  info?: unknown;
}

export interface Receipt {
  receivers: number;
  queued: number;
  dropped: number;
  epoch?: string;
  offset?: number;
  duplicate: boolean;
}

export interface StateDetail {
  state: State;
  /** With "waiting": milliseconds until the next attempt. */
  delay?: number;
  code?: number;
  reason?: string;
  error?: Error;
}

export interface ClientOptions {
  token?: string | (() => string | Promise<string>);
  /** Milliseconds that calls wait for their answer. 10,000 by default. */
  timeout?: number;
  /** For where there is none built in: `ws` on Node 20. */
  WebSocket?: new (url: string, protocols: string[]) => any;
  /** Whether to connect at once. true by default. */
  connect?: boolean;
}

export interface SubscribeOptions {
  overflow?: Overflow;
  maxQueue?: number;
  /** Events that may be under way and not taken. 256 by default. */
  credit?: number;
  echo?: boolean;
  since?: Position;
  last?: number | "all";
  presence?: boolean;
  info?: unknown;
  /** These two ask for `presence`, and are called as handlers of "join" and "leave" are. */
  onJoin?: (member: Presence) => unknown;
  onLeave?: (member: Presence) => unknown;
}

export interface PublishOptions {
  key?: string;
  dedup?: string;
  reliable?: boolean;
  /** Milliseconds. */
  timeout?: number;
  queue?: boolean;
}

export declare class WsbrokerError extends Error {
  code: string;
  retry: boolean;
}
export declare class CommandError extends WsbrokerError {
  /** Milliseconds. */
  retryAfter?: number;
}
export declare class ConnectionClosed extends WsbrokerError {
  constructor(closeCode: number, reason: string);
  closeCode: number;
  reason: string;
}
export declare class ConnectionLost extends WsbrokerError {}
export declare class NotConnected extends WsbrokerError {}
export declare class TimeoutError extends WsbrokerError {
  sent: boolean;
}
export declare class TokenError extends WsbrokerError {}
export declare class ClientClosed extends WsbrokerError {}
export declare class AlreadySubscribed extends WsbrokerError {}

export interface SubscriptionEvents<T> {
  event: BrokerEvent<T>;
  gap: Gap;
  live: Live;
  join: Presence;
  leave: Presence;
  error: Error;
}

export declare class Subscription<T = any> implements AsyncIterable<BrokerEvent<T>> {
  private constructor();
  readonly topic: string;
  readonly state: SubscriptionState;
  readonly error: Error | null;
  readonly ready: Promise<void>;
  readonly position: Position | null;
  readonly live: boolean;
  on<K extends keyof SubscriptionEvents<T>>(type: K, handler: (value: SubscriptionEvents<T>[K]) => unknown): () => void;
  unsubscribe(): void;
  [Symbol.asyncIterator](): AsyncIterableIterator<BrokerEvent<T>>;
  messages(): AsyncIterableIterator<Message<T>>;
}

export interface ClientEvents {
  state: CustomEvent<StateDetail>;
  error: CustomEvent<Error>;
}

export declare class Client extends EventTarget {
  constructor(url: string | URL, options?: ClientOptions);
  readonly state: State;
  readonly welcome: Record<string, unknown>;
  connect(): Promise<void>;
  close(): Promise<void>;
  subscribe<T = any>(topic: string, options?: SubscribeOptions): Subscription<T>;
  publish(topic: string, data: unknown, options?: PublishOptions): Promise<Receipt>;
  history<T = any>(topic: string, options?: { since?: Position; last?: number }): AsyncGenerator<{
    topic: string;
    data: T;
    key?: string;
    offset: number;
  }>;
  presence(topic: string): AsyncGenerator<Member>;
  ping(): Promise<void>;
  addEventListener<K extends keyof ClientEvents>(
    type: K,
    listener: (event: ClientEvents[K]) => unknown,
    options?: boolean | AddEventListenerOptions,
  ): void;
}

/** From which state a client, and a subscription, may go to which. */
export declare const TRANSITIONS: Record<State, State[]>;
export declare const SUBSCRIPTION_TRANSITIONS: Record<SubscriptionState, SubscriptionState[]>;

/** Whether a subscription to `pattern` gets the events of `topic`. */
export declare function matches(pattern: string, topic: string): boolean;
