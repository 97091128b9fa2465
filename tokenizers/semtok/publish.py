"""Exports to the Hugging Face Hub: all files at once, or none."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from semtok.card import PLACEHOLDER, README
from semtok.errors import UserError
from semtok.privacy import fit_to_show
from semtok.settings import read_yaml
from semtok.storage import first_line, read_json, write_json, write_text

PIPELINE_FILE = "model_index.json"
"""Marks a folder that diffusers loads as a pipeline."""
# The Hub's client has changed its HTTP library more than once. Its own error is a child of that library's, or of
# OSError; a large file that did not arrive is a RuntimeError.
_CONNECTION_ERRORS = (*HfHubHTTPError.__bases__, OSError, RuntimeError)
_REASONS = {
    401: "the token is missing or not valid; 'hf auth login', or set HF_TOKEN",
    403: "the token may not write there; use one with write access, or another name",
    404: "there is no such repository or branch, or the token may not see it",
    409: "there is a conflict with what is there, or with another commit at the same time",
}


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline that this library has exported."""
    if not (folder / PIPELINE_FILE).is_file():
        return False
    index = read_json(folder / PIPELINE_FILE)
    return isinstance(index, dict) and index.get("_library") == "semtok"


def export_files(folder: Path) -> list[tuple[str, int]]:
    """Relative path and size in bytes of every file that a push would upload.

    Raises:
        UserError: not an export of this library.
    """
    if not is_pipeline(folder):
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or config.get("library") != "semtok":
            raise UserError(
                f"{folder}: not an export of semtok; expected a run, its export/, or what 'hub export' writes"
            )
    inside = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    # Hidden files are somebody's own: settings, a checkout's .git.
    files = sorted(folder / p for p in inside if not any(part[0] == "." for part in p.parts))
    return [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in files]


def push_export(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    message: str | None = None,
    branch: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads an export as one commit and returns its address.

    A repository that is missing is created; one that is there keeps its visibility. The card gets the repository's
    name, and what an older semtok has written of private places is left out. The folder is only read, so a failed push
    leaves it as it was, and may be tried again.

    Args:
        repo_id: ``org/name`` or ``name``.
        private: of a new repository.
        message: of the commit.
        branch: None: the main one.
        token: None: from HF_TOKEN, or as 'hf auth login' has stored it.

    Raises:
        UserError: a name that the Hub does not take, no access, no connection.
    """
    files = export_files(folder)
    check_repo_id(repo_id)
    api = HfApi(token=token, library_name="semtok")
    way_on = f"{folder} is as it was, and the same command tries again"
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as copy:
            for name, _ in files:
                _stage(folder, name, Path(copy), repo_id)
            commit = api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=copy,
                commit_message=message or "Upload by semtok",
                revision=branch,
            )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = _REASONS.get(status, f"the Hub answers {status}: {first_line(error)}")
        raise UserError(f"{repo_id}: {reason}; {way_on}") from None
    except _CONNECTION_ERRORS as error:
        raise UserError(
            f"{repo_id}: the connection failed ({first_line(error)}); {way_on}"
        ) from None
    return str(commit.repo_url)


class PushToHub:
    """Gives a model that has ``save_pretrained`` its ``push_to_hub``."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what ``save_pretrained`` writes, as one commit, and returns its address.

        Args:
            repo_id: ``org/name`` or ``name``.
            options: ``private``, ``message``, ``branch``, ``token``, as ``push_export`` takes them.

        Raises:
            UserError: a name that the Hub does not take, no access, no connection.
        """
        check_repo_id(repo_id)
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder) / "export"
            self.save_pretrained(export)  # type: ignore[attr-defined]
            return push_export(export, repo_id, **options)


def check_repo_id(repo_id: str) -> None:
    """Raises UserError where the Hub would not take the name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' is no name on the Hub: {first_line(error)}") from None


def _stage(folder: Path, name: str, stage: Path, repo_id: str) -> None:
    """Puts a file of an export where it is uploaded from: a link, or what is changed of it."""
    file, copy = folder / name, stage / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if name == README:
        text = file.read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
        copy.write_text(text, encoding="utf-8")
        return
    if file.name == "config.json":
        content = read_json(file)
        shown = {k: v for k, v in content.items() if k != "_name_or_path"}
        shown |= {"trained": fit_to_show(content["trained"])} if "trained" in content else {}
        if shown != content:
            return write_json(copy, shown)
    if file.name == "recipe.yaml":
        content = read_yaml(file)
        if fit_to_show(content) != content:
            text = yaml.safe_dump(fit_to_show(content), sort_keys=False, allow_unicode=True)
            return write_text(copy, text)
    copy.symlink_to(file.resolve())
