"""The processes of one run, which `accelerate launch` starts. Every command imports this file, so it imports nothing
slow."""

import os


def main_process() -> bool:
    """Whether this is the process that writes and prints (rank 0). The others only sample."""
    return os.environ.get("RANK", "0") == "0"


def several_processes() -> bool:
    """Whether this is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def wait_for_all() -> None:
    """Waits until all processes of the run have called it."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
