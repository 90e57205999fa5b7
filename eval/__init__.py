"""How good and how fast an accelerated result is, compared with the full-step reference on the same prompts.

For one run, `runs` has the stages, `metrics` scores samples, `timing` measures speed and memory, `statistics` computes
means and their intervals, `pictures` draws, `console` prints, `tracking` logs, and `rescore` scores a finished run
again. For the board, `results` reads `result.json` files, `methods` has the order and the colours of the rows, `ranks`
compares them at equal compute, `tables` and `charts` show them, `report` writes the page, and `leaderboard` is the
command that calls all of these. Nothing here depends on how a method works.
"""

import os

# PyTorch reads it when it is loaded. Threads that wait actively take the processor from other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
