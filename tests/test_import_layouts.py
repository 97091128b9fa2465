"""The official checkpoints at full size, by names and shapes alone: each is recognised, and nothing in it is lost."""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semtok import Generator
from semtok.hub.formats import checkpoint_of
from semtok.hub.imports import import_opened
from semtok.hub.job import ImportOptions
from semtok.sampler.dit import DiT

_FILE = Path(__file__).parent / "layouts" / "layouts.json.gz"
LAYOUTS: dict[str, Any] = json.loads(gzip.decompress(_FILE.read_bytes()))

# What each is, and how many parameters its network has without what only training reads.
EXPECTED = {
    "sit_B_2.pt": ("sit", 130_303_504),
    "sit_XL_2.pt": ("sit", 674_816_272),
    "sit_B_2_train.pt": ("sit", 130_303_504),
    "sit_XL_2_train.pt": ("sit", 674_816_272),
    "redi_B_2.pt": ("redi", 130_352_688),
    "redi_XL_2.pt": ("redi", 674_890_032),
    "repa_B_2.pt": ("repa", 130_303_504),
    "repa_XL_2.pt": ("repa", 674_816_272),
    "repa_XL_2_last.pt": ("repa", 674_816_272),
    "repa_XL_2_legacy.pt": ("repa", 674_816_272),
    "reg_B_2.pt": ("reg", 131_486_224),
    "reg_XL_2.pt": ("reg", 676_589_968),
    "reglue_B_2.pt": ("reglue", 131_584_592),
    "reglue_XL_2.pt": ("reglue", 676_737_488),
    "repae_XL_1.pt": ("repa-e", 674_853_152),
    "lightningdit_XL_1.pt": ("lightningdit", 674_961_824),
    "sfd_B_1.pt": ("sfd", 130_090_800),
    "sfd_XL_1.pt": ("sfd", 674_339_184),
    "sfd_1p0B_1.pt": ("sfd", 1_027_880_496),
    "ldm-imagenet256-f16d32-50ep.ckpt": ("compvis-vae", 69_836_067),
    "vavae-imagenet256-f16d32-dinov2.pt": ("compvis-vae", 69_836_067),
    "repae_vae_f16d32.pt": ("compvis-vae", 69_836_067),
    "repae_vae_f8d4.pt": ("compvis-vae", 83_653_863),
    "compression_model.pth": ("reglue-compressor", 16_595_472),
    "semantic_ae_final.pt": ("semvae", 57_924_896),
}


def loaded(value: Any, name: str = "") -> Any:
    """The contents of a file: tensors without contents, but for a BatchNorm's few numbers."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        kind, *shape = value
        if name.startswith("bn."):
            return torch.ones(shape, dtype=getattr(torch, kind))
        return torch.empty(shape, dtype=getattr(torch, kind), device="meta")
    if not isinstance(value, dict):
        return value
    content = {inner: loaded(held, inner) for inner, held in value.items()}
    return content | {
        n: argparse.Namespace(**content[n]) for n in ("args",) if isinstance(content.get(n), dict)
    }


@pytest.fixture
def statistics(tmp_path) -> Path:
    torch.save({"mean": np.zeros(3072), "std": np.ones(3072)}, tmp_path / "dino_mean_std_x.pth")
    return tmp_path / "dino_mean_std_x.pth"


def parameters(model: torch.nn.Module) -> int:
    network = model.network if isinstance(model, Generator) else model
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", EXPECTED)
def test_an_official_layout_is_recognised_and_every_tensor_accounted_for(name, statistics):
    format, count = EXPECTED[name]
    content = loaded(LAYOUTS[name])
    checkpoint = checkpoint_of(content, Path(name))
    options = ImportOptions(statistics=statistics if format == "reglue-compressor" else None)
    imported = import_opened(checkpoint, "auto", options)
    assert imported.format == format and parameters(imported.model) == count
    assert set(checkpoint.state) <= imported.became.keys()
    beside = {} if checkpoint.nest is None else content
    entries = beside.keys() - {checkpoint.nest, checkpoint.settings.entry, "vae"}
    assert entries <= imported.became.keys()
    said = checkpoint.settings.became()
    assert said.keys() <= imported.became.keys() and not [n for n in said if "unknown" in said[n]]
    if isinstance(imported.model, DiT):
        own = [n for n, fate in imported.became.items() if fate == "network"]
        assert len(own) == len([n for n, _ in imported.model.named_parameters()])


def test_every_layout_is_expected():
    assert LAYOUTS.keys() == EXPECTED.keys() and len(EXPECTED) == 25


def test_a_tensor_that_an_official_layout_has_not_is_refused():
    """The check itself can fail, also without contents."""
    state: dict[str, Tensor] = loaded(LAYOUTS["repa_XL_2_last.pt"])
    for change, words in (
        ({"blocks.3.extra": torch.empty(1, device="meta")}, "blocks.3.extra unknown"),
        ({"pos_embed": torch.empty(1, 255, 1152, device="meta")}, "not a square grid"),
        ({"pos_embed": torch.empty(1, 256, 1024, device="meta")}, "not the fixed code"),
    ):
        with pytest.raises(ValueError, match=words):
            import_opened(checkpoint_of(state | change, Path("x.pt")), "repa", ImportOptions())
