"""What scores say of how they were measured, and reconstruction by the published protocol."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import tiny
from semtok import Generator, Tokenizer
from semtok.commands import evaluate, sample
from semtok.commands.cli import run
from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.resized import ResizedImages
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.images.tars import Tars, TarsConfig
from semtok.data.passes import chosen_images
from semtok.evaluation.drawn_sets import read_protocol
from semtok.evaluation.generation import FeatureNetwork, see_reference
from semtok.evaluation.image_sets import images_of_source
from semtok.evaluation.inception import Inception
from semtok.evaluation.protocol import PixelDigest, shown_names, weights_digest
from semtok.evaluation.reconstruction import PROTOCOLS, evaluate_reconstruction
from semtok.teachers import Teacher, TeacherConfig

KEYS = {
    *("task", "measures", "networks", "models", "images", "references", "fitted_on"),
    *("latents", "seed", "precision", "library"),
}
SIZES = ("--num-train", "40", "--num-held-out", "24")
DATA = ("--data", "kind=shapes", "size=16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer ``tok`` and a generator ``dit``, trained for two steps."""
    root = tmp_path_factory.mktemp("protocols")
    tiny.runs(root, steps=2, warmup_steps=0)
    return root


@pytest.fixture(autouse=True)
def nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cached references, and no weights of Inception or LPIPS."""
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def evaluated(tmp_path: Path, *words: object) -> dict:
    output = tmp_path / "scores.json"
    assert run(evaluate.main, [*map(str, words), "--output", str(output)]) == 0
    return json.loads(output.read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run(evaluate.main, list(map(str, words))) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


# One shape for all -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["generation", "reconstruction", "latents", "probe", "classes"])
def test_every_command_says_how_it_measured(root, tmp_path, capsys, task):
    models = ["--tokenizer", root / "tok", *DATA]
    words = {
        "generation": ["--model", root / "dit", "--num", 24, "--num-reference", 20],
        "reconstruction": [*models, "--num-held-out", 24],
        "latents": [*models, *SIZES],
        "probe": [*models, *SIZES],
        "classes": ["--model", root / "dit", "--num", 24, *SIZES],
    }[task]
    if task == "generation":
        pytest.importorskip("torch_fidelity")
    told = evaluated(tmp_path, task, *words)["protocol"]
    assert told.keys() == KEYS and told["task"] == task
    assert told["library"].startswith("semtok ") and told["precision"] == "fp32"
    assert str(tmp_path.parent) not in json.dumps(told), "no folders of this machine"
    assert all(len(digest) == 12 for digest in told["models"].values()) and told["models"]
    teacher = weights_digest(Teacher(TeacherConfig()).network)
    expected = {} if task == "probe" else {"demo": teacher}
    assert {name: network["weights"] for name, network in told["networks"].items()} == expected
    assert told["images"]["num_images"] == 24
    printed = capsys.readouterr().out
    for digest in (told["images"]["digest"], *told["models"].values(), *expected.values()):
        assert digest in printed
    if task in ("probe", "latents", "classes"):
        assert told["fitted_on"]["num_images"] in (24, 40)


def test_classes_name_their_trained_judge_with_everything_it_follows_from(root, tmp_path, capsys):
    words = ["--model", root / "dit", "--num", 36, "--judge", "trained", "--judge-steps", 3]
    scores = evaluated(tmp_path, "classes", *words)
    assert scores["judge"] == "trained" and 0 <= scores["generated"] <= 1
    network = scores["protocol"]["networks"]["trained"]
    assert network["model"] == "judge trained on 24 images, seed 0, 3 steps"
    assert scores["protocol"]["fitted_on"]["num_images"] == 24
    assert "3 steps of 64 images" in scores["protocol"]["measures"]
    assert network["weights"] in capsys.readouterr().out


def test_classes_are_read_by_any_frozen_network_that_words_name(root, tmp_path, capsys):
    words = ["--model", root / "dit", "--num", 36, *SIZES, "--judge", "name=demo", "layers=[-2]"]
    scores = evaluated(tmp_path, "classes", *words)
    network = scores["protocol"]["networks"]["demo"]
    assert scores["judge"] == "demo" and network["model"] == "demo, layer -2"
    assert "demo, layer -2" in capsys.readouterr().out


def test_a_digest_of_images_is_the_same_wherever_they_come_from(root, tmp_path):
    pytest.importorskip("torch_fidelity")
    draws = ["--num", "24", "--labels", "random", "--seed", "3", "--uint8", "truncate"]
    reference = ["--reference", "kind=shapes", "size=16", "num_images=24"]
    drawn = evaluated(tmp_path, "generation", "--model", root / "dit", *draws, *reference)
    (model,) = drawn["protocol"]["models"].values()
    digests, told = {drawn["protocol"]["images"]["digest"]}, drawn["protocol"]["images"]
    for name in ("set.npz", "folder"):
        assert run(sample.main, [str(root / "dit"), *draws, "--output", str(tmp_path / name)]) == 0
        again = evaluated(tmp_path, "generation", "--images", tmp_path / name, *reference)
        assert again["scores"] == pytest.approx(drawn["scores"], rel=1e-4)
        images = again["protocol"]["images"]
        digests.add(images["digest"])
        for key in ("labels", "seed", "uint8", "sampler", "precision"):
            assert images[key] == told[key], key
        assert images["written"]["model"]["digest"] == model
    arrays = np.load(tmp_path / "set.npz")["arr_0"]
    each = sorted(hashlib.sha256(image.tobytes()).digest() for image in arrays)
    assert digests == {hashlib.sha256(b"".join(each)).hexdigest()[:12]}


def test_a_model_is_drawn_and_told_as_sample_would_draw_and_tell_it(root, tmp_path, capsys):
    """More images than one batch of either command's: rounding depends on what is drawn together."""
    pytest.importorskip("torch_fidelity")
    weak = Generator.from_pretrained(root / "dit")
    with torch.no_grad():
        next(weak.network.parameters()).add_(0.1)
    weak.save_pretrained(tmp_path / "weak")
    draws = ["--num", 70, "--method", "dopri5", "--error-over", "batch", "--guidance", 2]
    draws = [*draws, "--interval", 0.2, 1, "--weak", tmp_path / "weak", "--uint8", "truncate"]
    reference = ["--reference", "kind=shapes", "size=16", "num_images=24"]
    told = evaluated(tmp_path, "generation", "--model", root / "dit", *draws, *reference)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("images: "))
    assert "dopri5" in line and "steps" not in line and "error over batch" in line
    assert "rtol 0.001" in line and "guidance 2.0" in line and "0.2" in line
    words = [str(root / "dit"), *map(str, draws), "--output", str(tmp_path / "set.npz")]
    assert run(sample.main, words) == 0
    images = told["protocol"]["images"]
    assert images["written"] == read_protocol(tmp_path / "set.npz")
    assert images["written"]["weak"]["digest"] == weak.digest()
    again = evaluated(tmp_path, "generation", "--images", tmp_path / "set.npz", *reference)
    assert again["protocol"]["images"]["digest"] == images["digest"]
    assert "round" not in told["protocol"]["measures"], "these were truncated"


def test_what_is_missing_is_told_without_places_of_this_machine(root, tmp_path, capsys):
    told = evaluated(tmp_path, "reconstruction", "--tokenizer", root / "tok", *DATA)
    assert told["unavailable"] and "checkpoints" in json.dumps(told["unavailable"])
    assert torch.hub.get_dir() in capsys.readouterr().out, "on the screen it says where to put them"
    assert torch.hub.get_dir() not in json.dumps(told)


def test_each_score_names_what_it_is_compared_with(root, tmp_path, capsys):
    pytest.importorskip("torch_fidelity")
    words = ["generation", "--model", root / "dit", "--num", 24]
    told = evaluated(tmp_path, *words, "--num-reference", 20)
    own = told["protocol"]["references"]["demo"]
    assert own["kind"] == "data" and own["num_images"] == 20
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(("  FD-demo", "  precision-demo", "  KD-demo")):
            assert line.endswith("against the model's own training images, 20 of " + told_name(own))
    statistics = tmp_path / "mine.npz"
    evaluated(tmp_path, *words, "--num-reference", 20, "--save-reference", statistics)
    capsys.readouterr()
    told = evaluated(tmp_path, *words, "--reference", statistics)["protocol"]["references"]["demo"]
    assert told["kind"] == "statistics"
    assert told["digest"] == hashlib.sha256(statistics.read_bytes()).hexdigest()[:12]
    assert "in …/mine.npz" in told["name"] and f"against {told['name']}" in capsys.readouterr().out


def told_name(images: dict) -> str:
    return images["name"].partition(" of ")[2]


def test_references_cached_without_a_digest_are_made_anew(tmp_path):
    source = images_of_source(Shapes(ShapesConfig(size=16), train=True), 20)
    network = FeatureNetwork("means", "", lambda x: {"pooled": x.float().mean(dim=(2, 3))})
    first = see_reference(source, network, tmp_path)
    (file,) = tmp_path.iterdir()
    with np.load(file) as content:
        arrays = dict(content)
    about = json.loads(str(arrays["about"]))
    del about["digest"]
    np.savez(file, **arrays | {"about": json.dumps(about)})
    again = see_reference(source, network, tmp_path)
    assert again.digest == first.digest is not None


def test_two_references_never_share_a_name():
    assert shown_names(["/a/run", "/b/run", "demo", "/a/run"]) == {
        "/a/run": "…/run",
        "/b/run": "…/run (2)",
        "demo": "demo",
    }


def test_digests_see_names_and_every_number():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert weights_digest(a) == weights_digest(b) != weights_digest(nn.Sequential(a))
    with torch.no_grad():
        b.bias[1] += 1e-6
    assert weights_digest(a) != weights_digest(b)


# What drawing options do -------------------------------------------------------------------------


def test_a_weak_model_guides_and_is_told(root, tmp_path, capsys):
    pytest.importorskip("torch_fidelity")
    weak = Generator.from_pretrained(root / "dit")
    with torch.no_grad():  # two steps teach too little to tell apart
        for tensor in weak.network.parameters():
            tensor += 0.3 * torch.randn_like(tensor)
    weak.save_pretrained(tmp_path / "weak")
    words = ["generation", "--model", root / "dit", "--num", 8, "--num-reference", 8]
    plain, guided = (
        evaluated(tmp_path, *words, "--guidance", 3, *option)
        for option in ((), ("--weak", tmp_path / "weak"))
    )
    assert plain["protocol"]["images"]["digest"] != guided["protocol"]["images"]["digest"]
    assert guided["protocol"]["models"]["…/weak"] == weak.digest()
    assert "guidance scale other than 1" in refused(capsys, *words, "--weak", root / "dit")
    assert "--weak: goes with --model" in refused(
        capsys, "generation", "--images", root, "--weak", root / "dit"
    )


def test_several_processes_are_told_where_to_draw(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    error = refused(capsys, "reconstruction", "--tokenizer", "demo")
    assert "one process, but 2 were launched" in error and "--images" in error


def test_features_are_computed_in_float32_on_a_gpu_too(tmp_path, monkeypatch):
    """cuDNN is allowed TF32 by default, which a CPU can't show; so what it is allowed is looked at."""
    allowed = []
    see = Teacher.features

    def features(self, *args, **kwargs):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return see(self, *args, **kwargs)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(Teacher, "features", features)
    evaluated(tmp_path, "reconstruction", "--tokenizer", "demo", "--num-held-out", 4)
    assert allowed and not any(allowed) and torch.backends.cudnn.allow_tf32


# As LightningDiT evaluates tokenizers -------------------------------------------------------------


def pictures(root: Path, num: int = 6) -> Path:
    """A folder of photographs' shapes: none square, fine patterns, as ``train`` and ``val``."""
    rng = np.random.default_rng(0)
    for i in range(num):
        for part in ("train", "val"):
            (root / part).mkdir(parents=True, exist_ok=True)
            size = (80 + 7 * i, 61) if i % 2 else (61, 83 + 5 * i)
            array = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(array).save(root / part / f"{i}.png")
    return root


def held_out(root: Path) -> Folder:
    return Folder.open(FolderConfig(path=str(pictures(root)), size=32))[1]


def as_published(file: Path, size: int) -> torch.Tensor:
    """ToTensor, Resize, CenterCrop, Normalize, as torchvision's classes do it."""
    from torchvision import transforms

    steps = (transforms.ToTensor(), transforms.Resize(size), transforms.CenterCrop(size))
    return transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)])(
        Image.open(file).convert("RGB")
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_resized_as_tensors_and_never_rounded(tmp_path, num_workers):
    source = held_out(tmp_path)
    source.num_workers = num_workers
    resized = ResizedImages(source)
    seen = torch.cat([batch.images for batch in chosen_images(resized, 6, batch_size=4)])
    expected = torch.stack([as_published(source.file(i), 32) for i in source.chosen(6)])
    assert torch.allclose(seen, expected, atol=1e-6)
    levels = (seen + 1) * 127.5
    assert (levels - levels.round()).abs().max() > 0.4
    adm = source.load(source.chosen(6)).images
    assert (adm.float() - levels).abs().mean() > 1, "another crop and another filter"


def test_tar_files_are_resized_likewise(tmp_path):
    source = held_out(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for i in range(6):
            content = source.file(i).read_bytes()
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    pytest.importorskip("webdataset")
    _, tars = Tars.open(TarsConfig(path=str(tmp_path / "x.tar"), size=32, validation_fraction=0.5))
    resized = ResizedImages(tars)
    names = [int(tars.image_name(i).rpartition(": ")[2].removesuffix(".png")) for i in range(3)]
    expected = torch.stack([as_published(source.file(i), 32) for i in names])
    assert torch.allclose(resized.load(range(3)).images, expected, atol=1e-6)


def test_its_lpips_sees_what_the_decoder_gave_and_a_draw_is_decoded():
    class Watching(nn.Module):
        def forward(self, output: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
            self.output = output
            return output.flatten(1).abs().amax(dim=1)

    tokenizer, watching = Tokenizer.from_pretrained("demo"), Watching()
    with torch.no_grad():
        tokenizer.autoencoder.decoder.conv_out.bias += 1  # beyond white
    source = Shapes(ShapesConfig(size=32), train=False)
    largest, shown = {}, {}
    for name, protocol in PROTOCOLS.items():
        report = evaluate_reconstruction(
            tokenizer, source, 8, protocol=protocol, perceptual=watching
        )
        largest[name], shown[name] = report.scores["lpips"], watching.output
    assert largest["adm"] <= 1 < largest["lightningdit"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        posterior = tokenizer.posterior(source.load(source.chosen(8)).images)
        drawn = tokenizer.decode(posterior.sample(generator))
        mean = tokenizer.decode(posterior.mean)
    assert torch.allclose(shown["lightningdit"].clamp(-1, 1), drawn, atol=1e-5)
    assert torch.allclose(shown["adm"], mean, atol=1e-5) and not torch.allclose(drawn, mean)


def test_its_inception_gets_images_as_pytorch_fid_resizes_them():
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *a, **k: None)
        network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    inception = Inception(network, resize="pytorch")
    inputs = []
    network.Conv2d_1a_3x3.conv.register_forward_hook(lambda _, given, out: inputs.append(given[0]))
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    inception(images)
    size = (299, 299)
    expected = F.interpolate(images / 255, size=size, mode="bilinear", align_corners=False) * 2 - 1
    assert torch.allclose(inputs[0], expected, atol=1e-6)
    assert "PyTorch" in inception.protocol.input


def test_the_protocol_by_command(tmp_path, capsys):
    pictures(tmp_path / "data")
    data = ["--data", "kind=folder", f"path={tmp_path / 'data'}", "size=32"]
    words = ["reconstruction", "--tokenizer", "demo", "--protocol", "lightningdit", *data]
    told = evaluated(tmp_path, *words, "--grid", tmp_path / "grid.png")
    printed = capsys.readouterr().out
    assert "protocol lightningdit; published scores use 50,000" in printed
    assert told["protocol"]["images"]["crop"] == "lightningdit"
    assert told["protocol"]["images"]["uint8"] == "round, for scores of 8 bits alone"
    assert told["protocol"]["latents"] == "sample" and told["protocol"]["seed"] == 0
    other = evaluated(tmp_path, *words[:3], *data)
    assert other["protocol"]["images"]["crop"] == "adm" and other["protocol"]["latents"] == "mean"
    assert other["scores"]["demo"]["psnr"] != told["scores"]["demo"]["psnr"]
    digest = PixelDigest()
    source = Folder.open(FolderConfig(path=str(tmp_path / "data"), size=32))[1]
    digest.add(source.load(source.chosen(6)).images)
    assert other["protocol"]["images"]["digest"] == str(digest)


def test_what_goes_against_the_protocol_is_refused_by_name(tmp_path, capsys):
    pictures(tmp_path / "data")
    words = ["reconstruction", "--tokenizer", "demo", "--protocol", "lightningdit"]
    data = ["--data", "kind=folder", f"path={tmp_path / 'data'}"]
    for more, message in (
        ([], "drawn at their size"),
        ([*data, "size=32", "--lpips-net", "alex"], "--lpips-net alex: --protocol lightningdit"),
        ([*data, "size=32", "crop=center"], "--data crop=…: --protocol lightningdit"),
        ([*data, "size=[32,48]"], "size: expected a square, got 32x48"),
    ):
        assert message in refused(capsys, *words, *more)
    (tmp_path / "data" / "val" / "0.png").write_bytes(b"no image")
    error = refused(capsys, *words, *data, "size=32")
    assert "0.png: can't be read as an image (no format that Pillow knows here); remove it" in error
