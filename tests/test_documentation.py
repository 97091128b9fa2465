"""README and docs/: links lead somewhere, commands are understood, and what code makes is current."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import architecture
import semtok
import semtok_cli
import settings_reference
from documented import PAGES, ROOT, blocks, commands, parsed, resolved


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def _links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in _links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index_and_readme_is_short():
    index = _links(ROOT / "docs" / "README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in index or page.name == "README.md"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "reproduce.md"], ids=lambda p: p.name
)
def test_every_command_is_understood_and_its_settings_exist(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in commands(page, tmp_path / "shell"):
        if command.module.startswith("semtok.commands.train_") and "--resume" not in command.words:
            resolved(command, capsys)
        else:
            parsed(command, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_of_python_and_yaml_can_be_read(page):
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)


def test_the_page_of_settings_is_what_the_docstrings_say():
    written = settings_reference.PAGE.read_text(encoding="utf-8")
    hint = "python tools/settings_reference.py makes it anew"
    assert written == settings_reference.page(), hint


@pytest.mark.parametrize("tool", [settings_reference, architecture])
def test_what_makes_pages_anew_only_helps_where_it_is_asked_to(tool, monkeypatch, capsys):
    for place in ("PAGE", "PICTURE"):
        monkeypatch.setattr(tool, place, "nothing is written", raising=False)
    monkeypatch.setattr("sys.argv", [tool.__name__, "--help"])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert ended.value.code == 0 and "--output" in capsys.readouterr().out


def test_every_setting_has_a_meaning():
    page = settings_reference.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \|.*\| *(.*?) *\|$", page, re.MULTILINE)
    assert len(rows) > 100
    assert [name for name, meaning in rows if not meaning] == []


def test_every_command_of_the_package_is_in_the_table():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for command in semtok_cli.COMMANDS:
        assert f"`semtok {command}" in index


def test_the_batch_script_is_shown_as_it_is():
    script = (ROOT / "tools" / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    assert script in blocks(ROOT / "docs" / "clusters.md", "sh")


def test_the_citation_names_what_is_published():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["authors"] == [{"name": "The semtok authors"}]
    assert citation["title"] == setup["metadata"]["name"]
    assert citation["version"] == setup["metadata"]["version"]
    assert citation["license"] == setup["metadata"]["license"]


def test_the_changes_begin_with_the_version_that_is_here():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == setup["metadata"]["version"]


def test_the_package_says_that_it_has_type_hints():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "py.typed" in setup["options.package_data"]["semtok"].split()
    assert (Path(semtok.__file__).parent / "py.typed").is_file()
