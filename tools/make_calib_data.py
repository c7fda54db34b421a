"""Make the files in calib_data/ from their origin, the same every time.

    python tools/make_calib_data.py [--out FOLDER]

Needs scikit-learn, which carries the images; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

FOLDER = Path(__file__).resolve().parent.parent / "calib_data"
SEED = 0
# Images of each digit, of about 180: the rest, about 900 in all, is for training.
TEST_OF_EACH, CALIBRATION_OF_EACH = 80, 10


def digits() -> dict[str, NDArray[np.generic]]:
    """The digits, split by class with a fixed seed.

    Returns:
        ``image`` float32 (1797, 1, 8, 8) from 0 to 1, ``labels`` int64 (1797,), ``split`` str (1797,) of
        ``train``, ``calibration`` and ``test``; in the order of the origin.
    """
    pixels, labels = load_digits(return_X_y=True)
    split = np.full(len(labels), "train", dtype="<U11")
    generator = np.random.default_rng(SEED)
    for digit in range(10):
        order = generator.permutation(np.flatnonzero(labels == digit))
        split[order[:TEST_OF_EACH]] = "test"
        split[order[TEST_OF_EACH : TEST_OF_EACH + CALIBRATION_OF_EACH]] = "calibration"
    image = (pixels / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    return {"image": image, "labels": labels.astype(np.int64), "split": split}


def write_npz(path: Path, arrays: dict[str, NDArray[np.generic]]) -> str:
    """Write an archive whose bytes depend on the arrays alone, and return its sha256."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
            # A fixed date: zip stores one for each member.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_digest(readme: Path, name: str, digest: str) -> None:
    """Put ``digest`` into the README's row for the file ``name``."""
    text = readme.read_text(encoding="utf-8")
    readme.write_text(re.sub(rf"(\| `{re.escape(name)}` .*)`[0-9a-f]*`", rf"\g<1>`{digest}`", text), encoding="utf-8")


def main() -> None:
    """Make every file, and write its digest into the folder's README, if it has one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    out: Path = parser.parse_args().out
    digest = write_npz(out / "digits.npz", digits())
    if (out / "README.md").exists():
        write_digest(out / "README.md", "digits.npz", digest)
    print(f"{digest}  digits.npz")


if __name__ == "__main__":
    main()
