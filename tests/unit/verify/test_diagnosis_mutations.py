"""A planted fault is found: the right node and the right cause."""

from __future__ import annotations

import explain_mutations as mutations
import pytest

from onnxshrink.verify.explain import Explanation

LEAST_RIGHT = 0.95


def said(found: Explanation) -> tuple[str, str]:
    """The first finding's cause and node."""
    first = next(iter(found.findings), None)
    return (first.finding.cause, first.finding.node) if first else ("none", "")


@pytest.mark.parametrize("network", mutations.NETWORKS)
def test_nothing_is_found_where_nothing_is_planted(network: str) -> None:
    """A model that our own stage quantized well has no findings."""
    model = mutations.NETWORKS[network]()
    arrays = mutations.samples(network, model)
    assert said(mutations.explained(model, mutations.quantized(model, arrays), arrays)) == ("none", "")


@pytest.mark.parametrize(
    "case",
    [case for case in mutations.cases() if (case.network, case.node) == ("mlp", "dense1")],
    ids=lambda c: c.plant,
)
def test_each_fault_in_one_node(case: mutations.Case) -> None:
    """Each way to plant a fault, at the layer in the middle of three."""
    assert said(case.run()) == (case.cause, case.node)


@pytest.mark.slow
def test_faults_everywhere() -> None:
    """Every other fault in every node of five networks: 19 of 20 are named right. The bench plants all."""
    cases = list(mutations.cases())[::2]
    wrong = {case.name: found for case in cases if (found := said(case.run())) != (case.cause, case.node)}
    assert len(cases) > 75
    assert len(wrong) <= (1 - LEAST_RIGHT) * len(cases), wrong
