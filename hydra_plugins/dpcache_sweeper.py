"""Hydra's own sweeper, with the jobs ordered by model: `eval.sweep.Board` puts it in that one's place.

A process keeps one pipeline, so that models which take turns would be loaded for every job.
"""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override


class ModelByModel(BasicSweeper):
    """All combinations of the values, in the order of the command line, but those of `model` and `model.*` change last,
    wherever they stand there or in an experiment's file."""

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Hydra's, for the overrides in another order: the first one changes last."""
        models_first = sorted(overrides, key=lambda override: override.key_or_group.split(".")[0] != "model")
        return BasicSweeper.split_arguments(models_first, max_batch_size)
