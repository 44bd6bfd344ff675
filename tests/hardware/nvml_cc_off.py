"""What NVML says on a machine whose GPUs are not in confidential mode, as one JSON object.

Needs NVIDIA's driver, Python 3.11 and this repository; no package:

    PYTHONPATH=appliance:client python3 tests/hardware/nvml_cc_off.py

The exit code is 0 when the mode is `cc-off`, 1 when it is another, 2 when NVML cannot be asked. Every call that the
appliance makes is made, the certificate and the report included, whose errors are of interest here. Where our
dependencies are installed too, `refused` is the code with which the appliance refuses these GPUs; the whole appliance
says the same with `countermark-appliance serve` and a node.toml of platform `tdx` and device `cuda` (exit code 14).
Identifiers of the machine are not printed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from countermark_appliance.platform.nvml import NONCE_BYTES, Nvml, NvmlError, Settings

_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def answer(call: Callable[[], Any]) -> Any:
    """What a call gives, or its error."""
    try:
        value = call()
    except NvmlError as err:
        return {"call": err.call, "error": err.number, "text": str(err)}
    if isinstance(value, Settings):
        names = ("environment", "cc_feature", "devtools", "multi_gpu", "mode")
        return {name: getattr(value, name) for name in names}
    return {"bytes": len(value)} if isinstance(value, bytes) else value


def refused() -> str:
    """The code with which the appliance refuses these GPUs."""
    try:
        from countermark.errors import GpuError
        from countermark_appliance.platform.nvml_gpus import open_gpus
    except ImportError as err:
        return f"not asked: {err}"
    try:
        open_gpus()
    except GpuError as err:
        return err.code
    return "accepted"


def main() -> int:
    try:
        nvml = Nvml()
        devices = nvml.devices()
    except NvmlError as err:
        print(json.dumps({"nvml": str(err)}))
        return 2
    settings = answer(nvml.settings)
    found = {
        "driver": answer(nvml.driver_version),
        "capabilities": answer(nvml.capabilities),
        "state": answer(nvml.state),
        "settings": settings,
        "ready": answer(nvml.ready),
        "gpus": [
            {
                "uuid_has_its_form": _UUID.fullmatch(nvml.uuid(device)) is not None,
                "vbios": answer(lambda device=device: nvml.vbios_version(device)),
                "certificate": answer(lambda device=device: nvml.attestation_chain(device)),
                "report": answer(lambda device=device: nvml.attestation_report(device, bytes(NONCE_BYTES))),
            }
            for device in devices
        ],
        "refused": refused(),
    }
    nvml.close()
    print(json.dumps(found, indent=1))
    unsupported = isinstance(settings, dict) and settings.get("error") == 3
    return 0 if unsupported or settings.get("mode") == "cc-off" else 1


if __name__ == "__main__":
    sys.exit(main())
