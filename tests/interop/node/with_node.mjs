/** The WebSocket that Node has itself, from version 22 on. */

import { run, SUBPROTOCOL } from "./steps.mjs";

const [url, topic] = process.argv.slice(2);
console.log("version", process.versions.node);
await run(() => new WebSocket(url, SUBPROTOCOL), topic, console.log);
process.exit();
