/** reconnecting-websocket, over the WebSocket that Node has itself. A reconnect after the close would be a fault. */

import { createRequire } from "node:module";
import ReconnectingWebSocket from "reconnecting-websocket";
import { run, SUBPROTOCOL } from "./steps.mjs";

const [url, topic] = process.argv.slice(2);
console.log("version", createRequire(import.meta.url)("reconnecting-websocket/package.json").version);
const Reconnecting = ReconnectingWebSocket.default ?? ReconnectingWebSocket;
await run(() => new Reconnecting(url, SUBPROTOCOL, { WebSocket }), topic, console.log);
process.exit();
