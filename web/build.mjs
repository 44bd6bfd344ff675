// Builds dist/verify.html: one file, the script and the style inside it, allowed by their hashes and nothing else.
// The same sources and lock give the same bytes. Not minified, so that whoever wants to can read what runs.

import { createHash } from "node:crypto";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const lock = JSON.parse(await readFile(join(here, "package-lock.json"), "utf8"));

const { outputFiles, metafile } = await build({
  absWorkingDir: here,
  preserveSymlinks: true, // a package is named by where it stands in here, wherever that is kept
  entryPoints: ["src/page/main.ts"],
  bundle: true,
  write: false,
  metafile: true,
  format: "iife",
  target: ["es2022"],
  charset: "ascii",
  legalComments: "none",
  logLevel: "warning",
});

const used = [...new Set(Object.keys(metafile.inputs).map((path) => /^node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(path)?.[1]))]
  .filter((name) => name !== undefined)
  .sort();
const notices = await Promise.all(used.map(notice));
const script = `/*\n${notices.join("\n")}*/\n${outputFiles[0].text}`;
const style = await readFile(join(here, "src/page/style.css"), "utf8");
const page = await readFile(join(here, "src/page/page.html"), "utf8");

const hash = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
const policy = [
  "default-src 'none'",
  "connect-src 'none'",
  `script-src ${hash(script)}`,
  `style-src ${hash(style)}`,
  "base-uri 'none'",
  "form-action 'none'",
  "require-trusted-types-for 'script'",
  "trusted-types 'none'",
].join("; ");

if (/<\/(script|style)/i.test(script) || /<\//.test(style)) throw new Error("the script or style would end its own element");
const filled = { POLICY: policy, STYLE: style, SCRIPT: script };
const html = page.replace(/\{\{([A-Z]+)\}\}/g, (_, name) => filled[name]);
await mkdir(join(here, "dist"), { recursive: true });
await writeFile(join(here, "dist/verify.html"), html);
console.log(`dist/verify.html: ${html.length} bytes, SHA-256 ${createHash("sha256").update(html).digest("hex")}`);

/** Whose code is inside, and under which terms: the text each package ships. */
async function notice(name) {
  const { version } = lock.packages[`node_modules/${name}`];
  const { license } = JSON.parse(await readFile(join(here, "node_modules", name, "package.json"), "utf8"));
  let terms = "";
  for (const file of ["LICENSE", "LICENSE.md", "LICENSE.txt", "CopyrightNotice.txt"]) {
    terms ||= await readFile(join(here, "node_modules", name, file), "utf8").catch(() => "");
  }
  return `Contains ${name} ${version} (${license}).\n\n${terms.replace(/\r/g, "").replaceAll("*/", "* /").trim()}\n\n`;
}
