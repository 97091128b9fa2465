"""Teachers, perceptual distances, and images at the border of the library."""

import hashlib
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from huggingface_hub.utils import _http
from PIL import Image
from sklearn.linear_model import LogisticRegression
from timm.models import VisionTransformer

import tiny
from semtok import UserError
from semtok.commands.train_tokenizer import build_objective
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.diffusion.training import DiffusionObjective
from semtok.evaluation.generation import teacher_network
from semtok.images import to_pil, to_pixels, to_uint8
from semtok.methods.feature_discriminator import FeatureDiscriminator, FeaturesConfig
from semtok.metrics import psnr, ssim
from semtok.perceptual import LPIPS, teacher_distance
from semtok.pictures import principal_components
from semtok.recipe import parse_recipe
from semtok.sampler.sampling import SamplerConfig
from semtok.storage import tensor_bytes
from semtok.teachers import _SHORT_NAMES, Teacher, TeacherConfig

VIT = "vit_tiny_patch16_224"
CNN = "efficientnet_lite0"


@pytest.fixture(scope="module")
def demo() -> Teacher:
    return Teacher(TeacherConfig(layers=(-1, 0)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    paths = {}
    for name in (VIT, CNN):
        torch.manual_seed(0)
        model = timm.create_model(name)  # with its classifier, as such files have
        paths[name] = str(folder / f"{name}.safetensors")
        safetensors.torch.save_file(model.state_dict(), paths[name])
    return paths


def test_the_embedded_teacher_is_small_and_tells_attributes():
    assert files("semtok").joinpath("assets/demo_teacher.safetensors").stat().st_size <= 4 * 2**20
    batch = Shapes(ShapesConfig(size=32, seed=7), train=True).load(range(600))
    pooled = Teacher(TeacherConfig()).features(to_pixels(batch.images)).pooled.numpy()
    for name in ("shape", "rotation", "fill", "ground"):
        y = batch.attributes[name].numpy()
        probe = LogisticRegression(max_iter=500).fit(pooled[:400], y[:400])
        assert probe.score(pooled[400:], y[400:]) > 0.9, name


def test_tokens_come_in_the_order_of_the_layers_with_the_final_norm(demo):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    features = demo.features(pixels)
    tokens = demo.network.patch_embed(pixels)
    tokens = demo.network._pos_embed(tokens)
    first = demo.network.norm(demo.network.blocks[0](tokens))
    last = demo.network.forward_features(pixels)
    as_map = lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (8, 8))  # noqa: E731
    torch.testing.assert_close(features.patches[0], as_map(last))
    torch.testing.assert_close(features.patches[1], as_map(first))
    torch.testing.assert_close(
        features.pooled, first[:, 0], msg="the class token, of the last layer asked for"
    )
    same = Teacher(TeacherConfig(layers=(3, -4))).features(pixels)
    assert all(torch.equal(a, b) for a, b in zip(same.patches, features.patches, strict=True))


def test_a_teacher_stays_frozen_and_passes_gradients_only_when_asked(demo):
    demo.train()
    assert not any(module.training for module in demo.modules())
    assert not any(p.requires_grad for p in demo.parameters())
    pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert not demo.features(pixels).pooled.requires_grad
    demo.features(pixels, differentiable=True).pooled.sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in demo.parameters())


def test_images_of_any_size_keep_their_aspect(demo):
    assert demo.features(torch.zeros(1, 3, 64, 96)).patches[0].shape[-2:] == (8, 12)
    assert demo.features(torch.zeros(1, 3, 16, 16)).patches[0].shape[-2:] == (8, 8)


def test_a_vit_from_a_local_file_at_its_own_or_another_size(checkpoints):
    teacher = Teacher(TeacherConfig(name=VIT, checkpoint=checkpoints[VIT], input_size=48))
    assert teacher.widths == (192,)
    features = teacher.features(torch.zeros(1, 3, 32, 64))
    assert features.patches[0].shape == (1, 192, 3, 6) and features.pooled.shape == (1, 192)
    expected = timm.data.resolve_model_data_config(teacher.network)
    pixels = torch.rand(1, 3, 48, 48) * 2 - 1
    mean, std = (torch.tensor(expected[k])[:, None, None] for k in ("mean", "std"))
    torch.testing.assert_close(teacher.preprocess(pixels), ((pixels + 1) / 2 - mean) / std)


def test_a_teacher_sees_pixels_unnormalised_and_resized_bilinearly_where_settings_say_so(
    checkpoints,
):
    same = {"name": VIT, "checkpoint": checkpoints[VIT], "input_size": 48}
    plain, other = (
        Teacher(TeacherConfig(**same)),
        Teacher(TeacherConfig(**same, normalise=False, resize="bilinear")),
    )
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = F.interpolate(pixels, size=(48, 48), mode="bilinear", align_corners=False)
    assert torch.equal(other.preprocess(pixels), expected)
    seen = plain.network.forward_features(expected)[:, 1:].transpose(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(other.features(pixels).patches[0], seen)
    assert plain.fingerprint() != other.fingerprint(), "caches of features tell them apart"
    assert teacher_network(plain).identity != teacher_network(other).identity


def test_a_fingerprint_tells_settings_apart_that_leave_the_weights_as_they_are(checkpoints):
    same = {"name": VIT, "checkpoint": checkpoints[VIT]}
    settings = [{"final_norm": n} for n in ("plain", "none")]
    settings += [{"shape": {"width": 192, "depth": 12, "heads": n}} for n in (1, 2)]
    prints = [Teacher(TeacherConfig.model_validate(same | each)).fingerprint() for each in settings]
    assert len(set(prints)) == len(prints)


def test_settings_of_preparation_leave_the_names_of_older_caches(checkpoints):
    """What was kept before they were there is still found."""
    teacher = Teacher(TeacherConfig(name=VIT, checkpoint=checkpoints[VIT], input_size=48))
    settings = f'{{"name":"{VIT}","input_size":48,"layers":[-1]}}'
    assert teacher_network(teacher).identity == f"{settings} {teacher.fingerprint()}"
    digest = hashlib.blake2b(digest_size=16)
    for name, _, content in tensor_bytes(teacher.network):
        digest.update(name.encode())
        digest.update(content)
    assert teacher.fingerprint() == digest.hexdigest()


@pytest.fixture(scope="module")
def relative(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A network for images of one size, as BEiT is too."""
    name = "vit_relpos_small_patch16_224"
    file = tmp_path_factory.mktemp("fixed") / "relpos.safetensors"
    safetensors.torch.save_file(timm.create_model(name, img_size=32).state_dict(), file)
    return {"name": name, "checkpoint": str(file)}


def test_a_vit_with_relative_positions_for_one_grid(relative):
    teacher = Teacher(TeacherConfig(**relative, input_size=32))
    features = teacher.features(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert features.patches[0].shape == (1, 384, 2, 2) and features.pooled.shape == (1, 384)
    message = (
        "teacher.input_size: 'vit_relpos_small_patch16_224' takes images of 32x32 pixels alone, and 2x3 tokens are of "
        "32x48; choose a network for any size, as dinov2_vits14"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        teacher.features(torch.zeros(1, 3, 16, 24))


def test_networks_of_one_size_are_refused_in_their_place_before_training(relative):
    judge = relative | {"input_size": 40, "layers": (0, 1), "kernel": 3, "final_norm": "affine"}
    told = "takes images of 40x40 pixels alone, and 2x2 tokens are of 32x32; pass {}=32, or"
    with pytest.raises(UserError, match=told.format("teacher.input_size")):
        Teacher(TeacherConfig(**relative, input_size=40))
    place = "method.adversarial.features.input_size"
    with pytest.raises(UserError, match=f"^{place}: .*{told.format(place)}"):
        FeatureDiscriminator(FeaturesConfig(**judge))
    for size, given, message in (
        (16, {"name": "rae"}, "4x4 tokens are of 64x64; pass teacher.input_size=64, or"),
        ([16, 24], {"name": "rae"}, "4x6 tokens are of 64x96; choose"),
        ([16, 24], {"name": "send_vae"}, "2x3 tokens are of 32x48; choose"),
        ([16, 24], {"name": "vae", "perceptual": "teacher"}, "2x3 tokens are of 32x48; choose"),
        ([16, 24], {"name": "reglue"}, "2x3 tokens are of 32x48; choose"),
    ):
        content = tiny.content(given)
        content["data"]["size"] = size
        content["teacher"] = relative | {"input_size": 32}
        recipe = parse_recipe(content, "tiny")
        texture = tiny.tokenizer("vae", "none", False) if given["name"] == "reglue" else None
        with pytest.raises(UserError, match=f"^tiny: teacher.input_size: .*{message}"):
            build_objective(recipe, texture, place="tiny")
    diffusion = DiffusionConfig(network={"depth": 2, "width": 32, "heads": 2}, repa={})
    with pytest.raises(UserError, match=r"2x3 tokens are of 32x48; choose"):
        DiffusionObjective(
            diffusion,
            tiny.tokenizer("vae", "none", False),
            class_names=("a",),
            image_size=(16, 24),
            sampler=SamplerConfig(),
            teacher=Teacher(TeacherConfig(**relative, input_size=32)),
        )


def test_weights_without_a_classifier_load_and_are_the_files(checkpoints, tmp_path):
    state = safetensors.torch.load_file(checkpoints[CNN])
    bare = {k: v for k, v in state.items() if not k.startswith("classifier")}
    safetensors.torch.save_file(bare, tmp_path / "bare.safetensors")
    for path in (checkpoints[CNN], str(tmp_path / "bare.safetensors")):
        loaded = Teacher(
            TeacherConfig(name=CNN, checkpoint=path, input_size=64)
        ).network.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in bare.items())


def test_a_cnn_from_a_local_file_pools_where_it_has_no_class_token(checkpoints):
    config = TeacherConfig(name=CNN, checkpoint=checkpoints[CNN], input_size=64, layers=(-2, -1))
    features = Teacher(config).features(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert features.patches[0].shape[-1] == 2 * features.patches[1].shape[-1]
    torch.testing.assert_close(features.pooled, features.patches[1].mean(dim=(2, 3)))


def test_registers_and_class_token_are_not_among_the_patches(tmp_path, monkeypatch):
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    assert _SHORT_NAMES["dinov2_vits14_reg"] == name
    model = timm.create_model(name, img_size=28, depth=1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=1))
    weights = str(tmp_path / "weights.safetensors")
    config = TeacherConfig(name="dinov2_vits14_reg", checkpoint=weights, input_size=28)
    features = Teacher(config).features(torch.rand(1, 3, 28, 28))
    tokens = model.forward_features(torch.zeros(1, 3, 28, 28))
    assert tokens.shape[1] == 1 + 4 + 4 and features.patches[0].shape[-2:] == (2, 2)


def test_dinov2_short_names_are_timms():
    assert len(_SHORT_NAMES) == 8
    assert all(timm.is_model(name) for name in _SHORT_NAMES.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "dinov2_vitb14_rge"}, "did you mean 'dinov2_vitb14_reg'"),
        ({"name": CNN, "checkpoint": "none.safetensors"}, "no such file 'none.safetensors'"),
        ({"checkpoint": "none.safetensors"}, "no such file 'none.safetensors'"),
        ({"layers": (0, 9)}, r"teacher.layers: \[9\] out of range; 'demo' has 4 layers"),
    ],
)
def test_wrong_teachers_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        Teacher(TeacherConfig(**settings))


@pytest.mark.parametrize("name", [CNN, "demo"])
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(name, checkpoints, tmp_path):
    for number, content in enumerate((Path(checkpoints[CNN]).read_bytes()[:5000], b"", None)):
        path = tmp_path / f"{number}.safetensors"
        if content is None:
            safetensors.torch.save_file({"other": torch.zeros(1)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            Teacher(TeacherConfig(name=name, checkpoint=str(path)))
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def teacher_of(network: torch.nn.Module, folder: Path, monkeypatch, **settings) -> Teacher:
    """A teacher around any network, by way of the embedded teacher's name."""
    network.pretrained_cfg = dict(
        input_size=(3, 16, 16), mean=(0.2, 0.3, 0.4), std=(0.5, 0.25, 0.125)
    )
    monkeypatch.setattr("semtok.teachers.demo_network", lambda: network)
    path = folder / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return Teacher(TeacherConfig(checkpoint=str(path), **settings))


@pytest.mark.parametrize(
    ("class_token", "registers"), [(True, 4), (True, 0), (False, 3), (False, 0)]
)
def test_patches_leave_prefix_tokens_out_and_pooling_takes_the_class_token(
    class_token, registers, tmp_path, monkeypatch
):
    network = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=2,
        num_classes=0,
        class_token=class_token,
        reg_tokens=registers,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        dynamic_img_size=True,
    )
    with torch.no_grad():  # a final norm that can't be left out unnoticed
        network.norm.weight.uniform_(1, 3)
        network.norm.bias.uniform_(1, 3)
    teacher = teacher_of(network, tmp_path, monkeypatch, layers=(2, 0, 1))
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    features = teacher.features(pixels)
    tokens = network._pos_embed(network.patch_embed(teacher.preprocess(pixels)))
    by_layer = []
    for block in network.blocks:
        tokens = block(tokens)
        by_layer.append(network.norm(tokens))
    for patches, layer in zip(features.patches, (2, 0, 1), strict=True):
        expected = by_layer[layer][:, class_token + registers :]
        torch.testing.assert_close(
            patches, expected.transpose(1, 2).unflatten(2, (4, 6)), atol=1e-4, rtol=1e-4
        )
    last = by_layer[1]
    pooled = last[:, 0] if class_token else last[:, registers:].mean(dim=1)
    torch.testing.assert_close(features.pooled, pooled, atol=1e-4, rtol=1e-4)


def test_pixels_are_normalised_by_the_networks_own_constants_and_then_resized(
    tmp_path, monkeypatch
):
    network = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=0
    )
    teacher = teacher_of(network, tmp_path, monkeypatch)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in ((0.2, 0.3, 0.4), (0.5, 0.25, 0.125))
    )
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(teacher.preprocess(pixels), ((pixels + 1) / 2 - mean) / std)
    wide = torch.rand(1, 3, 8, 12) * 2 - 1
    expected = F.interpolate(
        ((wide + 1) / 2 - mean) / std, size=(16, 24), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(teacher.preprocess(wide), expected)


@pytest.mark.parametrize("layers", [(-1, 1), (4, 0, 2), (-2, -1, -5)])
def test_a_cnn_gives_its_layers_in_the_order_asked_for(layers, checkpoints):
    settings = {"name": CNN, "checkpoint": checkpoints[CNN], "input_size": 64}
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    teacher = Teacher(TeacherConfig(layers=layers, **settings))
    every = Teacher(TeacherConfig(layers=(0, 1, 2, 3, 4), **settings)).features(pixels).patches
    features = teacher.features(pixels)
    for patches, layer in zip(features.patches, layers, strict=True):
        assert torch.equal(patches, every[layer])
    assert torch.equal(features.pooled, every[layers[-1]].mean(dim=(2, 3)))
    assert teacher.widths == tuple(every[layer].shape[1] for layer in layers)


@pytest.mark.parametrize("name", ["demo", CNN])
def test_a_layer_asked_for_twice_under_two_numbers_is_refused(name, checkpoints):
    depth = {"demo": 4, CNN: 5}[name]
    config = TeacherConfig(name=name, checkpoint=checkpoints.get(name), layers=(depth - 1, -1))
    with pytest.raises(UserError, match=r"teacher.layers: .*same layer"):
        Teacher(config)
    with pytest.raises(ValueError, match="distinct"):
        TeacherConfig(layers=(1, 1))
    with pytest.raises(ValueError, match="at least one"):
        TeacherConfig(layers=())


def test_a_frozen_cnn_keeps_its_batch_statistics_and_passes_gradients_when_asked(checkpoints):
    settings = {"name": CNN, "checkpoint": checkpoints[CNN], "input_size": 32}
    teacher = Teacher(TeacherConfig(**settings))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.train()
    torch.nn.ModuleList([teacher]).train()  # as a method that owns the teacher would
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    together = teacher.features(pixels).pooled
    torch.testing.assert_close(together[1:2], teacher.features(pixels[1:2]).pooled)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    pixels.requires_grad_()
    assert not teacher.features(pixels).patches[0].requires_grad
    teacher.features(pixels, differentiable=True).pooled.square().sum().backward()
    assert pixels.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("input_size", [0, -32])
def test_an_input_size_that_is_not_positive_is_refused(input_size):
    with pytest.raises(ValueError, match="input_size"):
        TeacherConfig(input_size=input_size)


@pytest.mark.parametrize(("name", "stride"), [("demo", 4), (CNN, 32)])
def test_the_smallest_input_is_one_patch(name, stride, checkpoints):
    config = TeacherConfig(name=name, checkpoint=checkpoints.get(name), input_size=1)
    teacher = Teacher(config)
    assert teacher.preprocess(torch.zeros(1, 3, 32, 32)).shape[-2:] == (stride, stride)
    assert teacher.features(torch.zeros(1, 3, 32, 32)).patches[0].shape[-2:] == (1, 1)


@pytest.mark.parametrize(
    ("name", "near"),
    [("dmeo", "demo"), ("resnet_18", "resnet18"), ("dinov2_vits14reg", "dinov2_vits14_reg")],
)
def test_an_unknown_name_suggests_the_nearest(name, near):
    with pytest.raises(UserError, match=f"'{name}'; did you mean '{near}'"):
        Teacher(TeacherConfig(name=name))


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_just_out_of_range_is_refused_from_both_ends(layer):
    with pytest.raises(UserError, match=r"teacher.layers: .*4 layers"):
        Teacher(TeacherConfig(layers=(layer,)))


# Perceptual distances ----------------------------------------------------------------------------


def test_teacher_distance_is_zero_for_equal_images_and_has_a_gradient(demo):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    target = demo.features(pixels)
    assert teacher_distance(demo, pixels, target).abs().max() < 1e-6
    other = (pixels * 0.5).requires_grad_()
    distance = teacher_distance(demo, other, target)
    assert distance.shape == (2,) and (distance > 0).all()
    distance.sum().backward()
    assert other.grad.abs().sum() > 0


def test_our_lpips_is_the_packages_on_the_same_pair(tmp_path, monkeypatch):
    import lpips
    import torchvision

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    ours = LPIPS("squeeze")
    a, b = (torch.rand(3, 3, 64, 64) * 2 - 1 for _ in range(2))
    theirs = lpips.LPIPS(net="squeeze", verbose=False)(a, b).flatten()
    torch.testing.assert_close(ours(a, b), theirs)
    in_unit_range = lpips.LPIPS(net="squeeze", verbose=False)(
        (a + 1) / 2, (b + 1) / 2, normalize=True
    )
    torch.testing.assert_close(ours(a, b), in_unit_range.flatten(), msg="the range is [-1, 1]")
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.train().training


def test_lpips_without_its_weights_says_where_to_put_them(tmp_path, monkeypatch):
    from urllib.error import URLError

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match="vgg16-397923af.pth.*method.perceptual=teacher") as error:
        LPIPS("vgg")
    assert "\n" not in str(error.value)


# Images ------------------------------------------------------------------------------------------


def test_uint8_survives_a_round_trip_and_pil_too():
    uint8 = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_pixels(uint8)), uint8)
    assert torch.equal(to_uint8(to_pixels(to_pil(to_pixels(uint8)))), uint8)
    assert to_pixels(uint8).min() == -1 and to_pixels(uint8).max() == 1
    assert to_pixels(Image.new("L", (4, 6), 255)).shape == (1, 3, 6, 4)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 4, 8, 8), "expected images"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "uint8 images"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 8))], "4x4, 4x8"),
    ],
)
def test_images_that_fit_nothing_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        to_pixels(images)


def test_psnr_by_hand_and_ssim_per_sample():
    black = torch.full((2, 3, 16, 16), -1.0)
    grey = black + torch.tensor([10.0, 20.0])[:, None, None, None] / 127.5
    expected = 20 * torch.log10(255 / torch.tensor([10.0, 20.0]))
    torch.testing.assert_close(psnr(grey, black), expected)
    noisy = torch.rand(2, 3, 16, 16) * 2 - 1
    values = ssim(torch.stack([noisy[0], -noisy[1]]), noisy)
    assert values[0] == pytest.approx(1) and values[1] < 0.9


def test_principal_components_show_what_varies():
    direction = torch.randn(6)
    ramp = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    picture = principal_components(ramp * direction[None, :, None, None])
    assert picture.shape == (1, 3, 4, 4) and picture.abs().max() <= 1
    assert picture[:, 0].std() > 0.3


NAME = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture
def no_network(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, and a Hub that refuses connections."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    return tmp_path / "hub"


def test_without_network_a_teacher_is_one_line_and_no_retries(
    no_network, monkeypatch, capfd, caplog
):
    monkeypatch.setattr(_http.time, "sleep", None)  # a retry would call it
    with pytest.raises(UserError) as raised:
        Teacher(TeacherConfig(name=NAME))
    message = str(raised.value)
    assert f"timm/{NAME} is not in the local cache, and the Hugging Face Hub can't be" in message
    assert "teacher.checkpoint=" in message and "\n" not in message
    assert "Retrying" not in capfd.readouterr().err + caplog.text


def test_a_teacher_in_the_local_cache_is_taken_without_asking_anybody(no_network):
    torch.manual_seed(0)
    network = timm.create_model(NAME)
    folder = no_network / f"models--timm--{NAME}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file(network.state_dict(), snapshot / "model.safetensors")
    teacher = Teacher(TeacherConfig(name=NAME))
    assert torch.equal(teacher.network.norm.weight, network.norm.weight)
    assert torch.equal(teacher.network.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)
