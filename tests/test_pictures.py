"""Pictures for people: what stands where, and what is written beside it."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import tiny
from semtok import Generator
from semtok.commands import evaluate, sample
from semtok.commands.train_dit import train_dit
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.errors import UserError
from semtok.pictures import (
    Row,
    components_in_colours_of,
    grid_of_images,
    principal_components,
    rows_of_images,
)
from semtok.recipe import parse_diffusion_recipe, parse_recipe


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written on pictures, in order."""
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: tuple[int, int], words: str, *args, **options):
        texts.append(words)
        return draw(self, place, words, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


# Rows --------------------------------------------------------------------------------------------


def test_a_picture_has_a_row_per_entry_and_a_column_per_sample():
    first = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 40, 60)
    second = -first[:, :, :10, :15]
    picture = rows_of_images([Row("", first), Row("", second)])
    height, width = 3 * 40, 3 * 60  # the smallest whole factor that gives 96 pixels
    assert picture.shape == (3, 2 * (height + 4) + 4, 3 * (width + 4) + 4)
    assert picture.dtype == torch.uint8
    middle = [
        [picture[0, 4 + y * (height + 4) + 60, 4 + x * (width + 4) + 90] for x in range(3)]
        for y in range(2)
    ]
    assert [[int(v) for v in row] for row in middle] == [[0, 128, 255], [255, 128, 0]]
    large = rows_of_images([Row("", torch.zeros(2, 3, 128, 128))])
    assert large.shape == (3, 128 + 8, 2 * 132 + 4)


def test_images_are_enlarged_without_blur():
    checks = torch.randint(0, 2, (1, 3, 8, 8)).to(torch.uint8) * 255
    picture = rows_of_images([Row("", checks)])
    assert torch.equal(picture[:, 4:-4:12, 4:-4:12], checks[0])
    assert set(picture.flatten().tolist()) == {0, 255}


def test_labels_stand_left_of_their_rows_and_captions_above_their_images(written):
    grey = torch.zeros(2, 3, 96, 96)
    bare = rows_of_images([Row("", grey), Row("", grey)])
    rows = [Row("image", grey, ["first", "second"]), Row("two\nlines", grey)]
    picture = rows_of_images(rows, footer="a credit")
    assert written == ["first", "second", "image", "two\nlines", "a credit"]
    ink = (picture < 100).any(dim=0)
    left, line = picture.shape[2] - bare.shape[2], (picture.shape[1] - bare.shape[1]) // 2
    assert left > 20 and line > 8
    assert ink[: 4 + line, left:].any() and not ink[: 4 + line, :left].any()  # captions
    rows_of_ink = ink[:, :left].any(dim=1).nonzero().flatten()
    assert abs(int(rows_of_ink[0]) - (4 + line + 48)) < 10  # in the middle of the first row
    assert ink[-line:].any() and not ink[4 + line + 100 : -line, left:].any()


def test_neighbours_with_one_caption_share_it_and_what_is_too_long_is_cut(written):
    images = torch.zeros(5, 3, 32, 32)
    long = "a class whose name is longer than two images"
    picture = grid_of_images(images, ["a", "a", long, long, "b"], columns=4)
    assert written[0] == "a" and written[1].endswith("…") and long.startswith(written[1][:-1])
    assert written[2:] == ["b"]
    height = picture.shape[1]
    assert height == 4 + 2 * (100 + (height - 204) // 2)
    assert (picture[:, -50, 110:] == 255).all()  # the last row has one image


def test_names_in_any_letters_are_written_and_bytes_that_are_no_utf8_replaced(written):
    image = torch.zeros(1, 3, 200, 200)
    rows_of_images([Row("Жук\nété", image, ["caf\udce9"])])
    assert written == ["caf\N{REPLACEMENT CHARACTER}", "Жук\nété"]


# Colours -----------------------------------------------------------------------------------------


def test_components_take_the_colours_of_others_that_they_are_a_mixture_of():
    torch.manual_seed(0)
    teacher = torch.randn(2, 3, 6, 6) * torch.tensor([5.0, 3.0, 1.0])[:, None, None]
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    wanted = principal_components(teacher)
    white = (teacher - teacher.mean((0, 2, 3), keepdim=True)) / teacher.std((0, 2, 3), keepdim=True)
    # Of other directions, scales and signs, yet the same three numbers at each place.
    mixture = turn @ torch.diag(torch.tensor([1.0, -3.0, 5.0]))
    latents = torch.einsum("j i, b i h w -> b j h w", mixture, white)
    error = (components_in_colours_of(latents, teacher) - wanted).abs().mean()
    assert error < 0.1 and (principal_components(latents) - wanted).abs().mean() > 0.3


def test_colours_of_others_show_nothing_that_the_features_do_not_hold():
    """No direction is picked for the others' sake: noise stays noise, positions differ as much as before."""
    torch.manual_seed(0)
    noise, teacher = torch.randn(4, 8, 8, 8), torch.randn(4, 20, 4, 4)
    plain, turned = principal_components(noise), components_in_colours_of(noise, teacher)
    assert turned.shape == plain.shape and turned.abs().max() <= 1
    distances = [
        torch.cdist(x[:1, :, :2].flatten(2)[0].T, x[:1, :, :2].flatten(2)[0].T)
        for x in (plain, turned)
    ]
    assert torch.corrcoef(torch.stack([d.flatten() for d in distances]))[0, 1] > 0.95


# What commands draw ------------------------------------------------------------------------------


PCA = "\n(PCA)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, and a transformer on its latents."""
    root = tmp_path_factory.mktemp("pictures")
    tiny.runs(root, steps=2)
    return root


def test_training_says_what_each_row_of_its_samples_is(tmp_path, written):
    rows = {
        "vae": {"image", "reconstruction", f"latents{PCA}"},
        "send_vae": {"image", "reconstruction", f"latents{PCA}", f"teacher{PCA}"},
        "semvae": {"image", f"teacher{PCA}", f"reconstruction{PCA}", f"code{PCA}"},
    }
    for name, expected in rows.items():
        written.clear()
        method = tiny.SEMANTICS.get(name, {"name": name})
        train_tokenizer(parse_recipe(tiny.content(method, steps=2), "tiny"), tmp_path / name)
        assert set(written) == expected
    written.clear()
    content = tiny.content(steps=2)
    del content["method"]
    shape = {"depth": 2, "width": 24, "heads": 2, "patch_size": 2}
    content |= {"tokenizer": str(tmp_path / "semvae"), "diffusion": {"network": shape}}
    content["sampler"] = {"steps": 2}
    train_dit(parse_diffusion_recipe(content, "tiny"), tmp_path / "dit")
    labels = {"sample", "real image\nof this class", f"semantic{PCA}"}
    classes = Generator.from_pretrained(tmp_path / "dit").class_names
    assert labels < set(written) and set(written) - labels <= set(classes)


def test_a_grid_of_samples_names_the_classes(runs, tmp_path, written):
    arguments = [str(runs / "dit"), "--classes", "ellipse red", "7", "none", "--num", "6"]
    assert sample.main([*arguments, "--output", str(tmp_path / "grid.png")]) == 0
    name = Generator.from_pretrained(runs / "dit").class_names[7]
    assert written == ["ellipse red", name, "any class"]


@pytest.mark.parametrize(
    ("images", "classes", "columns"),
    [(54, 54, 9), (216, 54, 12), (36, 9, 4), (4, 2, 2), (4000, 1000, 80), (7, 2, 3), (9, 1, 3)],
)
def test_no_row_of_a_grid_is_cut_short_where_that_is_possible(images, classes, columns):
    assert sample._num_columns(images, classes) == columns


def test_a_strip_names_its_classes_and_its_times(runs, tmp_path, written):
    arguments = [str(runs / "dit"), "--classes", "0", "none", "--strip", "3", "--steps", "4"]
    assert sample.main([*arguments, "--output", str(tmp_path / "strip.png")]) == 0
    first = Generator.from_pretrained(runs / "dit").class_names[0]
    assert written == ["0%", "50%", "100%", first, "any class"]


def test_worst_and_median_reconstructions_state_their_psnr(tmp_path, written):
    grid = tmp_path / "grid.png"
    arguments = ["reconstruction", "--tokenizer", "demo", "--num-held-out", "20"]
    assert evaluate.main([*arguments, "--grid", str(grid)]) == 0
    decibels = [float(text.removesuffix(" dB")) for text in written[3:-1]]
    assert written[:3] == ["worst", "median", "image"] and written[-1] == "demo\nreconstruction"
    assert decibels == sorted(decibels) and 15 < decibels[0] < decibels[-1] < 40


# Components --------------------------------------------------------------------------------------


def test_components_of_latents_stand_beside_the_teachers(runs, tmp_path, written, capsys):
    picture, scores = tmp_path / "hero.png", tmp_path / "scores.json"
    data = ["kind=shapes", "size=16", "num_validation_images=30", "classes=[hue]"]
    arguments = ["components", "--tokenizer", "demo", str(runs / "tok"), "--names", "A", "B"]
    arguments += ["--data", *data, "--num", "6", "--grid", str(picture), "--credit", "drawn here"]
    assert evaluate.main([*arguments, "--output", str(scores)]) == 0
    own = json.loads(scores.read_text())["scores"]
    assert own["A"]["psnr"] > own["B"]["psnr"] + 3 and set(own["B"]) == set(own["A"])
    assert -1 <= own["A"]["cknna"] <= 1 and "CKNNA" in capsys.readouterr().out
    assert len(set(written[:6])) == 6, "six images, of six classes"
    labels = [text.split("\n") for text in written[6:-1]]
    assert labels[0] == ["image"] and labels[-1] == ["demo", "the teacher's tokens"]
    for name, (reconstruction, latents) in zip("AB", (labels[1:3], labels[3:5]), strict=True):
        assert reconstruction == [name, "reconstruction", f"PSNR {own[name]['psnr']:.1f} dB"]
        assert latents == [name, "latents", f"self-similarity {own[name]['self_similarity']:.2f}"]
    assert written[-1] == "drawn here"
    assert Image.open(picture).size[0] > 6 * 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--names", "A", "B"], "--names: 2 names (A, B) for 1 tokenizers"),
        (["--num-held-out", "10"], "CKNNA needs at least 11"),
        (["--num", "0"], "--num 0"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--teacher-input-size", "0"], "--teacher-input-size: expected at least 1 pixel, got 0"),
    ],
)
def test_what_no_picture_can_be_drawn_of_is_refused(options, words, tmp_path):
    arguments = ["components", "--tokenizer", "demo", "--grid", str(tmp_path / "x.png")]
    with pytest.raises(UserError, match=re.escape(words)):
        evaluate.main([*arguments, *options])


def test_a_teacher_sees_images_at_the_size_that_is_asked_for(runs, tmp_path):
    arguments = ["components", "--tokenizer", "demo", "--grid", str(tmp_path / "x.png")]
    arguments += ["--num-held-out", "11", "--num", "2"]
    inputs = []
    for size in ([], ["--teacher-input-size", "48"]):
        output = tmp_path / "scores.json"
        assert evaluate.main([*arguments, *size, "--output", str(output)]) == 0
        inputs.append(json.loads(output.read_text())["protocol"]["networks"]["demo"]["input"])
    assert "32" in inputs[0] and "48" in inputs[1]
