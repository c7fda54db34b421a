"""What a run leaves: one folder, replaced as a whole, so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def home_of(base: Path, runs: Path) -> str:
    """The folder of a config as seen from the folder of its runs, such as ``..``."""
    return os.path.relpath(base.resolve(), runs.resolve())


def require_same_config(folder: Path, home: str, source: Mapping[str, Any]) -> str | None:
    """Look at the run that is about to be replaced: a folder is called after its config, and two may be called alike.

    The config's place from the runs' folder tells two configs apart, and neither an edit nor moving the whole project
    changes it. At the same place it is the same config, whatever it says now. At another place it may be the same
    config where the model is the same, moved within its project: the run is replaced, and that is told. With another
    model as well it is somebody else's evidence. Of reports from before places were noted nothing is said.

    Args:
        folder: ``runs/<name>``.
        home: The config's, as of `home_of`.
        source: Fingerprint of its model.

    Returns:
        What to tell where the run is replaced all the same; None where there is nothing to tell.

    Raises:
        StoreError: The run there is of another model and of a config at another place, or its report cannot be read.
    """
    if not (folder / REPORT_FILE).is_file():
        return None
    earlier = Report.read(folder / REPORT_FILE)
    if earlier.home in ("", home):
        return None
    if _origin_of(earlier.inputs.get("source", {})) == _origin_of(source):
        return f"{folder} held the run of a config in {_seen(earlier.home, folder)}, which this one replaces"
    raise StoreError(
        f"{folder} holds the run of another config of this name",
        where=str(folder),
        got=f"a run of another model, by a config in {_seen(earlier.home, folder)}",
        want="an earlier run of this config, or no folder",
        fix="give one of the two configs another `name`, or keep the runs of this one elsewhere: --runs PATH; to "
        "replace the run that is there, remove its folder",
    )


def _origin_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a fingerprint that of one model, and not of one of its sizes: its file, or its code and weights."""
    return {name: source.get(name) for name in ("onnx", "factory", "weights")}


def _seen(home: str, folder: Path) -> str:
    """A config's folder, noted as seen from the runs', as a path of today."""
    return os.path.normpath(folder.resolve().parent / home)


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
