"""The image's scripts are no import package: their folder is put on the path here."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "image"))
