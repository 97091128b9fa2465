"""What tar files hold beside plain images with labels: links, joined archives, and what is counted as left out."""

import io
import json
import tarfile
from pathlib import Path

import pytest

import stored
from semtok import UserError
from semtok.data.images.tars import Tars, TarsConfig

pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))


def opened(path: Path, **settings) -> tuple[Tars, Tars]:
    return Tars.open(TarsConfig(path=str(path), size=8, validation_fraction=0.01, **settings))


def found(path: Path, **settings) -> tuple[dict[int, str], dict[str, int]]:
    """The class name of each numbered image, and what was left out."""
    parts = opened(path, **settings)
    labels = {}
    for part in parts:
        numbers, own = stored.numbers_in(part), part.load(range(len(part))).labels.tolist()
        labels |= {n: part.class_names[label] for n, label in zip(numbers, own, strict=True)}
    assert parts[0].left_out is parts[1].left_out and parts[0].left_out is not None
    return labels, parts[0].left_out.counts()


def samples(*numbers: int, label: str | None = "0") -> list[tuple[str, bytes]]:
    members = []
    for n in numbers:
        members.append((f"{n:04}.png", stored.png(n)))
        members += [(f"{n:04}.cls", label.encode())] if label is not None else []
    return members


def link(archive: tarfile.TarFile, kind: bytes, name: str, target: str) -> None:
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, target
    archive.addfile(about)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


def test_hard_and_symbolic_links_in_tar_files_are_followed(tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("all/0.png", stored.png(7)), ("all/0.cls", b"3")):
            add(archive, name, content)
        link(archive, tarfile.LNKTYPE, "x/1.png", "all/0.png")  # from the archive's root
        link(archive, tarfile.SYMTYPE, "x/1.cls", "../y/to_come.cls")  # from where it lies
        link(archive, tarfile.SYMTYPE, "x/2.png", "./1.png")  # a link to a link
        add(archive, "x/2.cls", b"1")
        link(archive, tarfile.SYMTYPE, "x/3.png", "nowhere.png")
        link(archive, tarfile.SYMTYPE, "x/4.png", "4.png")
        add(archive, "y/to_come.cls", b"2")
    train, held_out = opened(path)
    members = [
        part.image_name(i).rpartition(" ")[2]
        for part in (train, held_out)
        for i in range(len(part))
    ]
    assert sorted(members) == ["all/0.png", "x/1.png", "x/2.png"]
    assert {n for part in (train, held_out) for n in stored.numbers_in(part)} == {7}
    by_name = {}
    for part in (train, held_out):
        for i in range(len(part)):
            by_name[part.image_name(i)[-7:]] = part.load([i]).labels.item()
    assert by_name == {"l/0.png": 3, "x/1.png": 2, "x/2.png": 1}
    assert train.left_out.counts() == {
        "links that lead to no file of the archive": 2,
        "samples with a label and no image": 1,
    }


def test_tar_files_that_were_joined_are_read_to_their_end(tmp_path):
    parts = [tmp_path / name for name in ("1.tar", "2.tar", "3.tar")]
    for part, label in zip(parts, "012", strict=True):
        number = int(label)
        stored.write_tar(part, samples(number, number + 10, label=label))
    joined = tmp_path / "joined.tar"
    whole = b"".join(part.read_bytes() for part in parts)
    joined.write_bytes(whole)
    expected = {n + 10 * k: str(n) for n in range(3) for k in range(2)}
    assert found(joined) == (expected, {})
    end = len(whole.rstrip(b"\0"))
    for num_bytes in range(len(parts[0].read_bytes()) + 100, end, 700):
        joined.write_bytes(whole[:num_bytes])
        if whole[num_bytes - 512 : num_bytes] != bytes(512):  # not in padding
            with pytest.raises(UserError, match="joined.tar: damaged, cut short"):
                opened(joined)


def test_one_sample_does_not_go_on_in_the_next_archive(tmp_path):
    path = tmp_path / "joined.tar"
    content = b""
    for number in range(2):
        stored.write_tar(path, [("a.png", stored.png(number)), ("a.cls", str(number).encode())])
        content += path.read_bytes()
    path.write_bytes(content)
    assert found(path) == ({0: "0", 1: "1"}, {})


def test_what_lies_behind_the_end_of_a_tar_file_is_refused(tmp_path):
    path = tmp_path / "more.tar"
    stored.write_tar(path, samples(0, 1))
    path.write_bytes(path.read_bytes() + b"something else" * 50)
    with pytest.raises(UserError, match=r"behind its end mark, at byte \d+, it holds something"):
        opened(path)


def test_members_that_are_not_used_are_counted_by_kind_and_named(tmp_path):
    members = [
        *samples(0, 1),
        ("0001.txt", b"a caption"),
        ("0001.json", b'{"label": 5}'),
        ("0002.heic", b"?"),
        ("0002.cls", b"0"),
        ("._0000.png", b"?"),
        (".DS_Store", b"?"),
        ("__MACOSX/0009.png", b"?"),
        (".thumbs/0009.png", stored.png(9)),
        ("readme", b"?"),
        ("__meta__/index.json", b"{}"),
        ("./0003.png", stored.png(3)),
        ("./0003.cls", b"0"),
        ("0004.small.png", stored.png(4)),
    ]
    stored.write_tar(tmp_path / "a.tar", members)
    labels, counts = found(tmp_path / "a.tar")
    assert labels == {0: "0", 1: "0", 3: "0"}
    expected = {
        "members .txt": 1,
        "members .json beside .cls": 1,
        "samples with a label and no image": 1,
        "members .heic": 1,
        "hidden members": 4,
        "members without an ending": 1,
        "images of other endings (data.image_key=…)": 1,
    }
    assert counts == expected
    line = opened(tmp_path / "a.tar")[0].left_out.line()  # from the index that was kept
    assert "hidden members: 4 (._0000.png, .DS_Store, …)" in line
    assert "samples with a label and no image: 1 (0002)" in line and "\n" not in line


def test_json_that_names_no_label_and_folders_that_are_no_classes_are_told_of(tmp_path):
    members = []
    for n, folder in enumerate(["cat", "cat", "dog"]):
        about = {"class": folder, "caption": "…"}
        members += [
            (f"{folder}/{n}.png", stored.png(n)),
            (f"{folder}/{n}.json", json.dumps(about).encode()),
        ]
    stored.write_tar(tmp_path / "a.tar", members)
    labels, counts = found(tmp_path / "a.tar")
    assert set(labels.values()) == {"images"}
    told = "folders that are not taken for classes, as tar files label by .cls or .json"
    assert counts == {"members .json without 'label'": 3, told: 2}
    line = opened(tmp_path / "a.tar")[0].left_out.line()
    assert "(cat/0.json: class, caption, " in line and f"{told}: 2 (cat, dog)" in line


def test_counts_of_several_tar_files_add_up(tmp_path):
    for shard in range(3):
        own = samples(*range(4 * shard, 4 * shard + 4))
        stored.write_tar(tmp_path / f"{shard}.tar", [*own, (".x", b""), (".y", b"")])
    assert found(tmp_path / "*.tar")[1] == {"hidden members": 6}
    assert "hidden members: 6 (.x, .y, …)" in opened(tmp_path / "*.tar")[0].left_out.line()


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_a_label_may_begin_with_a_byte_order_mark(tmp_path, ending):
    members = []
    for n, name in enumerate(["cat", "dog"]):
        text = name if ending == "cls" else json.dumps({"label": name})
        members += [
            (f"{n}.png", stored.png(n)),
            (f"{n}.{ending}", b"\xef\xbb\xbf" + text.encode()),
        ]
    stored.write_tar(tmp_path / "a.tar", members)
    assert found(tmp_path / "a.tar") == ({0: "cat", 1: "dog"}, {})


@pytest.mark.parametrize("ending", ["cls", "json"])
@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["0.0", "1.0"], ["0", "1"]),
        (["1", "1.0", "0"], ["1", "1", "0"]),
        (['"cat"', '" cat "', '"dog"'], ["cat", "cat", "dog"]),
        (['"cafe\u0301"', '"caf\u00e9"', '"dog"'], ["caf\u00e9", "caf\u00e9", "dog"]),
    ],
)
def test_labels_that_mean_the_same_are_one_class(tmp_path, ending, values, names):
    members = []
    for n, value in enumerate(values):
        text = value.strip('"') if ending == "cls" else f'{{"label": {value}}}'
        members += [(f"{n}.png", stored.png(n)), (f"{n}.{ending}", text.encode())]
    stored.write_tar(tmp_path / "a.tar", members)
    assert found(tmp_path / "a.tar") == (dict(enumerate(names)), {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["0.5", "1"], "label 0.5 is no whole number"),
        (["Cat", "cat"], "labels 'Cat' and 'cat' differ in upper and lower case alone"),
        (["nan", "0"], "label 'nan' says nothing"),
        (["?", "cat"], "label '?' says nothing"),
        (["true", "1"], "labels '1' and 'true' mean the same"),
    ],
)
def test_labels_that_may_mean_the_same_or_nothing_are_refused(tmp_path, values, message):
    members = [m for n, value in enumerate(values) for m in samples(n, label=value)]
    stored.write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "a.tar")
    assert message in str(caught.value) and "\n" not in str(caught.value)
