/**
 * JSON from outside (RFC 8259), read so that two readers cannot see two values: no duplicate member, no NaN or
 * Infinity, no byte-order mark, UTF-8. An integer is a `bigint`, any other number a `number`, an object a `Map`.
 *
 * Ours, because `JSON.parse` keeps the last of two members and has one number type. `dump` is the compact form we sign.
 */

import { type Bytes, fromUtf8, utf8 } from "./bytes.js";
import { malformed } from "./errors.js";

export type JsonObject = Map<string, Json>;
export type Json = null | boolean | bigint | number | string | Json[] | JsonObject;

const MAX_DEPTH = 500;
const NUMBER = /-?(?:0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?/y;
const STRING = /"([^"\\\u0000-\u001f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\u0000-\u001f]*)*)"/y;
const ESCAPES: Record<string, string> = { b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };

/** The value of one JSON text that fills `data`; refuses `<what>.too_long` and `<what>.json`. */
export function load(data: Bytes, what: string, maxBytes: number): Json {
  if (data.length > maxBytes) {
    throw malformed(`${what}.too_long`, `${what}: expected at most ${maxBytes} bytes, got ${data.length}`);
  }
  const text = fromUtf8(data);
  const fail = (message: string) => malformed(`${what}.json`, `${what}: expected strict JSON, got ${message}`);
  if (text === null) throw fail("bytes that are not UTF-8");
  const parser = new Parser(text, fail);
  return parser.whole();
}

class Parser {
  private at = 0;

  constructor(
    private readonly text: string,
    private readonly fail: (message: string) => Error,
  ) {}

  whole(): Json {
    const value = this.value(0);
    this.space();
    if (this.at !== this.text.length) throw this.fail(`more text at ${this.at}`);
    return value;
  }

  private space(): void {
    while (" \t\n\r".includes(this.text[this.at] ?? "x")) this.at++;
  }

  private next(char: string): boolean {
    this.space();
    if (this.text[this.at] !== char) return false;
    this.at++;
    return true;
  }

  private value(depth: number): Json {
    if (depth > MAX_DEPTH) throw this.fail("deeper nesting than this reader follows");
    this.space();
    if (this.next("{")) return this.object(depth);
    if (this.next("[")) return this.array(depth);
    if (this.text[this.at] === '"') return this.string();
    for (const [word, value] of [["true", true], ["false", false], ["null", null]] as const) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    NUMBER.lastIndex = this.at;
    const found = NUMBER.exec(this.text);
    if (!found) throw this.fail(`no value at ${this.at}`);
    this.at += found[0].length;
    return found[1] === undefined && found[2] === undefined ? BigInt(found[0]) : Number(found[0]);
  }

  private object(depth: number): JsonObject {
    const out: JsonObject = new Map();
    if (this.next("}")) return out;
    do {
      this.space();
      const name = this.string();
      if (out.has(name)) throw this.fail("duplicate member name");
      if (!this.next(":")) throw this.fail(`no colon at ${this.at}`);
      out.set(name, this.value(depth + 1));
    } while (this.next(","));
    if (!this.next("}")) throw this.fail(`an object without end at ${this.at}`);
    return out;
  }

  private array(depth: number): Json[] {
    const out: Json[] = [];
    if (this.next("]")) return out;
    do out.push(this.value(depth + 1));
    while (this.next(","));
    if (!this.next("]")) throw this.fail(`a list without end at ${this.at}`);
    return out;
  }

  private string(): string {
    STRING.lastIndex = this.at;
    const found = STRING.exec(this.text);
    if (!found) throw this.fail(`no text at ${this.at}`);
    this.at += found[0].length;
    return found[1]!.replace(/\\(?:u([0-9a-fA-F]{4})|(.))/g, (_, code?: string, char?: string) =>
      code === undefined ? (ESCAPES[char!] ?? char!) : String.fromCharCode(Number.parseInt(code, 16)),
    );
  }
}

/** The one compact form we write: sorted members, no spaces, ASCII. */
export function dump(value: Json): string {
  if (value === null || typeof value === "boolean" || typeof value === "bigint") return String(value);
  if (typeof value === "number") throw new Error("our JSON has no fractions");
  if (typeof value === "string") return quote(value);
  if (Array.isArray(value)) return `[${value.map(dump).join(",")}]`;
  const members = [...value].sort(([left], [right]) => (left < right ? -1 : 1));
  return `{${members.map(([name, item]) => `${quote(name)}:${dump(item)}`).join(",")}}`;
}

function quote(text: string): string {
  const short: Record<string, string> = { "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t", '"': '"', "\\": "\\" };
  const escaped = text.replace(/["\\]|[^ -~]/g, (char) =>
    short[char] === undefined ? `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}` : `\\${short[char]}`,
  );
  return `"${escaped}"`;
}

export const dumpBytes = (value: Json): Bytes => utf8(dump(value));
