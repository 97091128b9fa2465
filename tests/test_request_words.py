"""Words of a call that are of the wrong kind are told by their names."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.request import SampleRequest
from semtok.sampler.sampling import SamplerConfig


@pytest.mark.parametrize("seed", [1.0, 1.5, "1", True, -1])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="^seed: expected a whole number of at least 0"):
        SampleRequest([1], seed=seed)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"seed": 0, "first": -3}, "first"),
        ({"num_images_per_class": 1.5}, "num_images_per_class"),
        ({"strength": "x"}, "strength"),
        ({"callback_on_step_end": 5}, "callback_on_step_end"),
    ],
)
def test_a_word_of_the_wrong_kind_is_named(words, told):
    with pytest.raises(ValueError, match=f"^{told}: expected"):
        SampleRequest([1], **words)


def test_a_base_of_guidance_goes_with_guidance():
    own = SamplerConfig(guidance=GuidanceConfig(scale=2.0))
    assert (
        SampleRequest([1], guidance_base="inner_head").settings(own).guidance.base == "inner_head"
    )
    with pytest.raises(ValueError, match="^guidance_base: nothing is guided; give guidance_scale"):
        SampleRequest([1], guidance_base="inner_head", guidance_scale=1).settings(own)
    with pytest.raises(ValueError, match="^sampler.guidance.base: Input should be 'null_label'"):
        SampleRequest([1], guidance_base="nothing").settings(own)


class _Model:
    """As much of a ``Sampled`` as labels and noise of a caller's need."""

    class_names = ("cat", "dog")
    network = SimpleNamespace(num_classes=2)

    def shapes(self):
        return {"texture": (1, 2, 2)}


def test_numpy_numbers_are_whole_numbers():
    request = SampleRequest(np.int64(1), seed=np.int64(3), first=np.int32(2))
    assert request.numbers(_Model()) == [1]


def test_a_broken_label_is_told_plainly():
    with pytest.raises(ValueError, match=r"^class_labels: no class 1\.5"):
        SampleRequest(1.5).numbers(_Model())


def test_noise_that_is_not_finite_is_refused():
    latents = torch.full((1, 1, 2, 2), float("nan"))
    with pytest.raises(ValueError, match="^latents: texture has values that are not finite"):
        SampleRequest([1], latents=latents).start(_Model())
