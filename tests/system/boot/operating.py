"""What an operator and a client do before a machine boots, with the commands that docs/measurements.md names."""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from booted import FIRMWARE, IMAGES, SHAPE, SIM_STATE, Disks, image_program, made
from mutations import copied

import paritymodels

MEASURE: Final = "countermark_measurements.cli"
CLIENT: Final = "countermark.cli"
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

    def predict(self, kind: str) -> Path:
        """Write the prediction of an image of this kind; where it is."""
        target = self.folder / f"{kind}.prediction.json"
        disk = ("--disk", IMAGES / f"{kind}-cpu" / "disk.raw", "--firmware", FIRMWARE, "--shape", SHAPE)
        made(MEASURE, "predict", *disk, "--platform", "vtpm", "--out", target)
        return target

    def publish(self, kind: str, *more: str) -> Path:
        """Predict, sign and publish an image of this kind; where its manifest is."""
        image = ("--image", IMAGES / f"{kind}-cpu" / "image.json", "--keys", self.folder / "keys")
        prediction = ("--prediction", self.predict(kind), "--out", self.folder / f"{kind}.json")
        with (self.folder / "publishing").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one publisher, several test processes
            before = set(self.public.glob("manifests/*.json"))
            made(MEASURE, "manifest", *prediction, *image, "--publish", self.public, *more)
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
        image_program("disks", "weights", artefact, folder / f"{name}.weights.raw")
        image_program("disks", "config", folder / f"{name}.toml", folder / f"{name}.config.raw")
    image_program("disks", "log", folder / "log.raw", "--size", "64")
    made(MEASURE, "keys", "new", folder / "keys", "--log", "boot.test.example/measurements")
    _policy(operator, operator.publish("test"), artefacts)


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


def root_of(artefact: Path) -> str:
    root: str = json.loads((artefact / "weights.json").read_text())["root"]
    return root
