/** What the page says in plain words: of each step when it holds, of each verdict, of what nobody checked here. */

import type { Outcome } from "../core/verify.js";
import type { StepNumber } from "../core/steps.js";

export const WORDS: Record<StepNumber, string> = {
  "0": "The file is whole: no byte of it is missing, added or unaccounted for.",
  "1": "The evidence is well-formed: every byte of quote, logs, claims and certificates was read and understood.",
  "2": "The maker's statements about the processor are signed under the policy's root, current, and recent enough.",
  "3": "The processor's quote is correctly signed, and its security updates are at a level that the policy accepts.",
  "4": "The confidential machine cannot be debugged, profiled or moved, and runs on a module that the policy accepts.",
  "5": "The software that was started is an image that the policy trusts, register by register.",
  "6": "The start-up logs add up to exactly the measured values: nothing else was started, before or after.",
  "7b": "The appliance's keys and statements are those the quote vouches for. Who was connected is the file's own claim.",
  "8": "Every GPU signed a fresh report with the key that was measured at start-up, in confidential mode.",
  "9": "The processor and the GPUs are ones that the policy names.",
  "10": "The model's weights, its arithmetic and the configuration are ones that the policy accepts.",
  "11": "The network connection was the attested one.",
  "12": "The appliance had committed to this exact request.",
  "13": "It ran the software that was checked above, with the settings that were asked for.",
  "14": "That commitment stood in the signed log before the first word was written.",
  "15": "The receipt carries both signatures of the appliance, a classical and a post-quantum one.",
  "16": "The receipt is about this request, and its outcome is this request's.",
  "17": "The answer is the one that was signed: every token, its text, and where it ends.",
  "18": "Request and answer stand in one log, which has only grown.",
  "19": "The publisher of the software signed its measurements.",
  "20": "Others have seen this log and signed for it.",
  "21": "Others vouch for the time by which the log had this answer.",
};

/** Of a step that was skipped: why that says nothing against the answer, or what is left open. */
export const SKIPPED: Partial<Record<StepNumber, string>> = {
  "8": "The GPUs' firmware was not compared with their maker's published values, nor their certificates with lists of revoked ones.",
  "9": "The policy does not name machines, so any machine that its maker vouches for will do.",
  "11": "The network connection can only be checked by the client, while it is connected.",
  "12": "The request was left out of this file, so it was not compared with what the appliance had committed to. The rest of that commitment holds.",
  "13": "It ran the software that was checked above. The settings that were asked for were left out, so they were not compared.",
  "17": "Some of the answer was left out of this file. What is there is what was signed, and counts and end fit.",
  "19": "The publisher's signed measurements did not come along; those in the policy were used.",
  "21": "Others signed for the time by which the log had this answer. Their time stamps were not checked.",
  "20": "Nobody else is known to have seen this log, so that another version shown to others would not be noticed.",
};

export const VERDICTS: Record<Outcome, readonly [mark: string, heading: string, words: string]> = {
  accept: ["\u2713", "Verified", "Everything that this file claims was checked, and holds."],
  partial: [
    "\u2713",
    "Verified in part",
    "Everything that this page can check holds.",
  ],
  reject: ["\u2717", "Rejected", "Something is not as it must be. Do not rely on this file."],
  undecidable: ["?", "Undecidable", "Something that is needed to decide is missing. This is not a success."],
};

export const UNPROVEN = [
  "That the answer is true, or good advice.",
  "That the text is what its tokens spell, and the tokens what the model gives: `countermark replay` computes that again, with the weights.",
  "Who asked. The network connection can only be checked by the client that was connected.",
  "That the log was shown to others in the same form, as long as no witness has signed it.",
];
