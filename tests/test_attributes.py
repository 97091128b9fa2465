"""Tables of attributes, and the folders of images that they describe."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from semtok import UserError
from semtok.data.images.attributes import read_attributes
from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.order import BatchSlice, DataOrder, training_batches


def pictures(root: Path, *names: str) -> list[str]:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(root / name)
    return list(names)


def table(root: Path, text: str, name: str = "table.csv") -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def read(root: Path, text: str, *names: str) -> dict[str, list[str]]:
    """The category names of the images, per attribute."""
    known = read_attributes(table(root, text), pictures(root, *names))
    columns = zip(known.categories.items(), known.values.unbind(1), strict=True)
    return {
        name: [categories[i] for i in column.tolist()] for (name, categories), column in columns
    }


def open_folder(root: Path, attributes: Path | None, **settings) -> tuple[Folder, Folder]:
    config = {"path": str(root), "size": 8, "attributes": str(attributes)} | settings
    return Folder.open(FolderConfig(**config))


# Formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["cat/1.png", "cat/1", "1.png", "1", "./cat/1.png"])
def test_csv_names_images_by_path_or_unique_name_with_or_without_suffix(tmp_path, first):
    text = f"file,colour\n{first},red\ncat/2.png,blue\nelsewhere.png,green\n"
    assert read(tmp_path, text, "cat/1.png", "cat/2.png") == {"colour": ["red", "blue"]}


def test_csv_as_spreadsheets_write_it(tmp_path):
    text = '\ufefffile,"a, b", size \r\n\r\n1.png,"x ""y""", 10\r\n2.png,z,9\r\n'
    known = read(tmp_path, text, "1.png", "2.png")
    assert known == {"a, b": ['x "y"', "z"], "size": ["10", "9"]}


def test_categories_are_sorted_numbers_as_numbers_and_constant_attributes_left_out(tmp_path):
    text = "f,n,s,same,sign\na,10,b,7,1\nb,9,a,7,-1\nc,-2.5,10,7,1\n"
    files = pictures(tmp_path, "a.png", "b.png", "c.png")
    known = read_attributes(table(tmp_path, text), files)
    assert known.categories == {
        "n": ("-2.5", "9", "10"),
        "s": ("10", "a", "b"),
        "sign": ("-1", "1"),
    }
    assert known.values.tolist() == [[2, 2, 1], [1, 1, 0], [0, 0, 1]]
    assert known.values.dtype == torch.int64


def test_a_path_that_is_given_wins_over_a_name_that_several_share(tmp_path):
    text = "file,x\na.png,0\na.png.jpg,1\n"
    assert read(tmp_path, text, "a.png", "a.png.jpg") == {"x": ["0", "1"]}


CELEBA = """2
5_o_Clock_Shadow Smiling Young Male 
000001.jpg -1  1  1 -1
000002.jpg  1 -1  1  1
"""


def documented_command(begin: str, end: str) -> str:
    """A command of docs/methods.md, which may run over several lines."""
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"^{re.escape(begin)}.*?{re.escape(end)}$", page, flags=re.M | re.S)
    return command


def shell(command: str, folder: Path) -> None:
    subprocess.run(["sh", "-ec", command], cwd=folder, check=True, timeout=60)


def test_the_page_converts_the_tables_of_animals_with_attributes(tmp_path):
    table(tmp_path, "       1\tantelope\n       2\tgrizzly+bear\n       3\twhale\n", "classes.txt")
    table(tmp_path, "       1\tblack\n       2\tbigteeth\n       3\tanimal\n", "predicates.txt")
    table(tmp_path, "0 1 1\n1 0 1\n1 1 1\n", "predicate-matrix-binary.txt")
    images = tmp_path / "JPEGImages"
    own = [f"{name}/{name}_{i}.jpg" for name in ("antelope", "grizzly+bear") for i in range(3)]
    pictures(images, *own)
    shell(documented_command("(cd JPEGImages", "> awa2.csv"), tmp_path)
    parts = open_folder(images, tmp_path / "awa2.csv", validation_fraction=0.3)
    assert parts[0].attributes == {"black": ("0", "1"), "bigteeth": ("0", "1")}
    for part in parts:
        batch = part.load(range(len(part)))
        assert torch.equal(batch.attributes["black"], batch.labels)
        assert torch.equal(batch.attributes["bigteeth"], 1 - batch.labels)


@pytest.mark.parametrize("text", [CELEBA, CELEBA.removeprefix("2\n"), CELEBA.replace("\n", "\r\n")])
def test_celebas_own_file_is_read_with_and_without_its_count(tmp_path, text):
    known = read(tmp_path, text, "img/000001.jpg", "img/000002.jpg")
    assert known == {"5_o_Clock_Shadow": ["-1", "1"], "Smiling": ["1", "-1"], "Male": ["-1", "1"]}


def test_cells_that_mean_the_same_are_one_category(tmp_path):
    text = "file,n,answer,name\na,1,  yes ,caf\u00e9\nb,1.0,yes,cafe\u0301\nc,+2,no,bar\nd,2.50,no,none\n"
    known = read(tmp_path, text, "a.png", "b.png", "c.png", "d.png")
    assert known == {
        "n": ["1", "1", "2", "2.5"],
        "answer": ["yes", "yes", "no", "no"],
        "name": ["caf\u00e9", "caf\u00e9", "bar", "none"],
    }


def test_letters_are_told_apart_by_their_case_and_free_text_is_left_alone(tmp_path):
    names = [f"{i}.png" for i in range(20)]
    rows = [f"{i},{'aA'[i % 2]},{'A cat' if i else 'a cat'} {i % 19}" for i in range(20)]
    known = read(tmp_path, "\n".join(["file,letter,caption", *rows]), *names)
    assert set(known["letter"]) == {"a", "A"} and len(set(known["caption"])) == 20


def test_names_are_matched_in_any_of_unicodes_forms(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    for ours, theirs in ((composed, apart), (apart, composed)):
        for ending in ("", ".png"):
            text = f"file,x\n{theirs}{ending},0\nb,1\n"
            assert read(tmp_path, text, f"k/{ours}.png", "b.png") == {"x": ["0", "1"]}


def test_names_that_differ_in_their_form_alone_stay_two(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    text = f"file,x\n{apart},0\n{composed},1\n"
    assert read(tmp_path, text, f"{composed}.png", f"{apart}.png") == {"x": ["1", "0"]}
    with pytest.raises(UserError, match="no row for image"):
        read(tmp_path, f"file,x\n{apart},0\n", f"{composed}.png", f"{apart}.png")


def test_rows_without_an_image_are_counted(tmp_path):
    path = table(tmp_path, "file,x\n1,0\n2,1\n3,0\nlost.png,0\ngone.png,1\n", "t.csv")
    pictures(tmp_path / "images", "1.png", "2.png", "3.png")
    train, held_out = open_folder(tmp_path / "images", path)
    kind = "rows of the table of attributes without an image"
    assert train.left_out.counts() == held_out.left_out.counts() == {kind: 2}
    assert "lost.png" in train.left_out.line() and "gone.png" in train.left_out.line()


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f,x\na.png,0\n", "table.csv: no row for image 'b.png'; name each image"),
        ("f,x\na,0\nb,1,2\n", "table.csv, line 3: 2 values, 1 attributes"),
        ("f,x\na,0\nb\n", "line 3: 0 values, 1 attributes"),
        ("f,x\na,0\nb, \n", "line 3: 'x' is empty; fill it in"),
        ("f,x\n,0\nb,1\n", "line 2: 'name' is empty"),
        ("f,x,x\na,0,1\nb,1,0\n", "attribute 'x' occurs 2 times"),
        ("f,x,\na,0,1\nb,1,0\n", "an attribute has no name"),
        ("f,x\na,0\na,1\nb,1\n", "line 3: 'a' occurs a second time"),
        ("f,x\na,0\na.png,1\nb,1\n", "both 'a.png' and 'a' name 'a.png'"),
        ("f,x\na,1\nb,1\n", "each attribute is the same in all images"),
        ("f;x\na;1\nb;0\n", "no attributes; expected CSV with a header"),
        ("", "no attributes; expected CSV"),
        ("f,x\n", "no row for image 'a.png'"),
        ('f,x\na,"1\nb,0\n', "not CSV"),
        ("2\nx y\na.png 1\nb.png 1 1\n", "no attributes; expected CSV with a header"),
        ("2\nx y\na.png 1 0\nb.png 1\n", "line 4: 1 values, 2 attributes"),
        ("3\nx y\na.png 1 0\nb.png 1 1\n", "line 1: tells of 3 rows and has 2"),
        ("f,x\nc,0\n", "no row for image 'a.png' and 1 more; name each image"),
        ("f,x\na,yes\nb,Yes\n", "'x': 'Yes' and 'yes' differ in upper and lower case alone; mend"),
        ("f,x\na,1\nb,true\n", "'x': '1' and 'true' mean the same"),
        ("f,x\na,no\nb,F\n", "'x': 'no' and 'F' mean the same"),
        ("f,x\na,cat\nb,NA\n", "'x': 'NA' says nothing; mend it or remove the column"),
        ("f,x\na,1\nb,nan\n", "'x': 'nan' says nothing"),
        ("f,x\na,1\nb,?\n", "'x': '?' says nothing"),
        ("f,x\na,1\nb,-\n", "'x': '-' says nothing"),
    ],
)
def test_tables_that_do_not_fit_are_one_line_errors(tmp_path, text, message):
    with pytest.raises(UserError, match="data.attributes: .*table.csv") as caught:
        read(tmp_path, text, "a.png", "b.png")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_several_images_have_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"'1.png' names others beside 'cat/1.png'; .* its path"):
        read(tmp_path, "f,x\n1.png,0\ndog/1.png,1\n", "cat/1.png", "dog/1.png")
    with pytest.raises(UserError, match=r"'1' names others beside '1.jpg'"):
        read(tmp_path, "f,x\n1,0\n", "1.jpg", "1.png")


def test_files_that_are_no_text_are_errors(tmp_path):
    files = pictures(tmp_path, "a.png")
    (tmp_path / "latin.csv").write_bytes("f,x\na,é\n".encode("latin-1"))
    for name, message in [
        ("none.csv", "No such file"),
        ("latin.csv", "not UTF-8"),
        ("a.png", "not UTF-8"),
        (".", "data.attributes=FILE"),
    ]:
        with pytest.raises(UserError, match=message):
            read_attributes(tmp_path / name, files)


# Folders -----------------------------------------------------------------------------------------


def colours(root: Path, num: int) -> Path:
    """A folder in which the attribute 'red' says how red an image is."""
    pictures(root, *(f"{i}.png" for i in range(num)))
    rows = "".join(f"{i}.png,{20 * i},{i % 2}\n" for i in range(num))
    return table(root, "file,red,odd\n" + rows)


def test_both_parts_share_the_categories_and_images_keep_their_values(tmp_path):
    parts = open_folder(tmp_path, colours(tmp_path, 10), validation_fraction=0.3)
    assert [len(part) for part in parts] == [7, 3]
    for part in parts:
        assert part.attributes["red"] == tuple(str(20 * i) for i in range(10))
        batch = part.load([2, 0])
        names = [part.attributes["red"][i] for i in batch.attributes["red"].tolist()]
        assert names == [str(int(image[0, 0, 0])) for image in batch.images]
        assert batch.attributes["odd"].dtype == torch.int64


def test_train_and_val_folders_are_named_from_the_folder(tmp_path):
    pictures(tmp_path, "train/a/1.png", "train/a/2.png", "val/a/1.png")
    path = table(tmp_path, "f,x\ntrain/a/1,0\ntrain/a/2,1\nval/a/1,1\n")
    train, held_out = open_folder(tmp_path, path)
    assert train.load([0, 1]).attributes["x"].tolist() == [0, 1]
    assert held_out.load([0]).attributes["x"].tolist() == [1]


def test_an_unreadable_image_gives_way_to_the_next_and_to_its_attributes(tmp_path):
    pictures(tmp_path, "train/1.png", "train/2.png", "val/3.png")
    (tmp_path / "train" / "1.png").write_text("hello")
    train, _ = open_folder(tmp_path, table(tmp_path, "f,x\n1,0\n2,1\n3,0\n"))
    batch = train.load([0, 1])
    assert batch.attributes["x"].tolist() == [1, 1] and len(batch.skipped) == 1


def test_a_folder_without_a_table_knows_no_attributes(tmp_path):
    colours(tmp_path, 4)
    for part in Folder.open(FolderConfig(path=str(tmp_path), size=8)):
        assert part.attributes == {} and part.load([0]).attributes == {}


def test_an_empty_folder_is_told_before_its_table(tmp_path):
    with pytest.raises(UserError, match="data.path: no images"):
        open_folder(tmp_path, tmp_path / "none.csv")


def test_training_on_a_folder_with_attributes_sees_them(tmp_path):
    train, _ = open_folder(tmp_path, colours(tmp_path, 6), validation_fraction=0.3)
    order, share = DataOrder(len(train), 4, 0, flip=True), BatchSlice(4, 1, 0, 1)
    settings = {"first_step": 0, "last_step": 1, "num_workers": 0, "pin_memory": False}
    (batch,) = training_batches(train, order, share, **settings)
    red = [train.attributes["red"][i] for i in batch.attributes["red"].tolist()]
    assert red == [str(int(image[0, 0, 0])) for image in batch.images]
