import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "calib_data"


def test_the_committed_digits_are_what_the_tool_makes(tmp_path: Path) -> None:
    """Running the tool again gives the same arrays: nobody has to believe the file."""
    subprocess.run([sys.executable, ROOT / "tools/make_calib_data.py", "--out", tmp_path], check=True)
    made, kept = np.load(tmp_path / "digits.npz"), np.load(FOLDER / "digits.npz")
    assert made.files == kept.files == ["image", "labels", "split"]
    for name in kept.files:
        assert made[name].dtype == kept[name].dtype
        np.testing.assert_array_equal(made[name], kept[name])


def test_the_readme_tells_the_digest_and_size_of_each_file() -> None:
    """Every data file has its row, and the row is true."""
    rows = re.findall(r"\| `([^`]+)` .* \| ([\d,]+) \| `([0-9a-f]{64})` \|", (FOLDER / "README.md").read_text())
    assert {name for name, _, _ in rows} == {path.name for path in FOLDER.iterdir()} - {"README.md"}
    for name, size, digest in rows:
        content = (FOLDER / name).read_bytes()
        assert len(content) == int(size.replace(",", ""))
        assert hashlib.sha256(content).hexdigest() == digest


def test_no_image_is_in_two_splits() -> None:
    """Test images are seen by neither training nor calibration, and each split has every digit."""
    with np.load(FOLDER / "digits.npz") as file:
        image, labels, split = file["image"], file["labels"], file["split"]
    assert image.dtype == np.float32
    assert image.shape == (1797, 1, 8, 8)
    assert (image.min(), image.max()) == (0.0, 1.0)
    assert len({picture.tobytes() for picture in image}) == 1797
    names, counts = np.unique(split, return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {"calibration": 100, "test": 800, "train": 897}
    for name in names:
        assert set(labels[split == name].tolist()) == set(range(10))
