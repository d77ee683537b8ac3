"""The command line, what it refuses, and the arithmetic of the batch plan."""

import ast
import dataclasses
import inspect
import itertools
import math
import shutil
from pathlib import Path

import pytest

import config
from config import PRESETS, Config, ConfigError, parse_config, to_dict, validate
from harness.batches import batch_plan, describe
from harness.checkpoint import changed_fields, continued, prompt_files, write_settings
from sampler import timestep_schedule


# -------------------------------------------------------------------------------------------------------- command line

def test_no_preset_means_tiny_ocr_and_flags_change_single_fields():
    default = PRESETS["tiny_ocr"]
    assert parse_config([]) == ("tiny_ocr", default)
    assert parse_config(["--epochs", "3"]) == ("tiny_ocr", dataclasses.replace(default, epochs=3))
    preset, parsed = parse_config(["sd35m_ocr", "--learning-rate", "1e-5"])
    assert preset == "sd35m_ocr" and parsed == dataclasses.replace(PRESETS["sd35m_ocr"], learning_rate=1e-5)


def test_rewards_are_pairs_of_name_and_weight_and_the_resolution_is_two_numbers():
    _, parsed = parse_config("--rewards rapidocr 1 my_file:my_function -0.5 --resolution 32 48 --full-finetune".split())
    assert parsed.rewards == (("rapidocr", 1.0), ("my_file:my_function", -0.5))
    assert parsed.resolution == (32, 48)
    assert parsed.full_finetune and not parse_config(["--no-full-finetune"])[1].full_finetune


def test_every_field_is_explained_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code in (0, None)
    shown = " ".join(capsys.readouterr().out.split())
    body = ast.parse(inspect.getsource(config.Config)).body[0].body
    explained = {node.target.id: after.value.value for node, after in itertools.pairwise(body)
                 if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)}
    for field in dataclasses.fields(Config):
        assert len(explained[field.name]) > 5, field.name
        assert "--" + field.name.replace("_", "-") in shown
        assert explained[field.name].split()[0] in shown
    assert all(name in shown for name in PRESETS) and "values of tiny_ocr" in shown


def test_help_is_printed_once_when_several_ranks_are_asked_for_it(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"], quiet=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments, named", [
    (["--group-sise", "4"], ["--group-sise", "--group-size"]),
    (["tiny_orc"], ["tiny_orc", "tiny_ocr"]),
    (["--epochs", "many"], ["--epochs: not a whole number: 'many'"]),
    (["--beta", "much"], ["--beta: not a number: 'much'"]),
    (["--epochs"], ["Missing value for argument '--epochs'"]),
    (["--rule", "euler"], ["not a choice: 'euler'", "flow_sde", "cps"]),
    (["--resolution", "16"], ["--resolution", "16"]),
    (["--rewards", "rapidocr", "much"], ["--rewards", "much"]),
    (["--rewards", "rapidocr"], ["--rewards: expected name value [name value ...], not ['rapidocr']"]),
    (["sd35m_ocr", "tiny_ocr"], ["tiny_ocr"]),
    ("--rewards a 1 --rewards b 1".split(), ["--rewards is given twice"]),
    ("--rewards a 1 --epochs 3 --rewards=b".split(), ["--rewards is given twice", "--rewards=b"]),
    ("--group_size 4 --group-size 8".split(), ["--group-size is given twice (--group_size and --group-size)"]),
    ("--guard --no-guard".split(), ["--guard is given twice (--guard and --no-guard)"]),
    ("--no_guard --no-guard".split(), ["--guard is given twice"]),
    ("sd35m_ocr --seed=1 --seed=1".split(), ["--seed is given twice"]),
    ("--guard True".split(), ["'True' belongs to no option"]),
    ("-- --epochs 3".split(), ["'--epochs' belongs to no option"]),
])
def test_what_the_command_line_cannot_read_is_named_in_one_line(arguments, named):
    with pytest.raises(ConfigError) as error:
        parse_config(arguments)
    message = str(error.value)
    assert all(word in message for word in named), message
    assert "\n" not in message and not any(c in message for c in "╭╮╰╯│─\x1b") and "error" not in message.lower()


# ---------------------------------------------------------------------------------------------------------- validation

@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_described(preset):
    validate(PRESETS[preset])
    assert f"{batch_plan(PRESETS[preset], 8).samples} images" in describe(PRESETS[preset], 8)


@pytest.mark.parametrize("changes, names", [
    ({"group_size": 1}, "group-size is 1"),
    ({"groups_per_epoch": 0}, "groups-per-epoch is 0"),
    ({"updates_per_epoch": 13, "groups_per_epoch": 3, "group_size": 4}, "updates-per-epoch is 13: an epoch has only 12"),
    ({"num_steps": 0}, "num-steps is 0"),
    ({"train_batch": -1}, "train-batch is -1"),
    ({"rollout_batch": -1}, "rollout-batch is -1"),
    ({"epochs": -1}, "epochs is -1"),
    ({"seed": -1}, "seed is -1"),
    ({"clip_range": 0.0}, "clip-range is 0.0"),
    ({"beta": -0.1}, "beta is -0.1"),
    ({"learning_rate": float("nan")}, "learning-rate is nan"),
    ({"noise_level": float("inf")}, "noise-level is inf"),
    ({"noise_level": 0.0}, "noise-level is 0.0"),
    ({"guidance_scale": 0.5}, "guidance-scale is 0.5"),
    ({"ema_decay": 1.0}, "ema-decay is 1.0"),
    ({"timestep_fraction": 1.5}, "timestep-fraction is 1.5"),
    ({"window_size": 0, "timestep_fraction": 0.1}, "timestep-fraction is 0.1: of 8 steps it trains none"),
    ({"rule": "cps", "noise_level": 1.1}, "noise-level is 1.1: under cps"),
    ({"rule": "cps", "noise_level": 0.8, "window_size": 0, "timestep_fraction": 1.0}, "rule is 'cps': the last step"),
    ({"rule": "cps", "noise_level": 0.8, "window_size": 2, "window_range": (0, 8)}, "rule is 'cps': the last step"),
    ({"window_size": 2, "window_range": (0, 9)}, "window-range is (0, 9)"),
    ({"window_size": 6}, "window-size is 6"),
    ({"resolution": (0, 64)}, "resolution is (0, 64)"),
    ({"resolution": (64, 100_000)}, "resolution is (64, 100000)"),
    ({"seed": 2**63}, f"seed is {2**63}"),
    ({"noise_level": 1e-30}, "noise-level is 1e-30"),
    ({"rewards": (("rapidocr", 1.0), ("rapidocr", 2.0))}, "rewards is"),
    ({"run_name": "../elsewhere"}, "run-name is '../elsewhere'"),
    ({"guard": True, "rule": "cps", "noise_level": 0.8}, "guard is True: its ratio needs"),
    ({"eval_rewards": ("rapidocr_line",)}, "eval-rewards is ('rapidocr_line',): a reward is named twice, or trained on"),
    ({"eval_rewards": ("ocr", "ocr")}, "eval-rewards is ('ocr', 'ocr')"),
    ({"reward_urls": (("geneval", "http://host:1"),)}, "reward-urls is (('geneval', 'http://host:1'),): give 'geneval' a weight"),
    ({"reward_deadline": 4000.0}, "reward-deadline is 4000.0"),
    ({"reward_models": (("pickscore", "a"), ("pickscore", "b"))}, "reward-models is"),
    ({"lora_path": "adapter", "full_finetune": True}, "lora-path is 'adapter'"),
    ({"reward_deadline": 0.0}, "reward-deadline is 0.0"),
    ({"collective_timeout": 0.0}, "collective-timeout is 0.0"),
    ({"collective_timeout": 1000.0}, "reward-deadline is 600.0: other ranks wait --collective-timeout 1000 seconds"),
    ({"keep_checkpoints": 0}, "keep-checkpoints is 0"),
    ({"skip_nonfinite": -1}, "skip-nonfinite is -1"),
    ({"max_unanswered": 1.5}, "max-unanswered is 1.5"),
    ({"reward_batch": 0}, "reward-batch is 0"),
    ({"learning_rate_half_life": -1.0}, "learning-rate-half-life is -1.0"),
    ({"epochs": 10**15}, "epochs is 1000000000000000: it must be a finite number, 1,000,000,000 at most"),
    ({"collective_timeout": 1e14}, "collective-timeout is 1"),
    ({"rewards": (("rapidocr", 1e300),)}, "rewards is (('rapidocr', 1e+300),): weights must be finite and at most 1e30"),
])
def test_a_setting_that_cannot_be_is_named_with_its_value(changes, names):
    with pytest.raises(ConfigError) as error:
        validate(dataclasses.replace(Config(), **changes))
    assert str(error.value).startswith("--" + names) and "\n" not in str(error.value)


def test_a_continued_run_may_change_the_machine_and_the_length_alone():
    saved = to_dict(Config())
    free = dataclasses.replace(Config(), epochs=7, rollout_batch=3, train_batch=5, eval_every=2, eval_prompts=9,
                               eval_num_steps=3, eval_images=1, eval_only=True, save_every=9, run_name="x", output_dir="y",
                               reward_threads=2)
    assert changed_fields(saved, free) == []
    assert changed_fields(saved, dataclasses.replace(free, eval_only=False)) == ["eval_prompts", "eval_num_steps"]
    older = {name: value for name, value in saved.items() if name != "advantage_of"}       # it has no such setting
    assert changed_fields(older, free) == []
    assert changed_fields(older, dataclasses.replace(Config(), advantage_of="each")) == ["advantage_of"]
    assert changed_fields(saved, dataclasses.replace(Config(), seed=2)) == ["seed"]
    assert changed_fields(saved, dataclasses.replace(Config(), rewards=(("rapidocr", 1.0),))) == ["rewards"]
    assert changed_fields(saved, dataclasses.replace(Config(), resolution=(24, 56), beta=0.1)) == ["resolution", "beta"]


def test_a_directory_with_the_name_of_a_built_in_set_says_nothing_of_that_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("words", "mine"):
        Path(name).mkdir()
        Path(name, "train.txt").write_text("a cat\n")
    assert prompt_files(dataclasses.replace(Config(), prompts="words")) == {}
    assert list(prompt_files(dataclasses.replace(Config(), prompts="mine"))) == ["train.txt"]


def test_a_run_that_was_moved_with_its_model_goes_on_and_a_copy_of_it_is_told_both_paths(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "model").mkdir(parents=True)
    (old / "run").mkdir()
    settings = dataclasses.replace(Config(), model="model", rollout_batch=1, train_batch=1)
    monkeypatch.chdir(old)
    write_settings(Path("run"), settings, "tiny_ocr")
    Path("run/metrics.jsonl").touch()
    shutil.copytree(old, new)
    monkeypatch.chdir(new)
    with pytest.raises(ValueError, match=f"--model is '{new / 'model'}', but '' was started with '{old / 'model'}'"):
        continued(Path("run"), settings)
    shutil.rmtree(old)
    assert continued(Path("run"), settings) == settings


# ------------------------------------------------------------------------------------------------------- trained steps

def test_trained_steps_are_the_floor_of_the_fraction_or_the_window():
    steps = lambda **changes: dataclasses.replace(Config(), **{"window_size": 0, **changes}).trained_steps
    assert steps(num_steps=10, timestep_fraction=0.9) == 9
    assert steps(num_steps=10, timestep_fraction=0.99) == 9
    assert steps(num_steps=10, timestep_fraction=1.0) == 10
    assert [steps(num_steps=n, timestep_fraction=0.7) for n in (10, 20, 30)] == [7, 14, 21]      # as if not binary fractions
    assert steps(num_steps=10, window_size=3) == 3


# ---------------------------------------------------------------------------------------------------------- presets

# preset: groups, size, T, trained, guidance, rule, noise level, clip range, beta, std, dtype; after the published settings
PUBLISHED = {
    "sd35m_ocr": (48, 24, 10, 9, 4.5, "flow_sde", 0.7, 1e-4, 0.04, "global", "float16"),
    "sd35m_geneval": (48, 24, 10, 9, 4.5, "flow_sde", 0.7, 1e-4, 0.04, "global", "float16"),
    "sd35m_pickscore": (48, 24, 10, 9, 4.5, "flow_sde", 0.7, 1e-4, 0.01, "global", "float16"),
    "sd35m_ocr_4gpu": (16, 16, 10, 9, 4.5, "flow_sde", 0.7, 1e-4, 0.04, "global", "float16"),
    "sd35m_geneval_4gpu": (16, 16, 10, 9, 4.5, "flow_sde", 0.7, 1e-4, 0.04, "global", "float16"),
    "sd35m_pickscore_4gpu": (16, 16, 10, 9, 4.5, "flow_sde", 0.7, 1e-4, 0.01, "global", "float16"),
    "sd35m_ocr_1gpu": (8, 8, 10, 9, 4.5, "flow_sde", 0.7, 1e-4, 0.04, "global", "float16"),
    "sd35m_geneval_fast": (48, 24, 10, 3, 1, "cps", 0.8, 1e-5, 0, "global", "float16"),
    "sd35m_pickscore_fast": (64, 18, 10, 3, 1, "cps", 0.8, 1e-5, 0, "global", "float16"),
    "sd35m_ocr_guard": (48, 24, 10, 9, 4.5, "flow_sde", 0.7, 2e-6, 0, "group", "float16"),
    "flux_pickscore": (48, 24, 6, 5, 3.5, "flow_sde", 0.9, 1e-4, 0, "global", "bfloat16"),
    "flux_fast": (48, 24, 6, 3, 3.5, "cps", 0.8, 1e-5, 0, "group", "bfloat16"),
    "flux_geneval_fast": (48, 24, 6, 3, 3.5, "cps", 0.8, 1e-5, 0, "global", "bfloat16"),
    "qwen_image_pickscore": (32, 16, 10, 2, 4, "flow_sde", 1.2, 1e-4, 0, "global", "bfloat16"),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_preset_has_its_published_settings(preset):
    c = PRESETS[preset]
    assert PUBLISHED[preset] == (c.groups_per_epoch, c.group_size, c.num_steps, c.trained_steps, c.guidance_scale,
                                 c.rule, c.noise_level, c.clip_range, c.beta, c.advantage_std, c.dtype)
    task = preset.replace("qwen_", "").split("_")[1].replace("fast", "pickscore")
    evaluation = {"sd35m": 40, "flux": 28, "qwen": 50}[preset.split("_")[0]]
    assert c.rewards == ((task, 1.0),) and c.prompts.endswith(task) and c.resolution == (512, 512)
    assert c.learning_rate == (1e-4 if c.guard else 3e-4) and c.learning_rate_half_life == 0
    assert (c.lora_rank, c.lora_alpha, len(c.lora_targets)) == ((32, 64, 8) if "sd35m" in preset else (64, 128, 12))
    assert c.window_range == ((0, 3) if "flux" in preset else (0, 5)) or not c.window_size
    assert c.eval_num_steps == evaluation and not c.shared_start_noise and c.kl == "per_time"


def test_every_preset_has_its_authors_settings_or_is_said_to_be_untried():
    untried = {"flux2_klein_pickscore", "flux2_dev_pickscore", "z_image_pickscore", *LATE}
    assert set(PUBLISHED) == set(PRESETS) - {"tiny_ocr", "tiny_ocr_collapse", "tiny_ocr_awm"} - untried
    recipes = (Path(config.__file__).parent / "docs" / "recipes.md").read_text()
    lines = [line for line in recipes.splitlines() if "untried" in line]
    assert all(any(f"`{preset}`" in line for line in lines) for preset in untried)


# SD3's shift is 3. FLUX.1's is exp(mu), with mu by the line of its scheduler's settings at 32 x 32 patches.
LATE = {"sd35m_ocr_late": dict(shift=3.0),
        "flux_pickscore_late": dict(shift=math.exp(0.5 + (1024 - 256) / (4096 - 256) * (1.15 - 0.5)), sigma_min=1 / 6)}


@pytest.mark.parametrize("preset, schedule", LATE.items())
def test_late_windows_lie_at_the_noise_at_which_the_default_trains(preset, schedule):
    bounds = lambda c, sigmas: [sigmas[step].item() for step in c.window_range]
    default, late = PRESETS["tiny_ocr"], PRESETS[preset]
    assert default.shared_start_noise and late.shared_start_noise
    first, last = bounds(late, timestep_schedule(late.num_steps, **schedule))
    expected = bounds(default, timestep_schedule(default.num_steps))
    assert abs(first - expected[0]) < 0.03 and abs(last - expected[1]) < 0.05


@pytest.mark.parametrize("num_steps, trained", [(10, 9), (6, 5), (20, 19), (40, 39), (8, 7)])
def test_presets_train_as_many_steps_as_the_published_fraction(num_steps, trained):
    assert dataclasses.replace(PRESETS["sd35m_ocr"], num_steps=num_steps).trained_steps == trained


@pytest.mark.parametrize("preset, power", [("sd35m_ocr", 2), ("sd35m_geneval_fast", 2), ("sd35m_ocr_4gpu", 4), ("sd35m_ocr_1gpu", 4),
                                           ("sd35m_ocr_guard", 4), ("flux_pickscore", 6), ("flux_geneval_fast", 6)])
def test_the_average_of_a_preset_decays_as_that_of_the_published_weights(preset, power):
    assert PRESETS[preset].ema_decay == pytest.approx(0.9**power) and PRESETS[preset].ema_every == 8


@pytest.mark.parametrize("word, hint", [("--learning-rat", " (did you mean '--learning-rate'?)"), ("--lr", "")])
def test_an_option_that_is_unknown_names_one_that_is_like_it_beyond_its_dashes(word, hint):
    with pytest.raises(ConfigError) as error:
        parse_config([word, "1"])
    assert str(error.value) == f"unknown option {word!r}{hint}: --help lists them all"
