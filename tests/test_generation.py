"""Scores of generated images: closed forms, known overlaps, files in and out, and the command."""

import contextlib
import json
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from comparison import command as compare
from semtok import lock
from semtok.commands import evaluate, sample
from semtok.commands.cli import run
from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.evaluation.classes import Judge
from semtok.evaluation.frechet import Gaussian
from semtok.evaluation.generation import (
    FeatureNetwork,
    SetFeatures,
    generation_scores,
    read_statistics,
    see,
    see_reference,
    teacher_network,
    write_statistics,
)
from semtok.evaluation.image_sets import (
    ImageSet,
    images_of_folder,
    images_of_npz,
    images_of_source,
    labels_for,
)
from semtok.evaluation.inception import Inception
from semtok.evaluation.judge import trained_judge
from semtok.lock import only_one_in
from semtok.statistics import StreamingMoments
from semtok.teachers import Teacher, TeacherConfig

pytest.importorskip("torch_fidelity")
SOURCE = Shapes(ShapesConfig(size=16, num_images=400), train=True)
MEANS = FeatureNetwork(
    "means", "", lambda images: {"pooled": images.float().flatten(2).mean(dim=2) / 255}
)


def seen(
    features: torch.Tensor, name: str = "x", logits: torch.Tensor | None = None
) -> SetFeatures:
    moments = StreamingMoments(covariance=True)
    moments.add(features)
    return SetFeatures(
        name, None, "made up", None, len(features), Gaussian.of(moments), None, features, logits
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


# Scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_precision_and_recall_are_the_overlap_of_two_sets(share):
    """Real: two far clusters, half of the images each. Generated: images of the first, the rest far away."""
    torch.manual_seed(0)
    real = torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 100])
    inside = round(200 * share)
    generated = torch.cat([real[:inside], torch.randn(200 - inside, 4) - 100])
    scores = generation_scores(seen(generated), seen(real))
    assert scores["precision-x"] == pytest.approx(share)
    assert scores["recall-x"] == pytest.approx(0.5 if share else 0, abs=0.1)


def test_a_set_against_itself_is_perfect_and_names_its_network():
    features = torch.randn(300, 5)
    scores = generation_scores(seen(features), seen(features))
    # With fewer images than features rounding is largest.
    few = torch.randn(40, 64) * 10 + 100
    assert 0 <= generation_scores(seen(few), seen(few))["FD-x"] < 1e-3
    assert set(scores) == {"FD-x", "precision-x", "recall-x", "KD-x"}, "never FID"
    assert scores["FD-x"] == pytest.approx(0, abs=1e-6)
    assert scores["precision-x"] == scores["recall-x"] == 1
    assert scores["KD-x"] <= 1e-3
    with pytest.raises(ValueError, match="features of x, but a reference of y"):
        generation_scores(seen(features), seen(features, "y"))


def test_inception_scores_have_their_usual_names_and_do_not_depend_on_the_order():
    torch.manual_seed(0)
    logits = 8 * torch.eye(10).repeat_interleave(1000, dim=0)  # sorted by class: ten sure classes
    features = torch.randn(400, 3)
    in_order = seen(features, "inception", logits)
    scores = generation_scores(in_order, seen(features, "inception"))
    assert set(scores) == {"FID", "IS", "precision", "recall", "KID"}
    # exp of the mean divergence of ten sure predictions from uniform ones
    p = logits[0].double().softmax(dim=0)
    expected = float((p * (p.log() + np.log(10))).sum().exp())
    assert scores["IS"] == pytest.approx(expected, rel=1e-2)


def test_sfid_sees_the_first_seven_channels_of_mixed_6():
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
        network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    outputs = []
    # mixed_4 to mixed_7 of the TensorFlow graph are Mixed_6b to Mixed_6e here
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *a: outputs.append(a[-1]))
    features = Inception(network)(SOURCE.load([0, 1]).images)
    assert features.pooled.shape == (2, 2048) and features.logits.shape == (2, 1008)
    expected = outputs[0][:, :7]  # (B, 7, 17, 17)
    assert features.spatial.shape == (2, 2023)
    back = features.spatial.view(2, 17, 17, 7)  # positions first, as TensorFlow lays images out
    assert torch.equal(back.permute(0, 3, 1, 2), expected)


def test_no_more_images_than_a_batch_are_held():
    alive: list[weakref.ref] = []
    most = 0

    def batches():
        nonlocal most
        for _ in range(20):
            batch = torch.randint(0, 255, (8, 3, 4, 4), dtype=torch.uint8)
            alive.append(weakref.ref(batch))
            most = max(most, sum(ref() is not None for ref in alive))
            yield batch
            del batch

    result = see(ImageSet("made up", "", 160, (4, 4), batches), [MEANS], max_features=30)["means"]
    assert most <= 2 and result.num_images == 160 and len(result.features) == 30


def test_labels_are_balanced_or_drawn():
    assert np.bincount(labels_for(30, 3, balanced=True, seed=0)).tolist() == [10, 10, 10]
    drawn = labels_for(3000, 3, balanced=False, seed=1)
    assert set(np.bincount(drawn).tolist()) != {1000} and min(np.bincount(drawn)) > 900
    assert drawn == labels_for(3000, 3, balanced=False, seed=1)


# Sets of images and their files ------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_streams_what_numpy_reads(tmp_path, save):
    arrays = np.random.default_rng(0).integers(0, 255, (11, 6, 4, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", arr_0=arrays, arr_1=np.arange(11))
    images = images_of_npz(tmp_path / "x.npz", batch_size=4)
    assert (images.num_images, images.image_size) == (11, (6, 4))
    for _ in range(2):  # each pass from the beginning
        parts = list(images.open())
        assert [len(part) for part in parts] == [4, 4, 3]
        assert np.array_equal(torch.cat(parts).permute(0, 2, 3, 1).numpy(), arrays)


def test_archives_that_are_not_images_are_refused(tmp_path):
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((3, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"arr_0 is float64 .*expected uint8"):
        images_of_npz(tmp_path / "float.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="holds no arr_0"):
        images_of_npz(tmp_path / "other.npz")
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="expected uint8"):
        images_of_npz(tmp_path / "pickle.npz")
    (tmp_path / "damaged.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"damaged\.npz: cut short or damaged"):
        images_of_npz(tmp_path / "damaged.npz")
    with pytest.raises(ValueError, match="no such file"):
        images_of_npz(tmp_path / "none.npz")


def test_images_to_score_are_of_one_size_and_readable(tmp_path):
    for i, size in enumerate([(8, 8), (8, 8), (8, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"2\.png is 8x9, 0\.png 8x8"):
        images_of_folder(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2\.png: can't be read as an image"):
        images_of_folder(tmp_path)
    with pytest.raises(ValueError, match=r"2\.png: can't be read as an image \(.*\); remove it"):
        list(images_of_folder(tmp_path, (8, 8)).open())
    (tmp_path / "2.png").unlink()
    assert images_of_folder(tmp_path).image_size == (8, 8)


def test_a_part_of_a_folder_is_not_its_first_classes(tmp_path):
    for label in range(4):
        (tmp_path / str(label)).mkdir()
        for i in range(10):
            Image.new("RGB", (4, 4)).save(tmp_path / str(label) / f"{i}.png")
    source, _ = Folder.open(FolderConfig(path=str(tmp_path), size=4))
    labels = source.load(source.chosen(20)).labels
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert sorted(source.chosen(1000)) == list(range(len(source)))


def test_references_are_read_from_the_cache_until_the_images_change(cache, monkeypatch):
    calls = []

    def look(images: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(images))
        return MEANS.see(images)

    network = FeatureNetwork("means", "1", look)
    first = see_reference(images_of_source(SOURCE, 100), network, cache)
    again = see_reference(images_of_source(SOURCE, 100), network, cache)
    assert sum(calls) == 100 and len(list(cache.iterdir())) == 1
    assert torch.equal(first.pooled.covariance, again.pooled.covariance)
    assert torch.equal(first.features, again.features) and again.source == first.source
    see_reference(images_of_source(SOURCE, 101), network, cache)
    see_reference(images_of_source(SOURCE, 100), FeatureNetwork("means", "2", look), cache)
    assert sum(calls) == 301
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    see_reference(images_of_source(SOURCE, 100), network, cache)
    assert sum(calls) == 401, "a damaged file is made anew"


def test_a_reference_that_another_process_sees_is_waited_for_and_read(cache, monkeypatch, capsys):
    images, network = images_of_source(SOURCE, 100), FeatureNetwork("means", "1", MEANS.see)
    see_reference(images, network, cache)
    (file,) = cache.iterdir()
    kept, other = file.read_bytes(), contextlib.ExitStack()
    file.unlink()
    other.enter_context(only_one_in(cache, "another", lock_file=f".{file.stem}.lock"))

    def ends(seconds: float) -> None:
        file.write_bytes(kept)
        other.close()

    monkeypatch.setattr(lock.time, "sleep", ends)
    unasked = FeatureNetwork("means", "1", lambda images: {})
    assert see_reference(images, unasked, cache).num_images == 100
    assert "is at work there" in capsys.readouterr().out


def test_statistics_of_adm_are_read_and_damaged_ones_refused(tmp_path):
    file = tmp_path / "s.npz"
    sigma = np.eye(2048, dtype=np.float64)
    np.savez(file, mu=np.zeros(2048), sigma=sigma, mu_s=np.ones(2), sigma_s=np.eye(2))
    stored = read_statistics(file)
    assert stored.network == "inception" and stored.source == "s.npz" and stored.features is None
    assert stored.spatial.mean.tolist() == [1, 1]
    write_statistics(tmp_path / "t.npz", stored)
    assert torch.equal(
        read_statistics(tmp_path / "t.npz").pooled.covariance, stored.pooled.covariance
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "do not fit each other"),
        ({"mu": np.zeros(()), "sigma": np.eye(2)}, "do not fit each other"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "can't convert"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(2)}, "allow_pickle"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "about": "[1]"}, "expected settings"),
        ({"sigma": np.eye(2)}, "mu"),
    ],
)
def test_unsound_statistics_are_refused(tmp_path, content, message):
    np.savez(tmp_path / "s.npz", **content)
    with pytest.raises(ValueError, match=rf"s\.npz: .*{message}"):
        read_statistics(tmp_path / "s.npz")


def test_statistics_of_another_network_or_size_are_not_compared_with(tmp_path):
    network = FeatureNetwork("means", "other weights", MEANS.see)
    real = see(images_of_source(SOURCE, 20), [network])["means"]
    write_statistics(tmp_path / "s.npz", real)
    stored = read_statistics(tmp_path / "s.npz")
    assert stored.identity == "other weights" and stored.image_size == (16, 16)
    with pytest.raises(ValueError, match="of another 'means': other weights"):
        generation_scores(see(images_of_source(SOURCE, 20), [MEANS])["means"], stored)
    larger = images_of_source(Shapes(ShapesConfig(size=32), train=True), 20)
    with pytest.raises(ValueError, match=r"images of another size, \(16, 16\)"):
        generation_scores(see(larger, [network])["means"], stored)


def test_a_teacher_that_sees_otherwise_is_another_network():
    same, larger = (teacher_network(Teacher(TeacherConfig(input_size=size))) for size in (None, 16))
    assert same.name == larger.name == "demo" and same.identity != larger.identity


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that was trained for six steps."""
    root = tmp_path_factory.mktemp("generation")
    tiny.runs(root)
    return root / "dit"


def score(*words: object) -> int:
    return run(evaluate.main, ["generation", *map(str, words)])


def test_a_model_is_scored_against_what_it_was_trained_on(model, tmp_path, capsys):
    output = tmp_path / "scores.json"
    assert score("--model", model, "--num", 40, "--num-reference", 20, "--output", output) == 0
    printed = capsys.readouterr().out
    for words in (
        "FD-demo",
        "precision-demo",
        "against the model's own training images, 20 of shapes",
    ):
        assert words in printed
    assert "Inception's scores" in printed and "missing" in printed, "no weights here, and said so"
    written = json.loads(output.read_text())
    assert written["num_images"] == 40 and written["labels"] == "balanced"
    assert "FID" not in written["scores"] and written["scores"]["FD-demo"] > 0
    # The same images by way of an archive, and of a folder, score the same.
    for name in ("x.npz", "folder"):
        words = [str(model), "--num", "40", "--output", str(tmp_path / name)]
        assert run(sample.main, words) == 0
        data = ["--reference", "kind=shapes", "size=16", "num_images=24", "--num-reference", 20]
        assert score("--images", tmp_path / name, *data, "--output", output) == 0
        again = json.loads(output.read_text())["scores"]
        assert again["FD-demo"] == pytest.approx(written["scores"]["FD-demo"], rel=1e-4)


def test_judges_add_their_scores_and_fdr_over_them(model, tmp_path, monkeypatch, capsys):
    def quickly(*given: object, **named: object) -> Judge:
        return trained_judge(*given, **named | {"steps": 2})

    monkeypatch.setattr("semtok.evaluation.judges.trained_judge", quickly)
    output, judges = tmp_path / "scores.json", ["--judge", "trained", "--judge", "demo"]
    assert score("--model", model, "--num", 40, *judges, "--output", output) == 0
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    scores, told = written["scores"], written["judges"]
    for name in ("trained", "demo"):
        assert {f"{s}-{name}" for s in ("FD", "precision", "recall", "KD", "FDr")} <= set(scores)
        assert 0 <= scores[f"shown class ({name})"] <= 1
        assert told[name]["num_fitted"] == 24 and told[name]["held_out"]["num_images"] == 8
        ratio = scores[f"FD-{name}"] / told[name]["held_out"]["distance"]
        assert scores[f"FDr-{name}"] == pytest.approx(ratio)
        network = written["protocol"]["networks"][name]
        assert network == told[name]["network"] and network["weights"] in printed
        assert f"judge {name}; classes learned from 24 real training images; 8 held-out" in printed
    assert scores["FDr"] == pytest.approx((scores["FDr-trained"] + scores["FDr-demo"]) / 2)
    assert "of 8 held-out images, fewer than those generated" in written["protocol"]["measures"]
    data = ["--reference", "kind=shapes", "size=16", "num_images=24", "num_validation_images=8"]
    data += ["classes=[shape,hue]"]
    for name in ("x.npz", "folder"):
        words = [str(model), "--num", "40", "--output", str(tmp_path / name)]
        assert run(sample.main, words) == 0
        assert score("--images", tmp_path / name, *data, *judges, "--output", output) == 0
        again = json.loads(output.read_text())["scores"]
        for key in (s for s in scores if not s.startswith("KD")):  # of random subsets
            assert again[key] == pytest.approx(scores[key], rel=1e-4), "labels are read with them"
    capsys.readouterr()
    files = ["--images", tmp_path / "folder", "--reference", tmp_path / "folder"]
    assert score(*files, "--judge", "teacher", "--output", output) == 0
    assert "shown class (demo)" in json.loads(output.read_text())["unavailable"]
    assert "give it as data settings" in capsys.readouterr().out
    assert score(*files, "--judge", "trained") == 2
    assert "--judge trained: learns from training images" in capsys.readouterr().err


def test_a_set_of_files_is_perfect_against_itself_and_its_statistics(tmp_path, capsys):
    for i, image in enumerate(SOURCE.load(range(30)).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02}.png")
    output, statistics = tmp_path / "s.json", tmp_path / "reference.npz"
    words = ["--images", tmp_path, "--reference", tmp_path, "--output", output]
    assert score(*words, "--save-reference", statistics) == 0
    scores = json.loads(output.read_text())["scores"]
    assert scores["FD-demo"] == pytest.approx(0, abs=1e-2) and scores["precision-demo"] == 1
    assert set(zipfile.ZipFile(statistics).namelist()) >= {"mu.npy", "sigma.npy"}
    words = ["--images", tmp_path, "--reference", statistics, "--output", output]
    assert score(*words) == 0
    assert json.loads(output.read_text())["scores"] == pytest.approx(scores, abs=1e-6)
    assert "statistics of the reference, by demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "none"], "--images none: no such folder or .npz file"),
        (["--images", "one"], "--images one: one image; scores are of sets"),
        (["--images", "two"], "--reference is missing"),
        (["--images", "two", "--reference", "none"], "--reference none: no such folder or .npz"),
        (["--images", "two", "--reference", "empty.npz"], "neither images (arr_0) nor statistics"),
        (["--images", "two", "--reference", "kind=shapes", "size=16"], "images of 16x16, those to"),
        (["--images", "two", "--reference", "adm.npz"], "nothing there that can be compared with"),
        (["--images", "two", "--num", "9"], "--num: goes with --model; --images are drawn already"),
        (["--images", "two", "--guidance", "2"], "--guidance: goes with --model"),
        (["--images", "two", "--num-channels", "3"], "--num-channels: goes with --model"),
        (["--images", "two", "--error-over", "batch"], "--error-over: goes with --model"),
        (["--images", "two", "--save-reference", "x.txt"], "x.txt: expected FILE.npz"),
        (["--images", "two", "--num-reference", "1"], "must be at least 2"),
        (["--model", "nobody"], "model 'nobody': no such folder or run"),
        (["--images", "two", "--judge", "nobody"], "--judge nobody: expected trained, teacher"),
        (
            ["--images", "two", "--judge", "layers=[-2]"],
            "'demo' is --teacher's network with other settings; give --judge teacher",
        ),
    ],
)
def test_wrong_words_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for folder, num in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        for i in range(num):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / folder / f"{i}.png")
    np.savez(tmp_path / "empty.npz", nothing=np.zeros(1))
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert score(*words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_without_torch_fidelity_it_is_said_before_the_work(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert score("--model", model) == 2
    assert "needs torch-fidelity; pip install" in capsys.readouterr().err
    assert run(compare.main, ["--tokenizers", "demo", "--output", str(tmp_path / "c")]) == 2
    assert "needs torch-fidelity" in capsys.readouterr().err and not (tmp_path / "c").exists()
