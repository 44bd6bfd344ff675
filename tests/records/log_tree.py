"""An appliance's log directory, an operator log and a witness for tests; only the machines are missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from record_values import intent, open_recorder, outcome

from countermark.logkeys import SigningKeys, new_keys
from countermark.logsource import TileSource, directory
from countermark.tlog.cosignature import log_keys
from countermark.witnessing import Cosigned, Witness
from countermark_appliance.records import operator_log
from countermark_appliance.records.operator_log import Appended

NOW = 1_800_000_000


def boot(root: Path, *, answers: int = 1) -> bytes:
    """A start with some answers and one INTENT left open; its boot id."""
    recorder = open_recorder(root)
    for _ in range(answers):
        outcome(recorder, intent(recorder))
    intent(recorder)
    recorder.close()
    return recorder.epoch.boot_id


@dataclass
class Operator:
    """An operator log in a directory."""

    path: Path
    keys: SigningKeys = field(default_factory=lambda: new_keys("log.example/starts"))

    def __post_init__(self) -> None:
        if not self.path.exists():
            operator_log.create(self.path, self.keys)

    def append(self, boots: Path) -> Appended:
        return operator_log.append(self.path, self.keys, boots)

    @property
    def source(self) -> TileSource:
        return directory(self.path)

    @property
    def note(self) -> bytes:
        return (self.path / "checkpoint").read_bytes()

    def witness(self, state: Path, keys: SigningKeys) -> Witness:
        return Witness(state, keys, *log_keys(self.keys.as_log))

    def cosign(self, state: Path, keys: SigningKeys) -> Cosigned | None:
        """One round of a witness that is then gone."""
        witness = self.witness(state, keys)
        try:
            return witness.round(self.source, lambda: NOW)
        finally:
            witness.close()
