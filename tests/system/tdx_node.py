"""A whole appliance on platform `tdx` whose kernel is a directory. Started by `test_tdx_service`; no hardware.

    tdx_node.py CONFIG ROOT     serve as `countermark-appliance serve` does; ROOT becomes the machine's files

After it has served, one more line says in which files beside CONFIG a private key of this start stands.
"""

import base64
import json
import sys
from pathlib import Path

from fake_kernel import FakeKernel

import sim_evidence
from countermark.formats.evidence import Endorsements
from countermark_appliance import cli, main, watch
from countermark_appliance.config import Config
from countermark_appliance.platform import tdx
from countermark_appliance.platform.keyring import Keyring


class Cached:
    def current(self) -> Endorsements:
        return sim_evidence.machine().endorsements


def open_platform(config: Config) -> tdx.TdxPlatform:
    kernel = FakeKernel(Path(sys.argv[2]), sim_evidence.machine())
    return tdx.open_tdx(config, endorsements=lambda _quote, _gpus: Cached(), sysfs=kernel)


def secrets(keys: Keyring) -> list[bytes]:
    """Every private key in its shortest form, which all encodings of it contain."""
    scalars = [key.private_numbers().private_value.to_bytes(32, "big") for key in (keys.tls, keys.receipt_es256)]
    others = (keys.receipt_ml_dsa_65, keys.log_ed25519, keys.log_ml_dsa_44)
    return [*scalars, *(key.private_bytes_raw() for key in others)]


def forms(secret: bytes) -> list[bytes]:
    """The bytes themselves, hex, and base64 at every offset they can have in what is around them."""
    texts = [base64.b64encode(bytes(before) + secret)[4:-4] for before in range(3)]
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *texts]


def search(found: list[bytes]) -> dict[str, object]:
    """Files beside CONFIG that hold a secret."""
    files = [path for path in Path(sys.argv[1]).parent.rglob("*") if path.is_file()]
    wanted = [form for one in found for form in forms(one)]
    texts = {path.name: (data := path.read_bytes()) + data.replace(b"\n", b"") for path in files}
    held = [name for name, text in texts.items() if any(form in text for form in wanted)]
    return {"files": len(files), "secrets": len(found), "held": held}


if __name__ == "__main__":
    rings: list[Keyring] = []
    make = Keyring.__init__

    def remember(self: Keyring) -> None:
        make(self)
        rings.append(self)

    Keyring.__init__ = remember
    main.open_platform = open_platform
    watch.Watch.__init__.__kwdefaults__["interval_s"] = 0.2
    code = cli.main(["serve", "--config", sys.argv[1]])
    print(json.dumps(search([secret for ring in rings for secret in secrets(ring)])), flush=True)
    sys.exit(code)
