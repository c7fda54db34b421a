"""What importing the user's code promises: clear errors, fresh code, and a digest that sees every change of it."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onnxshrink.core.errors import ConfigError
from onnxshrink.core.importing import load_entry, require_entry, search_path, source_digest

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the user's below ``tmp_path``."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def call(folder: Path, entry: str) -> Any:
    """What the entry returns, with ``folder`` as the config's."""
    with search_path(folder):
        return load_entry(entry)()


def digest(folder: Path, entry: str = "users_nets:build") -> str:
    """The entry's digest, with ``folder`` as the config's."""
    with search_path(folder):
        return source_digest(entry)


def refused(folder: Path, entry: str, look: Callable[[str], Any] = load_entry) -> ConfigError:
    """The error that ``look`` raises for the entry."""
    with search_path(folder), pytest.raises(ConfigError) as caught:
        look(entry)
    return caught.value


def test_a_callable_may_be_a_function_a_class_or_an_attribute_of_one(tmp_path: Path, write: Write) -> None:
    """Functions, classes and dotted attributes beside the config are found; so are compiled and built-in ones."""
    write("users_nets.py", "class Net:\n  @staticmethod\n  def small(): return 3\n")
    assert call(tmp_path, "users_nets:Net.small") == 3
    assert type(call(tmp_path, "users_nets:Net")).__name__ == "Net"
    assert load_entry("math:sqrt")(4.0) == 2.0
    assert load_entry("sys:getrefcount")


@pytest.mark.parametrize("entry", ["", "module", "module:", ":name", "a.b"])
def test_an_entry_without_module_or_attribute_is_refused(entry: str) -> None:
    """An entry is package.module:callable, nothing less."""
    with pytest.raises(ConfigError, match="does not name a callable"):
        load_entry(entry)


def test_mistakes_in_the_entry_are_told(tmp_path: Path, write: Write) -> None:
    """A misspelt attribute suggests the right one; a value that cannot be called is told by its type."""
    write("users_nets.py", "def build(): pass\nSIZE = 3\n")
    error = refused(tmp_path, "users_nets:biuld")
    assert (error.what, error.fix) == ("'users_nets' has no 'biuld'", "did you mean 'build'?")
    assert refused(tmp_path, "users_nets:SIZE").got == "int"


def test_a_missing_module_is_told_from_a_missing_dependency(tmp_path: Path, write: Write) -> None:
    """The user's own missing module asks for the folder; a missing library of theirs asks for pip install."""
    write("users_nets.py", "import no_such_library\n")
    write("users_pkg/__init__.py", "")
    assert "run from the folder that holds it" in (refused(tmp_path, "no_such_nets:build").fix or "")
    assert "run from the folder that holds it" in (refused(tmp_path, "users_pkg.missing:build").fix or "")
    assert refused(tmp_path, "users_nets:build").fix == "install it: pip install no_such_library"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def build(:", "SyntaxError"),
        ("from sys import nothing", "ImportError: cannot import name 'nothing'"),
        ("class Odd(Exception): pass\nraise Odd('very')", "Odd: very"),
    ],
)
def test_a_module_that_fails_while_imported_is_told(tmp_path: Path, write: Write, text: str, said: str) -> None:
    """Whatever a module raises while it is imported, even an exit, becomes the user's error with its cause."""
    write("users_nets.py", text)
    error = refused(tmp_path, "users_nets:build")
    assert said in error.what
    assert error.__cause__ is not None


def test_require_entry_checks_without_importing(tmp_path: Path, write: Write) -> None:
    """A misspelt name or broken syntax is found in the source; the module is not run."""
    write(
        "users_nets.py",
        "raise RuntimeError\nif 1:\n  def build(): pass\nalias = build\nfrom math import sqrt as root\n",
    )
    write("users_broken.py", "x = 1\ndef build(:\n")
    with search_path(tmp_path):
        for name in ("build", "alias", "root", "build.attribute"):
            require_entry(f"users_nets:{name}")
        require_entry("math:sqrt")
    assert refused(tmp_path, "users_nets:biuld", require_entry).fix == "did you mean 'build'?"
    assert str(refused(tmp_path, "users_broken:build", require_entry).where).endswith("users_broken.py:2")
    assert "cannot find the source" in refused(tmp_path, "users_missing:build", require_entry).what


def test_modules_are_forgotten_after_the_block(tmp_path: Path, write: Write) -> None:
    """An edited module, and another of the same name beside another config, are read anew; sys is left as it was."""
    before = list(sys.path), set(sys.modules)
    write("a/users_nets.py", "import users_helper\ndef build(): return users_helper.SIZE\n")
    write("a/users_helper.py", "SIZE = 1\n")
    write("b/users_nets.py", "def build(): return 22\n")
    assert call(tmp_path / "a", "users_nets:build") == 1
    assert call(tmp_path / "b", "users_nets:build") == 22
    write("a/users_helper.py", "SIZE = 333\n")
    assert call(tmp_path / "a", "users_nets:build") == 333
    assert (list(sys.path), set(sys.modules)) == before


def test_a_module_beside_the_config_goes_before_one_that_is_loaded(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of that name that the process has from elsewhere gives way in the block, and comes back after it."""
    write("elsewhere/users_nets.py", "def build(): return 'elsewhere'\n")
    write("config/users_nets.py", "def build(): return 'config'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    import users_nets  # type: ignore[import-not-found]

    try:
        assert call(tmp_path / "config", "users_nets:build") == "config"
        assert digest(tmp_path / "config") != digest(tmp_path)
        assert sys.modules["users_nets"] is users_nets
        assert load_entry("users_nets:build")() == "elsewhere"
    finally:
        del sys.modules["users_nets"]


def test_a_loaded_module_that_was_edited_is_read_again(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that was imported before it was edited is read again: the code that runs is the one fingerprinted."""
    write("users_nets.py", "def build(): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import users_nets  # type: ignore[import-not-found]

    try:
        write("users_nets.py", "def build(): return 'edited'\n")
        assert call(tmp_path, "users_nets:build") == "edited"
        assert users_nets.build() == 1
    finally:
        del sys.modules["users_nets"]


def test_libraries_and_this_package_stay_loaded(tmp_path: Path, write: Write) -> None:
    """A block over a folder that holds this package, as in a checkout, never loads it twice."""
    from onnxshrink.core import errors

    write("users_nets.py", "import onnxshrink.core.errors, json\ndef build(): return onnxshrink.core.errors\n")
    assert call(tmp_path, "users_nets:build") is errors
    with search_path(Path(errors.__file__).parents[2]):
        assert load_entry("onnxshrink.core.errors:ConfigError") is errors.ConfigError


def test_the_working_folder_is_searched_after_the_configs(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules in the working folder are found as well; one beside the config goes before them."""
    write("cwd/users_cwd.py", "def build(): return 'cwd'\n")
    write("cwd/users_nets.py", "def build(): return 'cwd'\n")
    write("config/users_nets.py", "def build(): return 'config'\n")
    monkeypatch.chdir(tmp_path / "cwd")
    try:
        assert call(tmp_path / "config", "users_cwd:build") == "cwd"
        assert call(tmp_path / "config", "users_nets:build") == "config"
    finally:
        sys.modules.pop("users_cwd", None)


def test_namespace_packages_are_found(tmp_path: Path, write: Write) -> None:
    """Packages without __init__.py, nested as well, are imported and fingerprinted."""
    write("users_space/inner/nets.py", "from users_space.other import SIZE\ndef build(): return SIZE\n")
    write("users_space/other.py", "SIZE = 5\n")
    entry = "users_space.inner.nets:build"
    first = digest(tmp_path, entry)
    assert call(tmp_path, entry) == 5
    write("users_space/other.py", "SIZE = 66\n")
    assert digest(tmp_path, entry) != first
    assert call(tmp_path, entry) == 66


@pytest.mark.parametrize(
    ("statement", "changed"),
    [
        ("import users_pkg.helper", "users_pkg/helper.py"),
        ("import users_pkg.helper", "users_pkg/__init__.py"),
        ("from users_pkg import helper", "users_pkg/helper.py"),
        ("from . import helper", "users_pkg/helper.py"),
        ("from .helper import SIZE", "users_pkg/helper.py"),
        ("from .sub.deep import X", "users_pkg/sub/deep.py"),
        ("from .sub.deep import X", "users_pkg/sub/__init__.py"),
        ("from .sub import deep", "users_pkg/sub/deep.py"),
        ("def build():\n  import users_single", "users_single.py"),
        ("import users_single", "users_single.py"),
        ("from users_single import *", "users_single.py"),
        ("from .cycle import Y", "users_pkg/nets2.py"),
        ("", "users_pkg/nets.py"),
    ],
)
def test_a_change_of_any_imported_module_changes_the_digest(
    tmp_path: Path, write: Write, statement: str, changed: str
) -> None:
    """Modules imported directly or not, absolutely or relatively, at the top or in a function, all count."""
    for name in ("__init__", "helper", "sub/__init__", "sub/deep"):
        write(f"users_pkg/{name}.py", "X = Y = SIZE = 1\n")
    write("users_pkg/cycle.py", "from . import nets, nets2\nY = 1\n")
    write("users_pkg/nets2.py", "from . import cycle\n")
    write("users_single.py", "")
    write("users_pkg/nets.py", statement)
    entry = "users_pkg.nets:build"
    first = digest(tmp_path, entry)
    assert digest(tmp_path, entry) == first
    write(changed, (tmp_path / changed).read_text() + "\n# changed\n")
    assert digest(tmp_path, entry) != first


def test_modules_that_are_not_imported_do_not_count(tmp_path: Path, write: Write) -> None:
    """A neighbour that nothing imports may change without work being done again."""
    write("users_nets.py", "import json\n")
    write("users_other.py", "")
    first = digest(tmp_path)
    write("users_other.py", "changed = 1\n")
    assert digest(tmp_path) == first


def test_libraries_do_not_count(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in site-packages is known by its version; but an entry that is installed itself counts."""
    library = write("lib/site-packages/users_lib/__init__.py", "").parent
    monkeypatch.syspath_prepend(str(library.parent))
    write("users_nets.py", "import users_lib, numpy, os.path\n")
    own, installed = digest(tmp_path), digest(tmp_path, "users_lib:build")
    (library / "more.py").write_text("changed = 1\n")
    assert digest(tmp_path) == own
    assert digest(tmp_path, "users_lib:build") != installed


def test_a_digest_does_not_depend_on_where_the_code_lies(tmp_path: Path, write: Write) -> None:
    """The same source elsewhere has the same digest."""
    for folder in ("a", "b/c"):
        write(f"{folder}/users_nets.py", "import users_helper\n")
        write(f"{folder}/users_helper.py", "")
    assert digest(tmp_path / "a") == digest(tmp_path / "b" / "c")


def test_a_digest_imports_nothing(tmp_path: Path, write: Write) -> None:
    """Neither the module nor the packages it names are run."""
    write("users_pkg/__init__.py", "raise RuntimeError\n")
    write("users_pkg/nets.py", "import users_pkg.more\nfrom xml.dom import pulldom\n")
    write("users_pkg/more.py", "raise RuntimeError\n")
    before = set(sys.modules)
    assert digest(tmp_path, "users_pkg.nets:build")
    assert set(sys.modules) == before


@pytest.mark.parametrize("text", ["def build(:", "\0", "from ... import x", "import users_nets"])
def test_a_digest_never_minds_broken_code(tmp_path: Path, write: Write, text: str) -> None:
    """Broken syntax, imports that climb too high and modules that import themselves have a digest all the same."""
    write("users_nets.py", text)
    assert len(digest(tmp_path)) == 64


def test_compiled_and_built_in_modules_have_a_digest(tmp_path: Path, write: Write) -> None:
    """An extension counts with its bytes, a built-in module with Python's version."""
    assert len({source_digest("math:sqrt"), source_digest("sys:exit"), source_digest("json:loads")}) >= 2
    name = f"users_ext{sysconfig.get_config_var('EXT_SUFFIX')}"
    write(name, "one")
    first = digest(tmp_path, "users_ext:run")
    write(name, "two")
    assert digest(tmp_path, "users_ext:run") != first


def test_a_missing_source_is_refused(tmp_path: Path, write: Write) -> None:
    """A module or sub-module that is not there has no digest."""
    write("users_pkg/__init__.py", "")
    write("users_nets.py", "")
    for entry in ("users_missing:build", "users_pkg.missing:build", "users_nets.build:x"):
        assert "cannot find the source" in refused(tmp_path, entry, source_digest).what


def test_a_source_is_read_for_its_imports_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search asks at every trial; a file that changed is another source."""
    (tmp_path / "asked.py").write_text("import lent\n")
    (tmp_path / "lent.py").write_text("x = 'test_a_source_is_read_for_its_imports_once'\n")
    parsed: list[bytes] = []

    def parse(source: bytes) -> ast.Module:
        parsed.append(source)
        return plain(source)

    plain = ast.parse
    monkeypatch.setattr(ast, "parse", parse)
    with search_path(tmp_path):
        first = source_digest("asked:f")
        assert source_digest("asked:f") == first
        assert len(parsed) <= 2
        (tmp_path / "lent.py").write_text("x = 'another one'\n")
        assert source_digest("asked:f") != first
    assert parsed[-1] == b"x = 'another one'\n"
