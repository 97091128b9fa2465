"""What is spelt wrongly is answered with what was probably meant."""

import pytest

import tiny
from semtok import Generator, Tokenizer
from semtok.commands import evaluate, hub, train_tokenizer
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import check_reference
from semtok.errors import UserError
from semtok.recipe import parse_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with one finished run."""
    folder = tmp_path_factory.mktemp("names")
    content = tiny.content({"name": "vae"})
    train_tokenizer.train_tokenizer(parse_recipe(content, "tiny"), folder / "runs" / "my_faces")
    return folder


@pytest.mark.parametrize(
    ("main", "words", "hint"),
    [
        (train_tokenizer.main, ["vae", "--ouput", "x"], "did you mean '--output'?"),
        (evaluate.main, ["reconstuction"], "did you mean 'reconstruction'?"),
        (
            evaluate.main,
            ["probe", "--tokenizer", "demo", "--num-heldout", "5"],
            "did you mean '--num-held-out'?",
        ),
        (hub.main, ["exprot", "x"], "did you mean 'export'?"),
        (hub.main, ["checkpoint", "my_facse", "--output", "x"], "did you mean 'my_faces'?"),
        (evaluate.main, ["probe", "--tokenizer", "my_fases"], "did you mean 'my_faces'?"),
        (evaluate.main, ["probe", "--tokenizer", "send_vea"], "did you mean 'send_vae'?"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_word(place, monkeypatch, capsys, main, words, hint):
    monkeypatch.chdir(place)
    assert run(main, words) == 2
    told = capsys.readouterr().err
    assert hint in told and told.count("\n") == 1


def test_python_knows_the_runs_that_are_near(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=r"'my_face': no such folder.*did you mean 'my_faces'\?"):
        Tokenizer.from_pretrained("my_face")
    with pytest.raises(UserError, match=r"did you mean 'my_faces'\?"):
        Generator.from_pretrained("my_face")


def test_recipes_in_their_folder_are_tokenizers_by_name_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train it by: semtok train_tokenizer imagenet256/vae_f8d4"):
        Tokenizer.from_pretrained("imagenet256/vae_f8d4")
    # Its images are not there, which is told before anything begins.
    with pytest.raises(UserError, match=r"data\.path: no such folder"):
        check_reference("imagenet256/vae_f8d4")
