"""Ways into the library and out of it, metrics, pictures, and perceptual distances."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from semtok import UserError
from semtok.images import check_range, to_pil, to_pixels, to_uint8
from semtok.metrics import psnr, ssim
from semtok.perceptual import LPIPS, teacher_distance
from semtok.pictures import principal_components
from semtok.teachers import Teacher, TeacherConfig


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_range", [5, (0,), "ab", "01", (1, 0)])
def test_a_value_range_that_is_none_is_named(value_range):
    with pytest.raises(ValueError, match="^value_range: expected \\(black, white\\)"):
        to_pixels(torch.zeros(1, 3, 4, 4), value_range=value_range)


def test_images_outside_their_value_range_are_refused():
    pixels = to_pixels(torch.full((1, 3, 4, 4), 200.0), value_range=(0, 1))
    with pytest.raises(ValueError, match="^value_range: .* lie in .*200, 200"):
        check_range(pixels, (0, 1))
    check_range(to_pixels(torch.ones(1, 3, 4, 4), value_range=(0, 1)), (0, 1))


def test_floats_of_another_order_of_bytes_are_taken():
    array = np.full((4, 4, 3), 0.5, dtype=">f4")
    assert to_pixels(array).eq(0.5).all()


@pytest.mark.parametrize(
    ("array", "way_out"),
    [
        (np.zeros((4, 4), np.uint8), "np.stack"),
        (np.zeros((4, 4, 4), np.uint8), "leave transparency out"),
        (np.zeros((4, 4, 3), bool), "255$"),
    ],
)
def test_arrays_that_are_refused_have_a_way_out(array, way_out):
    with pytest.raises(ValueError, match=way_out):
        to_pixels(array)


def test_pil_images_become_channels_first_in_rgb_order():
    image = Image.new("RGB", (6, 4), (255, 0, 51))
    image.putpixel((5, 1), (0, 255, 0))
    for pixels in (to_pixels(image), to_pixels([image]), to_pixels((image,))):
        assert pixels.shape == (1, 3, 4, 6) and pixels.dtype == torch.float32
        torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
        torch.testing.assert_close(pixels[0, :, 1, 5], torch.tensor([-1.0, 1.0, -1.0]))


def test_several_pil_images_keep_their_order():
    images = [Image.new("RGB", (4, 4), (i, i, i)) for i in (0, 100, 255)]
    assert to_uint8(to_pixels(images))[:, 0, 0, 0].tolist() == [0, 100, 255]


def test_float_images_pass_unchanged_and_a_single_one_becomes_a_batch():
    pixels = noise(2, 3, 4, 4)
    assert to_pixels(pixels) is pixels
    assert torch.equal(to_pixels(pixels[0]), pixels[:1])
    assert to_pixels(torch.zeros(3, 4, 4, dtype=torch.uint8)).shape == (1, 3, 4, 4)
    assert to_pixels(pixels.half()).dtype == torch.float16
    assert to_pixels(pixels, "meta").device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.bool])
def test_other_kinds_of_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match="uint8 images in"):
        to_pixels(torch.zeros(1, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3), (2, 4, 4, 3), (1, 1, 4, 4), (1, 1, 3, 4, 4)])
def test_other_shapes_are_refused_and_told(shape):
    with pytest.raises(ValueError, match="expected images"):
        to_pixels(torch.zeros(shape))


def test_no_images_are_refused_as_such():
    with pytest.raises(ValueError, match="no images"):
        to_pixels([])


def test_uint8_rounds_to_the_nearest_level_and_clamps():
    levels = torch.tensor([-1.5, -1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 7.0])
    assert to_uint8(levels).tolist() == [0, 0, 1, 0, 255, 255]
    assert to_uint8(levels.bfloat16()).dtype == torch.uint8


def test_every_level_survives_every_way_in_and_out():
    levels = torch.arange(256, dtype=torch.uint8)
    images = torch.stack([levels, levels.flip(0), levels.roll(7)]).view(1, 3, 8, 32)
    images = torch.cat([images, images.roll(1, dims=1)])
    assert torch.equal(to_uint8(to_pixels(images)), images)
    pictures = to_pil(to_pixels(images))
    assert [picture.size for picture in pictures] == [(32, 8)] * 2
    assert np.array_equal(np.asarray(pictures[0]), images[0].permute(1, 2, 0).numpy())
    assert torch.equal(to_uint8(to_pixels(pictures)), images)


# Metrics -----------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_files_per_sample():
    a, b = noise(3, 3, 8, 8), noise(3, 3, 8, 8, seed=1)
    for value, x, y in zip(psnr(a, b), to_pil(a), to_pil(b), strict=True):
        mse = np.mean((np.asarray(x, dtype=float) - np.asarray(y, dtype=float)) ** 2)
        assert value.item() == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-3)


def test_psnr_of_equal_files_is_finite_and_ignores_what_files_cannot_hold():
    pixels = to_pixels(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8))
    for reconstruction in (pixels, pixels + 0.001, pixels + 5):
        assert psnr(reconstruction, pixels).item() == pytest.approx(88.13, abs=0.01)


def test_ssim_is_torchmetrics_for_each_sample_alone():
    pixels = noise(3, 3, 24, 32)
    other = pixels + torch.tensor([0.01, 0.3, 1.0])[:, None, None, None] * noise(
        3, 3, 24, 32, seed=1
    )
    other = other.clamp(-1, 1)
    values = ssim(other, pixels)
    assert values.shape == (3,) and values[0] > values[1] > values[2]
    for i in range(3):
        alone = structural_similarity_index_measure(
            other[i : i + 1], pixels[i : i + 1], data_range=2.0
        )
        torch.testing.assert_close(values[i], alone, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(ssim(other[i : i + 1], pixels[i : i + 1]), values[i : i + 1])


# Pictures ----------------------------------------------------------------------------------------


def test_features_of_rank_one_have_one_channel_that_is_not_constant():
    ramp = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    for scale in (1e-3, 1.0, 1e3):
        direction = scale * noise(6)[None, :, None, None]
        picture = principal_components(3 * scale + ramp * direction)
        spread = picture.std(dim=(0, 2, 3))
        assert spread[0] > 0.3 and (spread[1:] < 1e-3).all()
        correlation = torch.corrcoef(torch.stack([picture[:, 0].flatten(), ramp.flatten()]))
        assert correlation[0, 1].abs() > 0.999


@pytest.mark.parametrize(
    "shape", [(2, 8, 4, 6), (1, 2, 5, 5), (1, 1, 4, 4), (1, 8, 1, 2), (1, 8, 1, 1)]
)
def test_components_of_any_features_are_pixels(shape):
    picture = principal_components(5 + 100 * torch.randn(shape))
    assert picture.shape == (shape[0], 3, *shape[2:])
    assert picture.isfinite().all() and picture.abs().max() <= 1
    assert principal_components(torch.ones(shape)).abs().max() == 0


def test_components_are_ordered_uncorrelated_and_of_equal_spread():
    features = torch.randn(4, 5, 8, 8) * torch.tensor([1.0, 30.0, 3.0, 10.0, 0.1])[:, None, None]
    picture = principal_components(features).transpose(0, 1).flatten(1)
    sources = features.transpose(0, 1).flatten(1)[[1, 3, 2]]
    correlation = torch.corrcoef(torch.cat([picture, sources]))
    assert (correlation[:3, 3:].diagonal().abs() > 0.9).all()
    assert (correlation[:3, :3] - torch.eye(3)).abs().max() < 0.1
    assert ((picture.std(dim=1) - 0.5).abs() < 0.05).all()


def test_the_order_of_the_batch_does_not_change_the_colours():
    features = torch.randn(3, 5, 6, 6)
    picture = principal_components(features)
    torch.testing.assert_close(
        principal_components(features.flip(0)), picture.flip(0), atol=1e-3, rtol=1e-3
    )


# Perceptual distances ----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torchvision's weights, and no network to fill it from."""
    from urllib.error import URLError

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


SQUEEZE = "squeezenet1_1-b8a52dc0.pth"


def random_squeezenet(hub: Path) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), hub / SQUEEZE)


def test_lpips_is_one_value_per_sample_zero_for_equal_images_and_differentiable(hub):
    random_squeezenet(hub)
    distance = LPIPS("squeeze")
    pixels = noise(3, 3, 64, 64)
    other = torch.stack([pixels[0], pixels[1] + 0.1, -pixels[2]]).clamp(-1, 1).requires_grad_()
    values = distance(other, pixels)
    assert values.shape == (3,) and values[0] == 0 and 0 < values[1] < values[2]
    torch.testing.assert_close(distance(other[1:2], pixels[1:2]), values[1:2])
    values.sum().backward()
    assert other.grad[1:].abs().sum() > 0
    assert all(p.grad is None for p in distance.parameters())
    assert distance(other.bfloat16(), pixels.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("content", [None, b"", b"not weights", "half", "other"])
def test_a_missing_or_damaged_backbone_is_one_line_with_the_place_and_a_way_out(hub, content):
    if content == "half":
        random_squeezenet(hub)
        content = (hub / SQUEEZE).read_bytes()
        content = content[: len(content) // 2]
    if content == "other":
        torch.save({"other": torch.zeros(1)}, hub / SQUEEZE)
    elif content is not None:
        (hub / SQUEEZE).write_bytes(content)
    with pytest.raises(UserError) as error:
        LPIPS("squeeze")
    message = str(error.value)
    assert "\n" not in message and str(hub / SQUEEZE) in message
    assert "method.perceptual=teacher" in message


def test_teacher_distance_is_the_mean_over_layers_of_squared_distances_of_directions():
    teacher = Teacher(TeacherConfig(layers=(-1, 1)))
    pixels, other = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1)
    target = teacher.features(pixels)
    expected = torch.stack(
        [
            (2 - 2 * torch.cosine_similarity(a, b, dim=1)).mean(dim=(1, 2))
            for a, b in zip(teacher.features(other).patches, target.patches, strict=True)
        ]
    ).mean(dim=0)
    torch.testing.assert_close(
        teacher_distance(teacher, other, target), expected, atol=1e-5, rtol=1e-4
    )
    mixed = torch.stack([pixels[0], other[1]]).requires_grad_()
    distance = teacher_distance(teacher, mixed, target)
    assert distance[0] < 1e-6 < distance[1]
    distance[1].backward()
    assert mixed.grad[0].abs().sum() == 0 and mixed.grad[1].abs().sum() > 0


# What people have --------------------------------------------------------------------------------


def picture(width: int = 6, height: int = 4) -> Image.Image:
    """One with another colour in each corner."""
    image = Image.new("RGB", (width, height), (200, 100, 50))
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((width - 1, 0), (0, 0, 255))
    return image


def test_files_arrays_tensors_and_lists_of_them_are_the_same_pixels(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    wanted = to_pixels(image)
    for same in (str(tmp_path / "a.png"), tmp_path / "a.png", array, tensor, array[None]):
        assert torch.equal(to_pixels(same), wanted)
        assert torch.equal(to_pixels([same, image]), torch.cat([wanted, wanted]))
    floats = array.astype(np.float64) / 255
    assert to_pixels(floats, value_range=(0, 1)).dtype == torch.float32
    torch.testing.assert_close(to_pixels(floats, value_range=(0, 1)), wanted)
    torch.testing.assert_close(to_pixels(tensor.float(), value_range=(0, 255)), wanted)


def test_a_files_orientation_transparency_and_depth_are_understood(tmp_path):
    turned = picture()
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert to_pixels(tmp_path / "turned.png").shape == (1, 3, 6, 4)
    clear = picture()
    clear.putalpha(0)
    assert (to_pixels(clear) == 1).all()
    deep = Image.fromarray(np.full((4, 6), 65535, dtype=np.uint16))
    assert deep.mode.startswith("I;16") and (to_pixels(deep) == 1).all()
    with pytest.raises(
        ValueError, match="floating-point numbers of no known range; .* with value_range"
    ):
        to_pixels(Image.fromarray(np.zeros((4, 6), dtype=np.float32)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 4, 4, 3),
            r"got \(2, 4, 4, 3\); channels come first: images.movedim\(-1, -3\)",
        ),
        (torch.zeros(1, 1, 4, 4), r"got \(1, 1, 4, 4\); grey images become three channels by"),
        (torch.zeros(1, 4, 8, 8), r"got \(1, 4, 8, 8\); leave transparency out: images\[:, :3\]"),
        (np.zeros((3, 4, 6)), r"as a NumPy array, got \(3, 4, 6\); channels come first in tensors"),
        (
            np.zeros((4, 6, 4)),
            r"\(height, width, 3\) .* got \(4, 6, 4\); leave transparency out: array\[\.\.\., :3\]$",
        ),
        (
            torch.zeros(1, 3, 4, 4, dtype=torch.int64),
            r"got torch.int64; values in \[0, 255\] become",
        ),
        (3, "paths, PIL images, NumPy arrays or tensors, got int"),
        ("nowhere.png", "^nowhere.png: no such image$"),
        ("/", "^/: is a folder; give the images in it, as a list$"),
        (__file__, "test_images.py: can't be read as an image"),
        ([torch.zeros(3, 4, 4), picture(4, 4)], "several kinds of numbers"),
    ],
)
def test_what_is_no_batch_of_images_is_told_with_a_way_out(images, message):
    with pytest.raises(ValueError, match=message) as error:
        to_pixels(images)
    assert "\n" not in str(error.value)


def test_a_range_goes_with_floats_and_goes_up():
    with pytest.raises(ValueError, match="value_range: goes with floats"):
        to_pixels(picture(), value_range=(0, 255))
    with pytest.raises(ValueError, match="value_range: expected .black, white."):
        to_pixels(torch.zeros(1, 3, 4, 4), value_range=(1, 0))
