"""Alignment of whole maps and of kept tokens, by layers or by a convolution, to targets as they are or normalised."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semtok.diffusion.repa import REPAConfig, projector_for, repa_loss, spatially_normalised
from semtok.sampler.routing import taken
from semtok.teachers import TeacherFeatures

VECTORS = ["other", "global"]
GRID = (4, 6)


def given(seed: int = 0, grid: tuple[int, int] = GRID) -> tuple[Tensor, TeacherFeatures]:
    """Tokens of two vectors and 24 patches, and a teacher's features of 10 channels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 26, 8, generator=generator)
    patches = torch.randn(3, 10, *grid, generator=generator) + 1
    return hidden, TeacherFeatures((patches,), torch.randn(3, 10, generator=generator))


def loss(config: REPAConfig, hidden: Tensor, features: TeacherFeatures, kept: Tensor | None = None):
    torch.manual_seed(0)
    projector = projector_for(config, 8, 10)
    return repa_loss(config, projector, hidden, features, grid=GRID, vectors=VECTORS, kept=kept)


@pytest.mark.parametrize("kind", ["cosine", "cosine_mse"])
@pytest.mark.parametrize("with_global", [False, True])
@pytest.mark.parametrize("grid", [GRID, (8, 12)])
def test_all_tokens_kept_in_any_order_are_aligned_as_a_whole_map(kind, with_global, grid):
    config = REPAConfig(loss=kind, with_global=with_global, spatial_norm=0.6)
    hidden, features = given(grid=grid)
    kept = torch.rand(3, 26, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    ours = loss(config, taken(hidden, kept), features, kept)
    torch.testing.assert_close(ours, loss(config, hidden, features))


def test_kept_tokens_are_compared_each_with_its_own_target():
    config, (hidden, features) = REPAConfig(with_global=True), given()
    kept = torch.tensor(
        [[1, 2, 25], [0, 9, 3], [4, 5, 6]]
    )  # with the global's, with another's, with none
    ours = loss(config, taken(hidden, kept), features, kept)
    torch.manual_seed(0)
    tokens = projector_for(config, 8, 10)(hidden)
    patches = features.patches[0].flatten(2)
    own = [
        [
            (tokens[0, 1], features.pooled[0]),
            (tokens[0, 2], patches[0, :, 0]),
            (tokens[0, 25], patches[0, :, 23]),
        ],
        [(tokens[1, 9], patches[1, :, 7]), (tokens[1, 3], patches[1, :, 1])],
        [(tokens[2, i], patches[2, :, i - 2]) for i in (4, 5, 6)],
    ]
    by_hand = [
        torch.stack([1 - F.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()
        for pairs in own
    ]
    torch.testing.assert_close(ours, torch.stack(by_hand))


def test_a_pooled_token_of_another_width_is_nobodys_target():
    hidden, features = given()
    features = TeacherFeatures(features.patches, torch.zeros(3, 7))
    kept = torch.arange(2, 12).expand(3, -1)
    assert loss(REPAConfig(), taken(hidden, kept), features, kept).isfinite().all()


def test_targets_are_normalised_over_the_places_of_each_image():
    features = torch.randn(2, 3, 4, 5) * 3 + 2
    ours = spatially_normalised(features, 0.6)
    places = features[1, 2].flatten()
    torch.testing.assert_close(
        ours[1, 2].flatten(), (places - 0.6 * places.mean()) / (places.var().sqrt() + 1e-6)
    )
    torch.testing.assert_close(
        spatially_normalised(features, 1.0).mean(dim=(2, 3)), torch.zeros(2, 3)
    )


def test_a_convolution_projects_the_map_and_a_vector_by_its_middle():
    config, (hidden, features) = REPAConfig(projector="conv", with_global=True), given()
    torch.manual_seed(0)
    weight = projector_for(config, 8, 10)
    assert list(weight.weight.shape) == [10, 8, 3, 3]
    patches = F.conv2d(
        hidden[:, 2:].transpose(1, 2).unflatten(2, GRID), weight.weight, weight.bias, padding=1
    )
    pooled = hidden[:, 1] @ weight.weight[:, :, 1, 1].T + weight.bias
    cosine = F.cosine_similarity(patches, features.patches[0], dim=1).flatten(1)
    own = F.cosine_similarity(pooled, features.pooled, dim=1)
    by_hand = 1 - torch.cat([cosine, own[:, None]], dim=1).mean(dim=1)
    torch.testing.assert_close(loss(config, hidden, features), by_hand)
