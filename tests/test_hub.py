"""To the Hub and back, over real HTTP to a server on loopback."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from hub_server import TOKEN, HubServer, hub_server
from semtok import Tokenizer, UserError
from semtok.commands import hub
from semtok.commands.cli import run
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.methods.vae import Architecture, build_autoencoder, load_autoencoder
from semtok.publish import push_export

IMAGES = Shapes(ShapesConfig(size=16), train=False).load(range(2)).images


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "export"
    Tokenizer.from_pretrained("demo").save_pretrained(folder)
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "HubServer":
    """The Hub of this process: HF_ENDPOINT and its like are read when its client is imported."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with hub_server() as running:
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, below the progress bars of the Hub's client."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def push(*words: object) -> int:
    return run(hub.main, ["push", *map(str, words)])


def test_what_is_pushed_is_pulled_and_encodes_the_same(server, export, capsys):
    assert push(export, "org/name", "--yes") == 0
    assert "pushed: " in capsys.readouterr().out
    assert server.repositories["org/name"]["private"], "unless --public"
    stored, local = server.files("org/name"), contents(export)
    assert stored.keys() == local.keys() and server.uploads, "the large ones by LFS"
    assert all(stored[n] == local[n] for n in local if n != "README.md")
    assert b'from_pretrained("org/name")' in stored["README.md"]

    pulled, made = Tokenizer.from_pretrained("org/name"), Tokenizer.from_pretrained(export)
    with torch.no_grad():
        ours, theirs = pulled.encode(IMAGES), made.encode(IMAGES)
    assert torch.equal(ours.texture, theirs.texture)
    # From the cache, without the server.
    server.shutdown()
    again = Tokenizer.from_pretrained("org/name", local_files_only=True)
    assert again.means_the_same(made)


def test_a_gated_repository_is_told(server, export):
    push_export(export, "org/name")
    server.repositories["org/name"]["gated"] = True
    with pytest.raises(ValueError, match="access is gated; ask for it there, then 'hf auth login'"):
        Tokenizer.from_pretrained("org/name")


def test_without_a_network_and_outside_the_cache_it_says_so(server):
    server.shutdown()
    server.server_close()
    for offline in (False, True):
        with pytest.raises(ValueError, match="it can't be reached, nor is it in the local cache"):
            Tokenizer.from_pretrained("org/name", local_files_only=offline)


def test_a_revision_stays_what_it_was(server, export):
    push_export(export, "org/name")
    first = server.repositories["org/name"]["commits"][-1][0]
    changed = Tokenizer.from_pretrained(export)
    changed.texture_mean += 1
    changed.push_to_hub("org/name", message="shifted")
    old = Tokenizer.from_pretrained("org/name", revision=first)
    new = Tokenizer.from_pretrained("org/name")
    assert torch.allclose(new.texture_mean, old.texture_mean + 1)
    with pytest.raises(ValueError, match="it has no revision 'nope'"):
        Tokenizer.from_pretrained("org/name", revision="nope")


@pytest.mark.parametrize("option", [[], ["--public"]])
def test_a_new_repository_is_private_unless_asked(server, export, option):
    assert push(export, "org/name", "--yes", *option) == 0
    assert server.repositories["org/name"]["private"] == (not option)


@pytest.mark.parametrize(
    ("action", "status", "words"),
    [
        ("create", 401, "the token is missing or not valid; 'hf auth login'"),
        ("create", 403, "the token may not write there"),
        ("preupload", 403, "the token may not write there"),
        ("commit", 409, "another commit at the same time"),
        ("commit", 500, "the Hub answers 500"),
    ],
)
def test_a_refused_push_leaves_everything_as_it_was(server, export, capsys, action, status, words):
    before = contents(export)
    server.fails[action] = status
    assert push(export, "org/name", "--yes") == 2
    error = last_line(capsys)
    assert words in error and "the same command tries again" in error
    assert contents(export) == before
    assert not server.repositories.get("org/name", {"commits": []})["commits"]
    server.fails.clear()
    assert push(export, "org/name", "--yes") == 0, "and so it does"


def test_a_connection_that_is_cut_half_way_commits_nothing(server, export, capsys):
    before = contents(export)
    server.cut = True
    assert push(export, "org/name", "--yes") == 2
    error = last_line(capsys)
    assert "the connection failed" in error and "the same command tries again" in error
    assert contents(export) == before and not server.repositories["org/name"]["commits"]


def test_a_wrong_token_and_a_missing_repository_are_told(server, export, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(export, "org/name", "--yes") == 2
    assert "the token is missing or not valid" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no such repository"):
        Tokenizer.from_pretrained("org/nothing")


def test_a_dry_run_lists_what_a_push_sends_and_sends_nothing(server, export, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(export, copy)
    (copy / ".env").write_text("SECRET=1")
    (copy / "vae/.git").mkdir()
    (copy / "vae/.git/config").write_text("x")
    (copy / "notes.txt").write_text("of mine")
    assert push(copy, "org/name", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "vae/diffusion_pytorch_model.safetensors" in printed and "MB" in printed
    assert not server.repositories
    assert push(copy, "org/name", "--yes") == 0
    listed = {
        name for name in contents(copy) if re.search(rf"^ *{re.escape(name)} ", printed, re.M)
    }
    assert server.files("org/name").keys() == listed == {*contents(export), "notes.txt"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "a/b/c", "--yes"], "'a/b/c' is no name on the Hub"),
        (["nobody", "org/name", "--yes"], "tokenizer 'nobody': no such folder, run"),
        (["demo", "org/name"], "Nobody is there to answer; give --yes"),
    ],
)
def test_wrong_words_are_one_line(server, capsys, words, message):
    assert push(*words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not server.repositories


def test_the_environment_names_the_hub(tmp_path, export):
    """As users set it: HF_ENDPOINT, HF_TOKEN, HF_HOME, in a process of its own."""
    with hub_server() as running:
        environment = os.environ | {
            "HF_ENDPOINT": running.address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
        }
        script = (
            "import sys; from semtok import Tokenizer; t = Tokenizer.from_pretrained(sys.argv[1]);"
            "t.push_to_hub('org/name'); p = Tokenizer.from_pretrained('org/name');"
            "assert p.means_the_same(t)"
        )
        words = [sys.executable, "-c", script, str(export)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert running.files("org/name").keys() == contents(export).keys()


@pytest.mark.parametrize("subfolder", ["", "vae"])
@pytest.mark.parametrize("form", [{}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_a_vae_on_the_hub_is_found_under_any_of_diffusers_names(server, tmp_path, subfolder, form):
    shape = tiny.AUTOENCODER | {"block_channels": (8, 8, 16)}
    made = build_autoencoder(Architecture(**shape))
    made.save_pretrained(tmp_path / "repo" / subfolder, **form)
    commits = [("0" * 40, contents(tmp_path / "repo"))]
    server.repositories["org/vae"] = {"private": False, "commits": commits}
    state = load_autoencoder("org/vae").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def test_another_autoencoder_on_the_hub_is_named(server):
    files = {"vae/config.json": b'{"_class_name": "AutoencoderTiny"}'}
    server.repositories["org/other"] = {"private": False, "commits": [("0" * 40, files)]}
    with pytest.raises(UserError, match="org/other: is of diffusers' AutoencoderTiny, and only"):
        load_autoencoder("org/other")
