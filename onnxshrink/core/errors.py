"""Every mistake a user can meet, one exception type per kind, all with the same five-line form.

```
ShrinkError                 exit code 2: the user can fix it
├── ConfigError             the config file, an option or an override
├── DataError               samples: names, shapes, dtypes, NaN, empty readers, unreadable files
├── ModelError              the model brought in: factory, weights, ONNX file, unsupported graph
│   └── InferenceError      a model that loads, and fails on a batch
├── TrainingError           a loss that is not finite, a batch that cannot be learned from
├── ParityError             two models that should agree and do not (export, optimize)
├── ProviderError           an execution provider that is missing or was silently dropped
├── DependencyError         an optional package that is not installed
└── StoreError              the store or the run folder cannot be read or written
```
"""

from __future__ import annotations

from collections.abc import Sequence


class ShrinkError(Exception):
    """A mistake the user can fix, told as what, where, got, want and fix.

    Args:
        what: What is wrong, with the value, on one line.
        where: The file and line, or the tensor, node or sample.
        got: What was found there.
        want: What would have been accepted.
        fix: What to do about it.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: str | None = None,
        want: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.got = got
        self.want = want
        self.fix = fix

    def __str__(self) -> str:
        rows = (("where", self.where), ("got", self.got), ("want", self.want), ("fix", self.fix))
        return "\n".join([self.what, *(f"  {label:<6} {_indented(text)}" for label, text in rows if text)])

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not pickle by default, and errors cross process pools.
        return (_rebuild, (type(self), self.what, self.where, self.got, self.want, self.fix))


def _rebuild(  # noqa: PLR0917  pickle passes arguments by position
    kind: type[ShrinkError], what: str, where: str | None, got: str | None, want: str | None, fix: str | None
) -> ShrinkError:
    return kind(what, where=where, got=got, want=want, fix=fix)


def _indented(text: str) -> str:
    return text.replace("\n", "\n         ")


class ConfigError(ShrinkError):
    """The config file, a command-line option or an override is wrong."""


class ConfigErrors(ConfigError):  # noqa: N818  it is several
    """Several mistakes of one config file, told together so that they can be fixed together."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        first = errors[0]
        super().__init__(first.what, where=first.where, got=first.got, want=first.want, fix=first.fix)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n\n".join(str(error) for error in self.errors)

    def __reduce__(self) -> tuple[object, ...]:
        return (ConfigErrors, (self.errors,))


class DataError(ShrinkError):
    """Samples do not fit the model, are not numbers, or are not there."""


class ModelError(ShrinkError):
    """The model that was brought in cannot be built, read or changed as asked."""


class InferenceError(ModelError):
    """ONNX Runtime has loaded the model, and cannot run it on a batch."""


class TrainingError(ShrinkError):
    """Training cannot go on: a loss that is not finite, or data it cannot learn from."""


class ParityError(ShrinkError):
    """Two models that must give the same numbers do not."""


class ProviderError(ShrinkError):
    """An execution provider is missing, or ONNX Runtime silently dropped it."""


class DependencyError(ShrinkError):
    """An optional package is needed and not installed."""


class StoreError(ShrinkError):
    """The store or the run folder cannot be read or written."""
