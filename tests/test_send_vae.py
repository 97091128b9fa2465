"""What is particular to Send-VAE: the noise, the running statistics, the mapper, the alignment."""

import pytest
import torch
from torch import distributed as dist

import tiny
from semtok import UserError
from semtok.methods.adversarial import adaptive_ratio, hinge_loss
from semtok.methods.send_vae import (
    AlignmentConfig,
    Mapper,
    MapperConfig,
    noise_latents,
)
from semtok.methods.standardiser import RunningStandardiser
from semtok.methods.vae import kl_loss
from semtok.recipe import parse_recipe
from semtok.sampler.draws import Draws
from semtok.sampler.embeddings import sincos_positions
from semtok.teachers import alignment_loss

CPU = torch.device("cpu")


def many(num: int) -> Draws:
    return Draws(seed=0, step=0, global_batch=num, first=0, num=num, device=CPU)


def test_uniform_noise_has_one_t_per_image_spread_over_the_unit_interval():
    z = torch.full((2000, 1, 4, 4), 1000.0)  # so large that z_t tells t
    noised = noise_latents(z, AlignmentConfig(noise="uniform"), many(2000))
    t = 1 - noised.mean(dim=(1, 2, 3)) / 1000
    within = (noised / 1000).std(dim=(1, 2, 3))
    assert within.max() < 0.01, "one t for all of an image's latents"
    assert t.min() < 0.05 and t.max() > 0.95
    assert t.mean() == pytest.approx(0.5, abs=0.03) and t.std() == pytest.approx(0.289, abs=0.03)


def test_noise_at_level_one_is_standard_normal_and_at_level_zero_is_nothing():
    z = torch.randn(64, 4, 4, 4)
    pure = noise_latents(z, AlignmentConfig(noise="fixed", noise_level=1.0), many(64))
    assert pure.std() == pytest.approx(1, abs=0.05)
    assert abs(torch.corrcoef(torch.stack([pure.flatten(), z.flatten()]))[0, 1]) < 0.1
    clean = noise_latents(z, AlignmentConfig(noise="fixed", noise_level=0.0), many(64))
    assert torch.equal(clean, z)
    assert noise_latents(z, AlignmentConfig(noise="none"), many(64)) is z


def test_logit_normal_noise_is_centred_on_one_half():
    z = torch.full((2000, 1, 1, 1), 1000.0)
    t = 1 - noise_latents(z, AlignmentConfig(noise="logit_normal"), many(2000)).flatten() / 1000
    assert t.mean() == pytest.approx(0.5, abs=0.02)
    assert t.std() == pytest.approx(0.208, abs=0.02)  # of the logit-normal law (0, 1)


def test_running_statistics_start_at_the_first_batch_then_follow_with_momentum():
    standardiser = RunningStandardiser(2)
    first = torch.randn(64, 2, 4, 4) * torch.tensor([3.0, 0.5])[:, None, None] + 7
    out = standardiser(first)
    torch.testing.assert_close(standardiser.mean, first.mean(dim=(0, 2, 3)))
    assert (out.mean(dim=(0, 2, 3)).abs() < 1e-3).all()
    assert ((out.std(dim=(0, 2, 3)) - 1).abs() < 1e-2).all()
    before = standardiser.mean.clone()
    standardiser(first + 10)
    torch.testing.assert_close(standardiser.mean, before + 1.0)
    standardiser.eval()
    standardiser(first + 100)
    torch.testing.assert_close(standardiser.mean, before + 1.0)


def test_running_statistics_hold_where_the_mean_is_large_and_the_spread_small():
    """There the difference of E[z²] and E[z]² is rounding, and may be negative."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20, 16, 2, 4, 4, generator=generator)
    standardiser = RunningStandardiser(2)
    for step, batch in enumerate(spread):
        means = torch.tensor([100.0, -3000.0])[:, None, None] * (1 + step % 2)
        standardiser(means + 1e-2 * torch.tensor([1.0, 100.0])[:, None, None] * batch)
        assert (standardiser.var > 0).all()
    torch.testing.assert_close(standardiser.var, torch.tensor([1e-4, 1.0]), rtol=0.1, atol=0)


def statistics_of_own_share(file: str) -> None:
    """In one of two processes: of every second image of each batch."""
    dist.init_process_group("gloo")
    own = RunningStandardiser(2)
    for batch in torch.load(file, weights_only=True):
        own(batch[dist.get_rank() :: 2])
    torch.save(own.state_dict(), f"{file}.{dist.get_rank()}")


def test_running_statistics_of_two_processes_are_those_of_one_on_both_batches(tmp_path, ranks):
    """Where processes see different images, channels of large mean and small spread included."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 8, 2, 4, 4, generator=generator)
    z = z * torch.tensor([1e-2, 3.0])[:, None, None] + torch.tensor([300.0, 0.5])[:, None, None]
    z[:, ::2] += 0.02  # the processes' means differ by more than the spread
    torch.save(z, tmp_path / "z.pt")
    ranks.run("test_send_vae:statistics_of_own_share", str(tmp_path / "z.pt"))
    alone = RunningStandardiser(2)
    for batch in z:
        alone(batch)
    ours, theirs = (torch.load(tmp_path / f"z.pt.{rank}", weights_only=True) for rank in range(2))
    for name, value in alone.state_dict().items():
        assert torch.equal(ours[name], theirs[name]), "processes agree to the last bit"
        torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=0)


def test_gradients_do_not_pass_through_the_running_statistics():
    standardiser = RunningStandardiser(1)
    z = torch.randn(8, 1, 2, 2, requires_grad=True)
    standardiser(z).sum().backward()
    expected = (standardiser.var + standardiser.eps).rsqrt()
    torch.testing.assert_close(z.grad, expected.expand(8, 2, 2)[:, None])


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("patch", [1, 2])
def test_the_mapper_gives_teacher_wide_tokens_on_any_grid(depth, patch):
    mapper = Mapper(
        MapperConfig(depth=depth, patch_size=patch, projector_width=8, width=8),
        channels=3,
        teacher_width=5,
    )
    assert len(mapper.blocks) == depth
    assert mapper(torch.randn(2, 3, 4, 6)).shape == (2, 5, 4 // patch, 6 // patch)


def test_the_mapper_has_the_papers_widths_and_heads():
    mapper = Mapper(MapperConfig(), channels=32, teacher_width=768)
    assert mapper.blocks[0].attn.num_heads == 12
    assert [layer.out_features for layer in mapper.projector if hasattr(layer, "out_features")] == [
        2048,
        2048,
        768,
    ]
    assert Mapper(MapperConfig(), channels=4, teacher_width=1024).blocks[0].attn.num_heads == 16


def test_the_mapper_tells_positions_apart():
    mapper = Mapper(MapperConfig(width=8, heads=1, projector_width=8), channels=1, teacher_width=4)
    out = mapper(torch.ones(1, 1, 2, 2)).flatten(2)
    assert not torch.allclose(out[..., 0], out[..., 1])
    assert not torch.allclose(out[..., 0], out[..., 2])


def test_position_codes_encode_column_then_row():
    codes = sincos_positions((2, 3), 8).view(2, 3, 8)
    assert torch.equal(codes[0, :, 4:], codes[0, :1, 4:].expand(3, 4)), "same row, same second half"
    assert torch.equal(codes[:, 1, :4], codes[:1, 1, :4].expand(2, 4)), (
        "same column, same first half"
    )
    column = torch.tensor([2.0, 2.0 * 10_000**-0.5])
    torch.testing.assert_close(codes[0, 2, :4], torch.cat([column.sin(), column.cos()]))
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions((2, 2), 6)


def test_alignment_is_zero_for_equal_directions_and_two_for_opposite():
    target = torch.randn(3, 5, 4, 4)
    assert alignment_loss(target * 3, target).abs().max() < 1e-6
    torch.testing.assert_close(alignment_loss(-target, target), torch.full((3,), 2.0))


def test_alignment_resamples_the_teacher_to_the_latents_grid():
    smooth = torch.linspace(0, 1, 8)[None, None, :, None].expand(1, 1, 8, 8)
    target = torch.cat([smooth, 1 - smooth], dim=1)
    predicted = torch.nn.functional.avg_pool2d(target, 2)
    assert alignment_loss(predicted, target).max() < 1e-2
    assert alignment_loss(predicted.flip(2), target).min() > 0.1


def test_kl_matches_torch_distributions():
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (logvar / 2).exp()), normal(torch.zeros_like(mean), torch.ones_like(mean))
    ).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_loss(mean, logvar), expected)


def test_hinge_loss_by_hand():
    real, fake = (
        torch.tensor([2.0, 0.0]).view(2, 1, 1, 1),
        torch.tensor([-3.0, 0.5]).view(2, 1, 1, 1),
    )
    torch.testing.assert_close(hinge_loss(real, fake), torch.tensor([0.0, 0.5 * (1 + 1.5)]))


def test_lecam_holds_logits_to_the_running_means_of_the_other_kind(monkeypatch):
    made = tiny.build({"name": "vae", "adversarial": {**tiny.ADVERSARIAL, "lecam_weight": 0.5}})
    learner, logits = made.learners["discriminator"], iter((3.0, -1.0, 5.0, 2.0))
    monkeypatch.setattr(
        learner.discriminator, "forward", lambda x: torch.full((4, 1, 1, 1), next(logits))
    )
    images = torch.zeros(4, 3, 16, 16)
    inputs, carry = {"pixels": images}, {"reconstruction": images}
    first = learner(inputs, tiny.draws(), 0, {**carry}).terms["lecam"]
    assert first.weight == 0.5 and first.value == pytest.approx(3.0**2 + 1.0**2)
    torch.testing.assert_close(learner.ema_logits, torch.tensor([3e-3, -1e-3]))
    second = learner(inputs, tiny.draws(), 1, {**carry}).terms["lecam"]
    assert second.value == pytest.approx(5.001**2), "2 is above the running mean of the real ones"
    assert "ema_logits" not in dict(
        tiny.build({"name": "vae", "adversarial": tiny.ADVERSARIAL}).learners.named_buffers()
    )


def test_running_statistics_by_the_batch_are_those_of_a_batch_norm():
    ours, theirs = RunningStandardiser(2), torch.nn.BatchNorm2d(2, eps=1e-4, affine=False)
    ours.start(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))
    theirs.running_mean.copy_(torch.tensor([1.0, -2.0]))
    theirs.running_var.copy_(torch.tensor([0.25, 9.0]))
    for seed in range(3):
        z = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1
        torch.testing.assert_close(ours.by_batch(z), theirs(z))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.var, theirs.running_var)
    torch.testing.assert_close(ours.by_running(z), theirs.eval()(z))


def test_the_generator_is_not_paid_for_fooling_a_network_that_learns_later():
    late = tiny.content({"adversarial": {"start_step": 3, "discriminator_start_step": 5}})
    with pytest.raises(
        UserError,
        match="method.adversarial: discriminator_start_step 5 is after start_step 3",
    ) as error:
        parse_recipe(late, "tiny")
    assert "\n" not in str(error.value)
    for start in (None, 0, 3):
        settings = {"start_step": 3, "discriminator_start_step": start}
        parse_recipe(tiny.content({"adversarial": settings}), "tiny")


def test_the_ratio_of_gradients_survives_half_precision_at_large_batches():
    """A mean over 256 images of 256x256 moves each output by 2e-8, which float16 rounds to nothing."""
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(4, 3, 3, padding=1), torch.randn(2, 4, 8, 8)
    wanted = torch.randn(2, 3, 8, 8)
    share = 2 * 3 * 8 * 8 / (256 * 3 * 256**2)

    def ratio(precision: torch.dtype) -> float:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = layer(x)
            reconstruction = (out.float() - wanted).abs().mean() * share
            adversarial = out.float().square().mean() * share
        return adaptive_ratio(reconstruction, adversarial, layer.weight, cap=1e4).item()

    assert ratio(torch.float16) == pytest.approx(ratio(torch.float32), rel=0.02)


def test_the_export_leaves_the_mapper_out_and_the_checkpoint_keeps_it():
    objective = tiny.build()
    tokenizer = objective.tokenizer(objective.averaged_module())
    assert not any("mapper" in name for name in tokenizer.state_dict())
    assert any("mapper" in name for name in objective.learners.state_dict())


class _Without:
    """Draws that are zero under one name."""

    def __init__(self, name: str, draws: Draws) -> None:
        self.name, self.draws = name, draws
        self.uniform = draws.uniform

    def normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.draws.normal(name, shape) * (name != self.name)


def test_ablations_of_the_paper_are_switches():
    assert (
        len(
            tiny.build({"mapper": {"depth": 0, "projector_width": 8}})
            .learners["autoencoder"]
            .mapper.blocks
        )
        == 0
    )
    for noise, is_same in (("none", True), ("uniform", False)):
        made = tiny.build({"alignment": {"noise": noise}})
        learner, inputs = made.learners["autoencoder"].eval(), tiny.batch(made)
        values = [
            learner(inputs, _Without("posterior", tiny.draws(step)), 0, {}).terms["alignment"].value
            for step in (0, 1)
        ]
        assert torch.equal(*values) == is_same, noise


def test_a_patch_size_that_does_not_divide_the_grid_is_an_error():
    with pytest.raises(
        ValueError, match="mapper.patch_size: 3 does not divide the latent grid 4x4"
    ):
        tiny.build({"mapper": {"patch_size": 3, "projector_width": 8}})
