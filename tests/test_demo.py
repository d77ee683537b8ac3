"""The demo's pictures: the base and its adapters, as diffusers draws them; what is found, and what is refused in one line."""

import dataclasses
import functools
import json
import os
import shutil
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel
from test_adapters import fresh_pipeline, written_by_peft
from test_families import CPU, TOKENS, change, make_policy
from tiny_models import save_flux2_klein

from config import PRESETS, Config, to_dict
from policy import Policy
from prompts import Prompt, load_prompts
from rewards import build_rewards
from tools import demo
from tools.demo import DemoOptions, choose_settings, load_examples, make_studio, one_line, requests_of
from tools.showcase import rows_html
from tools.studio import Picture, PictureRequest, Studio, locate, newest_run, newest_weights

REQUEST = PictureRequest('the word "lamp"', 7, 3, 2.5, (16, 32))
replace = dataclasses.replace


def plain(model: str, rewards=None) -> Studio:
    return Studio(Policy(model, CPU, "float32", resolution=(16, 32), max_sequence_length=TOKENS, lora_rank=0), rewards)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> list[str]:
    """Two of different ranks and layers: peft's format, and a checkpoint's."""
    places = [tmp_path_factory.mktemp(name) for name in ("by_peft", "checkpoint")]
    written_by_peft(model, places[0])
    policy = make_policy(model)
    change(policy, 0.05)
    policy.save(places[1])
    return [str(place) for place in places]


@pytest.fixture(scope="module")
def studio(model, adapters) -> Studio:
    """For tests that leave it as it is."""
    studio = plain(model)
    for adapter in adapters:
        studio.add(adapter)
    return studio


def of_pipeline(pipe, request: PictureRequest) -> np.ndarray:
    """What diffusers' own pipeline draws, float (H, W, 3) from 0 to 255."""
    guided = {"negative_prompt": request.negative_prompt} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    return 255 * pipe(request.prompt, height=request.resolution[0], width=request.resolution[1], max_sequence_length=TOKENS,
                      num_inference_steps=request.num_steps, guidance_scale=request.guidance_scale, output_type="np",
                      generator=torch.Generator().manual_seed(request.seed), **guided).images[0]


def agree(image: np.ndarray, expected: np.ndarray) -> bool:
    """Within the half step of rounding to 8 bits, and floating point's error."""
    return np.abs(image - expected).max() < 0.52


# ---------------------------------------------------------------------------------------------------------------- pictures

def test_the_base_and_each_adapter_are_drawn_as_diffusers_and_peft_draw_them_from_the_same_seed(each_model, tmp_path):
    studio, request = plain(each_model), replace(REQUEST, negative_prompt="a cat")
    base = studio.draw("", request)
    assert agree(base, of_pipeline(fresh_pipeline(each_model), request))
    written_by_peft(each_model, tmp_path / "first")
    written_by_peft(each_model, tmp_path / "second", LoraConfig(r=2, lora_alpha=5, target_modules=["attn.to_v", "proj_out"]))
    names = [studio.add(str(tmp_path / name)) for name in ("first", "second")]
    pipe = fresh_pipeline(each_model)
    for name, strength in ((names[0], 1.0), (names[1], 0.4)):
        image = studio.draw(name, replace(request, strength=strength))
        pipe.transformer = PeftModel.from_pretrained(fresh_pipeline(each_model).transformer, name)
        for layer in pipe.transformer.modules():
            if hasattr(layer, "scaling"):
                layer.scaling = {"default": strength * layer.scaling["default"]}
        assert agree(image, of_pipeline(pipe, request)), (name, strength)
        assert not np.array_equal(image, base)


def test_a_checkpoint_is_drawn_as_diffusers_draws_it_with_load_lora_weights_and_set_adapters(model, adapters, studio):
    pipe = fresh_pipeline(model)
    pipe.load_lora_weights(adapters[1] + "/adapter", adapter_name="tuned")
    for strength in (1.0, 0.5):
        pipe.set_adapters("tuned", strength)
        assert agree(studio.draw(adapters[1], replace(REQUEST, strength=strength)), of_pipeline(pipe, REQUEST))


def test_the_same_seed_gives_the_same_picture_whatever_was_drawn_between_and_another_seed_another(studio, adapters):
    for name in ("", *adapters):
        image = studio.draw(name, REQUEST)
        studio.draw(adapters[0], replace(REQUEST, seed=8, resolution=(32, 16), strength=0.3))
        assert image.shape == (16, 32, 3) and image.dtype == np.uint8
        assert np.array_equal(studio.draw(name, REQUEST), image)
        assert not np.array_equal(studio.draw(name, replace(REQUEST, seed=8)), image)


def test_strength_0_is_the_base_to_the_bit_which_is_the_model_without_any_adapter(model, studio, adapters):
    expected = plain(model).draw("", REQUEST)
    for name in adapters:
        assert not np.array_equal(studio.draw(name, REQUEST), expected)
        assert np.array_equal(studio.draw("", REQUEST), expected)
        assert np.array_equal(studio.draw(name, replace(REQUEST, strength=0)), expected)


def test_a_negative_prompt_matters_with_classifier_free_guidance_and_nowhere_else(studio, flux_model):
    negative = replace(REQUEST, negative_prompt="a cat")
    flux = plain(flux_model)
    for drawing, guidance_scale, matters in ((studio, 2.5, True), (studio, 1.0, False), (flux, 2.5, False)):
        images = [drawing.draw("", replace(request, guidance_scale=guidance_scale)) for request in (REQUEST, negative)]
        assert np.array_equal(*images) != matters, guidance_scale


def test_each_picture_is_scored_where_its_prompt_can_be_and_drawn_anyway_and_kept(studio, adapters):
    scored = Studio(studio.policy, build_rewards({"rapidocr_line": 2.0, "jpeg_compressibility": 1.0}))
    scored.adapters = studio.adapters
    steps = []
    pictures = [scored.draw_and_score(name, REQUEST, lambda: steps.append(1)) for name in ("", *adapters)]
    assert len(steps) == 3 * REQUEST.num_steps
    for picture in pictures:
        score = {key: value[0] for key, value in scored.rewards(picture.image[None], [REQUEST.prompt], [{}]).items()}
        assert picture.scores == score and set(score) == {"rapidocr_line", "jpeg_compressibility", "total"}
    assert scored.draw_and_score(adapters[0], REQUEST, steps.clear) is pictures[1]
    assert scored.draw_and_score(adapters[0], replace(REQUEST, strength=0.0)).image is not pictures[0].image and steps
    without = replace(REQUEST, prompt="a lamp")
    picture = scored.draw_and_score("", without)
    assert picture.scores == {} and "double quotes" in picture.score_problem and not pictures[0].score_problem
    assert np.array_equal(picture.image, studio.draw("", without))


def test_an_example_is_scored_with_what_its_prompt_set_says_of_it(studio, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text("def count(images, prompts, metadata): return [entry.get('count', 0) for entry in metadata]")
    monkeypatch.syspath_prepend(tmp_path)
    scored = Studio(studio.policy, build_rewards({"own_reward:count": 1.0}), [Prompt(REQUEST.prompt, {"count": 3})])
    assert scored.draw_and_score("", REQUEST).scores["own_reward:count"] == 3
    assert scored.draw_and_score("", replace(REQUEST, prompt="another")).scores["own_reward:count"] == 0


def test_half_precision_draws_the_base_to_the_bit_too(model, adapters):
    studio = Studio(Policy(model, CPU, "bfloat16", resolution=(16, 32), max_sequence_length=TOKENS, lora_rank=0), None)
    request = replace(REQUEST, num_steps=1)
    expected = studio.draw("", request)
    studio.add(adapters[0])
    assert np.array_equal(studio.draw(adapters[0], replace(request, strength=0)), expected)
    assert not np.array_equal(studio.draw(adapters[0], request), expected)


# ---------------------------------------------------------------------------------------------------------------- refusals

def refusal(call, *args, **kwargs) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        call(*args, **kwargs)
    message = one_line(error.value)
    assert "\n" not in message and len(message) < 500 and "--lora-path" not in message, message
    return message


def test_a_bad_adapter_is_refused_in_one_line_and_those_before_and_after_it_work_as_ever(model, flux_model, adapters, tmp_path):
    studio = plain(model)
    bad = {name: tmp_path / name for name in ("other", "layer", "torn", "empty", "whole/transformer", "run/checkpoints")}
    written_by_peft(flux_model, bad["other"], LoraConfig(r=3, target_modules=["attn.to_q", "proj_mlp"]))
    written_by_peft(model, bad["layer"])
    settings = json.loads((bad["layer"] / "adapter_config.json").read_text())
    settings["target_modules"] += ["norm_out.norm"]                                      # found after others became layers
    (bad["layer"] / "adapter_config.json").write_text(json.dumps(settings))
    written_by_peft(model, bad["torn"])
    weights = bad["torn"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name in ("empty", "whole/transformer", "run/checkpoints"):
        bad[name].mkdir(parents=True)
    base = studio.draw("", REQUEST)

    assert "does not fit" in refusal(studio.add, str(bad["other"]))
    assert "does not fit" in refusal(studio.add, str(bad["layer"]))
    assert "no whole safetensors file" in refusal(studio.add, str(bad["torn"]))
    assert "holds no adapter" in refusal(studio.add, str(bad["empty"]))
    assert "--full-finetune" in refusal(studio.add, str(tmp_path / "whole"))
    assert "no checkpoint yet" in refusal(studio.add, str(tmp_path / "run"))
    assert "does not exist" in refusal(studio.add, "no/such/place")
    assert "no adapter given" in refusal(studio.add, " ")
    assert np.array_equal(studio.draw("", REQUEST), base)
    first, second = adapters
    expected = studio.draw(studio.add(first), REQUEST)
    assert "does not fit" in refusal(studio.add, str(bad["layer"])) and "does not fit" in refusal(studio.add, str(bad["other"]))
    assert "here already" in refusal(studio.add, first)
    assert list(studio.adapters) == [first] and np.array_equal(studio.draw(first, REQUEST), expected)
    assert not np.array_equal(studio.draw(studio.add(second), REQUEST), expected)


@pytest.mark.parametrize("change, said", [
    ({"seed": -1}, "seed is -1"), ({"seed": None}, "seed is None"), ({"seed": 2**32}, "seed"), ({"num_steps": 0}, "is 0"),
    ({"num_steps": 2.5}, "whole number"), ({"guidance_scale": 0.5}, "guidance scale is 0.5"), ({"strength": float("nan")}, "nan"),
    ({"strength": 2.1}, "strength is 2.1"), ({"resolution": (16, None)}, "None"), ({"resolution": (16, 4096)}, "4096")])
def test_a_request_that_cannot_be_is_refused_in_one_line(change, said):
    assert said in refusal(replace, REQUEST, **change)


def test_a_size_that_the_patches_do_not_tile_is_refused_and_the_next_picture_is_drawn(studio):
    for resolution in ((20, 32), (0, 32), (-16, 32), (16, 2048)):
        assert "takes multiples of 8" in refusal(studio.draw, "", replace(REQUEST, resolution=resolution))
    assert studio.draw("", REQUEST).shape == (16, 32, 3)


def test_running_out_of_memory_is_said_in_one_line_and_the_next_picture_is_drawn(studio, adapters):
    expected = studio.draw(adapters[0], REQUEST)
    hook = studio.policy.pipe.transformer.register_forward_pre_hook(lambda *_: torch.empty(2**50))
    with pytest.raises(RuntimeError) as error:
        studio.draw(adapters[0], REQUEST)
    hook.remove()
    assert demo.is_for_user(error.value) and one_line(error.value).startswith("out of memory: draw a smaller picture")
    assert np.array_equal(studio.draw(adapters[0], REQUEST), expected)


@pytest.mark.parametrize("arguments, said", [
    (["--adapters", "a", "--adapters=b"], "--adapters is given twice"),
    (["--adapters", "no/such/place"], "'no/such/place' does not exist"), (["--adaptor", "x"], "did you mean '--adapters'?"),
    (["--model", "no/such/place/at/all"], "is no diffusers pipeline"), (["--port", "many"], "many"),
    (["--port", "70000"], "port"), (["--num-seeds", "0"], "--num-seeds is 0"), (["--num-prompts", "0"], "--num-prompts is 0"),
    (["--prompts", "no/such/place"], "no/such/place"), (["--adapters", "tests"], "holds no adapter")])
def test_a_bad_command_line_ends_in_one_line(arguments, said, capsys, tmp_path):
    port = [] if "--port" in arguments else ["--port", "0"]
    assert demo.main([*arguments, *port, "--output-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and said in err, err


def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert demo.main(["--port", str(port)]) == 2
        assert demo.free_port("127.0.0.1", 0) != port
    assert f"cannot listen on --host 127.0.0.1 --port {port}" in capsys.readouterr().err


def test_examples_come_from_all_over_the_test_split_of_the_runs_prompts():
    texts = [prompt.text for prompt in load_prompts("words", "test")]
    examples = load_examples(DemoOptions(num_prompts=4), Config(prompts="words"))
    assert [texts.index(example.text) for example in examples] == [0, 32, 64, 96]
    assert len(load_examples(DemoOptions(num_prompts=1000), Config(prompts="words"))) == 128


def test_a_run_whose_prompts_are_gone_has_no_examples_and_a_note_says_so(model, tmp_path):
    gone = Config(model=model, resolution=(16, 32), rewards=(), prompts=str(tmp_path / "gone.txt"))
    studio, notes = make_studio(DemoOptions(), gone, ())
    assert not studio.examples and "gone.txt" in notes[0]
    refusal(make_studio, DemoOptions(prompts=gone.prompts), gone, ())


def test_seeds_follow_the_first_and_a_count_that_cannot_be_is_refused_in_one_line():
    assert [request.seed for request in requests_of(REQUEST, 3)] == [7, 8, 9]
    for count in (0, 17, None, 2.5):
        assert f"seeds is {count}" in refusal(requests_of, REQUEST, count)
    assert "seed is 4294967296" in refusal(requests_of, replace(REQUEST, seed=2**32 - 1), 2)


def test_what_cannot_be_loaded_is_refused_in_one_line(model):
    config = Config(model=model, resolution=(16, 32))
    load = functools.partial(make_studio, adapters=())
    assert "multiples of 8" in refusal(load, DemoOptions(), replace(config, resolution=(20, 64)))
    unknown = replace(config, rewards=(("rapidocr_lin", 1.0),))
    assert "unknown reward 'rapidocr_lin'" in refusal(load, DemoOptions(rewards=unknown.rewards), unknown)
    studio, notes = load(DemoOptions(), unknown)                                              # of a run, not to be had here
    assert studio.rewards is None and "unknown reward 'rapidocr_lin'" in notes[0] and "has an adapter" in notes[1]


# ------------------------------------------------------------------------------------------------------------ runs on disk

def make_run(directory, adapter: str, epochs, **settings):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_dict(Config(**settings))))
    for epoch in epochs:
        shutil.copytree(adapter + "/adapter", directory / f"checkpoints/epoch_{epoch:05d}/adapter")
    return directory


def test_the_newest_run_is_the_one_whose_weights_were_written_last_and_of_it_the_last_checkpoint(adapters, tmp_path):
    assert newest_run(str(tmp_path)) is None
    first, second, other = (make_run(tmp_path / name, adapters[1], (10, 100), model=model)
                            for name, model in (("first", "here"), ("second", "here"), ("other", "there")))
    make_run(tmp_path / "failed", adapters[1], ())
    (first / "checkpoints" / "epoch_00110").mkdir()                                       # without weights
    for age, run in enumerate((second, other, first)):
        os.utime(newest_weights(run), (1e9 + age, 1e9 + age))
    assert newest_run(str(tmp_path)) == first and newest_run(str(tmp_path), "there") == other
    os.utime(newest_weights(second), (2e9, 2e9))
    assert newest_run(str(tmp_path), "here") == second
    for place in (second, second / "checkpoints/epoch_00100", second / "checkpoints/epoch_00100/adapter"):
        name, path = locate(str(place))
        assert name == "second, epoch 100" and "epoch_00100" in path
    assert locate(str(second / "checkpoints/epoch_00010"))[0] == "second, epoch 10"


def test_the_authors_layout_is_found_from_each_of_its_directories_and_named_by_its_run(model, tmp_path):
    run = tmp_path / "logs/ocr/sd3.5-M"
    for number in (60, 120, 1020):
        written_by_peft(model, run / f"checkpoints/checkpoint-{number}/lora")
    (run / "checkpoints/checkpoint-1080/lora").mkdir(parents=True)                         # without weights yet
    newest = run / "checkpoints/checkpoint-1020"
    for place in (run, run / "checkpoints", newest, newest / "lora"):
        name, path = locate(str(place))
        assert name == "ocr/sd3.5-M, checkpoint 1020" and str(newest) in path
    assert locate(str(run / "checkpoints/checkpoint-60"))[0] == "ocr/sd3.5-M, checkpoint 60"


def test_an_adapter_in_the_authors_layout_is_drawn_as_its_own_directory_is(model, studio, adapters, tmp_path):
    shutil.copytree(adapters[0], tmp_path / "logs/run/checkpoints/checkpoint-60/lora")
    theirs = plain(model)
    name = theirs.add(str(tmp_path / "logs/run"))
    assert np.array_equal(theirs.draw(name, REQUEST), studio.draw(adapters[0], REQUEST))


def test_the_newest_run_may_be_one_of_the_authors_where_the_model_is_given(model, tmp_path):
    written_by_peft(model, tmp_path / "sd3.5-M/checkpoints/checkpoint-60/lora")
    assert newest_run(str(tmp_path)) is None
    assert newest_run(str(tmp_path), model) == tmp_path / "sd3.5-M"


def test_settings_are_those_of_the_first_adapters_run_unless_told_otherwise(model, adapters, tmp_path):
    run = make_run(tmp_path / "run", adapters[1], (3,), model=model, rewards=(("jpeg_compressibility", 2.0),), eval_num_steps=5,
                   guidance_scale=3.0, resolution=(16, 32), max_sequence_length=9)
    for options in (DemoOptions(adapters=(f"{run}/checkpoints/epoch_00003/adapter",)), DemoOptions(output_dir=str(tmp_path))):
        config, chosen = choose_settings(options)
        assert len(chosen) == 1 and (config.model, config.eval_num_steps, config.guidance_scale) == (model, 5, 3.0)
        assert tuple(config.resolution) == (16, 32) and dict(config.rewards) == {"jpeg_compressibility": 2.0}
        assert config.max_sequence_length == 9
    config, _ = choose_settings(replace(options, resolution=(8, 8), rewards=(("rapidocr", 1.0),)))
    assert config.resolution == (8, 8) and config.rewards == (("rapidocr", 1.0),) and config.eval_num_steps == 5
    config, chosen = choose_settings(DemoOptions(output_dir=str(tmp_path / "nothing")))
    assert chosen == () and config == PRESETS["tiny_ocr"]


def test_other_models_start_with_published_settings_and_without_rewards(model, flux_model, tmp_path):
    for directory, steps, guidance_scale in ((model, 40, 4.5), (flux_model, 28, 3.5)):
        config, chosen = choose_settings(DemoOptions(model=directory, output_dir=str(tmp_path)))
        assert chosen == () and (config.model, config.eval_num_steps, config.guidance_scale) == (directory, steps, guidance_scale)
        assert config.rewards == () and config.resolution == (512, 512) and config.prompts == "ocr"


@pytest.mark.slow
def test_the_page_of_a_distilled_model_draws_without_guidance_and_asks_for_none(model, tmp_path):
    gradio = pytest.importorskip("gradio")
    distilled = save_flux2_klein(tmp_path, is_distilled=True)
    for directory, scale in ((distilled, 1.0), (model, PRESETS["sd35m_ocr"].guidance_scale)):
        config, _ = choose_settings(DemoOptions(model=directory, output_dir=str(tmp_path)))
        assert config.guidance_scale == scale
        parts = SimpleNamespace()
        with gradio.Blocks():
            demo.lay_out_settings(parts, plain(directory), config, 1)
        assert parts.guidance.visible == parts.negative.visible == (scale != 1)


# -------------------------------------------------------------------------------------------------------------------- text

def test_words_reach_the_page_escaped():
    evil = '<script>alert(1)</script><img src=x onerror="alert(1)">'
    request = replace(REQUEST, prompt=evil, negative_prompt=evil)
    image = np.zeros((16, 32, 3), np.uint8)
    page = rows_html({"": [Picture("", image, {evil: 1.0})], evil: [Picture(evil, image, {evil: 2.0})]}, [request])
    page += demo.caption_html([request]) + demo.message_html("problem", evil)
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") == 9
