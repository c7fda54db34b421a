"""The table of the command ``bisect``, in 80 columns."""

from __future__ import annotations

from math import ceil, log2

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxshrink.search.bisection import Found, Search
from onnxshrink.search.limits import Check, Limit

_UNITS = {"sqnr_db": ".1f", "max_abs_error": ".3g", "accuracy_drop": ".4f"}
_SUFFIX = {"sqnr_db": " dB", "max_abs_error": "", "accuracy_drop": ""}
_LABELS = {"sqnr_db": "SQNR", "max_abs_error": "max abs error", "accuracy_drop": "accuracy drop"}


def print_bisection(found: Found, console: Console) -> None:
    """Print every step with what was measured at it, which step broke the limit, and what to do next."""
    bound = "at least" if found.limit.metric == "sqnr_db" else "at most"
    limit = f"{_LABELS[found.limit.metric]} {bound} {_number(found.limit, found.limit.value)}"
    console.print(Text(f"{found.subject}: {limit}, measured against {found.reference}"))
    _print_search(found.search, found.limit, console)
    if found.optimizers is not None:
        console.print(Text("ONNX Runtime's optimizers that act at that level first, one more each time:"))
        _print_search(found.optimizers, found.limit, console)
    console.print(Text(sentence(found)))
    for name, path in found.files.items():
        console.print(Text(f"  {name:<6} {path}"), soft_wrap=True)
    for line in found.advice:
        console.print(Text(f"  next   {line}"), soft_wrap=True)


def sentence(found: Found) -> str:
    """What was found, in words."""
    search, limit = found.search, found.limit
    if search.broke is None:
        last = search.checks[0]
        return f"Nothing broke the limit: {last.name} kept {_value(limit, last)}."
    kept = search.kept
    before = f"{kept.name} kept {_value(limit, kept)}; " if kept else f"{found.reference} is the reference; "
    parts = [f"{before}{search.broke.name} broke the limit: {_value(limit, search.broke)}."]
    if found.optimizers is not None:
        parts.append(_of_optimizers(found, found.optimizers))
    if search.unseen:
        verb = "was" if len(search.unseen) == 1 else "were"
        steps = f"{len(search.unseen)} of the {search.first} steps before it {verb} not checked"
        parts.append(f"{steps}: what breaks there and is mended again is not seen.")
    return " ".join(parts)


def _of_optimizers(found: Found, search: Search) -> str:
    if search.broke is None:
        return "No optimizer that is new at the level breaks it again."
    if search.first == 0:
        return "It stays broken without every optimizer that is new at the level."
    text = f"ONNX Runtime's {search.broke.name} did it"
    if found.without is None:
        return f"{text}."
    verb = "still breaks it" if found.without.is_broken else "keeps it"
    return f"{text}; the session without it alone {verb}: {_value(found.limit, found.without)}."


def _print_search(search: Search, limit: Limit, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("step", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column(_LABELS[limit.metric], justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    checks = {check.step: check for check in search.checks}
    for step, name in enumerate(search.steps):
        check = checks.get(step)
        verdict = "" if check is None else "kept" if not check.is_broken else "broken"
        style = "bold" if step == search.first else "" if check else "dim"
        mark = " ◀ first" if step == search.first else ""
        table.add_row(Text(name), _value(limit, check) if check else "not checked", verdict + mark, style=style)
    console.print(table)
    n_steps = len(search.steps)
    most = ceil(log2(n_steps)) + 1
    console.print(Text(f"{len(search.checks)} of {n_steps} steps checked; it takes {most} at most", style="dim"))
    console.print()


def _value(limit: Limit, check: Check) -> str:
    if check.value is None:
        return check.note or "not a number"
    note = f" ({check.note})" if check.note == "identical" else ""
    return _number(limit, check.value) + note


def _number(limit: Limit, value: float) -> str:
    return f"{value:{_UNITS[limit.metric]}}{_SUFFIX[limit.metric]}"
