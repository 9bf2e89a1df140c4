/** The hooks, in a real React, with a real connection. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { createElement, StrictMode } from "react";
import { act, create } from "react-test-renderer";
import { ClientContext, useClient, useTopic } from "../react.js";
import { model } from "./model.js";

globalThis.IS_REACT_ACT_ENVIRONMENT = true;
const settle = () => act(() => new Promise((resolve) => setTimeout(resolve, 50)));

test("components with one topic share a subscription, and the last one ends it", { timeout: 20_000 }, async (t) => {
  const broker = await model(t);
  const [client, other] = [broker.connect(), broker.connect()];
  const events = [];
  const Price = ({ name }) => {
    const { data, missed, state } = useTopic("prices.a", { onEvent: ({ data }) => events.push([name, data]) });
    return createElement("b", null, `${data} ${missed} ${state}`);
  };
  const App = ({ count }) =>
    createElement(
      StrictMode,
      null,
      createElement(ClientContext.Provider, { value: client }, ...[..."xy"].slice(0, count).map((name) => createElement(Price, { name, key: name }))),
    );
  let tree;
  await act(async () => (tree = create(createElement(App, { count: 2 }))));
  await client.connect();
  await settle();
  await other.publish("prices.a", 1);
  await settle();
  assert.deepEqual(tree.toJSON().map(({ children }) => children[0]), ["1 0 live", "1 0 live"]);
  assert.deepEqual(events, [["x", 1], ["y", 1]]);
  await broker.steer("send", { op: "gap", topic: "prices.a", missed: 3, reason: "overflow" });
  await settle();
  assert.deepEqual(tree.toJSON()[0].children, ["1 3 live"]);
  await act(async () => tree.update(createElement(App, { count: 0 })));
  await client.ping();
  assert.equal((await other.publish("prices.a", 2)).receivers, 0);
});

test("useClient tells the state of the client", { timeout: 20_000 }, async (t) => {
  const broker = await model(t);
  const client = broker.connect({ connect: false });
  const Shown = () => createElement("b", null, useClient().state);
  let tree;
  await act(async () => (tree = create(createElement(ClientContext.Provider, { value: client }, createElement(Shown)))));
  assert.deepEqual(tree.toJSON().children, ["idle"]);
  await client.connect();
  await settle();
  assert.deepEqual(tree.toJSON().children, ["connected"]);
});
