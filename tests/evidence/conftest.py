from __future__ import annotations

import pytest

from evidence.command import Evidence


@pytest.fixture
def evidence(capsys: pytest.CaptureFixture[str]) -> Evidence:
    return Evidence(capsys)
