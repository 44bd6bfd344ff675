/** The numerics profiles this version knows (`countermark.numerics`); a test compares the two. */

import { undecided } from "./errors.js";

export const CURRENT = "exact-v1";
const EXACT = {
  determinism: "exact",
  claims: ["run", "batch", "chunking", "prefill-is-decode", "hardware"],
};

export interface Profile {
  readonly determinism: string;
  readonly claims: readonly string[];
  readonly retired: string;
}

export const PROFILES: ReadonlyMap<string, Profile> = new Map([
  ["exact-v0", { ...EXACT, retired: "a draft that no release used" }],
  [CURRENT, { ...EXACT, retired: "" }],
]);

export const isRetired = (name: string): boolean => Boolean(PROFILES.get(name)?.retired);

/** Refuses `profile.retired`, undecided: every signature held, but nothing can compute the tokens again. */
export function refuseRetired(name: string): void {
  if (!isRetired(name)) return;
  const why = `retired (${PROFILES.get(name)!.retired}), its runner is gone`;
  const message = `profile: expected ${CURRENT}, got ${name}: ${why}; every signature and every other check held`;
  throw undecided("profile.retired", message);
}
