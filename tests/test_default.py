"""The default preset learns to spell and keeps its pictures as varied as they were. On one core, in two minutes."""

import pytest
from helpers import flags, metrics_of, run_here


@pytest.mark.slow
def test_the_default_raises_the_score_and_keeps_the_spread(tmp_path):
    run_here(flags(output_dir=tmp_path, run_name="default"))
    before, *_, after = (m for m in metrics_of(tmp_path / "default") if "eval/total" in m)
    assert before["epoch"] == 0 and after["epoch"] == 10
    assert after["eval/total"] > before["eval/total"] + 0.2                      # .66 to .95 with seed 1
    assert after["spread/eval_share"] > 0.85                    # 1.01; with --window-range 0 2 it is .12
