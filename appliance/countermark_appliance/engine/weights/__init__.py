"""The weights artefact: build it from a checkpoint, verify it block by block, load it as mapped tensors."""

from countermark_appliance.engine.weights.artefact import Artefact, DamagedBlock, Verified, load, verify
from countermark_appliance.engine.weights.build import Built, build
from countermark_appliance.engine.weights.config import ModelConfig, tensor_specs
from countermark_appliance.engine.weights.standin import stand_in_gguf

__all__ = [
    "Artefact",
    "Built",
    "DamagedBlock",
    "ModelConfig",
    "Verified",
    "build",
    "load",
    "stand_in_gguf",
    "tensor_specs",
    "verify",
]
