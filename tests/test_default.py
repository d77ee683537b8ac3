"""The default preset learns to spell and keeps its pictures as varied as they were. In 10 of its epochs, on one core."""

import pytest
from helpers import flags, metrics_of, run_here


@pytest.mark.slow
def test_ten_epochs_of_the_default_raise_the_score_and_keep_the_spread(tmp_path):
    run_here(flags(epochs=10, output_dir=tmp_path, run_name="default"))
    before, *_, after = (m for m in metrics_of(tmp_path / "default") if "eval/total" in m)
    assert before["epoch"] == 0 and after["epoch"] == 10
    assert after["eval/total"] > before["eval/total"] + 0.15                     # .66 to .89 with seed 1
    assert after["spread/eval_share"] > 0.93                    # .99; with the early window in its place it is .90
