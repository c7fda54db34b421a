"""A run's folder is exchanged as a whole, and what somebody put into it outlives that."""

from __future__ import annotations

from pathlib import Path

from onnxshrink.core.report import Report
from onnxshrink.core.run_folder import publish


def test_notes_outlive_a_run_that_was_killed_while_it_exchanged_the_folders(tmp_path: Path) -> None:
    """Killed between the two renames, it leaves the folder under a hidden name; the next run takes it up again."""
    report, folder = Report("r", {}, (), (), None, "", {}, {}, 0.0), tmp_path / "runs" / "r"
    publish(report, {}, folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    folder.rename(folder.with_name(".r.old"))
    publish(report, {}, folder)
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not folder.with_name(".r.old").exists()
