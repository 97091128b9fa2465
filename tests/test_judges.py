"""Judges by their words: any frozen network that learns to read classes, and FDr over several."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.errors import UserError
from semtok.evaluation import classes
from semtok.evaluation.classes import class_reader
from semtok.evaluation.frechet import relative_frechet
from semtok.evaluation.generation import see, see_reference
from semtok.evaluation.image_sets import images_of_source
from semtok.evaluation.judges import (
    Seat,
    check_judges,
    judge_choices,
    judged,
    load_judge,
    relative_scores,
    take_seat,
    with_held_out,
    with_reader,
)
from semtok.teachers import TeacherConfig

CPU = torch.device("cpu")
CONFIG = ShapesConfig(size=16, classes=("hue",), num_images=400, num_validation_images=100)
TRAIN, HELD_OUT = Shapes.open(CONFIG)
TEACHER = TeacherConfig()


def seat(cache: Path, *words: str, num_images: int = 100) -> Seat:
    (choice,) = judge_choices([words], TEACHER)
    judge = with_reader(load_judge(choice, TRAIN, device=CPU), TRAIN, 300, cache)
    reference = see_reference(images_of_source(TRAIN, 300), judge.network, cache)
    return with_held_out(Seat(judge, reference), HELD_OUT, num_images, cache)


def test_a_frozen_network_learns_to_read_classes_and_tells_how_far_to_trust_it(tmp_path):
    own = seat(tmp_path, "name=demo", "input_size=16", "layers=[-2]")
    told = own.told()
    assert own.name == "demo" and told["num_fitted"] == 300
    assert told["held_out"]["num_images"] == 100 and told["held_out"]["read_right"] > 0.5
    assert "demo, layer -2" in told["network"]["model"] and "16" in told["network"]["input"]
    files = len(list(tmp_path.iterdir()))
    again = seat(tmp_path, "name=demo", "input_size=16", "layers=[-2]")
    assert again.told() == told and len(list(tmp_path.iterdir())) == files, "seen once"


def test_a_judge_that_was_seated_before_reads_no_image_and_fits_nothing(tmp_path, monkeypatch):
    for number in range(24):
        colour = (10 * number, 255 - 10 * number, 30)
        file = tmp_path / "images" / ("ab"[number % 2]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(file)
    sources = Folder.open(
        FolderConfig(kind="folder", path=str(tmp_path / "images"), size=16, validation_fraction=0.4)
    )
    (choice,) = judge_choices([["demo"]], TEACHER)
    judge = load_judge(choice, sources[0], device=CPU)
    reference = see_reference(images_of_source(sources[0], 20), judge.network, tmp_path)
    numbers = {"num_fitted": 20, "num_held_out": 20, "cache": tmp_path / "kept"}
    first = take_seat(judge, reference, sources, **numbers)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "contents", lambda *_: pytest.fail("an image was read"))
        patch.setattr(classes, "logistic_regression", lambda *_, **__: pytest.fail("fitted"))
        again = take_seat(judge, reference, sources, **numbers)
    assert again.told() == first.told() and again.held_out.read_right is not None


def test_a_reader_that_was_kept_is_the_one_that_was_fitted(tmp_path, monkeypatch):
    features = np.random.default_rng(0).normal(size=(90, 12)).astype(np.float32)
    fits = []
    own_fit = classes.logistic_regression
    monkeypatch.setattr(
        classes, "logistic_regression", lambda *a, **k: fits.append(1) or own_fit(*a, **k)
    )
    for num_classes in (2, 3):
        labels = np.arange(90) % num_classes + 1
        labels[features[:, 0] > 0] = 1
        for _ in range(2):
            class_reader(features, labels, cache=tmp_path)
        (file,) = tmp_path.glob("*.safetensors")
        kept, fresh = load_file(file), classes._fitted(features, labels)
        assert kept.keys() == fresh.keys() and all(kept[k].equal(fresh[k]) for k in kept)
        read = class_reader(features, labels, cache=tmp_path)(features)
        assert (read == class_reader(features, labels)(features)).all()
        fits.clear()
        class_reader(features, np.roll(labels, 1), cache=tmp_path)
        file.write_bytes(b"damaged")
        class_reader(features, labels, cache=tmp_path)
        assert len(fits) == 2, "other labels, and a damaged file, are fitted"
        for file in tmp_path.iterdir():
            file.unlink()


def test_held_out_images_score_as_what_they_are(tmp_path):
    """The set that FDr divides by has FDr 1, and its labels are read as its reader reads them."""
    pytest.importorskip("torch_fidelity")
    one = seat(tmp_path, "name=demo", "input_size=16")
    images = images_of_source(HELD_OUT, 100)
    labels = torch.cat([HELD_OUT.load(HELD_OUT.chosen(100)).labels]).tolist()
    scores = judged(see(images, [one.judge.network])["demo"], one, labels)
    assert set(scores) == {
        "FD-demo",
        "precision-demo",
        "recall-demo",
        "KD-demo",
        "shown class (demo)",
    }
    assert scores["shown class (demo)"] == pytest.approx(one.held_out.read_right)
    assert scores["FD-demo"] == pytest.approx(one.held_out.distance)
    assert relative_scores(scores, [one]) == {}, "of one network there is none"


def test_fdr_is_the_mean_of_the_ratios_to_held_out_images():
    scores = relative_frechet({"a": 3.0, "b": 10.0}, {"a": 2.0, "b": 4.0})
    assert scores == {"FDr": 2.0, "FDr-a": 1.5, "FDr-b": 2.5}
    with pytest.raises(ValueError, match="over two networks or more, got a"):
        relative_frechet({"a": 3.0}, {"a": 2.0})
    with pytest.raises(ValueError, match="the same to b"):
        relative_frechet({"a": 3.0, "b": 10.0}, {"a": 2.0, "b": 0.0})


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ([["demo"], ["name=demo", "layers=[-2]"]], "two judges are called 'demo'; leave one out"),
        ([["teacher"], ["demo"]], "two judges are called 'demo'"),
        ([["trian"]], "--judge trian: expected trained, teacher, demo, .* did you mean 'trained'"),
        ([["trained", "demo"]], "give --judge once for each judge"),
        ([["name=nope"]], "--judge name=nope: name: timm knows no model 'nope'"),
        ([["name=demo", "layer=3"]], "unknown key 'layer'; did you mean 'layers'"),
    ],
)
def test_words_that_name_no_judge_are_refused(judges, message):
    with pytest.raises(UserError, match=message):
        judge_choices(judges, TEACHER)


def test_images_of_one_class_have_distances_alone(tmp_path):
    train, _ = Shapes.open(CONFIG)
    train.class_names = ("all",)
    frozen, trained = judge_choices([["demo"], ["trained"]], TEACHER)
    check_judges([frozen], train)
    assert with_reader(load_judge(frozen, train, device=CPU), train, 300, tmp_path).read is None
    with pytest.raises(UserError, match="--judge trained: learns to tell classes apart"):
        check_judges([trained], train)
    with pytest.raises(UserError, match="files have none; give data settings"):
        load_judge(trained, None, device=CPU)


def test_a_judge_is_a_teachers_network_whatever_size_and_layers_it_sees_by(tmp_path):
    for name, content in (("a", b"1"), ("copy", b"1"), ("b", b"2")):
        (tmp_path / name).write_bytes(content)

    def choice(*words: str):
        return judge_choices([["name=vit_small_patch14_dinov2", *words]], TEACHER)[0]

    named = TeacherConfig(name="vit_small_patch14_dinov2", checkpoint=str(tmp_path / "a"))
    assert choice(f"checkpoint={tmp_path / 'copy'}", "layers=[-2]", "input_size=56").is_of(named)
    assert not choice(f"checkpoint={tmp_path / 'b'}").is_of(named)
    assert choice().is_of(named), "nobody knows before timm's weights are there"
    assert not choice().is_of(TEACHER) and not judge_choices([["trained"]], TEACHER)[0].is_of(named)
