"""The processes of one run, which `accelerate launch` starts. Imported by every command, so it needs nothing
slow to load."""

import os


def main_process() -> bool:
    """False in the processes that only help to sample."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Wait until all processes of the run are here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
