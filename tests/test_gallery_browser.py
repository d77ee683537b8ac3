"""The page in a browser, from the file system: nothing fetched, slider, keys, play, pointer, hostile prompts, weight, widths.

Skipped where Chromium or the package playwright is missing: pip install playwright, and a chromium on the PATH.
SCREENSHOTS=directory keeps what the tests see, at two widths, in light and dark.
"""

import os
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from helpers import CHEAP, metrics_of
from PIL import Image
from test_gallery import HOSTILE, make_run, page_of, runs_on

from harness.gallery import save_images, write_page

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture
def show(browser):
    """`show(page, size, **settings)`: the page, open; at the end it must have said and fetched nothing but files of its own."""
    contexts, said, fetched = [], [], []

    def open_page(path: Path, size: str = "desktop", **settings):
        width, height = SIZES[size]
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: "ERR_ABORTED" in request.failure or said.append(f"{request.url} {request.failure}"))
        page.on("request", lambda request: fetched.append(request.url))
        page.fetched = fetched
        page.goto(path.as_uri())
        page.wait_for_function("() => document.querySelector('.pictures img[src]')")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert fetched and all(url.startswith("file://") for url in fetched), fetched


def settled(page) -> None:
    """After the next frame, with its pictures decoded."""
    page.evaluate("""async () => {
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        await Promise.all([...document.querySelectorAll(".pictures img[src]")].map(image => image.decode()));
        await new Promise(done => requestAnimationFrame(done));
    }""")


def epochs_shown(page) -> set[str]:
    """Of the right-hand pictures in view, by the folders of their files."""
    settled(page)
    return set(page.evaluate("""() => [...document.querySelectorAll(".pictures li figure:last-child img[src]")]
        .filter(image => { const box = image.getBoundingClientRect(); return box.top < innerHeight && box.bottom > 0; })
        .map(image => image.src.split("/").at(-2))"""))


def readings(page) -> list[str]:
    settled(page)
    return page.locator(".readout b").all_text_contents()


def see_all(page) -> None:
    """Scroll past every curve, since they are drawn when seen, and back."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator("canvas").wait_for()
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    settled(page)


def folder(epoch: int) -> set[str]:
    return {f"epoch_{epoch:05d}"}


@pytest.fixture(scope="module")
def trained(train_here) -> Path:  # noqa: F811
    """The page of a real run, with evaluations of 7 prompts at epochs 0, 1 and 2."""
    return train_here("browsed", **CHEAP | dict(eval_prompts=7, eval_images=7), epochs=2, eval_every=1, learning_rate=3e-2) / "index.html"


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """The page of ten evaluations, and of as many prompts as fill several screens."""
    return page_of(make_run(tmp_path_factory.mktemp("runs") / "long", range(0, 100, 10), [f"prompt {i}" for i in range(60)], metrics=[
        {"epoch": e, "grad_norm": 1 / (e + 1)} | ({"eval/total": e / 100} if e % 10 == 0 else {"reward/total": e / 90})
        for e in range(100)]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_the_page_of_a_real_run_shows_pictures_scores_and_curves_and_fits_the_screen(show, trained, size, color_scheme):
    page = show(trained, size, color_scheme=color_scheme)
    settled(page)
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]
    assert page.locator(".pictures li").count() == 7
    see_all(page)
    said = page.locator(".chart, #curves-note").all_text_contents()
    names = {name.split("/")[-1] for line in metrics_of(trained.parent) for name in line} - {"epoch"}
    assert len(names) > 15 and not [name for name in names if name not in " ".join(said)]       # drawn, or constant and named
    scores = page.locator(".pictures figcaption span:last-child").all_text_contents()
    assert len(scores) == 14 and all(score.strip() for score in scores[:2])
    drawn = page.evaluate("""() => [...document.querySelectorAll(".chart canvas")].map(canvas =>
        new Set(new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size)""")
    assert min(drawn) > 5                                                        # lines, grid, digits: no empty canvas
    assert page.evaluate("[...document.images].every(image => image.alt !== '' || !image.src)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c < 60)")
    assert dark == (color_scheme == "dark")
    if "SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / f"{size}-{color_scheme}.png", full_page=True)


def test_the_slider_moves_every_picture_wherever_the_reader_is(show, long_run):
    page = show(long_run)
    assert epochs_shown(page) == folder(90)                                      # at first the last evaluation
    page.locator("#slider").fill("3")
    assert epochs_shown(page) == folder(30) and page.locator("#now").text_content() == "epoch 30"
    page.locator(".pictures li").nth(45).scroll_into_view_if_needed()
    page.wait_for_timeout(100)
    assert epochs_shown(page) == folder(30)                                      # those that come into view later too
    page.locator("#slider").fill("7")
    assert epochs_shown(page) == folder(70)
    bases = page.evaluate("[...document.querySelectorAll('.pictures li figure:first-child img[src]')].map(i => i.src.split('/').at(-2))")
    assert set(bases) == folder(0)
    for figure in page.locator(".pictures li").nth(45).locator("figure").all():   # the words belong to the picture
        epoch = int(figure.locator("img").get_attribute("src").split("/")[-2].split("_")[1])
        (score,) = (e["scores"]["total"][45] for e in runs_on(long_run)[0]["evaluations"] if e["epoch"] == epoch)
        said = figure.locator("figcaption span").all_text_contents()
        assert said[0] == (f"epoch {epoch}" if epoch else "base") and float(said[1].split()[-1]) == pytest.approx(score, abs=0.006)
    page.locator(".pictures li").nth(0).scroll_into_view_if_needed()
    page.wait_for_timeout(100)
    assert epochs_shown(page) == folder(70)
    texts = page.locator(".pictures .prompt").all_text_contents()
    assert texts == [f"prompt {i}" for i in range(60)]


def test_arrow_keys_home_and_end_move_through_training_with_and_without_the_slider_focused(show, long_run):
    page = show(long_run)
    for focused in False, True:
        if focused:
            page.locator("#slider").focus()
        for key, epoch in ("Home", 0), ("ArrowRight", 10), ("ArrowRight", 20), ("ArrowLeft", 10), ("End", 90), ("ArrowRight", 90):
            page.keyboard.press(key)
            assert epochs_shown(page) == folder(epoch), (focused, key)
    page.keyboard.press("Alt+ArrowUp")
    assert page.locator("#slider").get_attribute("aria-valuetext") == "epoch 90"


@pytest.mark.parametrize("reduced_motion", ["no-preference", "reduce"])
def test_play_goes_from_the_start_to_the_end_by_keyboard_and_slower_where_motion_is_unwanted(show, trained, reduced_motion):
    page = show(trained, reduced_motion=reduced_motion)
    page.locator("#play").focus()
    page.keyboard.press("Enter")
    assert epochs_shown(page) == folder(0) and page.locator("#play").text_content() == "Pause"
    started = time.monotonic()
    page.wait_for_function("() => document.querySelector('#play').textContent === 'Play'")
    took = time.monotonic() - started
    assert epochs_shown(page) == folder(2)
    assert took > (2.5 if reduced_motion == "reduce" else 1)


def test_the_pointer_on_a_curve_moves_the_slider_and_the_slider_the_line_on_every_curve(show, long_run):
    page = show(long_run)
    see_all(page)
    plots = page.locator(".u-over")
    assert plots.count() == 2                                                    # the score, and grad_norm

    def lines() -> list[int]:
        """The epoch at which each chart's line stands, by where it is on the screen; both span 99 epochs."""
        settled(page)
        return page.evaluate("""() => [...document.querySelectorAll(".u-over")].map(over => { const box = over.getBoundingClientRect(),
            line = over.querySelector(".u-cursor-x").getBoundingClientRect(); return Math.round((line.left - box.left) / box.width * 99); })""")

    page.locator("#slider").fill("4")
    assert lines() == [40, 40] and readings(page) == ["0.40", "0.43", "0.024"]  # held-out 40 / 100, training 39 / 90, 1 / 41
    box = plots.nth(0).bounding_box()
    page.mouse.move(box["x"] + box["width"] * 62 / 99, box["y"] + 50)
    assert lines() == [62, 62] and readings(page) == ["0.60", "0.69", "0.016"]
    assert page.locator("#slider").input_value() == "6" and epochs_shown(page) == folder(60)
    assert page.locator(".chart .name small").all_text_contents() == ["epoch 62"] * 2
    page.mouse.move(5, 5)
    assert lines() == [60, 60]                                                   # back to what is shown
    plots.nth(1).scroll_into_view_if_needed()
    box = plots.nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] * 18 / 99, box["y"] + 50)
    assert lines() == [18, 18] and page.locator("#slider").input_value() == "2"


def test_a_prompt_that_holds_a_script_is_shown_and_not_run(show, tmp_path):
    run = make_run(tmp_path / "<b>run", prompts=HOSTILE, model=HOSTILE[0], preset=HOSTILE[1], differs_from_preset={"model": HOSTILE[1]})
    page = show(page_of(run))
    settled(page)
    shown = page.locator(".pictures .prompt").all_text_contents()
    assert shown == HOSTILE
    assert HOSTILE[0] in page.locator("#settings").text_content() and HOSTILE[1] in page.locator("#settings").text_content()
    assert page.title() == "<b>run" == page.locator("h1").text_content()
    assert page.locator(".pictures script, .pictures img[onerror], h1 b").count() == 0
    assert page.locator(".pictures img").nth(1).get_attribute("alt") == f"epoch 10: {HOSTILE[0]}"


def test_several_runs_lie_over_each_other_and_are_chosen_by_a_picker(show, tmp_path, long_run):
    other = make_run(tmp_path / "other", (0, 15), [f"prompt {i}" for i in range(60)], metrics=[
        {"epoch": e, "eval/total": 0.5, "grad_norm": e} for e in range(0, 16, 5)], seed=2)
    write_page([long_run.parent, other], tmp_path / "both.html")
    page = show(tmp_path / "both.html")
    page.locator("#slider").fill("3")                                            # 0, 5, 10, 15, 20, ...
    settled(page)
    first = page.locator(".pictures li").nth(0)
    assert first.locator("figcaption span:first-child").all_text_contents() == ["base", "long, epoch 10", "other, epoch 15"]
    see_all(page)
    charts = page.locator(".chart .name").all_text_contents()
    assert charts == ["Score", "reward/total", "grad_norm"]
    assert page.locator(".chart").nth(0).locator("li").all_text_contents() == ["long0.100", "other0.500"]
    assert "seed" in page.locator("#settings table").nth(0).text_content()
    dashes = page.evaluate("[...document.querySelectorAll('.compared .swatch line')].map(l => l.getAttribute('stroke-dasharray'))")
    assert len(set(dashes)) == 2                                                 # told apart without colour
    page.locator(".compared input").nth(0).uncheck()
    settled(page)
    assert first.locator("figcaption span:first-child").all_text_contents() == ["base", "other, epoch 15"]
    page.locator(".compared input").nth(1).uncheck()
    settled(page)
    assert page.locator("#images").is_hidden()
    page.locator(".compared input").nth(0).check()
    settled(page)
    assert page.locator(".pictures li").count() == 60


def test_64_prompts_and_50_evaluations_are_seen_within_two_seconds_and_under_two_megabytes(show, tmp_path):
    """Pictures of 512 x 512, smooth ones with some grain; all evaluations are links to one, which a browser cannot know."""
    run = make_run(tmp_path / "wide", (), metrics=[
        {"epoch": e, **{f"metric_{i}": 1 / (e + i + 3) for i in range(20)}, "reward/total": e / 1000}
        | ({"eval/total": e / 1000} if e % 20 == 0 else {}) for e in range(1000)])
    coarse = np.random.default_rng(0).integers(0, 256, (64, 24, 24, 3), np.uint8)
    grain = np.random.default_rng(1).integers(0, 9, (512, 512, 3), np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((512, 512), Image.Resampling.BICUBIC)) // 8 * 7 + grain for image in coarse])
    prompts = [f"a photograph of {i} things on a table, in the rain, with a sign that says so" for i in range(64)]
    save_images(run, 0, images, prompts, {name: [i / 64 for i in range(64)] for name in ("total", "one", "other")})
    for i in range(1, 50):
        (run / "images" / f"epoch_{20 * i:05d}").symlink_to("epoch_00000")
    path = page_of(run)
    page = show(path)
    settled(page)
    seconds = page.evaluate("performance.now()") / 1000                          # since the browser began to open it
    files = [Path(unquote(urlsplit(url).path)) for url in page.fetched]
    weight = sum(file.stat().st_size for file in files)
    print(f"first view: {seconds:.2f} s, {len(files)} files, {weight / 1e6:.2f} MB")
    assert seconds < 10 and weight < 2e6 and len(files) < 64
    assert page.locator(".pictures li").count() == 64 and all(file.suffix in (".html", ".webp") for file in files)
    page.locator("#slider").fill("10")
    assert epochs_shown(page) == folder(200)
