"""One surface: a generator and its exported pipeline take the same words and mean the same by them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

from semtok import Generator, Latents
from semtok.hub.export_pipeline import export_pipeline
from semtok.images import to_pil
from semtok.speed import allow_tf32
from test_pipeline import noise, plain, reglue, same


class Both:
    """A model as the two that users have, each answering with pixels in [-1, 1]."""

    def __init__(self, model: Generator, folder: Path) -> None:
        self.model, self.folder = model, folder
        export_pipeline(model, folder)
        self.pipeline = load(folder)

    def surfaces(self) -> list[Callable[..., Tensor]]:
        return [
            self.model.sample,
            lambda *a, **k: self.pipeline(*a, **k, output_type="pt").images * 2 - 1,
        ]


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers keeps the code of pipelines in a folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Texture alone."""
    return Both(plain(), tmp_path_factory.mktemp("one") / "pipeline")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Texture, semantics and a global part."""
    return Both(reglue(), tmp_path_factory.mktemp("three") / "pipeline")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        {"guidance_scale": 3.0, "num_inference_steps": 2},
        {"guidance_scale": {"texture": 2.0}},
        {"num_images_per_class": 2, "first": 3},
    ],
)
def test_a_word_means_the_same_in_both(one, words):
    ours, theirs = (call([0, None], seed=5, **words) for call in one.surfaces())
    assert same(ours, theirs)
    assert not torch.equal(one.model.sample([0, None], seed=5), ours)


def test_a_generator_is_where_each_images_seed_comes_from(three):
    for call in three.surfaces():
        both = call([0, 1], generator=seeded(7))
        source = seeded(7)
        one_by_one = torch.cat([call([0], generator=source), call([1], generator=source)])
        assert same(both, one_by_one)
        each = call([0, 1], generator=[seeded(7), seeded(8)])
        assert same(each[:1], both[:1]) and not same(each[1:], both[1:])
        assert same(each[1:], call([1], generator=seeded(8)))


def test_without_a_seed_each_call_is_new_and_torchs_seed_repeats_it(one):
    drawn = []
    for call in one.surfaces():
        first, second = call([0]), call([0])
        assert not same(first, second)
        torch.manual_seed(3)
        drawn.append(call([0]))
    assert same(*drawn)


def test_latents_are_taken_as_a_tensor_or_by_part(one, three):
    start = noise(one.model, 5, 2)
    for call in one.surfaces():
        wanted = call([0, 1], seed=5)
        assert same(call([0, 1], latents=start["texture"]), wanted)
        assert same(call([0, 1], latents=Latents(start)), wanted)
        for wrong in (start["texture"][:1], {"texture": start["texture"].int()}, [1]):
            with pytest.raises(ValueError, match="latents: expected"):
                call([0, 1], latents=wrong)
    for call in three.surfaces():
        message = r"latents: expected a mapping from part to tensor, {.*'global': \(1, "
        with pytest.raises(ValueError, match=message):
            call([0], latents=torch.randn(1, 4, 4, 6))


def test_a_callback_sees_each_step_and_can_change_the_latents(three):
    for owner, call in zip((three.model, three.pipeline), three.surfaces(), strict=True):
        seen = []

        def note(model, step, clock, words, seen=seen):
            seen.append((model, step, clock, list(words["latents"])))
            return words

        wanted = call([0], seed=5)
        words = {"callback_on_step_end_tensor_inputs": ["latents"]}
        assert torch.equal(call([0], seed=5, callback_on_step_end=note, **words), wanted)
        assert [entry[:2] for entry in seen] == [(owner, 0), (owner, 1), (owner, 2)]
        assert seen[-1][2:] == (1.0, ["texture", "semantic", "global"])
        other = three.model.sample_latents([1], seed=9)

        def replace(model, step, clock, words, other=other):
            return {"latents": dict(other)} if clock == 1 else {}

        changed = call([0], seed=5, callback_on_step_end=replace)
        assert same(changed, three.model.tokenizer.decode(other))
        with pytest.raises(ValueError, match="callback_on_step_end: expected it to return"):
            call([0], seed=5, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"seed": 1, "generator": seeded(1)}, "seed and generator both say"),
        ({"first": 2}, "first: is a place in the set of a seed; give seed too"),
        ({"generator": [seeded(1)] * 3}, "generator: 3 of them for 1 images"),
        (
            {"generator": 5},
            "generator: expected a torch.Generator, .* got int; a number goes to seed",
        ),
        ({"strength": 0.5}, "strength: says how much of an image is kept; give image too"),
        ({"num_inference_steps": 0}, "steps: Input should be greater"),
        (
            {"guidance_scale": {"semantc": 2.0}},
            "guidance_scale: no part semantc; this model's: texture",
        ),
        ({"class_labels": [1.5]}, "no class 1.5; this model has 0 to 2"),
        ({"class_labels": ["2"]}, "no class '2'; this model has 0 to 2, or by name red circle"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "no tensor prompt_embeds"),
    ],
)
def test_words_that_do_not_fit_are_told_alike(one, words, message):
    for call in one.surfaces():
        with pytest.raises(ValueError, match=message) as error:
            call(**{"class_labels": [0]} | words)
        assert "\n" not in str(error.value)


def test_steps_are_refused_where_the_sampler_chooses_them(one):
    sampler = one.model.sampler.model_copy(update={"method": "dopri5"})
    with pytest.raises(ValueError, match="num_inference_steps: .* dopri5, chooses its steps"):
        one.model.sample([0], sampler=sampler, num_inference_steps=4)


def test_words_of_before_are_answered_with_todays(one):
    for old, new in (("labels", "class_labels"), ("steps", "num_inference_steps")):
        with pytest.raises(TypeError, match=f"{old}: is called {new}"):
            one.model.sample(**{old: [0]})
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompt'"):
        one.model.sample([0], prompt="a cat")


def test_a_generator_is_called_and_gives_what_it_is_asked_for(one):
    wanted = one.model.sample([0, 1], seed=5)
    assert torch.equal(one.model([0, 1], seed=5), wanted)
    unit = one.model.sample([0, 1], seed=5, output_type="pt")
    assert same(unit * 2 - 1, wanted)
    array = one.model.sample([0, 1], seed=5, output_type="np")
    assert array.shape == (2, 16, 24, 3) and np.array_equal(array, unit.permute(0, 2, 3, 1).numpy())
    pictures = one.model.sample([0, 1], seed=5, output_type="pil")
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in to_pil(wanted)]
    assert isinstance(one.model.sample([0], output_type="latent"), Latents)
    with pytest.raises(
        ValueError, match="output_type 'jpeg': expected pixels, pt, np, pil, latent"
    ):
        one.model.sample([0], output_type="jpeg")


def test_another_scheduler_is_refused_in_one_line(one):
    swapped = copy.copy(one.pipeline)
    swapped.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="scheduler: DDIMScheduler can't draw .*; keep Semtok"):
        swapped([0])


# From an image -----------------------------------------------------------------------------------


def test_more_strength_is_farther_from_the_image_and_all_of_it_is_none_of_it(one):
    picture = to_pil(one.model.sample([1], seed=2))[0]
    encoded = one.model.tokenizer.encode(picture).texture
    for call in (one.model.sample, lambda *a, **k: one.pipeline(*a, **k).images):
        words = {"seed": 5, "num_inference_steps": 20, "output_type": "latent"}
        distances = []
        for strength in (0.01, 0.5, 1.0):
            drawn = call([0], image=picture, strength=strength, **words)["texture"]
            distances.append((drawn - encoded).square().mean().item())
        assert distances == sorted(distances) and distances[0] < 0.01 * distances[-1]
        assert same(drawn, call([0], **words)["texture"])
        two = call([0, 0], image=[picture] * 2, **words)["texture"]
        assert same(two[:1], call([0], image=picture, strength=0.8, **words)["texture"])


def test_both_start_from_the_same_image(one):
    picture = to_pil(one.model.sample([1], seed=2))[0]
    clear = picture.copy()
    clear.putalpha(0)
    drawn = [call([0], seed=5, image=picture, strength=0.4) for call in one.surfaces()]
    assert same(*drawn)
    white = Image.new("RGB", picture.size, "white")
    for call in one.surfaces():
        over_white = call([0], seed=5, image=clear, strength=0.4)
        assert same(over_white, call([0], seed=5, image=white, strength=0.4))


def test_an_image_means_the_same_to_both_in_every_form(one):
    drawn = one.model.sample([1], seed=2)
    picture = to_pil(drawn)[0]
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    turned = picture.rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn to the right shows it the right way up
    forms = [
        {"image": picture},
        {"image": turned},
        {"image": levels},
        {"image": levels[0].permute(1, 2, 0).numpy()},
        {"image": levels / 255},
        {"image": (levels / 255).permute(0, 2, 3, 1).numpy()},
        {"image": levels / 127.5 - 1, "value_range": (-1, 1)},
        {"image": levels.float(), "value_range": (0, 255)},
    ]
    made = [call([0], seed=5, strength=0.3, **form) for form in forms for call in one.surfaces()]
    assert [same(made[0], other) for other in made] == [True] * 2 * len(forms)
    for call in one.surfaces():
        with pytest.raises(ValueError, match=r"pass value_range=\(black, white\), as \(-1, 1\)"):
            call([0], image=drawn, strength=0.3)


def test_semantics_of_an_image_come_from_the_teacher_where_there_is_one(three):
    picture = to_pil(three.model.sample([1], seed=2))[0]
    drawn = three.model.sample_latents([0], seed=5, image=picture, strength=1e-3)
    encoded = three.model.tokenizer.encode(picture)
    for name, part in drawn.items():
        assert part.shape[1:] == three.model.sample_latents([0])[name].shape[1:]
        assert name == "semantic" or (part - encoded[name]).abs().mean() < 0.05
    with pytest.raises(
        ValueError, match="image: this model also draws semantic, global, for which"
    ):
        three.pipeline([0], image=picture)


def test_images_that_do_not_fit_are_told(one):
    small, right = Image.new("RGB", (16, 16)), Image.new("RGB", (24, 16))
    for call in one.surfaces():
        with pytest.raises(ValueError, match="image: .*16"):
            call([0], image=small)
        with pytest.raises(ValueError, match="image: 2 images for 3 to draw"):
            call([0, 1, 2], image=[right] * 2)
        with pytest.raises(ValueError, match="strength: expected more than 0 and at most 1"):
            call([0], image=right, strength=1.5)
        with pytest.raises(ValueError, match="255"):
            call([0], image=torch.full((1, 3, 16, 24), 255.0))


# Types of numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_move_to_other_types_of_numbers(three, dtype):
    wanted = three.model.sample([0, 1], seed=5)
    moved = copy.deepcopy(three.model).to(dtype)
    drawn = moved.sample([0, 1], seed=5)
    assert drawn.dtype == torch.float32
    assert (drawn - wanted).abs().max() < (1e-4 if dtype == torch.float64 else 0.1)
    latents = three.model.sample_latents([0, 1], seed=5)
    assert (moved.tokenizer.decode(latents).float() - wanted).abs().max() < 0.1
    assert moved.tokenizer.encode(wanted).texture.dtype == dtype
    pipeline = load(three.folder).to(dtype)
    images = pipeline([0, 1], seed=5, output_type="pt").images * 2 - 1
    assert (images.float() - wanted).abs().max() < 0.1


def test_a_model_in_half_precision_is_saved_and_loaded(one, tmp_path):
    half = copy.deepcopy(one.model).half()
    half.save_pretrained(tmp_path / "half")
    again = Generator.from_pretrained(tmp_path / "half")
    difference = again.sample([0], seed=5) - one.model.sample([0], seed=5)
    assert again.network.patch_embed.weight.dtype == torch.float32 and difference.abs().max() < 0.02


def test_the_decoder_keeps_float32_whatever_the_process_allows(one, monkeypatch):
    model, seen = copy.deepcopy(one.model).speed_up(precision="fp32"), []
    decode = model.tokenizer.decode_raw

    def noted(raw: Latents) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return decode(raw)

    monkeypatch.setattr(model.tokenizer, "decode_raw", noted)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        allow_tf32("tf32")
        model.sample([0])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert seen == ["highest"]


# Elsewhere ---------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_again_and_so_does_that_ones(three, tmp_path):
    wanted = three.pipeline([0, 1], seed=5, output_type="pt").images
    pipeline = three.pipeline
    for name in ("once", "twice"):
        pipeline.save_pretrained(tmp_path / name)
        pipeline = load(tmp_path / name)
        assert torch.equal(pipeline([0, 1], seed=5, output_type="pt").images, wanted)
    with pytest.raises(ValueError, match="push_to_hub: save to a folder"):
        pipeline.save_pretrained(tmp_path / "no", push_to_hub=True)


def asked(model: Generator) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What a network is given for two images."""
    x = noise(model, 0, 2)
    return x, {name: torch.full((2,), 0.3) for name in x}, torch.tensor([0, 2])


def test_the_transformer_is_exported_by_torch_and_read_back_for_any_batch(three, tmp_path):
    network, inputs = three.model.network, asked(three.model)
    batch = {name: {0: torch.export.Dim("batch", min=1, max=64)} for name in inputs[0]}
    exported = torch.export.export(
        network.for_export(), inputs, dynamic_shapes=(batch, batch, batch["texture"])
    )
    torch.export.save(exported, tmp_path / "network.pt2")
    again = torch.export.load(tmp_path / "network.pt2").module()
    x, times, labels = inputs
    for num in (2, 1):
        some = {n: p[:num] for n, p in x.items()}, {n: t[:num] for n, t in times.items()}
        ours, theirs = (run(*some, labels[:num]).velocity for run in (network, again))
        assert isinstance(theirs, Latents)
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_a_pipelines_transformer_is_exported_by_torch(one):
    network, inputs = one.pipeline.transformer, asked(one.model)
    exported = torch.export.export(network, inputs).module()
    wanted, drawn = network(*inputs).velocity, exported(*inputs).velocity
    assert torch.allclose(wanted["texture"], drawn["texture"], atol=1e-5)
