"""The exported gallery: what stands in it, what a rerun replaces, and what is refused in one line."""

import dataclasses
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_demo import REQUEST, TOKENS, change, make_policy, make_run, plain

from rewards import jpeg_incompressibility
from tools import demo
from tools.demo import requests_of
from tools.showcase import mean_scores, new_pictures, rows_html, write_gallery
from tools.studio import Picture, Studio

PROMPTS = ['a "lamp"', "a <b>cat</b> & a dog", "a tree"]
ADAPTERS = ["first, epoch 5", "second, epoch 7"]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> Path:
    """Two runs with an adapter each, scored by the size of a JPEG, and a file of prompts."""
    place = tmp_path_factory.mktemp("runs")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    for scale, name, epoch in ((0.05, "first", 5), (0.1, "second", 7)):
        policy = make_policy(model)
        change(policy, scale)
        policy.save(place / "saved" / name)
        make_run(place / name, str(place / "saved" / name), (epoch,), model=model, resolution=(16, 32), eval_num_steps=3,
                 guidance_scale=2.5, max_sequence_length=TOKENS, rewards=(("jpeg_incompressibility", 1.0),),
                 prompts=str(place / "prompts.txt"))
    return place


@pytest.fixture(scope="module")
def gallery(runs, tmp_path_factory) -> Path:
    """What the command writes of the two runs, with two seeds."""
    place = tmp_path_factory.mktemp("export") / "new" / "gallery"
    adapters = [str(runs / "first"), str(runs / "second")]
    assert demo.main(["--export", str(place), "--adapters", *adapters, "--num-seeds", "2"]) == 0
    return place


@pytest.fixture(scope="module")
def studio(runs, model) -> Studio:
    studio = plain(model)
    for name in ("first", "second"):
        studio.add(str(runs / name))
    return studio


def images_of(page: str) -> list[tuple[str, str]]:
    """(alt, src) of each picture, in the order of the page."""
    return [(unescape(alt), src) for src, alt in re.findall(r'<img[^>]* src="([^"]*)"[^>]* alt="([^"]*)"', page)]


def kept(place: Path) -> dict[str, bytes]:
    """Every file below a directory, with what it holds."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ what is written

def test_a_gallery_holds_every_prompt_seed_base_and_adapter(gallery):
    images = images_of((gallery / "index.html").read_text())
    expected = [f"{name}, seed {seed}" for _ in PROMPTS for name in ("base", *ADAPTERS) for seed in (1, 2)]
    assert [alt for alt, _ in images] == expected


def test_a_gallerys_pictures_are_those_that_the_studio_draws(gallery, studio):
    images = iter(images_of((gallery / "index.html").read_text()))
    for prompt in PROMPTS:
        for name in ("", *ADAPTERS):
            for request in requests_of(dataclasses.replace(REQUEST, prompt=prompt, seed=1), 2):
                _, source = next(images)
                assert np.array_equal(np.asarray(Image.open(gallery / source)), studio.draw(name, request))


def test_a_gallery_names_prompts_as_text_and_each_adapter_by_its_run(gallery):
    page = (gallery / "index.html").read_text()
    assert [unescape(title) for title in re.findall("<h2>(.*?)</h2>", page)] == PROMPTS
    rows = re.findall(r"<h3>(.*?)<span", page)
    assert rows == ["base", *ADAPTERS] * len(PROMPTS)


def test_a_gallerys_scores_are_those_of_the_runs_reward(gallery):
    page = (gallery / "index.html").read_text()
    images = np.stack([np.asarray(Image.open(gallery / source)) for _, source in images_of(page)])
    shown = [float(value) for value in re.findall(r"<span>jpeg_incompressibility ([0-9.]+)</span>", page)]
    assert shown == pytest.approx(jpeg_incompressibility(images, [], []), abs=6e-4)                # three decimals
    means = [float(value) for value in re.findall(r"<td>([0-9.]+)", page)]
    base = [value for i, value in enumerate(shown) if i % 6 < 2]
    assert len(means) == 3 and means[0] == pytest.approx(np.mean(base), abs=1e-3)


def test_a_gallery_refers_to_nothing_but_its_own_files(gallery):
    page = (gallery / "index.html").read_text()
    places = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert places and all((gallery / place).is_file() for place in places)
    assert "//" not in page and "@import" not in page and "<script" not in page
    assert len(kept(gallery)) == 1 + len(images_of(page))


# ------------------------------------------------------------------------------------------------------------ a second export

def test_an_export_that_fails_leaves_the_earlier_one_as_it_was(gallery, studio):
    before = kept(gallery)
    untiled = dataclasses.replace(REQUEST, resolution=(20, 32))
    with pytest.raises(ValueError, match="multiples of 8"), new_pictures(gallery) as pictures:
        write_gallery(studio, [[REQUEST], [untiled]], pictures, "fails at its second prompt")
    assert kept(gallery) == before and len(list(gallery.iterdir())) == 2


def test_while_an_export_draws_the_earlier_one_is_whole(gallery, studio):
    before = kept(gallery)
    seen = []
    hook = studio.policy.pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(kept(gallery).items() >= before.items()))
    try:
        with pytest.raises(ValueError), new_pictures(gallery) as pictures:
            write_gallery(studio, [[dataclasses.replace(REQUEST, seed=99)], [dataclasses.replace(REQUEST, resolution=(20, 32))]],
                          pictures, "")
    finally:
        hook.remove()
    assert len(seen) > 3 and all(seen)


def test_an_export_replaces_the_earlier_one_and_leaves_other_files_alone(studio, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "pictures-holiday").mkdir()
    for prompt in ("one", "two"):
        with new_pictures(tmp_path) as pictures:
            page = write_gallery(studio, [[dataclasses.replace(REQUEST, prompt=prompt)]], pictures, "")
    assert "<h2>two</h2>" in page.read_text() and "<h2>one</h2>" not in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["index.html", "notes.txt", "pictures-holiday", pictures.name])
    assert len(list(pictures.iterdir())) == 3


@pytest.mark.parametrize("place, said", [
    ("file", "is no directory that can be written"), ("file/below", "is no directory that can be written"),
    ("/proc/nothing", "is no directory that can be written"), ("run", "no gallery of this program")])
def test_a_bad_directory_is_refused_in_one_line(place, said, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "index.html").write_text("the page of a run")
    before = kept(tmp_path)
    assert demo.main(["--export", str(tmp_path / place), "--output-dir", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: --export") and err.count("\n") == 1 and said in err, err
    assert kept(tmp_path) == before


# --------------------------------------------------------------------------------------------------------------- rows, scores

def test_pictures_to_come_have_their_place_in_rows():
    requests = requests_of(REQUEST, 3)
    drawn = Picture("", np.zeros((16, 32, 3), np.uint8), {})
    page = rows_html({"": [drawn, drawn], "tuned": [drawn]}, requests)
    assert page.count("<img") == 3 and page.count("aspect-ratio") == 3 and page.count(">seed 9<") == 2


def test_a_mean_is_taken_over_the_pictures_that_have_the_score():
    assert mean_scores([{"a": 1.0, "total": 1.0}, {}, {"a": 2.0, "total": 2.0}]) == {"a": 1.5}
    assert mean_scores([{"a": 1.0, "a/b": float("nan"), "total": 1.0}]) == {"a": 1.0, "total": 1.0}


def test_an_adapters_gain_is_on_the_base_of_the_same_seeds():
    image = np.zeros((16, 32, 3), np.uint8)
    base = [Picture("", image, {"a": score}) for score in (0.1, 0.9)]
    page = rows_html({"": base, "tuned": [Picture("tuned", image, {"a": 0.4})]}, requests_of(REQUEST, 2))
    assert "mean a 0.500" in page and "a 0.400 (+0.300)" in page
