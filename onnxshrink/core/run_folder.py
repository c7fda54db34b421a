"""What a run leaves: one folder, replaced as a whole, so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from onnxshrink.core.artifact import ONNX_FILE, Artifact, files_of
from onnxshrink.core.errors import StoreError
from onnxshrink.core.report import Report
from onnxshrink.core.store import room_on

REPORT_FILE = "report.json"
BUNDLE_FOLDER = "bundle"
"""What the winner is checked with later; a folder of the run like its models."""
SEARCH_FILE, SEARCH_TABLE = "search.json", "search.csv"
"""What a search leaves beside its report; another run of the same name does not keep them."""
BISECT_FOLDER = "bisect"
"""What ``onnxshrink bisect`` leaves in a run's folder, or in one where no run has been yet."""


def publish(
    report: Report,
    models: Mapping[str, Artifact],
    folder: Path,
    bundle: Path | None = None,
    texts: Mapping[str, str | None] | None = None,
) -> None:
    """Write ``folder`` anew: the report, every model at the path its candidate names, and the winner's at the top.

    Another run of the same name waits its turn and then replaces the folder in turn.

    Args:
        report: Its candidates' ``model`` is the path of the ``.onnx`` file below ``folder``.
        models: Candidate name to artifact.
        folder: ``runs/<name>``.
        bundle: A folder to copy as ``bundle``, if it is there.
        texts: Name of a file beside the report to its text; with None an earlier run's goes, and none is written.

    Raises:
        StoreError: The folder cannot be written, or it holds something that no run has left.
    """
    parent, hidden = folder.parent, f".{folder.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        require_own(folder)
        with FileLock(parent / f"{hidden}.lock"):
            fresh, old = parent / f"{hidden}.new", parent / f"{hidden}.old"
            if old.is_dir() and not folder.exists():  # killed while it exchanged both: it may hold somebody's notes
                old.rename(folder)
            for leftover in (fresh, old):  # of a run that was killed while it held the lock
                shutil.rmtree(leftover, ignore_errors=True)
            fresh.mkdir()
            for candidate in (row for row in report.candidates if row.name in models):
                copy_files(models[candidate.name], (fresh / candidate.model).parent)
            if report.winner is not None:
                copy_files(models[report.winner], fresh)
            if bundle is not None and bundle.is_dir():
                shutil.copytree(bundle, fresh / BUNDLE_FOLDER)
            for name, text in {**(texts or {}), REPORT_FILE: report.to_json()}.items():
                if text is not None:
                    (fresh / name).write_text(text, encoding="utf-8")
            os.sync()
            _carry_over(folder, fresh, set(texts or ()))
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise _unwritable(e, folder) from e


def require_own(folder: Path) -> None:
    """Raise where a run's folder is somebody else's.

    Raises:
        StoreError: It holds files and no report.
    """
    if not folder.exists() or (folder / REPORT_FILE).is_file():
        return
    if folder.is_file() or any(path.name != BISECT_FOLDER for path in folder.iterdir()):
        raise StoreError(
            "the run's folder holds files that are not a run's",
            where=str(folder),
            got="a file" if folder.is_file() else ", ".join(sorted(path.name for path in folder.iterdir())[:5]),
            want="an empty folder, or an earlier run",
            fix="choose another `name` in the config, or another folder: --runs PATH",
        )


def leave(models: Mapping[str, Artifact], folder: Path) -> None:
    """Write models into ``runs/<name>/bisect``, each into a folder of its own, in place of those that were there.

    Args:
        models: Name of the folder to artifact.
        folder: ``runs/<name>``.

    Raises:
        StoreError: The folder cannot be written, or it holds something that no run has left.
    """
    require_own(folder)
    place = folder / BISECT_FOLDER
    try:
        shutil.rmtree(place, ignore_errors=True)
        for name, artifact in models.items():
            copy_files(artifact, place / name)
    except OSError as e:
        raise _unwritable(e, folder) from e


def _carry_over(old: Path, fresh: Path, texts: set[str]) -> None:
    """Copy what somebody else put into the folder: notes beside the evidence are not ours to delete."""
    if not (old / REPORT_FILE).is_file():
        return
    report = Report.read(old / REPORT_FILE)
    own = {Path(row.model).parts[0] for row in report.candidates if row.model}
    own |= {REPORT_FILE, SEARCH_FILE, SEARCH_TABLE} | texts
    own |= {BUNDLE_FOLDER for row in report.candidates if "bundle" in row.details}
    if report.winner is not None:  # its files lie at the top as well, such as a package's
        own |= {path.name for path in (old / report.candidate(report.winner).model).parent.glob("*")}
    for path in old.iterdir():
        if path.name not in own and not path.name.startswith(ONNX_FILE):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, fresh / path.name)


def copy_files(artifact: Artifact, folder: Path) -> None:
    """Copy an artifact's files, writable again: the store's own stay as they are."""
    for path in files_of(artifact.path):
        target = folder / path.relative_to(artifact.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _unwritable(error: OSError, folder: Path) -> StoreError:
    return StoreError(
        f"the run's folder cannot be written: {error.strerror or error}",
        where=str(error.filename or folder),
        got=room_on(folder),
        want="a folder that can be written, with room on the disk",
        fix="free some space, or name another folder: --runs PATH",
    )
