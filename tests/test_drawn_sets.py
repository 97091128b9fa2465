"""Sets of images as ``sample`` draws them: interrupted anywhere, by any number of processes, and packed.

``SEMTOK_FULL_SETS=1`` draws 2,000 images where 60 stand here, kills more often, and measures memory: minutes.
"""

import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
from processes import launch
from semtok import Generator
from semtok.commands import evaluate, sample, sample_set
from semtok.commands.cli import run
from semtok.commands.sample_set import check_same
from semtok.diffusion.diffusion_config import DiffusionConfig, build_network, resolve_defaults
from semtok.errors import UserError
from semtok.evaluation import drawn_sets
from semtok.evaluation.drawn_sets import read_protocol
from semtok.evaluation.image_sets import images_of_folder, images_of_npz, labels_for
from semtok.images import to_pil, to_uint8
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.sampling import SamplerConfig

FULL = bool(os.environ.get("SEMTOK_FULL_SETS"))
NUM = 2000 if FULL else 60
# Kills itself, as the system would, when so many files are there; tells the most memory that it took.
WATCHED = """
import os, pathlib, re, signal, sys, threading, time
from semtok.commands import cli, sample
folder, pattern, most, *words = sys.argv[1:]
def watch():
    while sum(1 for _ in pathlib.Path(folder).glob(pattern)) < int(most):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = cli.run(sample.main, words)
# Its own: ru_maxrss begins with what the process had before Python was started anew in it.
print("kilobytes", *re.findall(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text()))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny.measured({"name": "vae"})
    shape = DiTArchitecture(depth=1, width=32, heads=2, patch_size=2)
    config = resolve_defaults(DiffusionConfig(network=shape, repa=False), tokenizer)
    names = ["a", "b", "c"]
    network = tiny.awake(build_network(config, tokenizer.spec, num_classes=len(names)))
    sampler = SamplerConfig(steps=2, guidance=GuidanceConfig(scale=1.0))
    generator = Generator(
        network, tokenizer, config, sampler, class_names=names, image_size=(32, 32)
    )
    folder = tmp_path_factory.mktemp("sets") / "someone" / "model"
    generator.save_pretrained(folder)
    return folder


def draw(model: Path, output: Path, *options: Any) -> int:
    return run(sample.main, [str(model), "--output", str(output), *map(str, options)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flipped(file: Path) -> None:
    """One bit in the middle of a file, and its length as before."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# Interrupted -------------------------------------------------------------------------------------


def killed(words: Sequence[str], logs: Path, watched: Path, *, num: int, at: int | str) -> None:
    """Runs ``sample`` in ``num`` processes that are killed once ``watched`` holds ``at`` images, or such a file."""
    pattern, most = ("*.png", at) if isinstance(at, int) else (at, 1)
    source = ["-c", WATCHED, str(watched), pattern, str(most), *words]
    logs.mkdir()
    ranks = launch(source, logs, num=num)
    assert any(rank.code == -signal.SIGKILL for rank in ranks), ranks


def test_a_set_that_was_killed_again_and_again_is_that_of_one_run_byte_for_byte(
    model, tmp_path, ranks
):
    options = ["--num", NUM, "--batch-size", 4, "--steps", 2 if FULL else 20, "--labels", "random"]
    words = [str(model), *map(str, options), "--output"]
    assert draw(model, tmp_path / "one", *options) == 0
    assert draw(model, tmp_path / "one.npz", *options) == 0

    folder, archive = tmp_path / "many", tmp_path / "many.npz"
    parts = tmp_path / "many.npz.parts"
    for output, watched in ((folder, folder), (archive, parts)) if FULL else ((archive, parts),):
        kills = [(1, 300), (2, 900), (1, 1500)] if FULL else [(1, 20)]
        for number, (num, at) in enumerate(kills):
            logs = tmp_path / f"{output.name}{number}"
            killed([*words, str(output)], logs, watched, num=num, at=at)
            assert at <= len(list(watched.glob("*.png"))) < NUM, "in the middle"
        # What a disk that failed may leave behind.
        (watched / "000001.png").unlink()
        flipped(watched / "000006.png")
        (watched / "000009.png").write_bytes(b"")
        (watched / f".{'0' * 32}.000059.png").write_bytes(b"half")
    if FULL:
        killed([*words, str(archive)], tmp_path / "packing", parts, num=1, at=".*.npz")
    else:  # a folder is what an archive is made of
        shutil.copytree(parts, folder)
    ranks.command("sample", [*words, str(archive)])
    assert draw(model, folder, *options) == 0

    assert archive.read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert contents(folder) == contents(tmp_path / "one")
    assert not parts.exists()
    assert len(contents(folder)) == NUM + 2


@pytest.mark.skipif(not FULL, reason="a minute; SEMTOK_FULL_SETS=1 runs it")
@pytest.mark.parametrize("output", ["folder", "x.npz"])
def test_memory_does_not_grow_with_the_number_of_images(model, tmp_path, output):
    most = []
    for num in (200, 2000):
        words = ["nowhere", "*", "1", str(model), "--num", str(num), "--output"]
        logs = tmp_path / f"logs{num}"
        logs.mkdir()
        ranks = launch(["-c", WATCHED, *words, str(tmp_path / f"{num}{output}")], logs)
        assert all(rank.code == 0 for rank in ranks), ranks
        most.append([int(re.search(r"kilobytes (\d+)", rank.output)[1]) for rank in ranks])
    print(f"{output}: kilobytes of each process, 200 and 2,000 images: {most}")
    assert all(many - few < 4096 for few, many in zip(*most, strict=True)), most


def test_a_batch_is_of_the_same_images_however_few_of_them_are_missing(
    model, tmp_path, monkeypatch
):
    """A sampler may make one image depend on those beside it."""
    options = ["--num", 19, "--batch-size", 4]
    assert draw(model, tmp_path / "set", *options) == 0
    before = contents(tmp_path / "set")
    (tmp_path / "set" / "000002.png").unlink()
    (tmp_path / "set" / "000009.png").unlink()
    flipped(tmp_path / "set" / "000013.png")
    drawn: list[tuple[int, int]] = []
    original = Generator.sample

    def watch(self: Generator, labels: Sequence[int], **options: Any) -> Tensor:
        drawn.append((options["first"], len(labels)))
        return original(self, labels, **options)

    monkeypatch.setattr(Generator, "sample", watch)
    assert draw(model, tmp_path / "set", *options) == 0
    assert drawn == [(0, 4), (8, 4), (12, 4)]
    assert contents(tmp_path / "set") == before
    assert draw(model, tmp_path / "set", *options) == 0
    assert len(drawn) == 3, "a whole set is left alone"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", 1], "seed 0, now 1"),
        (["--num", 5], "num_images 4, now 5"),
        (["--labels", "random"], "labels balanced, now random"),
        (["--classes", "a", "b"], "classes all, now [0, 1]"),
        (["--uint8", "truncate"], "uint8 round, now truncate"),
        (["--steps", 3], "sampler.steps 2, now 3"),
        (["--guidance", 2], "sampler.guidance.scale 1.0, now 2.0"),
        (["--precision", "bf16"], "precision fp32, now bf16"),
        (["--batch-size", 2], "batch_size 32, now 2"),
    ],
)
def test_a_set_that_was_drawn_otherwise_is_refused_and_what_differs_is_named(
    model, tmp_path_factory, capsys, options, words
):
    place = tmp_path_factory.getbasetemp() / "refused"
    for output in (place / "set", place / "set.npz"):
        if not output.exists():
            assert draw(model, output, "--num", 4) == 0
        before = contents(place / "set")
        capsys.readouterr()
        given = options if "--num" in options else ["--num", 4, *options]
        assert draw(model, output, *given) == 2
        error = capsys.readouterr().err.strip()
        assert f"({words})" in error and str(output) in error and "\n" not in error
        assert contents(place / "set") == before


def test_a_set_that_was_begun_before_there_were_bases_of_guidance_goes_on():
    def protocol(**guidance: object) -> dict[str, object]:
        return {"seed": 0, "sampler": {"method": "heun", "guidance": {"scale": 2.0, **guidance}}}

    check_same(Path("set"), protocol(), protocol(base="null_label"))
    with pytest.raises(UserError, match="sampler.guidance.base null_label, now dropped_path"):
        check_same(Path("set"), protocol(), protocol(base="dropped_path"))


def test_another_model_is_refused_and_a_moved_one_is_not(model, tmp_path, capsys):
    assert draw(model, tmp_path / "set", "--num", 2) == 0
    before = contents(tmp_path / "set")
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    (tmp_path / "set" / "000000.png").unlink()
    assert draw(moved, tmp_path / "set", "--num", 2) == 0
    assert contents(tmp_path / "set") == before
    other = Generator.from_pretrained(model)
    with torch.no_grad():
        next(other.tokenizer.parameters()).add_(1e-6)
    other.save_pretrained(moved)
    assert draw(moved, tmp_path / "set", "--num", 2) == 2
    assert "model.digest" in capsys.readouterr().err
    assert draw(model, tmp_path / "set", "--num", 2, "--weak", moved, "--guidance", 2) == 2
    assert "weak.digest not said, now" in capsys.readouterr().err


def test_what_is_not_of_the_set_is_not_taken_for_it(model, tmp_path, capsys):
    output = tmp_path / "set"
    assert draw(model, output, "--num", 2) == 0
    for name in ("000002.png", "1.png", "cat.jpg"):
        (output / name).write_bytes((output / "000000.png").read_bytes())
        assert draw(model, output, "--num", 2) == 2
        assert f"{name} is no image of this set; remove it" in capsys.readouterr().err
        (output / name).unlink()
    (output / "protocol.json").unlink()
    assert draw(model, output, "--num", 2) == 2
    assert "exists already" in capsys.readouterr().err
    (output / "protocol.json").write_text("[")
    assert draw(model, output, "--num", 2) == 2
    assert "not readable as JSON" in capsys.readouterr().err


def test_a_second_command_is_told_of_the_first_and_finds_the_archive_when_that_has_ended(
    model, tmp_path, monkeypatch, capsys
):
    output, options = tmp_path / "set.npz", ["--num", 9, "--batch-size", 4]
    draw_set = sample.draw_set

    def meanwhile(drawing: Any, folder: Path, protocol: dict[str, Any]) -> None:
        monkeypatch.setattr(sample, "draw_set", draw_set)
        assert draw(model, output, *options) == 2
        draw_set(drawing, folder, protocol)

    monkeypatch.setattr(sample, "draw_set", meanwhile)
    assert draw(model, output, *options) == 0
    assert f"{output}.parts: a command that draws a set is at work there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]

    # It looked before the first was there, and gets its turn when that has ended.
    is_packed, looks = sample._is_packed, iter([lambda *_: False])
    monkeypatch.setattr(sample, "_is_packed", lambda *args: next(looks, is_packed)(*args))
    assert draw(model, output, *options) == 0
    assert "is there already, whole" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def test_a_signal_says_that_the_same_command_goes_on(model, tmp_path, monkeypatch, capsys):
    write = sample_set.write_png

    def stop(file: Path, image: Tensor) -> None:
        write(file, image)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sample_set, "write_png", stop)
    assert draw(model, tmp_path / "set", "--num", 4) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command goes on\n"
    monkeypatch.setattr(sample_set, "write_png", write)
    assert draw(model, tmp_path / "set", "--num", 4) == 0
    assert draw(model, tmp_path / "other", "--num", 4) == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "other")


def test_what_another_command_has_taken_away_is_never_packed(model, tmp_path, monkeypatch, capsys):
    output = tmp_path / "set.npz"
    draw_set = sample.draw_set

    def lose(drawing: Any, folder: Path, protocol: dict[str, Any]) -> None:
        draw_set(drawing, folder, protocol)
        for name in ("protocol.json", "labels.json", "000001.png"):
            (folder / name).unlink()

    monkeypatch.setattr(sample, "draw_set", lose)
    assert draw(model, output, "--num", 4) == 2
    assert "holds 3 of 4 images" in capsys.readouterr().err and not output.exists()


def test_a_folder_may_have_a_point_and_a_number_in_its_name(model, tmp_path, capsys):
    for name in ("cfg1.5", "v0.1"):
        assert draw(model, tmp_path / name, "--num", 2) == 0
        assert len(list((tmp_path / name).glob("*.png"))) == 2
    assert draw(model, tmp_path / "set.tar", "--num", 2) == 2
    assert "expected FILE.png, FILE.npz or a folder" in capsys.readouterr().err


def test_a_foreign_image_is_found_in_a_folder_within_too(model, tmp_path, capsys):
    output = tmp_path / "set"
    assert draw(model, output, "--num", 2) == 0
    (output / "sub").mkdir()
    shutil.copy(output / "000000.png", output / "sub" / "x.png")
    assert draw(model, output, "--num", 2) == 2
    assert "sub/x.png is no image of this set; remove it" in capsys.readouterr().err


def test_what_can_not_be_drawn_leaves_nothing_and_a_batch_that_was_too_large_may_be_smaller(
    model, tmp_path, monkeypatch, capsys
):
    weak = Generator.from_pretrained(model)
    weak.class_names = ("a", "b", "z")
    weak.save_pretrained(tmp_path / "weak")
    output = tmp_path / "out" / "set"
    words = ["--num", 4, "--guidance", 2, "--weak", tmp_path / "weak"]
    assert draw(model, output, *words) == 2
    assert "the weak model has other classes" in capsys.readouterr().err
    assert not output.parent.exists()

    original = Generator.sample

    def little_memory(self: Generator, labels: Sequence[int], **options: Any) -> Tensor:
        if len(labels) > 2:
            raise torch.OutOfMemoryError("too large")
        return original(self, labels, **options)

    monkeypatch.setattr(Generator, "sample", little_memory)
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, output, "--num", 4, "--batch-size", 4)
    assert draw(model, output, "--num", 4, "--batch-size", 2) == 0
    assert read_protocol(output)["batch_size"] == 2 and len(contents(output)) == 6


# What a set says of itself -----------------------------------------------------------------------


def test_a_set_tells_how_it_was_drawn_and_nothing_of_this_machine(model, tmp_path, capsys):
    options = ["--num", 4, "--seed", 3, "--uint8", "truncate", "--labels", "random", "--steps", 3]
    for name in ("set", "set.npz"):
        assert draw(model, tmp_path / name, *options) == 0
    protocol = read_protocol(tmp_path / "set")
    with np.load(tmp_path / "set.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1", "protocol"]
        assert archive["protocol"].item() == (tmp_path / "set" / "protocol.json").read_text()
        assert (
            json.loads((tmp_path / "set" / "labels.json").read_text()) == archive["arr_1"].tolist()
        )
        images = archive["arr_0"]
    assert read_protocol(tmp_path / "set.npz") == protocol
    own = {"num_images": 4, "seed": 3, "uint8": "truncate", "labels": "random", "batch_size": 32}
    assert protocol.items() >= own.items()
    assert protocol["model"]["name"] == "…/model" and "someone" not in json.dumps(protocol)
    assert protocol["model"]["digest"] == Generator.from_pretrained(model).digest()
    assert SamplerConfig.model_validate_json(json.dumps(protocol["sampler"])).steps == 3
    scored = images_of_folder(tmp_path / "set"), images_of_npz(tmp_path / "set.npz")
    assert [each.protocol for each in scored] == [protocol, protocol]
    stacked = torch.cat(list(scored[1].open())).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(stacked, images)


def test_sets_of_others_say_nothing(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert read_protocol(tmp_path / "x.npz") is None and read_protocol(tmp_path) is None
    for value in (np.array(3), np.array("[1]"), np.array("{")):
        np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), protocol=value)
        with pytest.raises(UserError, match="protocol"):
            read_protocol(tmp_path / "x.npz")


def test_a_set_that_is_not_whole_is_not_scored(model, tmp_path, capsys):
    assert draw(model, tmp_path / "set", "--num", 4) == 0
    (tmp_path / "set" / "000001.png").unlink()
    words = ["generation", "--images", str(tmp_path / "set"), "--reference", str(tmp_path)]
    assert run(evaluate.main, words) == 2
    assert "holds 3 of 4 images; the command that began it draws" in capsys.readouterr().err


# Labels and levels -------------------------------------------------------------------------------


def test_labels_are_drawn_as_those_that_are_scored_whatever_batch_and_number(model, tmp_path):
    for num, batch_size in ((40, 7), (20, 20)):
        options = ["--labels", "random", "--seed", 5, "--batch-size", batch_size, "--steps", 1]
        assert draw(model, tmp_path / f"{num}.npz", "--num", num, *options) == 0
        labels = np.load(tmp_path / f"{num}.npz")["arr_1"].tolist()
        assert labels == labels_for(40, 3, balanced=False, seed=5)[:num]
    assert len(set(Counter(labels).values())) > 1, "not balanced"
    some = ["--classes", "c", "none", "--labels", "random", "--num", 20, "--steps", 1]
    assert draw(model, tmp_path / "some.npz", *some) == 0
    expected = [(2, 3)[place] for place in labels_for(20, 2, balanced=False, seed=0)]
    assert np.load(tmp_path / "some.npz")["arr_1"].tolist() == expected


def test_levels_are_rounded_or_cut_off(model, tmp_path):
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.5, 0.999, 1.0, 1.5])
    published = torch.clamp(255.0 * ((levels + 1) / 2), 0, 255).to(torch.uint8)
    assert torch.equal(to_uint8(levels, "truncate"), published)
    assert to_uint8(levels).tolist() == [0, 0, 128, 191, 255, 255, 255]
    assert published.tolist() == [0, 0, 127, 191, 254, 255, 255]
    pixels = Generator.from_pretrained(model).sample([0, 1, 2], seed=0)
    for rule in ("round", "truncate"):
        assert draw(model, tmp_path / f"{rule}.npz", "--num", 3, "--uint8", rule) == 0
        images = torch.from_numpy(np.load(tmp_path / f"{rule}.npz")["arr_0"])
        assert torch.equal(images.permute(0, 3, 1, 2), to_uint8(pixels, rule))


def test_a_model_is_scored_at_the_levels_that_are_asked_for(model, tmp_path, capsys):
    data = ["--reference", "kind=shapes", "size=32", "num_images=24", "--num-reference", 20]
    scores = {}
    for rule in ("round", "truncate"):
        assert draw(model, tmp_path / rule, "--num", 8, "--batch-size", 64, "--uint8", rule) == 0
        for what in (
            ["--images", tmp_path / rule],
            ["--model", model, "--num", 8, "--uint8", rule],
        ):
            words = ["generation", *what, *data, "--output", tmp_path / "x.json"]
            assert run(evaluate.main, list(map(str, words))) == 0
            written = json.loads((tmp_path / "x.json").read_text())
            scores[rule, what[0]] = written["scores"]["FD-demo"]
        assert written["uint8"] == rule
        assert scores[rule, "--images"] == pytest.approx(scores[rule, "--model"], rel=1e-4)
    assert scores["round", "--model"] != pytest.approx(scores["truncate", "--model"], rel=1e-4)
    words = ["generation", "--images", str(tmp_path / "round"), "--uint8", "round"]
    assert run(evaluate.main, words) == 2
    assert "--uint8: goes with --model" in capsys.readouterr().err


def test_what_has_no_effect_on_a_strip_is_refused(model, tmp_path, capsys):
    for option in (["--labels", "random"], ["--uint8", "round"], ["--batch-size", 4]):
        assert draw(model, tmp_path / "x.png", "--strip", 3, *option) == 2
        assert f"{option[0]}: goes with a set of images" in capsys.readouterr().err


# Packing -----------------------------------------------------------------------------------------


def pack(*words: Any) -> int:
    return run(sample.main, ["pack", *map(str, words)])


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Twelve images, 0.png to 11.png, each of its number's grey, and labels."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (6, 4), (number, number, number)).save(folder / f"{number}.png")
    (folder / "labels.json").write_text(json.dumps([number // 4 for number in range(12)]))
    return folder


def test_a_folder_becomes_the_archive_that_sample_would_have_written(model, tmp_path):
    for name in ("set", "drawn.npz"):
        assert draw(model, tmp_path / name, "--num", 5) == 0
    assert pack(tmp_path / "set", tmp_path / "packed.npz") == 0
    assert (tmp_path / "packed.npz").read_bytes() == (tmp_path / "drawn.npz").read_bytes()


def test_images_are_packed_by_number_or_shuffled_with_their_labels(numbered, tmp_path, model):
    assert pack(numbered, tmp_path / "x.npz") == 0
    archive = np.load(tmp_path / "x.npz", allow_pickle=False)
    assert archive.files == ["arr_0", "arr_1"] and archive["arr_0"].shape == (12, 4, 6, 3)
    assert archive["arr_0"][:, 0, 0, 0].tolist() == list(range(12)), "2 before 10"
    assert archive["arr_1"].tolist() == [number // 4 for number in range(12)]
    shuffled = []
    for name, seed in (("a", 42), ("b", 42), ("c", 7)):
        assert pack(numbered, tmp_path / f"{name}.npz", "--shuffle", seed) == 0
        other = np.load(tmp_path / f"{name}.npz")
        order = other["arr_0"][:, 0, 0, 0].tolist()
        assert sorted(order) == list(range(12)) != order
        assert other["arr_1"].tolist() == [number // 4 for number in order]
        shuffled.append(order)
    assert shuffled[0] == shuffled[1] != shuffled[2]
    (numbered / "labels.json").unlink()
    assert pack(numbered, tmp_path / "bare.npz") == 0
    assert np.load(tmp_path / "bare.npz").files == ["arr_0"]
    assert draw(model, tmp_path / "set", "--num", 3) == 0
    assert pack(tmp_path / "set", tmp_path / "set.npz", "--shuffle", 2) == 0
    assert read_protocol(tmp_path / "set.npz") == read_protocol(tmp_path / "set") | {"shuffle": 2}


def damage(folder: Path, how: str) -> None:
    if how == "size":
        Image.new("RGB", (5, 4)).save(folder / "7.png")
    elif how == "bit":
        flipped(folder / "7.png")
    elif how == "cut":
        (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:-8])
    elif how == "labels":
        (folder / "labels.json").write_text("[1, 2]")
    elif how == "few":
        (folder / "protocol.json").write_text('{"num_images": 13}')


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("size", "7.png is 5x4, others 6x4"),
        ("bit", "7.png: can't be read as an image"),
        ("cut", "7.png: can't be read as an image"),
        ("labels", "labels.json: 2 labels, but there are 12 images"),
        ("few", "holds 12 of 13 images"),
    ],
)
def test_what_can_not_be_packed_is_named(numbered, tmp_path, capsys, how, words):
    damage(numbered, how)
    assert pack(numbered, tmp_path / "x.npz") == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["numbered"], "nothing half done stays"


def test_wrong_requests_to_pack_are_one_line(numbered, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.npz").write_bytes(b"")
    assert pack(tmp_path / "nowhere", tmp_path / "x.npz") == 2
    assert pack(tmp_path / "empty", tmp_path / "x.npz") == 2
    assert pack(numbered, tmp_path / "x.tar") == 2
    assert pack(numbered, tmp_path / "there.npz") == 2
    assert pack(numbered, tmp_path / "x.npz", "--shuffle", -1) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    for error, words in zip(
        errors,
        ("no such folder", "no images there", "expected FILE.npz", "not there yet", "at least 0"),
        strict=True,
    ):
        assert words in error


def test_packing_holds_a_few_dozen_images(tmp_path, monkeypatch):
    """However many there are: what is read and not yet written is counted."""
    folder, most, read = tmp_path / "many", 0, 0
    folder.mkdir()
    for number in range(300):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png", compress_level=0)
    original = drawn_sets.decode

    def decode(*arguments: Any) -> np.ndarray:
        nonlocal read
        read += 1
        return original(*arguments)

    def written(count: int) -> Iterator[None]:
        nonlocal most, done
        done += count
        most = max(most, read - done)

    done = 0
    monkeypatch.setattr(drawn_sets, "decode", decode)
    assert drawn_sets.write_archive(tmp_path / "x.npz", folder, progress=written) == done == 300
    assert most <= 64


def test_a_set_that_starts_from_an_image_is_near_it_and_says_so(model, tmp_path, capsys):
    picture = tmp_path / "start.png"
    assert draw(model, tmp_path / "first.png", "--num", 1) == 0
    pixels = Generator.from_pretrained(model).sample([0], seed=3)
    to_pil(pixels)[0].save(picture)
    words = ("--num", 2, "--image", picture)
    assert draw(model, tmp_path / "near", *words, "--strength", 0.02) == 0
    for name in ("000000.png", "000001.png"):
        drawn = np.asarray(Image.open(tmp_path / "near" / name)).astype(int)
        assert np.abs(drawn - np.asarray(Image.open(picture))).mean() < 40
    capsys.readouterr()
    assert draw(model, tmp_path / "near", *words) == 2
    assert "strength 0.02, now 0.8" in capsys.readouterr().err
    for wrong, message in (
        (("--strength", 0.5), "--strength: says how much of an image is kept; give --image too"),
        (("--image", picture, "--strength", 2), "--strength: expected more than 0 and at most 1"),
        (("--image", tmp_path / "no.png"), "no.png: no such image"),
        (
            ("--image", picture, "--strip", 3),
            "--image: goes with a set of images, not with --strip",
        ),
    ):
        output = "x.png" if "--strip" in wrong else "x"
        assert draw(model, tmp_path / output, *wrong) == 2
        assert message in capsys.readouterr().err
