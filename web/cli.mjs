// The page's own verification under Node: `node web/cli.mjs BUNDLE POLICY [AT]` prints the result as JSON.
// It runs the very script of the built page (docs/verify.html, or the file PAGE names), so it needs no npm.
// With --batch it reads {"bundle": path, "policy": path, "at": seconds} from standard input, one a line.
// Exit codes: 0 accept or partial, 1 reject, 2 undecidable, 64 wrong call.

import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { runInThisContext } from "node:vm";

const page = process.env.PAGE ?? join(dirname(fileURLToPath(import.meta.url)), "../docs/verify.html");
const script = /<script>([\s\S]*)<\/script>/.exec(readFileSync(page, "utf8"))?.[1];
if (!script) throw new Error(`${page}: expected the built page`);
runInThisContext(script, { filename: page });

const EXIT = { accept: 0, partial: 0, reject: 1, undecidable: 2 };

function verify({ bundle, policy, at }) {
  const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(readFileSync(policy));
  return globalThis.verifyBundle(new Uint8Array(readFileSync(bundle)), text, at);
}

if (process.argv[2] === "--batch") {
  for await (const line of createInterface({ input: process.stdin })) {
    if (line.trim()) console.log(JSON.stringify(verify(JSON.parse(line))));
  }
} else if (process.argv.length < 4) {
  console.error("usage: node web/cli.mjs BUNDLE POLICY [AT in unix seconds]");
  process.exitCode = 64;
} else {
  const [bundle, policy, at = Math.floor(Date.now() / 1000)] = process.argv.slice(2);
  const result = verify({ bundle, policy, at: Number(at) });
  console.log(JSON.stringify(result, null, 2));
  process.exitCode = EXIT[result.verdict];
}
