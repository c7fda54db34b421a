"""User callables named as ``package.module:attribute``: found, imported, and fingerprinted by their source."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from onnxshrink.core.artifact import Digest
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.tensors import did_you_mean

_searched: list[Path] = []
"""Folders of the configs that are being run, the innermost first."""


@contextmanager
def search_path(folder: Path) -> Iterator[None]:
    """Let modules that lie beside a config file, or in the working folder, be imported as long as the block runs.

    A module beside the config file goes before another of the same name that this process imported from elsewhere, and
    is read from disk again: the code that runs is the code that `source_digest` saw. Afterwards the process has the
    modules it had before.
    """
    folder = folder.resolve()
    before = {}
    for name, module in list(sys.modules.items()):
        file = _users_file(name, module)
        if file and (Path(file).is_relative_to(folder) or _hides(folder, name)):
            before[name] = sys.modules.pop(name)
    added = [str(folder), str(Path.cwd())]
    sys.path[:0] = added[:1]
    sys.path.append(added[1])
    importlib.invalidate_caches()
    _searched.insert(0, folder)
    try:
        yield
    finally:
        _searched.remove(folder)
        sys.path.remove(added[0])
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(added[1])]
        for name, module in list(sys.modules.items()):
            file = _users_file(name, module)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]
        sys.modules.update(before)


def _users_file(name: str, module: object) -> str | None:
    """Where one of the user's own modules lies; None for libraries, this package and the running script."""
    # Not getattr: lazy modules import half a framework when they are asked for anything.
    file = getattr(module, "__dict__", {}).get("__file__")
    top = name.partition(".")[0]
    if not isinstance(file, str) or top in ("__main__", __name__.partition(".")[0]) or _is_library(file):
        return None
    return file


def _hides(folder: Path, name: str) -> bool:
    """True if ``import`` finds the top-level package of ``name`` in ``folder``."""
    top = name.partition(".")[0]
    return (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()


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
    except (Exception, SystemExit) as e:  # a user's module may raise anything, or be a script that exits
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
    if path is None or path.suffix != ".py":
        return  # built in or compiled: only importing it would tell
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as e:
        where = f"{path}:{e.lineno}" if isinstance(e, SyntaxError) else str(path)
        raise ConfigError(f"{module_name!r} is not valid Python: {e}", where=where, got=entry) from e
    names = {name for node in ast.walk(tree) for name in _defines(node)}
    if attribute.partition(".")[0] not in names and not names & {"*", "__getattr__"}:
        raise ConfigError(
            f"{module_name!r} has no {attribute!r}",
            where=str(path),
            got=entry,
            want="package.module:callable",
            fix=did_you_mean(attribute.partition(".")[0], sorted(names)) or "name a function or class of the module",
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
    """sha256 over the source that the entry's module can run, and over the versions of the libraries it imports.

    The source is the module and every module it imports that lies neither in the standard library nor in site-packages.
    Where the entry itself is installed there, it is every module of its top-level package. A compiled module counts
    with its bytes, and one that is built into Python with Python's version. Nothing is imported. What the source does
    not show is not seen: modules imported by a computed name, and files that the code reads.

    Raises:
        ConfigError: The entry's module cannot be found.
    """
    module_name, _ = split_entry(entry)
    package = module_name.partition(".")[0]
    if package in sys.builtin_module_names:
        return Digest(hashlib.sha256(sys.version.encode()).hexdigest())
    path, top = _source_file(module_name), _source_file(package)
    if path is None:
        raise ConfigError(
            f"cannot find the source of {module_name!r}",
            where=", ".join(map(str, _searched)) or str(Path.cwd()),
            got=entry,
            want="a Python module beside the config file, in the working folder, or installed",
            fix="check the spelling, or run from the folder that holds it",
        )
    found, libraries = (_installed(top), {package}) if top and _is_library(top) else _reachable(module_name)
    sha = hashlib.sha256(repr(sorted(_versions(libraries).items())).encode())
    for name in sorted(found):
        sha.update(f"{name}\0".encode() + hashlib.sha256(found[name].read_bytes()).digest())
    return Digest(sha.hexdigest())


def _installed(top: Path) -> dict[str, Path]:
    """The files of an installed package. Not followed import by import: that takes half a minute for torch."""
    files = top.parent.rglob("*.py") if top.name == "__init__.py" else [top]
    return {path.relative_to(top.parent).as_posix(): path for path in files}


def _reachable(module_name: str) -> tuple[dict[str, Path], set[str]]:
    """The files of a module and of all it imports, directly or not, that are no library; and the libraries' names."""
    found: dict[str, Path] = {}
    libraries: set[str] = set()
    seen = {""}
    queue = [module_name]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        queue.append(name.rpartition(".")[0])  # importing a.b runs a/__init__.py as well
        path = _source_file(name)
        if path is None or _is_library(path):
            libraries.add(name.partition(".")[0])
            continue
        found[name] = path
        if path.suffix == ".py":
            queue.extend(_imports(path.read_bytes(), name, is_package=path.name == "__init__.py"))
    return found, libraries


def _versions(packages: set[str]) -> dict[str, str]:
    """Versions of the distributions that give these packages; the standard library gives none."""
    owners = _distributions()
    names = {name for package in packages for name in owners.get(package, ())}
    return {name: metadata.version(name) for name in sorted(names)}


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def find_file(text: str) -> Path | None:
    """The file or folder that user code would find under ``text``, from the working folder or beside the config."""
    for folder in (Path(), *_searched):
        path = folder / text
        try:
            if path.exists() and not Path.cwd().is_relative_to(path.resolve()):  # "." and "/" name no data
                return path
        except (OSError, ValueError):  # too long, or a NUL: no file's name
            return None
    return None


def _source_file(name: str) -> Path | None:
    """The file of a module, found as ``import`` finds it, but without importing the packages it is in."""
    origin: str | None = None
    folders: Sequence[str] = sys.path
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        origin, folders = _find(".".join(parts[:depth]), folders)
    return Path(origin) if origin and Path(origin).is_file() else None


def _find(name: str, folders: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """File of the module ``name`` if it is in one of ``folders``, and the folders of its submodules."""
    portions: list[str] = []  # of a namespace package, which may lie in several folders
    for folder in folders:
        finder = pkgutil.get_importer(folder)
        spec = finder.find_spec(name) if finder else None
        if spec and spec.loader:
            return spec.origin, spec.submodule_search_locations or ()
        portions += (spec and spec.submodule_search_locations) or ()
    if "." not in name and not portions:
        # Packages installed as editable may be found by a hook instead of a folder.
        specs = (finder.find_spec(name, None) for finder in sys.meta_path)
        spec = next(filter(None, specs), None)
        if spec:
            return spec.origin, spec.submodule_search_locations or ()
    return None, portions


@cache
def _library_folders() -> tuple[Path, ...]:
    folders = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple({*folders, *(folder.resolve() for folder in folders)})


def _is_library(path: str | Path) -> bool:
    path = Path(path)
    installed = "site-packages" in path.parts or "dist-packages" in path.parts  # the user's own and the system's too
    return installed or any(path.is_relative_to(folder) for folder in _library_folders())


@lru_cache(maxsize=1 << 12)  # a search fingerprints the same sources at every trial, and parsing is most of the time
def _imports(source: bytes, module: str, *, is_package: bool) -> tuple[str, ...]:
    """Names of the modules that ``source`` may import, relative ones made absolute."""
    return tuple(dict.fromkeys(_named(source, module if is_package else module.rpartition(".")[0])))


def _named(source: bytes, package: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # importing it will say so better
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                try:
                    base = importlib.util.resolve_name("." * node.level + base, package)
                except ImportError:  # it climbs above its package: importing it will say so better
                    continue
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
