/** undici's WebSocket. */

import { createRequire } from "node:module";
import { WebSocket } from "undici";
import { run, SUBPROTOCOL } from "./steps.mjs";

const [url, topic] = process.argv.slice(2);
console.log("version", createRequire(import.meta.url)("undici/package.json").version);
await run(() => new WebSocket(url, SUBPROTOCOL), topic, console.log);
process.exit();
