"""Images in tar files, on disk and behind a server."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import stored
import tiny
from file_server import FileServer, file_server
from semtok import UserError
from semtok.commands import evaluate
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.tars import Tars, TarsConfig
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.recipe import parse_recipe

pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tars"


def sample(number: int, label: str | None = None) -> list[tuple[str, bytes]]:
    """Members of a numbered sample."""
    image = (f"{number:04}.png", stored.png(number))
    return [image] if label is None else [image, (f"{number:04}.cls", label.encode())]


def write_shards(folder: Path, num_images: int = 11, per_shard: int = 4) -> str:
    """Shards of numbered images of three classes; returns their pattern."""
    starts = range(0, num_images, per_shard)
    for shard, first in enumerate(starts):
        own = range(first, min(first + per_shard, num_images))
        members = [member for number in own for member in sample(number, str(number % 3))]
        stored.write_tar(folder / f"s-{shard:03}.tar", members)
    return f"{folder}/s-{{000..{len(starts) - 1:03}}}.tar"


def write_held_out(folder: Path) -> str:
    stored.write_tar(folder / "held_out.tar", sample(500, "1"))
    return str(folder / "held_out.tar")


def open_tars(path: str | tuple[str, ...], **settings) -> tuple[Tars, Tars]:
    return Tars.open(TarsConfig(**({"path": path, "size": 8} | settings)))


def test_shards_are_one_set_in_order_with_their_labels(tmp_path):
    train, held_out = open_tars(write_shards(tmp_path), validation=write_held_out(tmp_path))
    assert stored.numbers_in(train) == list(range(11)) and stored.numbers_in(held_out) == [500]
    assert train.class_names == held_out.class_names == ("0", "1", "2")
    assert train.load(range(11)).labels.tolist() == [number % 3 for number in range(11)]
    assert held_out.load([0]).labels.tolist() == [1]


def test_globs_lists_and_braces_name_the_same_files(tmp_path):
    braces = write_shards(tmp_path)
    files = [str(file) for file in sorted(tmp_path.glob("*.tar"))]
    expected = stored.numbers_in(open_tars(braces)[0])
    for path in (f"{tmp_path}/s-*.tar", tuple(files), f"{tmp_path}/s-00[0-2].tar"):
        assert stored.numbers_in(open_tars(path)[0]) == expected


def test_images_are_held_out_as_those_of_folders_are(tmp_path):
    path = write_shards(tmp_path)
    (tmp_path / "folder").mkdir()
    for number in range(11):
        (tmp_path / "folder" / f"{number:04}.png").write_bytes(stored.png(number))
    for seed in (0, 1):
        settings = {"size": 8, "validation_fraction": 0.3, "seed": seed}
        folders = Folder.open(FolderConfig(path=str(tmp_path / "folder"), **settings))
        for ours, theirs in zip(open_tars(path, **settings), folders, strict=True):
            assert stored.numbers_in(ours) == stored.numbers_in(theirs)


def test_images_look_as_those_of_folders_do(tmp_path):
    (tmp_path / "folder" / "val").mkdir(parents=True)
    (tmp_path / "folder" / "train").mkdir()
    files = dict(sorted(stored.odd_images().items()))
    for name, content in files.items():
        for part in ("train", "val"):
            (tmp_path / "folder" / part / name).write_bytes(content)
    stored.write_tar(tmp_path / "odd.tar", list(files.items()))
    stored.write_tar(tmp_path / "other.tar", sample(0))
    for size in (8, (6, 11)):
        ours, _ = open_tars(
            str(tmp_path / "odd.tar"), validation=str(tmp_path / "other.tar"), size=size
        )
        theirs, _ = Folder.open(FolderConfig(path=str(tmp_path / "folder"), size=size))
        assert torch.equal(
            ours.load(range(len(files))).images, theirs.load(range(len(files))).images
        )
    assert ours.class_names == ("images",) and len(ours) == len(files)


def test_samples_are_those_that_webdataset_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    members = [
        ("a/0.1.png", stored.png(0)),  # the ending is '1.png'
        ("a/1.PNG", stored.png(1)),
        ("a/1.txt", b"a caption"),
        ("a/1.CLS", b"7\n"),
        ("__meta__/index.json", b"{}"),
        ("no_ending", b"?"),
        ("b.c/1.png", stored.png(2)),
        ("b.c/1.cls", b"3"),
    ]
    stored.write_tar(tmp_path / "a.tar", members)
    stored.write_tar(tmp_path / "b.tar", sample(5, "3"))
    train, _ = open_tars(str(tmp_path / "a.tar"), validation=str(tmp_path / "b.tar"))
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    images = [(one["png"], int(one["cls"])) for one in theirs if "png" in one]
    assert len(images) == len(train) == 2
    assert train.contents(range(2)) == [image for image, _ in images]
    assert train.load(range(2)).labels.tolist() == [label for _, label in images] == [7, 3]


def test_labels_may_be_names_or_lie_in_json(tmp_path):
    members = []
    for number, label in enumerate(["dog", "cat", "Äffchen", "cat"]):
        about = json.dumps({"label": label, "caption": "…"}).encode()
        members += [*sample(number), (f"{number:04}.json", about)]
    stored.write_tar(tmp_path / "a.tar", members)
    train, held_out = open_tars(str(tmp_path / "a.tar"), validation_fraction=0.25)
    assert train.class_names == ("cat", "dog", "Äffchen")
    for source in (train, held_out):
        labels = source.load(range(len(source))).labels.tolist()
        expected = [[1, 0, 2, 0][number] for number in stored.numbers_in(source)]
        assert labels == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*sample(0, "1"), *sample(1)], "1 of 2 images have no label, the first of them 0001.png"),
        ([*sample(0, "-1"), *sample(1, "0")], "label -1; class numbers start at 0"),
        ([*sample(0), ("0000.json", b"{")], "sample '0000': its label can't be read"),
        ([*sample(0), ("0000.json", b'{"label": [1]}')], "sample '0000': label [1] is neither"),
        ([*sample(0), *sample(0)], "duplicate file name"),
        ([*sample(0), ("0000.jpg", b"")], "holds several images; choose by data.image_key=png"),
        ([("0.txt", b"hello")], "no images in"),
        ([("0.img.png", stored.png(0))], "data.image_key"),
    ],
)
def test_shards_that_can_not_be_are_one_line_errors(tmp_path, members, message):
    stored.write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match="data.path") as raised:
        open_tars(str(tmp_path / "a.tar"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_of_several_images_in_a_sample_one_is_chosen(tmp_path):
    members = []
    for number in range(4):
        members += [(f"{number}.png", stored.png(number)), (f"{number}.small.png", stored.png(99))]
    stored.write_tar(tmp_path / "a.tar", members)
    assert set(stored.numbers_in(open_tars(str(tmp_path / "a.tar"))[0])) < {0, 1, 2, 3}
    small, _ = open_tars(str(tmp_path / "a.tar"), image_key="small.png")
    assert stored.numbers_in(small) == [99] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "DIR/s-{000..007}.tar"}, "data.path: 'DIR/s-003.tar': no such file"),
        ({"path": "DIR/t-*.tar"}, "data.path: no file is named like 'DIR/t-*.tar'"),
        ({"path": "DIR"}, "data.path: 'DIR' is a folder; name tar files, such as 'DIR/*.tar'"),
        ({"path": "DIR/s-{000.tar"}, "a brace has no partner"),
        ({"path": ()}, "data.path: names no file"),
        ({"path": "DIR/s-{000,000}.tar"}, "named twice"),
        ({"path": "nope://DIR/s.tar"}, "Protocol not known: nope"),
        ({"path": "DIR/s-*.tar", "validation": "DIR/s-001.tar"}, "is in data.path too"),
        ({"path": "DIR/s-*.tar", "validation": "DIR/no.tar"}, "data.validation: 'DIR/no.tar': no"),
        ({"path": "DIR/new.tar", "validation": "DIR/s-000.tar"}, "classes that training lacks: 2"),
        ({"path": "DIR/s-000.tar.gz"}, "no uncompressed tar file"),
    ],
)
def test_files_that_can_not_be_are_one_line_errors(tmp_path, settings, message):
    write_shards(tmp_path)
    stored.write_tar(tmp_path / "new.tar", sample(0, "1"))
    with tarfile.open(tmp_path / "s-000.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "s-000.tar")
    settings = {k: v and v.replace("DIR", str(tmp_path)) for k, v in settings.items()}
    with pytest.raises(UserError) as raised:
        open_tars(**settings)
    assert message.replace("DIR", str(tmp_path)) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_is_known_however_it_is_named(tmp_path, monkeypatch):
    write_shards(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path, validation in (("s-*.tar", "./s-001.tar"), ("s-{000..002}.tar", f"{tmp_path}/s-0*")):
        with pytest.raises(UserError, match="is in data.path too"):
            open_tars(path, validation=validation)
    assert open_tars("s-*.tar")[0].image_name(0) == f"{tmp_path}/s-000.tar: 0000.png"


def test_a_tar_file_cut_short_anywhere_is_never_taken_for_a_smaller_one(tmp_path):
    write_shards(tmp_path, num_images=3)
    whole = (tmp_path / "s-000.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))  # after it only the end mark and padding
    for num_bytes in (*range(0, end, 256), end):
        (tmp_path / "cut.tar").write_bytes(whole[:num_bytes])
        with pytest.raises(UserError, match="cut.tar: damaged, cut short"):
            open_tars(str(tmp_path / "cut.tar"))
    flipped = bytearray(whole)
    flipped[whole.index(b"0001.cls")] ^= 1  # a header that its checksum does not fit
    (tmp_path / "flipped.tar").write_bytes(flipped)
    with pytest.raises(UserError, match="flipped.tar: damaged"):
        open_tars(str(tmp_path / "flipped.tar"))


def test_an_unreadable_image_gives_way_to_the_next_and_is_named(tmp_path):
    members = [*sample(0, "a"), ("0001.png", b"hello"), ("0001.cls", b"a"), *sample(2, "b")]
    stored.write_tar(tmp_path / "a.tar", members)
    train, _ = open_tars(str(tmp_path / "a.tar"), validation=write_named(tmp_path))
    for _ in range(2):
        batch = train.load([1, 0])
        assert stored.numbers(batch.images) == [2, 0] and batch.labels.tolist() == [1, 0]
        assert [one.name for one in batch.skipped] == [f"{tmp_path}/a.tar: 0001.png"]
    assert len(train.load([1]).skipped) == len(batch.skipped)
    stored.write_tar(tmp_path / "b.tar", [("0.png", b"hello"), ("1.png", b"hello")])
    with pytest.raises(UserError, match="none of the 1 .* images in 'b.tar' can be read"):
        open_tars(str(tmp_path / "b.tar"))


def write_named(folder: Path) -> str:
    stored.write_tar(folder / "named.tar", sample(9, "a"))
    return str(folder / "named.tar")


@pytest.mark.parametrize(
    ("num_processes", "accumulate", "num_workers"),
    [(1, 1, 0), (2, 1, 2), (3, 2, 0), (5, 1, 1)],
)
def test_epochs_are_whole_in_any_number_of_processes(
    tmp_path, num_processes, accumulate, num_workers
):
    path = write_shards(tmp_path, num_images=23)
    train, _ = open_tars(path, validation=write_held_out(tmp_path))
    stored.check_order(
        train, num_processes=num_processes, accumulate=accumulate, num_workers=num_workers
    )


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    content = tiny.content({"name": "vae"}, checkpoint_every=3)
    path, validation = write_shards(tmp_path), write_held_out(tmp_path)
    content["data"] = {"kind": "tars", "path": path, "validation": validation, "size": 16}
    content["data"]["num_workers"] = 1
    recipe = parse_recipe(content, "tiny")
    train_tokenizer(recipe, tmp_path / "run")
    whole = tiny.final_tensors(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train_tokenizer(recipe, tmp_path / "run", resume=True)
    resumed = tiny.final_tensors(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_index_is_kept_until_its_file_changes(tmp_path, cache, capsys):
    path = write_shards(tmp_path)
    first = open_tars(path)[0]
    assert "indexing 3 tar files" in capsys.readouterr().out
    kept = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = open_tars(path)[0]
    assert again.identity == first.identity and not capsys.readouterr().out
    assert kept == {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    stored.write_tar(tmp_path / "s-001.tar", sample(300, "1"))
    changed = open_tars(path, validation=write_held_out(tmp_path))[0]
    assert "indexing 2 tar files" in capsys.readouterr().out
    assert stored.numbers_in(changed) == [0, 1, 2, 3, 300, 8, 9, 10]
    assert changed.identity != first.identity
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert stored.numbers_in(open_tars(path)[0])  # what was damaged is made anew


def test_the_parts_of_a_set_differ_in_what_they_are(tmp_path):
    path = write_shards(tmp_path, num_images=12, per_shard=6)
    parts = open_tars(path, validation_fraction=0.5)
    assert len({source.identity for source in (*parts, *open_tars(path, seed=3))}) == 4


# Behind a server -----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    write_shards(tmp_path, num_images=23)
    write_held_out(tmp_path)
    with file_server({f"/{f.name}": f.read_bytes() for f in tmp_path.glob("*.tar")}) as running:
        yield running


def open_served(server: FileServer, **settings) -> tuple[Tars, Tars]:
    held_out = f"{server.address}/held_out.tar"
    return open_tars(f"{server.address}/s-{{000..005}}.tar", validation=held_out, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_urls_are_read_as_files_are(server, tmp_path, num_workers):
    train, held_out = open_served(server)
    local, _ = open_tars(f"{tmp_path}/s-*.tar", validation=str(tmp_path / "held_out.tar"))
    assert torch.equal(train.load(range(23)).labels, local.load(range(23)).labels)
    assert stored.numbers_in(held_out) == [500]
    stored.check_order(train, num_processes=2, num_workers=num_workers)


def test_of_a_url_only_the_images_asked_for_are_fetched(server):
    train, _ = open_served(server)
    server.num_bytes = 0
    again, _ = open_served(server)
    again.load([3, 17, 3])
    assert server.num_bytes == sum(len(stored.png(i)) for i in (0, 500, 3, 17)), "no index"
    assert again.identity == train.identity


def test_a_url_may_hold_a_query_that_is_not_shown(server):
    server.files["/a.tar?key=secret"] = server.files["/s-000.tar"]
    source, _ = open_tars(f"{server.address}/a.tar?key=secret")
    assert len(source) == 3 and "secret" not in source.name + source.image_name(0)
    for missing in ("b.tar?key=secret", "*.tar?key=secret"):
        with pytest.raises(UserError, match=r"\.tar…'") as raised:
            open_tars(f"{server.address}/{missing}")
        assert "secret" not in str(raised.value)


def test_a_server_is_asked_again_and_then_given_up(server, monkeypatch):
    monkeypatch.setattr("semtok.data.remote._WAITS", (0.0, 0.0))
    train, _ = open_served(server)
    server.fails = 4
    assert stored.numbers(train.load([1, 2, 3]).images) == [1, 2, 3] and server.fails == 0
    server.fails = 1000
    with pytest.raises(UserError, match=r"s-000.tar: 503.*Service Unavailable"):
        train.load([1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_shrinks_or_goes_while_training_is_one_line(
    server, tmp_path, monkeypatch, num_workers
):
    monkeypatch.setattr("semtok.data.remote._WAITS", ())
    served, _ = open_served(server)
    local, _ = open_tars(f"{tmp_path}/s-*.tar")
    for name in list(server.files):
        server.files[name] = server.files[name][:600]
        (tmp_path / name.removeprefix("/")).unlink()
    for source, message in ((served, "416|it has changed"), (local, "no such file")):
        batches = training_batches(
            source,
            DataOrder(len(source), 4, 0, False),
            BatchSlice(4, 1, 0, 1),
            first_step=0,
            last_step=3,
            num_workers=num_workers,
            pin_memory=False,
        )
        with pytest.raises(UserError, match=message) as raised:
            list(batches)
        assert "\n" not in str(raised.value)


def test_servers_that_can_not_do_are_one_line_errors(server):
    server.gives_parts = False
    with pytest.raises(UserError, match="its server gives no parts of files"):
        open_served(server)
    with pytest.raises(UserError, match=r"x.tar': no such file, or no answer \(404"):
        open_tars(f"{server.address}/x.tar")
    server.files["/cut.tar"] = server.files["/s-000.tar"][:2000]
    with pytest.raises(UserError, match="cut.tar: damaged, cut short"):
        open_tars(f"{server.address}/cut.tar")


# Commands -----------------------------------------------------------------------------------------


def test_attributes_are_probed_in_tar_files(tmp_path, capsys):
    lines, members = ["image,bright,odd"], []
    for number in range(80):
        name = f"{number:04}.png"
        bright, shade = number % 2, 20 * (number // 8)
        members.append((name, stored.png(60_000 * bright + shade)))
        lines.append(f"{name},{bright},{number % 3 == 0}")
    stored.write_tar(tmp_path / "a.tar", members)
    (tmp_path / "table.csv").write_text("\n".join(lines))
    arguments = ["probe", "--tokenizer", "demo", "--attributes", str(tmp_path / "table.csv")]
    arguments += ["--data", "kind=tars", f"path={tmp_path}/a.tar", "size=32"]
    arguments += ["validation_fraction=0.4", "--output", str(tmp_path / "scores.json")]
    assert run(evaluate.main, arguments) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "bright" in shown and "odd" in shown


def test_without_webdataset_it_is_said_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tars needs webdataset; pip install 'semtok\[data\]'"):
        open_tars(str(tmp_path / "a.tar"))


def count_together(path: str) -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    assert len(open_tars(path)[0]) == 22


def test_processes_that_start_together_share_one_index(tmp_path, cache, ranks):
    path = write_shards(tmp_path, num_images=23)
    ranks.run("test_tars:count_together", path)
    assert len(list(cache.iterdir())) == 6, "an index for each file, and nothing temporary"
