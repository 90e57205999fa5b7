"""How good and how fast an accelerated result is, compared with the full-step reference on the same prompts.

A run: `runs` has its stages, `metrics` scores samples, `timing` measures speed and memory, `statistics` gives means
their intervals, `pictures` draws, `console` prints, `tracking` logs, `rescore` scores it again. The board: `results`
reads `result.json` files, `methods` knows the rows' order and colours, `tables` and `charts` show them, `report` makes
a page, `leaderboard` is the command for all of it. Nothing here knows how a method works.
"""

import os

# Read when PyTorch is loaded. Threads that spin while they wait starve others where something else runs, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
