"""The pytest plugin: bundles are collected as tests, and a fixture checks a model against one.

Every folder ``*.bundle``, and every folder that the ini option ``onnxshrink_bundles`` names, becomes one test per item
of its verdict, ``digits.bundle/manifest.json::max_abs_error[logits]`` for one; one without a manifest, empty or not, is
an error of the collection, which no ``-k`` deselects. It needs pytest 8. pytest loads this module in every run
of every project that has onnxshrink installed, so it imports neither numpy nor onnxruntime before a bundle is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from onnxshrink.regress.check import Item, Result

_MANIFEST = "manifest.json"
_ACCEPTED = pytest.StashKey[dict[str, list[str]]]()


class Check(Protocol):
    """What the fixture `onnxshrink_check` gives."""

    def __call__(self, bundle: str | Path, model: str | Path | None = None, *, latency: bool | None = None) -> Result:
        """Check ``model``, or the bundle's own, against the bundle.

        Args:
            bundle: The bundle's folder.
            model: An ``.onnx`` file.
            latency: Compare latency: yes, no, or (None) where the machine is the baseline's and nothing else runs.

        Returns:
            The result, for what a test wants to know beyond the verdict.

        Raises:
            AssertionError: An item failed; the message names each, how far off, in which sample, since when.
            BundleError: The bundle cannot be read.
        """


class BundleFile(pytest.File):
    """A bundle, by its manifest: one check, which runs when the first of its items is asked for."""

    _result: Result | None = None

    def collect(self) -> Iterator[BundleItem]:
        """One test per item, named from the manifest alone; a manifest that is damaged is one test, which tells how."""
        from onnxshrink.regress.check import BundleError, item_names

        try:
            names = item_names(self.path.parent)
        except BundleError:
            names = ("manifest",)
        for name in names:
            yield BundleItem.from_parent(self, name=_node_name(name))

    def result(self) -> Result:
        """The check of the bundle's own model, with a new baseline first where one is to be accepted."""
        if self._result is None:
            self._result = _checked(self.config, self.path.parent, None, latency=None)
        return self._result


class UnfinishedBundle(pytest.File):
    """A bundle's folder that has no manifest: somebody removed it, or what made the bundle did not come to its end."""

    def collect(self) -> Iterator[BundleItem]:
        """Nothing can be checked, which is an error and not silence."""
        raise self.CollectError(
            f"{self.name} is called a bundle and has no {_MANIFEST}: it is unfinished, or the file was removed\n"
            f"  where  {self.path}\n"
            f"  got    {', '.join(sorted(path.name for path in self.path.iterdir())) or 'an empty folder'}\n"
            "  fix    restore it from version control, make the bundle anew: onnxshrink run; or remove the folder"
        )


class BundleItem(pytest.Item):
    """One item of a bundle's verdict."""

    parent: BundleFile

    def runtest(self) -> None:
        """Fail or skip as the item did."""
        result = self.parent.result()
        item = next((item for item in result.items if _node_name(item.name) == self.name), None)
        if item is None:
            pytest.skip("the new baseline has no such item")
        if item.outcome == "failed":
            pytest.fail(_message([item], result), pytrace=False)
        if item.outcome != "passed":
            pytest.skip(item.reason)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """A bundle that cannot be read is told in the words of its error, without our frames."""
        from onnxshrink.regress.check import BundleError

        return str(excinfo.value) if isinstance(excinfo.value, BundleError) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where it is, and its name."""
        return self.path, None, f"{self.path.parent.name}: {self.name}"


@pytest.fixture(scope="session")
def onnxshrink_check(request: pytest.FixtureRequest) -> Check:
    """Check a model against a bundle: ``onnxshrink_check("digits.bundle", "build/digits.onnx")``."""

    def check(bundle: str | Path, model: str | Path | None = None, *, latency: bool | None = None) -> Result:
        __tracebackhide__ = True
        result = _checked(request.config, Path(bundle), Path(model) if model is not None else None, latency=latency)
        failed = [item for item in result.items if item.outcome == "failed"]
        if failed:
            raise AssertionError(_message(failed, result))
        return result

    return check


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--onnxshrink-update`` and the ini option ``onnxshrink_bundles``."""
    parser.getgroup("onnxshrink").addoption(
        "--onnxshrink-update",
        action="store_true",
        help="Where a check against a bundle fails: accept what the model does now as its new baseline, and say so.",
    )
    parser.addini("onnxshrink_bundles", "Folders that are bundles though not called *.bundle.", type="paths")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to write baselines from several processes at once."""
    config.stash[_ACCEPTED] = {}
    if config.getoption("onnxshrink_update") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--onnxshrink-update writes bundles, so it runs in one process: leave out -n")


@pytest.hookimpl(optionalhook=True)  # pytest 7 does not know it, and refuses plugins with hooks that it does not know
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> UnfinishedBundle | None:
    """A bundle without a manifest is missed; every other folder is walked as ever.

    What a killed update has left beside it in place of a bundle is put back first: its name is hidden, so nothing of it
    would be collected, and a test that is gone fails nowhere.
    """
    for old in sorted(path.glob(".*.old")):
        bundle = path / old.name.removeprefix(".").removesuffix(".old")
        if _is_bundle(bundle, parent.config) and (old / _MANIFEST).is_file():
            from onnxshrink.regress.check import take_back

            take_back(bundle)
    if not _is_bundle(path, parent.config) or (path / _MANIFEST).is_file():
        return None
    unfinished: UnfinishedBundle = UnfinishedBundle.from_parent(parent, path=path)
    return unfinished


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> BundleFile | None:
    """A bundle's manifest stands for the bundle."""
    if file_path.name != _MANIFEST or not _is_bundle(file_path.parent, parent.config):
        return None
    bundle: BundleFile = BundleFile.from_parent(parent, path=file_path)
    return bundle


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which baselines are new, and what changed: nothing is accepted silently."""
    accepted = config.stash[_ACCEPTED]
    if accepted:
        terminalreporter.section("onnxshrink: new baselines")
    for bundle, changes in accepted.items():
        terminalreporter.line(bundle)
        for change in changes:
            terminalreporter.line(f"  {change}")


def _is_bundle(folder: Path, config: pytest.Config) -> bool:
    return folder.suffix == ".bundle" or folder in config.getini("onnxshrink_bundles")


def _checked(config: pytest.Config, bundle: Path, model: Path | None, *, latency: bool | None) -> Result:
    """Check; where that fails and new baselines are to be accepted, accept this one and check again."""
    from onnxshrink.regress.check import BundleError, check_bundle, update_bundle

    if latency is None and hasattr(config, "workerinput"):
        latency = False  # the other workers of pytest-xdist would be part of what is measured
    update = config.getoption("onnxshrink_update")
    try:
        result = check_bundle(bundle, model, latency=latency)
    except BundleError:
        if not update:
            raise
    else:
        if result.outcome != "failed" or not update:
            return result
    config.stash[_ACCEPTED][str(bundle)] = update_bundle(bundle, model)
    return check_bundle(bundle, model, latency=latency)


def _node_name(name: str) -> str:
    """``max_abs_error[logits]`` of ``max_abs_error logits``: pytest takes what is before the bracket for all."""
    rule, _, about = name.partition(" ")
    return f"{rule}[{about}]" if about else rule


def _message(items: list[Item], result: Result) -> str:
    """Which output, how far, which sample, since when."""
    return "\n".join(
        [
            f"{result.model} is not what it was in {result.bundle}, the baseline since {result.since}",
            *(f"  {item.name:<28} {item.reason}" for item in items),
            "  if this is meant: pytest --onnxshrink-update makes it the baseline",
        ]
    )
