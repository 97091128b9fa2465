"""The page of the papers' runs: its commands are parsed, follow one another, and their recipes are whole."""

import shlex

import pytest

from documented import ROOT, Command, commands, parsed, resolved

PAGE = ROOT / "docs" / "reproduce.md"
FETCHED = ("weights/", "stabilityai/", "guided-diffusion", "/data/imagenet")
"""What the page says that it is not made by its commands begins with these."""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> list[Command]:
    return commands(PAGE, tmp_path_factory.mktemp("page"))


def _trains(command: Command) -> bool:
    return command.module.startswith("semtok.commands.train_")


def _output(words: tuple[str, ...]) -> str:
    return words[words.index("--output") + 1]


def test_the_page_has_a_chain_for_every_recipe(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    named = {word for command in page for word in command.words if word.endswith(".yaml")}
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "recipes" / "imagenet256").glob("*.yaml")}
    assert there - named == {
        "recipes/imagenet256/vae_f8d4.yaml"
    }  # of which no paper reports a number
    assert named <= there


def test_every_command_is_understood(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in page:
        if _trains(command):
            resolved(command, capsys)
        else:
            parsed(command, monkeypatch)


def test_what_a_command_reads_was_made_before_it_or_is_said_to_be_fetched(
    page, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    made: dict[str, list[int]] = {}
    for command in page:
        words = command.words
        output = _output(words) if "--output" in words else None
        read = [w.split("=", 1)[-1] for w in words if "/" in w and w != output]
        read = [w for w in read if not w.startswith("SiT-")]  # the name of a network
        for path in read:
            if path.endswith(".yaml") or path.startswith(FETCHED):
                continue
            run, _, step = path.partition("/exports/")
            assert run in made, f"{path} is read before it is made: {shlex.join(words)}"
            assert not step or int(step) in made[run], f"{path} is not exported"
        if output is not None:
            assert output not in made, f"two commands write {output}"
            recipe = resolved(command, capsys) if _trains(command) else {}
            made[output] = recipe.get("train", {}).get("export_at", [])


def test_every_set_of_images_is_fifty_thousand_and_is_scored(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    drawn, scored = set(), set()
    for command in page:
        words = command.words
        if command.module == "semtok.commands.sample":
            assert parsed(command, monkeypatch).num == 50_000
            drawn.add(_output(words))
        elif command.module == "semtok.commands.evaluate" and words[0] == "generation":
            scored.add(words[words.index("--images") + 1])
    assert drawn == scored and len(drawn) > 20
