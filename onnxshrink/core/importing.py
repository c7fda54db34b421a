"""User callables named as ``package.module:attribute``: found, imported, and fingerprinted by their source."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from onnxshrink.core.artifact import Digest
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.tensors import did_you_mean


@contextmanager
def search_path(folder: Path) -> Iterator[None]:
    """Let modules that lie beside a config file be imported, for as long as the block runs.

    What was imported from there is forgotten afterwards: another run in this process may have edited it, or may have
    another module of the same name beside its own config.
    """
    folder = folder.resolve()
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            path = getattr(sys.modules[name], "__file__", None)
            if path and Path(path).is_relative_to(folder) and not _is_library(Path(path)):
                del sys.modules[name]


def load_entry(entry: str) -> Callable[..., Any]:
    """Import the callable that ``entry`` names.

    Args:
        entry: ``package.module:attribute``; the attribute may be dotted.

    Raises:
        ConfigError: The module cannot be found or fails to import, or it has no such callable.
    """
    module_name, attribute = split_entry(entry)
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        missing = e.name or module_name
        own = module_name == missing or module_name.startswith(missing + ".")
        raise ConfigError(
            f"cannot import {module_name!r}: there is no module {missing!r}",
            got=entry,
            want="a module beside the config file, in the working folder, or installed",
            fix="check the spelling, or run from the folder that holds it"
            if own
            else f"install it: pip install {missing}",
        ) from e
    except Exception as e:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"importing {module_name!r} failed: {type(e).__name__}: {e}",
            got=entry,
            fix=f"python -c 'import {module_name}'",
        ) from e
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [name for name in dir(target) if not name.startswith("_")]
            raise ConfigError(
                f"{module_name!r} has no {attribute!r}",
                got=entry,
                want="package.module:callable",
                fix=did_you_mean(part, names),
            )
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(f"{entry!r} is not callable", got=type(target).__name__, want="a function or class")
    return target  # type: ignore[no-any-return]


def require_entry(entry: str) -> None:
    """Check without importing anything that ``entry`` can be there: its module is found, and defines the name.

    Raises:
        ConfigError: The module cannot be found, or nothing in it has that name.
    """
    module_name, attribute = split_entry(entry)
    source_digest(entry)
    path = _source_file(module_name)
    try:
        tree = ast.parse(path.read_bytes() if path else b"")
    except SyntaxError as e:
        raise ConfigError(
            f"{module_name!r} is not valid Python: {e.msg}", where=f"{path}:{e.lineno}", got=entry
        ) from e
    names = {name for node in ast.walk(tree) for name in _defines(node)}
    if attribute.partition(".")[0] not in names and not names & {"*", "__getattr__"}:
        raise ConfigError(
            f"{module_name!r} has no {attribute!r}",
            where=str(path),
            got=entry,
            want="package.module:callable",
            fix=did_you_mean(attribute, sorted(names)),
        )


def _defines(node: ast.AST) -> Iterator[str]:
    """The names that a statement may bind."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id


def split_entry(entry: str) -> tuple[str, str]:
    """``("package.module", "attribute")`` of an entry."""
    module_name, colon, attribute = entry.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"{entry!r} does not name a callable", got=entry, want="package.module:callable")
    return module_name, attribute


def source_digest(entry: str) -> Digest:
    """sha256 over the source of the entry's module and of every module it imports that is not a library.

    A library is what lies in the standard library or in site-packages; its version stands in the keys instead. Modules of
    the entry's own top-level package always count, installed or not.

    Raises:
        ConfigError: The entry's module cannot be found.
    """
    module_name, _ = split_entry(entry)
    package = module_name.partition(".")[0]
    found: dict[str, bytes] = {}
    queue = [module_name]
    while queue:
        name = queue.pop()
        path = _source_file(name)
        if name in found or path is None or not (name.partition(".")[0] == package or not _is_library(path)):
            continue
        source = path.read_bytes()
        found[name] = source
        queue.extend(_imports(source, name, is_package=path.name == "__init__.py"))
        queue.append(name.rpartition(".")[0])  # importing a.b runs a/__init__.py as well
    if module_name not in found:
        raise ConfigError(
            f"cannot find the source of {module_name!r}",
            got=entry,
            want="a Python module beside the config file, in the working folder, or installed",
            fix="check the spelling, or run from the folder that holds it",
        )
    sha = hashlib.sha256()
    for name in sorted(found):
        sha.update(f"{name}\0".encode() + hashlib.sha256(found[name]).digest())
    return Digest(sha.hexdigest())


def _source_file(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name) if name else None
    except (ImportError, ValueError, AttributeError):  # a parent that is no package, or a half-made module
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _library_folders() -> tuple[Path, ...]:
    return tuple(Path(sysconfig.get_paths()[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib"))


def _is_library(path: Path) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in _library_folders())


def _imports(source: bytes, module: str, *, is_package: bool) -> Iterator[str]:
    """Names of the modules that ``source`` imports, relative ones made absolute."""
    package = module if is_package else module.rpartition(".")[0]
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return  # importing it will say so better
    resolve = partial(importlib.util.resolve_name, package=package)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve("." * node.level + (node.module or "")) if node.level else (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
