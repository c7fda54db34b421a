from __future__ import annotations

import os
import signal

import onnxruntime
import pytest
from command_line import LOOKS

# How output looks is for the tests to choose, here and in the processes that they start: not for the terminal's width,
# nor for what a continuous integration sets to have colours (typer takes GITHUB_ACTIONS for a terminal).
for name in LOOKS & os.environ.keys():
    del os.environ[name]
os.environ["TERM"] = "xterm"

# What is started in the background of a shell ignores Ctrl-C, and so would everything that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and onnxruntime-gpu")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
