/**
 * Why something was refused: one class, with the stable code that the command line has for it (docs/codes.md).
 *
 * A format refusal comes from a parser, an undecided one from something that is missing, a policy refusal from the
 * verifier's own file; everything else was checked and is not as it must be. Messages read
 * `<field>: expected <x>, got <y>`.
 */

export type Kind = "format" | "refused" | "undecided" | "policy";

export class Refusal extends Error {
  constructor(
    readonly kind: Kind,
    readonly code: string,
    message: string,
    readonly step: string | null = null,
  ) {
    super(message);
  }
}

/** Bytes from outside do not have the form they claim. */
export const malformed = (code: string, message: string): Refusal => new Refusal("format", code, message);

/** Something was checked and is not as it must be. `step` only where it is not the step that is running. */
export const refused = (code: string, message: string, step: string | null = null): Refusal =>
  new Refusal("refused", code, message, step);

/** Something needed to decide is missing. */
export const undecided = (code: string, message: string): Refusal => new Refusal("undecided", code, message);

/** The policy file cannot be used. */
export const unusable = (code: string, message: string): Refusal => new Refusal("policy", code, message);
