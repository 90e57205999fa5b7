"""What more than one test module uses: models, references written by hand, commands."""

import pytest

pytest.register_assert_rewrite("helpers.by_hand", "helpers.tracing")  # a failing assertion shows its values there, too
