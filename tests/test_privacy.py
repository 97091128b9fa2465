"""What an export says of the machine and the person it was made by: nothing that is theirs alone."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import constants

import tiny
from file_server import file_server
from hub_server import TOKEN, hub_server
from semtok import Generator, Tokenizer
from semtok.commands import evaluate, hub
from semtok.commands.cli import run
from semtok.commands.train_dit import train_dit
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.errors import UserError
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.methods.vae import KLTokenizer
from semtok.privacy import first_left_out, fit_to_show
from semtok.publish import push_export
from semtok.recipe import load_diffusion_recipe, load_recipe, parse_diffusion_recipe, parse_recipe
from semtok.settings import read_yaml
from semtok.storage import read_json, write_json
from semtok.teachers import DEMO_FILE
from stored import png

SIGNED = "?X-Amz-Credential=me&X-Amz-Signature=0ecfe4"
USER = "somebody:hunter2"
PLUGIN = "from semtok.registry import register_method\n"


@dataclass(frozen=True)
class Runs:
    """Of a tokenizer, and of a generator on it, whose recipes name private places."""

    root: Path
    tokenizer: Path
    generator: Path

    def secrets_in(self, folder: Path) -> set[tuple[str, str]]:
        """(file, secret) of all that is in the files of a folder."""
        words = [str(self.root), str(Path.home()), "X-Amz", "0ecfe4", "somebody", "hunter2"]
        return {
            (file.relative_to(folder).as_posix(), word)
            for file in folder.rglob("*")
            if file.is_file()
            for word in words
            if word.encode() in file.read_bytes()
        }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Trained on a folder, and on tar files behind signed URLs with a password."""
    root = tmp_path_factory.mktemp("somewhere")
    for label in ("a", "b"):
        for number in range(6):
            file = root / "images" / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(number))
    (root / "images/attributes.csv").write_text("file,colour\n")
    (root / "plugin.py").write_text(PLUGIN)
    AutoencoderKL(**KLTokenizer.from_pretrained("demo").autoencoder.config).save_pretrained(
        root / "vae"
    )
    served = {
        f"/{name}.tar{SIGNED}": archive(range(first, first + 8))
        for name, first in (("x", 0), ("y", 8))
    }
    with file_server(served) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMTOK_CACHE", str(root / "cache"))
        host = server.address.removeprefix("http://")
        urls = [f"http://{USER}@{host}/{name}.tar{SIGNED}" for name in "xy"]
        content = tiny.content({"name": "send_vae", "vae": str(root / "vae")}, steps=2)
        content["data"] = {"kind": "tars", "size": 16, "path": urls, "cache": str(root / "latents")}
        content["plugins"] = [str(root / "plugin.py")]
        train_tokenizer(parse_recipe(content, "tiny"), root / "texture")
        method = tiny.SEMANTICS["reglue"] | {
            "texture": str(root / "texture"),
            "min_texture_psnr": 0,
        }
        content = tiny.content(method | {"feature_cache": str(root / "features")}, steps=2)
        shutil.copy(files("semtok") / "assets" / DEMO_FILE, root / "teacher.safetensors")
        content["teacher"]["checkpoint"] = str(root / "teacher.safetensors")
        content["data"] = {"kind": "folder", "size": 16, "path": str(root / "images")}
        train_tokenizer(parse_recipe(content, "tiny"), root / "tokenizer")
        content = tiny.content(steps=2) | {"tokenizer": str(root / "tokenizer")}
        del content["method"], content["teacher"]
        content["data"] = {"kind": "folder", "size": 16, "path": str(root / "images")}
        shape = {"depth": 1, "width": 24, "heads": 2, "patch_size": 2}
        content |= {"diffusion": {"network": shape}, "sampler": {"steps": 2}}
        train_dit(parse_diffusion_recipe(content, "tiny"), root / "dit")
    yield Runs(root, root / "tokenizer", root / "dit")


def archive(numbers: range) -> bytes:
    """A tar file of images."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in numbers:
            content = png(number)
            about = tarfile.TarInfo(f"{number}.png")
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return file.getvalue()


def test_no_file_of_an_export_names_a_private_place(runs, tmp_path):
    for folder in (runs.root / "texture", runs.tokenizer, runs.generator):
        assert runs.secrets_in(folder / "export") == set()
    model = Generator.from_pretrained(runs.generator)
    model.save_pretrained(tmp_path / "again")
    assert runs.secrets_in(tmp_path / "again") == set()
    words = ["export", str(runs.generator), "--output", str(tmp_path / "pipeline")]
    assert run(hub.main, words) == 0
    assert runs.secrets_in(tmp_path / "pipeline") == set()


def test_the_runs_own_recipe_stays_whole_and_that_of_its_export_can_be_read(runs):
    for folder in (runs.root / "texture", runs.tokenizer):
        assert load_recipe(folder / "recipe.yaml", []).data.path
        own, shown = read_yaml(folder / "recipe.yaml"), read_yaml(folder / "export/recipe.yaml")
        assert shown == fit_to_show(own) != own
    urls = read_yaml(runs.root / "texture/export/recipe.yaml")["data"]["path"]
    assert [url[:17] for url in urls] == ["http://127.0.0.1:"] * 2
    assert [url[-7:] for url in urls] == ["/x.tar…", "/y.tar…"]
    recipe = load_diffusion_recipe(runs.generator / "export/recipe.yaml", [])
    assert recipe.data.path == "…/images" and recipe.tokenizer == "…/tokenizer"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://h.org/a/b.tar", "https://h.org/a/b.tar"),
        ("https://h.org:80/{000..012}.tar?X-Amz-Signature=1&b", "https://h.org:80/{000..012}.tar…"),
        ("https://me:pass@h.org/b.tar", "https://h.org/b.tar…"),
        ("https://me@h.org/b.tar#part", "https://h.org/b.tar…"),
        ("https://me:pa/ss@h.org/b.tar", "https://…/b.tar…"),
        ("https://me:123#ss@h.org/b.tar", "https://…/…"),
        ("hf://datasets/org/name@v1/x.parquet", "hf://datasets/org/name@v1/x.parquet"),
        ("s3://bucket/x-*.tar", "s3://bucket/x-*.tar"),
        ("simplecache::https://h.org/b.zip?token=1", "simplecache::https://h.org/b.zip…"),
        ("zip://a.png::/home/me/x.zip", "zip://a.png::…/x.zip"),
        ("pipe:curl -H secret https://h.org/b.tar", "…/"),
        ("file:///home/me/data", "…/data"),
        ("/home/me/data/", "…/data"),
        ("~/data", "…/data"),
        ("C:\\Users\\me\\data", "…/data"),
        ("{/home/me/a,/home/you/b}/x.tar", "{…/a,…/b}…/x.tar"),
        ("s-{000..012}.tar", "s-{000..012}.tar"),
        ("file:/home/me/data", "…/data"),
        ("me:pass@h.org:/home/me/data", "…/data"),
        (" /home/me/data", "…/data"),
        ("$HOME/data", "…/data"),
        ("h.org/b.tar?token=1", "h.org/b.tar…"),
        ({"/home/me/data": 1}, {"…/data": 1}),
        ("runs/x", "runs/x"),
        ("org/name", "org/name"),
        ("…/data", "…/data"),
        ("red circle, 1/2", "red circle, 1/2"),
        ({"a": ["/x/y", 3, None, True]}, {"a": ["…/y", 3, None, True]}),
    ],
)
def test_of_each_kind_of_place_what_is_fit_to_show_stays(value, shown):
    assert fit_to_show(value) == shown and fit_to_show(shown) == shown
    assert (first_left_out(shown) is not None) == ("…" in str(shown))


def test_an_import_does_not_say_where_it_came_from(runs, tmp_path):
    for source in (runs.root / "vae", runs.tokenizer / "export/texture/vae"):
        options = ImportOptions(statistics=0.5)
        import_checkpoint(source, "auto", options).save(tmp_path / source.parent.name)
        assert runs.secrets_in(tmp_path / source.parent.name) == set()


# Where settings are read again -------------------------------------------------------------------


def score(*words: object) -> int:
    """Draws four images, and scores them against eight of those that the model was trained on."""
    few = ["--num", "4", "--num-reference", "8", "--steps", "2"]
    return run(evaluate.main, ["generation", "--model", *map(str, words), *few])


def test_a_run_knows_its_images_and_a_copy_of_its_export_says_that_it_does_not(
    runs, tmp_path, capsys
):
    for place in (runs.generator, runs.generator / "export"):
        assert score(place) == 0
        out = capsys.readouterr().out
        assert "against the model's own training images, 8 of images (11 images)" in out
    shutil.copytree(runs.generator / "export", tmp_path / "export")
    for beside in (None, runs.root / "texture/recipe.yaml"):  # that of another run says nothing
        if beside is not None:
            shutil.copy(beside, tmp_path / "recipe.yaml")
        assert score(tmp_path / "export") == 2
        error = capsys.readouterr().err.strip()
        assert "was trained on '…/images', of which its export leaves out what is private" in error
        assert "give --reference kind=folder path=…" in error and "\n" not in error
    words = ["--reference", "kind=folder", f"path={runs.root / 'images'}", "size=16"]
    assert score(tmp_path / "export", *words) == 0


def test_what_an_older_version_has_exported_is_pushed_without_private_places(runs, tmp_path):
    export = tmp_path / "export"
    shutil.copytree(runs.tokenizer / "export", export)
    recipe = read_yaml(runs.tokenizer / "recipe.yaml")
    for folder in (export, export / "texture"):
        config = read_json(folder / "config.json")
        config["trained"]["recipe"] = recipe
        write_json(folder / "config.json", config)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    place = export / "texture/vae/config.json"
    write_json(place, read_json(place) | {"_name_or_path": str(runs.root / "vae")})
    old = Tokenizer.from_pretrained(export)
    assert len(runs.secrets_in(export)) > 4
    with hub_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.address)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        push_export(export, "org/name", token=TOKEN)
        pushed = server.files("org/name")
    for name, content in pushed.items():
        file = tmp_path / "pushed" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert runs.secrets_in(tmp_path / "pushed") == set()
    assert len(runs.secrets_in(export)) > 4, "the folder is only read"
    new = Tokenizer.from_pretrained(tmp_path / "pushed")
    assert new.means_the_same(old) and new.training_info == fit_to_show(old.training_info)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "data.path: https://h/a.tar?sig=x: no such file",
            "data.path: https://h/a.tar…: no such file",
        ),
        (
            "'s3://me:word@h/a.tar': 403, url='http://h/b?c=d'",
            "'s3://h/a.tar…': 403, url='http://h/b…'",
        ),
        ("data.path: https://h:80/a.tar: gave 3 bytes (see http://h/).", None),
        ("data.path: file:///home/me/a?.tar, /home/me/b and hf://datasets/x/y: no such file", None),
    ],
)
def test_errors_tell_of_urls_without_what_is_secret(message, told):
    assert str(UserError(message)) == (told or message)
    assert str(UserError(str(UserError(message)))) == (told or message)
