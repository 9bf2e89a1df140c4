/** React hooks: `useClient(url, options)` and `useTopic(topic, options)`, below a `ClientContext.Provider`. */

import { createContext, useContext, useEffect, useRef, useState } from "react";
import { Client } from "./wsbroker.js";

/** The client of the components below: `<ClientContext.Provider value={client}>`. */
export const ClientContext = createContext(null);

/** For each client the subscriptions that components share: topic → { subscription, users }. */
const shared = new WeakMap();

/**
 * The client of the context, and its state; or with a `url` one that lives as long as the component. The options count
 * when it is made.
 */
export function useClient(url, options) {
  const outer = useContext(ClientContext);
  const [own, setOwn] = useState(null);
  const [, setState] = useState("idle");
  useEffect(() => {
    if (url === undefined) return undefined;
    const client = new Client(url, options);
    setOwn(client);
    return () => {
      setOwn(null);
      client.close();
    };
  }, [url]);
  const client = url === undefined ? outer : own;
  useEffect(() => {
    if (client === null) return undefined;
    const look = () => setState(client.state);
    look();
    client.addEventListener("state", look);
    return () => client.removeEventListener("state", look);
  }, [client]);
  return { client, state: client?.state ?? "idle" };
}

/**
 * The newest event of a topic or pattern, and how many events were missed: `{ event, data, missed, state, error }`.
 * `onEvent` in the options is called with each event. Components with the same topic share one subscription, with the
 * options of the first. `client` in the options takes the place of the context's.
 */
export function useTopic(topic, { client: given, onEvent, ...options } = {}) {
  const outer = useContext(ClientContext);
  const client = given ?? outer;
  const [seen, setSeen] = useState(NOTHING);
  const handler = useRef(onEvent);
  handler.current = onEvent;
  useEffect(() => {
    if (!client) return undefined;
    setSeen(NOTHING);
    let subscription;
    try {
      subscription = enter(client, topic, options);
    } catch (error) {
      setSeen({ ...NOTHING, error, state: "ended" });
      return undefined;
    }
    const off = [
      subscription.on("event", (event) => {
        handler.current?.(event);
        setSeen((before) => ({ ...before, event, data: event.data, state: subscription.state }));
      }),
      subscription.on("gap", ({ missed }) => setSeen((before) => ({ ...before, missed: before.missed + (missed ?? 1) }))),
      subscription.on("error", (error) => setSeen((before) => ({ ...before, error, state: "ended" }))),
    ];
    return () => {
      for (const each of off) each();
      leave(client, topic);
    };
  }, [client, topic]);
  return seen;
}

const NOTHING = { event: null, data: undefined, missed: 0, state: "offline", error: null };

function enter(client, topic, options) {
  if (!shared.has(client)) shared.set(client, new Map());
  const topics = shared.get(client);
  let entry = topics.get(topic);
  if (!entry || entry.subscription.state === "ended") {
    entry = { subscription: client.subscribe(topic, options), users: 0 };
    topics.set(topic, entry);
  }
  entry.users += 1;
  return entry.subscription;
}

function leave(client, topic) {
  const topics = shared.get(client);
  const entry = topics.get(topic);
  if (!entry || --entry.users > 0) return;
  topics.delete(topic);
  entry.subscription.unsubscribe();
}
