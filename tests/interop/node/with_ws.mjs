/** ws, which makes fragments. */

import { createRequire } from "node:module";
import { WebSocket } from "ws";
import { run, SUBPROTOCOL } from "./steps.mjs";

const [url, topic] = process.argv.slice(2);
console.log("version", createRequire(import.meta.url)("ws/package.json").version);
await run(() => new WebSocket(url, SUBPROTOCOL), topic, console.log, (socket, parts) => {
  parts.forEach((part, place) => socket.send(part, { fin: place === parts.length - 1 }));
});
process.exit();
