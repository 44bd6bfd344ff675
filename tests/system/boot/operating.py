"""What an operator and a client do before a machine boots, with the commands that docs/measurements.md names."""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from booted import FIRMWARE, IMAGES, ROOT, SHAPE, SIM_STATE, Disks, made, program
from mutations import copied

import paritymodels

MEASURE: Final = "countermark_measurements.cli"
CLIENT: Final = "countermark.cli"
DISKS: Final = ROOT / "image" / "disks"
CONFIG: Final = """[node]
operator = "boot.test.example"
listen = "0.0.0.0:8443"
[platform]
name = "vtpm"
state = "/usr/lib/countermark/sim"
[weights]
dir = "/run/countermark/weights"
root = "{root}"
[log]
dir = "/run/countermark/log"
"""
ANY_CONFIG: Final = "any = true  # true: whatever the operator configured; the verdict names it\ndigests = []"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator's folder.

    `policy` accepts the test image, SmolLM2 (`real`), a model of two layers (`small`, for boots whose answers do not
    matter) and both configs; nothing else. `other` are weights that it does not accept.
    """

    folder: Path
    smollm2: Path

    @property
    def policy(self) -> Path:
        return self.folder / "policy.toml"

    @property
    def public(self) -> Path:
        return self.folder / "public"

    def disks(self, name: str, log: Path) -> Disks:
        """The disks that the operator made for one of the models, with an empty log disk at `log`."""
        return Disks(
            root=IMAGES / "test-cpu" / "disk.raw",
            weights=self.folder / f"{name}.weights.raw",
            config=self.folder / f"{name}.config.raw",
            log=copied(self.folder / "log.raw", log),
        )

    def publish(self, image: Path, *more: str) -> Path:
        """Predict, sign and publish the image that was built in this folder; where its manifest is."""
        name = image.name
        prediction, release = self.folder / f"{name}.prediction.json", self.folder / f"{name}.json"
        disk = ("--disk", image / "disk.raw", "--firmware", FIRMWARE, "--shape", SHAPE, "--platform", "vtpm")
        made(MEASURE, "predict", *disk, "--out", prediction)
        signed = ("--image", image / "image.json", "--keys", self.folder / "keys", "--out", release)
        with (self.folder / "publishing").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one publisher, several test processes
            before = set(self.public.glob("manifests/*.json"))
            made(MEASURE, "manifest", "--prediction", prediction, *signed, "--publish", self.public, *more)
            (manifest,) = set(self.public.glob("manifests/*.json")) - before
        return manifest

    def pin_arguments(self, manifest: Path, policy: Path) -> tuple[str | Path, ...]:
        """`countermark policy pin` with the keys that a client got from the publisher."""
        signers = (self.folder / "keys" / "signers").read_text().split()
        named = [argument for signer in signers for argument in ("--signer", signer)]
        proof = ("--proof", manifest.with_suffix(".tlog-proof"), "--log", self.folder / "keys" / "vkeys")
        return "policy", "pin", manifest, "--policy", policy, *proof, *named


def prepare(operator: Operator) -> None:
    """Everything up to the first boot. The measurements are published before any machine has run the image."""
    folder = operator.folder
    assert (IMAGES / "test-cpu" / "disk.raw").is_file(), f"{IMAGES}/test-cpu: no image; run `make image` first"
    artefacts = {"real": operator.smollm2}
    for name, recipe in (("small", paritymodels.RECIPES[0]), ("other", paritymodels.RECIPES[4])):
        artefacts[name] = folder / name
        paritymodels.write(recipe, folder / recipe.name)
        made("countermark_appliance.cli", "weights", "build", folder / recipe.name, artefacts[name])
    for name, artefact in artefacts.items():
        (folder / f"{name}.toml").write_text(CONFIG.format(root=root_of(artefact)))
        program(DISKS, "weights", artefact, folder / f"{name}.weights.raw")
        program(DISKS, "config", folder / f"{name}.toml", folder / f"{name}.config.raw")
    program(DISKS, "log", folder / "log.raw", "--size", "64")
    made(MEASURE, "keys", "new", folder / "keys", "--log", "boot.test.example/measurements")
    _policy(operator, operator.publish(IMAGES / "test-cpu"), artefacts)


def _policy(operator: Operator, manifest: Path, artefacts: dict[str, Path]) -> None:
    roots = {"tdx": "root.der", "gpu": "gpu-root.der", "rim": "rim-root.der"}
    named = [
        argument
        for root, file in roots.items()
        for argument in (f"--simulated-{root}-root", hashlib.sha256((SIM_STATE / file).read_bytes()).hexdigest())
    ]
    text = made(CLIENT, "policy", "new", "--profile", "test", *named).out
    accepted = ("real", "small")
    digests = [hashlib.sha256((operator.folder / f"{name}.toml").read_bytes()).hexdigest() for name in accepted]
    assert text.count(ANY_CONFIG) == 1
    operator.policy.write_text(text.replace(ANY_CONFIG, f"any = false\ndigests = {json.dumps(digests)}"))
    for name in accepted:
        weights = ("--weights", root_of(artefacts[name]))
        made(CLIENT, *operator.pin_arguments(manifest, operator.policy), *weights)


def next_release(folder: Path) -> Path:
    """The test image with another version in its os-release, built from a clone of the repository; its folder."""
    clone, target = folder / "repository", folder / "next"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], check=True, timeout=120)
    with (clone / "image/rootfs/common/usr/lib/os-release").open("a") as file:
        file.write("VERSION=next\n")
    built = ("--kind", "test", "--sim-state", SIM_STATE, "--cache", ROOT / "image" / "cache", "--out", target)
    program(clone / "image" / "build", *built)
    return target


def root_of(artefact: Path) -> str:
    root: str = json.loads((artefact / "weights.json").read_text())["root"]
    return root
