"""A user's own method joins without a change to the library."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

import tiny
from semtok import Generator, Tokenizer, UserError, register_method
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import main, train_tokenizer
from semtok.methods.vae import KLTokenizer, VAEConfig, VAEObjective
from semtok.recipe import parse_recipe
from semtok.registry import _METHODS, get_method, load_plugins

EXAMPLE = str(Path(__file__).parent / "examples" / "edge_vae.py")
PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"


def recipe() -> dict:
    content = tiny.content({"name": "edge_vae", "edge_weight": 0.5})
    return content | {"plugins": [EXAMPLE]}


def test_a_method_in_ones_own_file_trains_exports_and_loads(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe()))
    assert main([str(file), "--output", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all("loss/edges" in row for row in rows)
    assert Tokenizer.from_pretrained(tmp_path / "run").method == "edge_vae"


def test_its_settings_are_checked_like_ours():
    with pytest.raises(
        UserError, match="unknown key 'method.edge_wait'; did you mean 'edge_weight'"
    ):
        content = recipe()
        content["method"]["edge_wait"] = 1.0
        parse_recipe(content, "recipe.yaml")


def test_a_missing_plugin_file_is_named():
    with pytest.raises(UserError, match="recipe.yaml: plugins: no such file 'nowhere.py'"):
        parse_recipe(recipe() | {"plugins": ["nowhere.py"]}, "recipe.yaml")


def test_a_plugin_beside_its_recipe_is_found_and_the_run_goes_on_with_it(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    lines = "from semtok.recipe import PUBLISHED  # a plugin of no method"
    (tmp_path / "own" / "beside.py").write_text(lines)
    content = tiny.content({"name": "vae"}) | {"plugins": ["beside.py"]}
    (tmp_path / "own" / "recipe.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    assert main(["own/recipe.yaml", "train.steps=2", "--output", "run"]) == 0
    recorded = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert recorded["plugins"] == ["own/beside.py"]
    sys.modules.pop("semtok_plugin_beside")
    for words in ([], ["own/recipe.yaml"]):
        assert main([*words, "--resume", "--output", "run"]) == 0
    assert "semtok_plugin_beside" in sys.modules


def test_a_plugin_that_is_nowhere_is_told_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=f"neither in {Path.cwd()} nor beside the recipe"):
        parse_recipe(recipe() | {"plugins": ["nowhere.py"]}, str(tmp_path / "recipe.yaml"))


def test_two_methods_of_one_name_are_refused():
    load_plugins([EXAMPLE])

    class Other(VAEConfig):
        pass

    with pytest.raises(ValueError, match="'edge_vae' is registered already"):
        register_method("edge_vae", config=Other, objective=VAEObjective, tokenizer=KLTokenizer)


def test_a_method_without_its_file_says_how_to_load_it(tmp_path):
    train_tokenizer(parse_recipe(recipe(), "recipe.yaml"), tmp_path / "run")
    config = tmp_path / "run" / "export" / "config.json"
    config.write_text(config.read_text().replace('"edge_vae"', '"lost_vae"'))
    with pytest.raises(
        UserError, match="method 'lost_vae', which edge_vae.py brings; .*--plugin edge_vae.py"
    ):
        Tokenizer.from_pretrained(tmp_path / "run")


def test_a_name_like_one_of_ours_is_not_taken_for_a_slip():
    with pytest.raises(UserError) as error:
        get_method("gan_vae", place="recipe.yaml")
    assert "did you mean 'send_vae'" not in str(error.value)
    assert "redi, reglue, repae, semvae, send_vae" in str(error.value) and ". A method" in str(
        error.value
    )
    with pytest.raises(UserError, match="did you mean 'send_vae'\\? A method of your own"):
        get_method("sendvae", place="recipe.yaml")


def test_an_export_says_which_file_it_needs_and_loads_by_it_alone(tmp_path, monkeypatch):
    """Somebody's code that lies beside the weights is not run."""
    train_tokenizer(parse_recipe(recipe(), "recipe.yaml"), tmp_path / "run")
    export = tmp_path / "run" / "export"
    config = json.loads((export / "config.json").read_text())
    assert config["plugin"] == "edge_vae.py"
    (export / "edge_vae.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(export)
    monkeypatch.delitem(_METHODS, "edge_vae")  # as in a process that knows nothing of it
    monkeypatch.delitem(sys.modules, "semtok_plugin_edge_vae")
    with pytest.raises(UserError) as error:
        Tokenizer.from_pretrained(export)
    assert str(error.value).endswith(
        "is of the method 'edge_vae', which edge_vae.py brings; pass its file by --plugin edge_vae.py, plugin= in "
        "Python, or plugins: in a recipe"
    )
    assert Tokenizer.from_pretrained(export, plugin=EXAMPLE).method == "edge_vae"
    with pytest.raises(UserError, match="plugins: no such file 'nowhere.py'"):
        Generator.from_pretrained(tmp_path, plugin="nowhere.py")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "x = 1\n\nregister_method('mine')\n",
            "mine.py:3: NameError: name 'register_method' is not",
        ),
        ("def f():\n    return 1 / 0\n\nf()\n", "mine.py:2: ZeroDivisionError: division by zero"),
        (
            "import nothing_of_that_name\n",
            "mine.py:1: ModuleNotFoundError: No module named 'nothing",
        ),
        ("raise KeyError('one\\ntwo')\n", "mine.py:1: KeyError: 'one"),
        ("import sys\nsys.exit(1)\n", "mine.py:2: SystemExit: 1"),
    ],
)
def test_what_a_plugin_raises_when_it_is_loaded_is_one_line_with_its_place(tmp_path, text, told):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        load_plugins([tmp_path / "mine.py"])
    message = str(error.value)
    assert message.startswith(f"plugins: {told}") and "\n" not in message
    assert message.endswith("; 'python mine.py' shows where from")
    assert error.value.__cause__ is not None, "in Python the traceback is there"


def test_what_a_plugins_classes_raise_in_a_command_is_one_line_with_its_place(tmp_path, capsys):
    text = Path(EXAMPLE).read_text().replace("edge_vae", "torn_vae").replace("EdgeVAE", "TornVAE")
    text = text.replace("        edges = (", "        edges = nowhere + (")
    (tmp_path / "torn_vae.py").write_text(text)
    line = next(i for i, one in enumerate(text.splitlines(), start=1) if "nowhere" in one)
    content = tiny.content({"name": "torn_vae"}) | {"plugins": [str(tmp_path / "torn_vae.py")]}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    assert run(main, [str(file), "--output", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    place = f"torn_vae.py:{line}: NameError"
    assert last == f"error: {place}: name 'nowhere' is not defined; --debug shows where from"
    with pytest.raises(NameError):
        run(main, [str(file), "--output", str(tmp_path / "again"), "--debug"])


@pytest.mark.skipif(not PAGE.is_file(), reason="the page is not written yet")
def test_the_page_shows_the_whole_file_as_it_is_tested_here():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert Path(EXAMPLE).read_text(encoding="utf-8") in blocks
