"""The contract that every tokenizer keeps, whatever its method."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import tiny
from semtok import Latents, LatentSpec, PartSpec, Tokenizer
from semtok.images import to_pil
from semtok.registry import _METHODS, get_method
from semtok.sampler.latents import Posterior

get_method("vae", place="test")  # loads the built-in methods
METHODS = [name for name in _METHODS if name in ("vae", "send_vae", "va_vae")]


def made(method: str) -> Tokenizer:
    objective = tiny.build({"name": method})
    tokenizer = objective.tokenizer(objective.averaged_module()).eval()
    tokenizer.measure_statistics([tiny.batch(objective, 16)["pixels"]])
    return tokenizer


@pytest.fixture(scope="module", params=METHODS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return made(request.param)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def deterministic(raw: Latents) -> Posterior:
    return Posterior(raw, raw.map(torch.zeros_like))


def test_latents_have_the_shapes_that_the_spec_states(tokenizer, pixels):
    latents = tokenizer.encode(pixels)
    tokenizer.spec.check(latents)
    for name, part in latents.items():
        assert tuple(part.shape[1:]) == tokenizer.spec.shape(name, (16, 24))
    decoded = tokenizer.decode(latents)
    assert decoded.shape == pixels.shape
    assert decoded.abs().max() <= 1


def test_destandardise_undoes_standardise(tokenizer, pixels):
    with torch.no_grad():
        raw = tokenizer.posterior_raw(pixels).mean
    again = tokenizer.destandardise(tokenizer.standardise(raw))
    for name in raw:
        torch.testing.assert_close(again[name], raw[name])


@torch.no_grad()
def test_latents_of_the_measured_images_have_zero_mean_and_unit_variance(tokenizer):
    images = tiny.batch(tiny.build({"name": "vae"}), 128)["pixels"]
    tokenizer.measure_statistics([images[:5], images[5:6], images[6:]])
    latents = tokenizer.encode(images, sample=True, generator=torch.Generator().manual_seed(1))
    texture = latents.texture
    assert texture.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert (texture.std(dim=(0, 2, 3)) - 1).abs().max() < 0.15


@torch.no_grad()
def test_statistics_do_not_depend_on_how_images_are_batched(tokenizer):
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    # Posterior means alone, so that the draws cannot differ.
    original = tokenizer.posterior_raw
    tokenizer.posterior_raw = lambda pixels, features=None: deterministic(original(pixels).mean)
    try:
        tokenizer.measure_statistics([images])
        whole = tokenizer.texture_mean.clone(), tokenizer.texture_std.clone()
        tokenizer.measure_statistics([images[:3], images[3:4], images[4:]])
    finally:
        del tokenizer.posterior_raw
    torch.testing.assert_close(tokenizer.texture_mean, whole[0])
    torch.testing.assert_close(tokenizer.texture_std, whole[1])


def test_encoding_before_statistics_are_measured_is_refused(pixels):
    objective = tiny.build({"name": "vae"})
    fresh = objective.tokenizer(objective.averaged_module())
    with pytest.raises(ValueError, match="not measured"):
        fresh.encode(pixels)


def test_measuring_a_constant_channel_is_an_error(tokenizer):
    zeros = torch.zeros(2, 4, 2, 2)
    tokenizer.posterior_raw = lambda pixels, features=None: deterministic(
        Latents({"texture": zeros})
    )
    try:
        with pytest.raises(ValueError, match=r"'texture': channels \[0, 1, 2, 3\] are constant"):
            tokenizer.measure_statistics([torch.zeros(2, 3, 8, 8)])
    finally:
        del tokenizer.posterior_raw


@torch.no_grad()
def test_uint8_pil_and_float_images_encode_alike(tokenizer):
    uint8 = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in uint8]
    expected = tokenizer.encode(uint8.float() / 127.5 - 1).texture
    assert torch.equal(tokenizer.encode(uint8).texture, expected)
    assert torch.equal(tokenizer.encode(pil).texture, expected)


@torch.no_grad()
def test_sampling_follows_its_generator_and_differs_from_the_mean(tokenizer, pixels):
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return tokenizer.encode(pixels, sample=True, generator=generator).texture

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert not torch.equal(draw(0), tokenizer.encode(pixels).texture)


def test_an_image_size_that_the_stride_does_not_divide_is_refused(tokenizer):
    with pytest.raises(ValueError, match="15x16 is not divisible .* 4; the nearest that is: 16x16"):
        tokenizer.encode(torch.zeros(1, 3, 15, 16))


def test_latents_that_do_not_fit_the_spec_are_refused(tokenizer):
    with pytest.raises(ValueError, match="expected"):
        tokenizer.decode(Latents({"texture": torch.zeros(1, 5, 4, 4)}))
    with pytest.raises(ValueError, match="expected parts"):
        tokenizer.decode(Latents({"texture": torch.zeros(1, 4, 4, 4), "global": torch.zeros(1, 2)}))


@torch.no_grad()
def test_a_fresh_process_reads_the_same_and_diffusers_needs_no_semtok(pixels, tmp_path):
    for method in METHODS:
        tokenizer = made(method)
        tokenizer.save_pretrained(tmp_path / method)
        latents = tokenizer.encode(pixels)
        torch.save(
            {"pixels": pixels, "latents": latents.texture, "decoded": tokenizer.decode(latents)},
            tmp_path / f"{method}.pt",
        )
    # One process for all methods, as it takes long to start.
    script = (
        "import sys, torch; sys.modules['semtok'] = None\n"
        "from diffusers import AutoencoderKL\n"
        "threads, *folders = sys.argv[1:]\n"
        "torch.set_grad_enabled(False); torch.set_num_threads(int(threads))\n"
        "expected = {f: torch.load(f + '.pt') for f in folders}\n"
        "for folder, e in expected.items():\n"
        "    vae = AutoencoderKL.from_pretrained(folder + '/vae').eval()\n"
        "    z = vae.encode(e['pixels']).latent_dist.mode()\n"
        "    mean, std = (torch.tensor(v)[:, None, None] for v in"
        " (vae.config.latents_mean, vae.config.latents_std))\n"
        "    d = vae.decode((z - mean) / std * std + mean).sample.clamp(-1, 1)\n"
        "    torch.testing.assert_close(d, e['decoded'], atol=1e-5, rtol=0)\n"
        "del sys.modules['semtok']; from semtok import Tokenizer\n"
        "for folder, e in expected.items():\n"
        "    t = Tokenizer.from_pretrained(folder)\n"
        "    z = t.encode(e['pixels']); assert torch.equal(z.texture, e['latents'])\n"
        "    assert torch.equal(t.decode(z), e['decoded']); assert not t.training\n"
        "    print(t.method)"
    )
    words = [str(torch.get_num_threads()), *(str(tmp_path / method) for method in METHODS)]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == METHODS


def test_saving_over_an_export_replaces_it_whole(tokenizer, tmp_path):
    folder = tmp_path / "export"
    tokenizer.save_pretrained(folder)
    (folder / "stale.txt").write_text("from before")
    tokenizer.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "tokenizer.safetensors",
        "vae",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["export"], "nothing temporary stays"
    assert json.loads((folder / "config.json").read_text())["format_version"] == 1


def test_a_tokenizer_trains_inside_other_peoples_code(tokenizer, pixels):
    module = torch.nn.Sequential(tokenizer)
    loss = tokenizer.decode(tokenizer.encode(pixels)).square().mean()
    loss.backward()
    gradients = [p.grad is not None for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    assert all(gradients)


def test_a_spec_names_distinct_parts_texture_first_and_survives_json():
    spec = LatentSpec(
        (PartSpec("texture", 4, 8), PartSpec("semantic", 16, 12), PartSpec("global", 7, None))
    )
    assert LatentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.stride == 24
    assert spec.shape("semantic", (48, 96)) == (16, 4, 8)
    assert spec.shape("global", (48, 96)) == (7,)
    with pytest.raises(ValueError, match="'texture' first"):
        LatentSpec((PartSpec("semantic", 4, 8),))
    with pytest.raises(KeyError, match="no part 'style'"):
        spec["style"]


def test_latents_need_a_texture_and_keep_their_order():
    with pytest.raises(ValueError, match="texture"):
        Latents({"semantic": torch.zeros(1, 2, 2, 2)})
    latents = Latents({"texture": torch.ones(1, 1, 2, 2), "global": torch.ones(1, 3)})
    assert list(latents) == ["texture", "global"]
    assert torch.equal(latents.map(lambda part: part * 2)["global"], torch.full((1, 3), 2.0))
    assert latents.to(torch.float64).texture.dtype == torch.float64


# What people give it -----------------------------------------------------------------------------


def test_images_of_another_range_are_refused_or_asked_about(tokenizer, pixels, recwarn):
    unit, wanted = (pixels + 1) / 2, tokenizer.encode(pixels).texture
    for images, message in (
        (unit * 255, r"float images are in \[-1, 1\]; these lie in .* value_range=\(0, 255\)"),
        (pixels * 2.2, r"these lie in \[-2.*; pass value_range="),
        (pixels * float("nan"), r"\[nan, nan\]; mend what made them so"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(images)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"all values of these lie in \[0, 1\]; pass value_range"):
        tokenizer.encode(unit)
    recwarn.clear()
    torch.testing.assert_close(tokenizer.encode(unit, value_range=(0, 1)).texture, wanted)
    torch.testing.assert_close(tokenizer.encode(unit * 255, value_range=(0, 255)).texture, wanted)
    tokenizer.encode(pixels * 2.2, value_range=(-1, 1))
    tokenizer.encode(unit, value_range=(-1, 1))
    tokenizer.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert not recwarn.list


def test_a_path_is_encoded_as_its_image_is(tokenizer, pixels, tmp_path):
    image = to_pil(pixels)[0]
    image.save(tmp_path / "a.png")
    assert torch.equal(
        tokenizer.encode(tmp_path / "a.png").texture, tokenizer.encode(image).texture
    )
    with pytest.raises(
        ValueError, match="image size 16x22 is not divisible .* nearest that is: 16x24"
    ):
        tokenizer.encode(image.resize((22, 16)))
    with pytest.raises(ValueError, match="generator: nothing is drawn; pass sample=True too"):
        tokenizer.encode(image, generator=torch.Generator())


def test_what_is_no_latents_is_told(tokenizer, pixels):
    latents = tokenizer.encode(pixels)
    texture = latents.texture
    assert torch.equal(tokenizer.decode({"texture": texture}), tokenizer.decode(latents))
    with pytest.raises(TypeError, match="expected Latents, got Tensor; wrap it"):
        tokenizer.decode(texture)
    for wrong, message in (
        ({"texture": texture[0]}, r"part 'texture': expected \(B, 4, H, W\), got \(4, 4, 6\)"),
        (
            {"texture": texture.int()},
            "part 'texture': expected floating-point numbers, got torch.int",
        ),
        ({"texture": None}, r"part 'texture': expected a tensor \(B, 4, H, W\), got NoneType"),
        ({"semantic": texture}, r"expected parts \['texture'\], got \['semantic'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_tokenizer_moves_to_other_types_of_numbers(tokenizer, pixels, dtype):
    moved, latents = copy.deepcopy(tokenizer).to(dtype), tokenizer.encode(pixels)
    assert moved.encode(pixels).texture.dtype == dtype
    difference = moved.decode(latents).double() - tokenizer.decode(latents)
    assert difference.abs().max() < 0.1
