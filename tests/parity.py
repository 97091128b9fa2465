"""Kits of official checkpoints with expected outputs, in the folder that ``SEMTOK_PARITY`` names."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor


@dataclass(frozen=True)
class Kit:
    """One kit: its folder, ``case.json`` and the tensors of ``io.safetensors``."""

    folder: Path
    case: dict[str, Any]
    tensors: dict[str, Tensor]

    def settings(self, name: str) -> dict[str, Any]:
        return self.case["cases"][name].get("settings", {})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def heads(self) -> int:
        return self.case["constructor"]["kwargs"]["num_heads"]


def kits(name: str) -> list[Any]:
    """Parameters for a test: every kit of that name, or one that skips with the reason."""
    root = os.environ.get("SEMTOK_PARITY")
    if not root:
        return [pytest.param(None, marks=pytest.mark.skip(reason="SEMTOK_PARITY is not set"))]
    found = [
        path.parent for path in sorted(Path(root).rglob("case.json")) if _kit_name(path) == name
    ]
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{root} has no kit '{name}'"))]
    return [pytest.param(folder, id=str(folder.relative_to(root))) for folder in found]


def load_kit(folder: Path) -> Kit:
    case = json.loads((folder / "case.json").read_text())
    return Kit(folder, case, safetensors.torch.load_file(folder / "io.safetensors"))


def _kit_name(case: Path) -> str:
    return json.loads(case.read_text())["kit"]
