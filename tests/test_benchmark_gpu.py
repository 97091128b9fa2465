"""``benchmark gpu``: it rehearses whole without a GPU, and what breaks in one part breaks nothing else."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from benchmarks import caching
from benchmarks import command as benchmark
from benchmarks.gpu import device_checks, first_minutes, worker
from benchmarks.gpu.finding import Finding, told
from benchmarks.gpu.parts import PARTS, RECIPES, Part
from benchmarks.gpu.processes import Workers
from semtok.commands.cli import run
from semtok.errors import UserError
from semtok.methods.vae import PRESETS
from semtok.recipe import load_recipe
from semtok.speed import allow_tf32

NAMES = [part.name for part in PARTS]


def gpu(*words: object) -> int:
    return run(benchmark.main, ["gpu", *map(str, words)])


def parts_in(file: Path) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in json.loads(file.read_text())["parts"]}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Small networks in the place of published ones, which are minutes of work on a CPU."""
    monkeypatch.setitem(PRESETS, "f8d4", PRESETS["tiny"])
    monkeypatch.setattr(caching, "random_reglue", lambda _: tiny.tokenizer("vae", "reglue", True))
    monkeypatch.setattr(caching, "_SIZE", 16)
    modules = "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(modules, str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    allow_tf32("fp32")
    torch.backends.cudnn.benchmark = False


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what there is without a GPU")
def test_parts_are_rehearsed_without_a_gpu(small, tmp_path, capsys):
    """A part of each kind. The group of one has a process of its own, below, and the rest are other words alone."""
    file = tmp_path / "gpu.json"
    words = ("precision", "compile", "memory", "transfer", "dit SiT-XL/2", "cudnn", "cache with")
    assert gpu("--tiny", "--only", *words, "--output", file) == 0
    figures, parts = json.loads(file.read_text()), parts_in(file)
    assert figures["is_rehearsal"] and figures["device"] == "CPU"
    assert figures["date"].startswith("20") and figures["torch"] == torch.__version__
    states = {name: part["state"] for name, part in parts.items()}
    assert states == {
        "precision": "held",
        "compile": "held",
        "memory": "held",
        "dit SiT-XL/2": "measured",
        "transfer": "skipped",
        "cudnn_benchmark": "measured",
        "cache with targets": "measured",
    }
    assert "needs a GPU" in parts["transfer"]["found"]
    measured = [part for part in parts.values() if part["state"] == "measured"]
    assert all(part["figures"]["rows"] and part["seconds"] > 0 for part in measured)
    out = capsys.readouterr().out
    assert "0 in the next 2" in out and "cudnn_benchmark=true: " in out


def test_a_group_of_one_process_is_rehearsed(tmp_path):
    file = tmp_path / "gpu.json"
    program = Path(benchmark.__file__).parents[1] / "benchmark.py"
    words = [str(program), "gpu", "--tiny", "--only", "nccl", "--output", str(file)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = parts_in(file)["nccl"]["found"]
    assert "losses 0.0000% from those without, 0.0000% where fsdp2 shares out" in found


def test_what_fails_in_a_part_is_told_and_the_others_are_done(tmp_path, monkeypatch, capsys):
    def fails(_: bool, folder: Path) -> Finding:
        load_recipe(folder / "none.yaml", [])
        raise AssertionError

    def lacks(_: bool, folder: Path) -> Finding:
        import there_is_no_such_module  # noqa: F401

        raise AssertionError

    held = Finding("held", "well")
    for name, check in (("nccl", fails), ("pipeline", lacks), ("memory", lambda *_: held)):
        monkeypatch.setitem(device_checks.CHECKS, name, check)
    file = tmp_path / "gpu.json"
    words = ["--tiny", "--only", "memory", "nccl", "pipeline", "--output", file]
    assert gpu(*words) == 1, "a check failed"
    parts = parts_in(file)
    assert [part["state"] for part in parts.values()] == ["held", "failed", "skipped"]
    assert parts["nccl"]["found"].startswith("UserError: ")
    assert ", at semtok/" in parts["nccl"]["found"], "the line that it came through"
    assert parts["pipeline"]["found"] == "there_is_no_such_module is not installed"


def done_by(monkeypatch: pytest.MonkeyPatch, do: Callable[..., dict[str, Any]]) -> None:
    monkeypatch.setattr(first_minutes, "do_part", do)


def test_when_the_minutes_are_over_no_part_begins_and_what_is_left_is_said(tmp_path, monkeypatch):
    """The file is written after each part: here it is read while the second one is under way."""
    file, now, seen = tmp_path / "gpu.json", [0.0], []

    def do(name: str, share: float, folder: Path, *, tiny: bool) -> dict[str, Any]:
        seen.append(list(parts_in(file)) if file.is_file() else [])
        now[0] += 40
        return {"name": name, "state": "held", "found": "", "seconds": 40.0, "figures": {}}

    done_by(monkeypatch, do)
    monkeypatch.setattr(first_minutes.time, "monotonic", lambda: now[0])
    assert gpu("--tiny", "--minutes", 1, "--output", file) == 0
    states = [part["state"] for part in parts_in(file).values()]
    assert states == ["held", "held"] + ["left out"] * (len(NAMES) - 2)
    assert seen == [[], NAMES[:1]]


def test_where_memory_runs_out_a_part_is_done_again_with_half_the_batch(tmp_path, monkeypatch):
    asked = []

    def do(name: str, share: float, folder: Path, *, tiny: bool) -> dict[str, Any]:
        asked.append(share)
        told = {"batch_share": share, "ran_out_of_memory": share > 0.25, "state": "measured"}
        return told | {"name": name, "found": "", "seconds": 1.0, "figures": {}}

    done_by(monkeypatch, do)
    assert gpu("--tiny", "--only", "dit SiT-XL/2") == 0
    assert asked == [1, 0.5, 0.25]


def test_a_batch_falls_where_a_gpu_has_less_memory():
    part = Part("x", ("dit", "--batch-size=BATCH"), batch_size=256, gb=100)
    assert [part.share(gb) for gb in (141, 80, 24)] == [1, 0.5, 0.125]
    assert part.command(0.5, tiny=False) == ["dit", "--batch-size=128"]
    assert Part("y").share(1) == 1, "what says nothing of memory is done as it is"


@pytest.mark.parametrize("part", [p for p in PARTS if p.words], ids=lambda part: part.name)
def test_the_words_of_a_measurement_are_some_of_the_benchmark(part):
    args = benchmark._parsed(part.command(1, tiny=False))
    assert args.task in part.name or args.task in ("tokenizer", "dit")
    if args.task == "tokenizer":
        for words in benchmark._sides(args).values():
            assert load_recipe(args.recipe, words).train.batch_size == part.batch_size


def test_a_process_that_dies_or_hangs_loses_its_job_alone(tmp_path):
    code = (
        "import json, os, sys, time\n"
        "job = json.loads(sys.stdin.readline() or '{}')\n"
        "if job.get('do') == 'die': os._exit(3)\n"
        "if job.get('do') == 'hang': time.sleep(600)\n"
        "if job: open(job['result'], 'w').write(json.dumps({'done': job['do']}))\n"
    )
    with Workers((sys.executable, "-c", code)) as workers:
        asked = {"result": str(tmp_path / "result.json")}
        assert "exit code 3" in workers.do(asked | {"do": "die"}, 60)
        assert workers.do(asked | {"do": "hang"}, 1) == "stopped after 1 s"
        assert workers.do(asked | {"do": "well"}, 60) == {"done": "well"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what there is without a GPU")
def test_a_worker_reads_its_job_and_writes_what_came_of_it(tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    job = {"name": "transfer", "share": 1.0, "folder": str(tmp_path / "own" / "folder")}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(job | {"result": str(result)}) + "\n"))
    worker.main()
    record = json.loads(result.read_text())
    assert record["state"] == "skipped" and record["found"].startswith("needs a GPU; a batch has 9")
    worker.main()  # of a process that nobody needs any more


def test_an_error_that_came_through_the_library_names_its_line():
    with pytest.raises(UserError) as raised:
        load_recipe(RECIPES / "none.yaml", [])
    assert "none.yaml" in told(raised.value) and ".py:" in told(raised.value)
    assert told(ValueError("no")) == "ValueError: no"


def test_what_both_sides_share_is_not_said_twice():
    row = {"images/s": 10.0, "of matmul": None}
    rows = [row | {"what": "a=1 b=1"}, row | {"what": "a=1 b=2"}]
    line = worker._line({"rows": rows, "ratio": "a=1 b=2 is 1.00 times as fast as a=1 b=1"})
    assert line == "b=1: 10 images/s; b=2: 10 images/s; b=2 is 1.00 times as fast as b=1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--only", "nope", "--tiny"], "--only nope: no part has this in its name; parts: synchr"),
        (["--output", "."], "--output .: not a file that can be written"),
    ],
)
def test_wrong_words_are_one_line(capsys, words, message):
    assert gpu(*words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what there is without a GPU")
def test_without_a_gpu_nothing_but_a_rehearsal_begins(capsys):
    assert gpu() == 2
    assert "there is no GPU here; --tiny rehearses" in capsys.readouterr().err
