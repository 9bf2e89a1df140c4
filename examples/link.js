/** What the pages share: where the broker is, and the state of the connection in words. The client is clients/js. */

import { Client } from "./wsbroker.js";

/** The broker of a page: `?broker=ws://…` in its address, or else port 8765 of the host that the page came from. */
export function brokerOfPage(location = window.location) {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  return new URLSearchParams(location.search).get("broker") ?? `${scheme}//${location.hostname}:8765/`;
}

/**
 * A client of the page's broker, which writes its state into an element, and counts down to the next attempt.
 * `options` are those of the client.
 */
export function clientIn(element, options = {}) {
  const client = new Client(brokerOfPage(), options);
  let countdown = null;
  client.addEventListener("state", ({ detail: { state, delay, code, reason } }) => {
    clearInterval(countdown);
    element.dataset.state = state;
    const words = { connecting: "connecting", connected: "live", closed: `closed: ${reason || code}` }[state];
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
  });
  return client;
}
