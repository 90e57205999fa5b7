"""How good and how fast an accelerated result is, compared with the full-step reference on the same prompts.

`metrics` scores samples, `statistics` turns scores into a mean with an interval, `timing` measures speed and memory,
`pictures` draws, `leaderboard` collects `result.json` files, `report` makes a page of them, `tracking` logs
to W&B. Nothing here knows how a method works.
"""

import os

# Read when PyTorch is loaded. Threads that spin while they wait starve others where something else runs, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
