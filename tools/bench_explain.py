"""How often `onnxshrink explain` names the node and the cause of a planted fault: a confusion table.

Run: python tools/bench_explain.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from explain_mutations import cases

CAUSES = ("weight_range", "activation_clipping", "resolution", "bias_overflow", "saturation", "fused_kernel", "none")


def main() -> None:
    """Plant every fault, and print what was said of it."""
    table: Counter[tuple[str, str]] = Counter()
    right = both = total = 0
    for case in cases():
        found = case.run().findings
        said, node = (found[0].finding.cause, found[0].finding.node) if found else ("none", "")
        table[case.cause, said] += 1
        total += 1
        right += said == case.cause
        both += said == case.cause and node == case.node
        if (said, node) != (case.cause, case.node):
            print(f"{case.name}: said {said} at {node or 'no node'}")
    print(f"\n{'planted':20}" + "".join(f"{cause[:12]:>14}" for cause in CAUSES))
    for cause in CAUSES[:-1]:
        print(f"{cause:20}" + "".join(f"{table[cause, said]:>14}" for said in CAUSES))
    print(f"\n{total} faults: cause right {right / total:.1%}, cause and node right {both / total:.1%}")


if __name__ == "__main__":
    main()
