"""Counts how often the host waits for the GPU in every method's steps on every model family, and writes a table:

python scripts/fake_cuda.py FILE

No GPU is needed, see `tests/helpers/fake_cuda.py`. A cell has the largest number of waits in one call of the
transformer at computed / skipped / decided steps, or "-" if there is no such step. At a decided step the method reads
results of the device to decide whether to compute. The caches of libraries do not tell at which steps they decide, so
these steps count as computed or skipped. The first step is left out for them, because they read the scheduler's
timesteps and noise levels there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from baselines.library import LibraryCache
from helpers.fake_cuda import FAMILIES
from test_fake_cuda import DECISIONS, METHODS, case, run


def cell(name: str, family: str) -> str:
    """Waits at computed / skipped / decided steps; or "refused"."""
    try:
        method, computed, calls = run(case(family), name)
    except (ValueError, AssertionError):  # cache-dit refuses by assertions
        return "refused"
    library = isinstance(method, LibraryCache)
    waits = {"computed": [], "skipped": [], "decided": []}
    for place, (branch, made) in enumerate(calls.items()):
        decides = DECISIONS.get(name) if place == 0 or name != "easycache" else None
        for step, call in list(enumerate(made))[library:]:
            decided = decides is not None and decides(step, computed[branch])
            kind = "decided" if decided else "computed" if step in computed[branch] else "skipped"
            waits[kind].append(len(call.waits))
    return " / ".join(str(max(counts)) if counts else "-" for counts in waits.values())


def main(path: str) -> None:
    rows = [["method", *FAMILIES], ["---"] * (1 + len(FAMILIES))]
    rows += [[name, *(cell(name, family) for family in FAMILIES)] for name in METHODS]
    Path(path).write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
