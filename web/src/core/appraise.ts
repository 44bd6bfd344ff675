/**
 * Appraisal of evidence offline, steps 1 to 10: evidence and a policy in, a verdict out, at an explicit time.
 *
 * The steps, their order and their codes are the command line's. Two parts of step 8 are beyond this page and said so:
 * GPU measurements against reference manifests, and revocation of GPU certificates.
 */

import { type Bytes, equal, hex, includes } from "./bytes.js";
import { parseClaims, verifyBinding, verifyKeys } from "./claims.js";
import { parseEndorsements, verifyEndorsements } from "./endorsements.js";
import { refused } from "./errors.js";
import { parseBootLog, parseEventLog, replay } from "./eventlog.js";
import { parseEvidence } from "./evidence.js";
import { type Gpu, appraiseGpus, parseGpus } from "./gpu.js";
import { isRetired } from "./numerics.js";
import { INTEL_SGX_ROOT, type Policy, isSimulated } from "./policy.js";
import { parseQuote, quoteDigest } from "./quote.js";
import type { Steps, Verdict } from "./steps.js";
import { type Platform, verifyEventLog, verifyQuote, verifyRegisters, verifyRoot, verifyTd } from "./tdx.js";

const GPU_BEYOND =
  "GPU measurements against NVIDIA's reference manifests, and revocation of GPU certificates, are not checked here; " +
  "`countermark verify` checks them";

/** Refuses what the failing step says; the checks so far are in `steps`. */
export function appraise(encoded: Bytes, policy: Policy, now: number, steps: Steps): Verdict {
  const { step } = steps;
  const parsed = step("1", (detail) => {
    const evidence = parseEvidence(encoded);
    const quote = parseQuote(evidence.quote);
    const ccel = parseEventLog(evidence.ccel);
    const rtmr3Log = parseEventLog(evidence.rtmr3Log);
    const claims = parseClaims(evidence.claims);
    const endorsements = parseEndorsements(evidence.tdx);
    const gpus = parseGpus(evidence.gpu);
    detail(`${encoded.length} bytes; platform ${evidence.platform}; quote version ${quote.version}`);
    return { evidence, quote, ccel, rtmr3Log, claims, endorsements, gpus };
  });
  const { evidence, quote, ccel, claims, endorsements } = parsed;
  const { body } = quote;

  step("2", (detail) => {
    verifyRoot(quote, policy);
    verifyPlatform(evidence.platform, policy);
    detail(verifyEndorsements(endorsements, policy, now));
  });
  const tdx = step("3", (detail) => {
    const platform = verifyQuote(quote, endorsements, policy, now);
    detail(`${platform.tcbStatus}; advisories ${platform.advisories.join(", ") || "none"}`);
    return platform;
  });
  step("4", (detail) => detail(verifyTd(body, policy)));
  const [image, shape] = step("5", (detail) => {
    const found = verifyRegisters(body, policy, evidence.platform, claims.image_id, ccel, now);
    const [image, shape] = found;
    detail(`image ${hex(image.image_id)}, version ${image.version}, ${image.kind} image, machine ${shape.name}`);
    return found;
  });
  const boot = step("6", (detail) => {
    detail(verifyEventLog(body, ccel));
    const boot = parseBootLog(evidence.rtmr3Log);
    const replayed = replay(parsed.rtmr3Log.events)[3]!;
    if (!equal(replayed, body.rtmr3)) {
      throw refused("rtmr3.replay", `rtmr3: expected ${hex(replayed)} after its events, got ${hex(body.rtmr3)}`);
    }
    if (!equal(boot.imageId, image.image_id)) {
      const message = `image id in RTMR3: expected ${hex(image.image_id)}, got ${hex(boot.imageId)}`;
      throw refused("measurement.image_id", message);
    }
    detail("RTMR3 is exactly our boot events, up to system-ready");
    return boot;
  });
  step("7b", (detail) => {
    verifyBinding(evidence.claims, claims, body.report_data, boot);
    verifyKeys(evidence.keysArray, evidence.keys, claims);
    detail(`boot ${hex(claims.boot_id).slice(0, 16)}; ${Object.keys(evidence.keys).length} keys as measured`);
  });
  const gpus = step("8", (detail) => {
    const gpus = appraiseGpus(parsed.gpus, claims, boot.gpus, policy, now);
    for (const gpu of gpus) detail(`${gpu.name}, driver ${gpu.driver}, VBIOS ${gpu.vbios}`);
    detail(`mode ${policy.gpuMode}; reports signed, fresh and by the keys in RTMR3`);
    return gpus;
  });
  steps.skip("8", GPU_BEYOND, true, "GPU firmware against reference manifests, and revocation");
  if (policy.anyHardware) {
    steps.skip("9", `the policy accepts any machine; this is PPID ${hex(tdx.ppid)}`);
  } else {
    step("9", (detail) => {
      verifyHardware(tdx, gpus, policy);
      detail(`PPID ${hex(tdx.ppid)}`);
    });
  }
  step("10", (detail) => {
    verifyModel(boot, policy);
    detail(`weights ${hex(boot.weightsRoot)}; ${boot.profile}`);
    detail(`config ${hex(boot.config)}${policy.anyConfig ? " (the policy accepts any)" : ""}`);
  });
  steps.skip("11", "does not apply offline");
  return {
    simulated: isSimulated(policy) || evidence.platform !== "tdx",
    platform: evidence.platform,
    imageId: image.image_id,
    imageVersion: image.version,
    shape: shape.name,
    claims,
    boot,
    keys: evidence.keys,
    quoteDigest: quoteDigest(quote),
    tdx,
    gpus,
  };
}

function verifyPlatform(platform: string, policy: Policy): void {
  // The name is an assertion; the root is what decides. Evidence that calls itself genuine must not pass a simulated
  // root and the other way round.
  const genuine = equal(policy.tdxRoot, INTEL_SGX_ROOT);
  if (genuine !== (platform === "tdx")) {
    const wanted = genuine ? "tdx" : "a simulated platform";
    throw refused("quote.platform", `platform: expected ${wanted} under this root, got ${platform}`);
  }
}

function verifyHardware(platform: Platform, gpus: readonly Gpu[], policy: Policy): void {
  if (!includes(policy.ppids, platform.ppid)) {
    const message = `ppid: expected one of the ${policy.ppids.length} in the policy, got ${hex(platform.ppid)}`;
    throw refused("hardware.ppid", message);
  }
  const strange = gpus.find((gpu) => !includes(policy.gpuChips, gpu.chip));
  if (strange) {
    const message = `GPU chip: expected one of the ${policy.gpuChips.length} in the policy, got ${hex(strange.chip)}`;
    throw refused("hardware.gpu", message);
  }
}

function verifyModel(boot: Verdict["boot"], policy: Policy): void {
  if (!includes(policy.weightsRoots, boot.weightsRoot)) {
    const known = policy.weightsRoots.map(hex).join(", ") || "none";
    throw refused("weights.root", `weights root: expected one of ${known}, got ${hex(boot.weightsRoot)}`);
  }
  // A retired profile passes here: the last step has the last word on it.
  if (!isRetired(boot.profile) && !policy.numerics.includes(boot.profile)) {
    const known = policy.numerics.join(", ");
    throw refused("numerics.profile", `numerics: expected one of ${known}, got ${boot.profile}`);
  }
  if (!policy.anyConfig && !includes(policy.configs, boot.config)) {
    const known = policy.configs.map(hex).join(", ") || "none";
    throw refused("config.digest", `config: expected one of ${known}, got ${hex(boot.config)}`);
  }
}

