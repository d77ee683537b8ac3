"""The demo as people meet it: the real server, driven in headless Chromium. Skipped where playwright or it is missing.

Its screenshots are written to $DEMO_SCREENSHOTS, if that is set.
"""

import base64
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import wait_until
from PIL import Image
from test_demo import change, make_run, plain
from test_families import TOKENS

from policy import Policy
from prompts import load_prompts
from tools import demo
from tools.studio import PictureRequest

SEEDS = 3
PROMPT, EVIL = 'the word "lamp"', '<script>window.ran = 1</script><img src=x onerror="window.ran = 1">${window.ran = 1}'
EVIL_NAME = "<img src=x onerror=window.ran=1>"
EXAMPLES = [prompt.text for prompt in load_prompts("words", "test")][::16]               # eight, from all over the set
# The server as it is, which says besides what it looks up and connects to.
SERVER = """import sys
sys.addaudithook(lambda event, args: event in ("socket.getaddrinfo", "socket.connect")
                 and print("NETWORK", args[1] if event == "socket.connect" else args[0], file=sys.stderr, flush=True))
from tools import demo
sys.exit(demo.main(sys.argv[1:]))"""


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> Path:
    """A run with an adapter, and beside it a directory with one, whose name is markup."""
    directory = tmp_path_factory.mktemp("place") / "runs"
    for scale, name in ((0.05, "tuned"), (0.1, "other")):
        policy = Policy(model, torch.device("cpu"), "float32", resolution=(16, 32), max_sequence_length=TOKENS, lora_rank=4)
        change(policy, scale)
        policy.save(directory.parent / name)
    make_run(directory / "first", str(directory.parent / "tuned"), (5,), model=model, resolution=(16, 32), eval_num_steps=3,
             guidance_scale=2.0, max_sequence_length=TOKENS)
    (directory.parent / "other").rename(directory.parent / EVIL_NAME)
    return directory


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """`serve(*arguments)`: (address, file of what it said) of a demo that answers."""
    processes = []

    def start(*arguments: str) -> tuple[str, Path]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        said = tmp_path_factory.mktemp("server") / "said.txt"
        with open(said, "w") as file:
            process = subprocess.Popen([sys.executable, "-c", SERVER, *arguments, "--port", str(port)], stdout=file, stderr=file,
                                       cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
        processes.append(process)

        def answers() -> bool:
            assert process.poll() is None, said.read_text()
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        wait_until(answers, 300)
        return f"http://127.0.0.1:{port}/", said

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(serve, runs):
    return serve("--output-dir", str(runs), "--num-seeds", str(SEEDS))


class Visit:
    """A page, with what it asked for and said."""

    def __init__(self, browser, address: str, width: int = 1280, height: int = 900, scheme: str = "light"):
        self.page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        self.address, self.requests, self.complaints = address, [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}") or dialog.dismiss())
        self.page.goto(address)
        self.page.wait_for_selector("#draw")

    def fill(self, field: str, value: str) -> None:
        self.page.locator(f"#{field} textarea, #{field} input[type=text], #{field} input[type=number]").first.fill(value)

    def draw(self, prompt: str, pictures: int) -> list[np.ndarray]:
        """The pictures for a prompt that does not stand there yet."""
        self.fill("prompt", prompt)
        self.page.click("#draw")
        return self.drawn("status", prompt, pictures)

    def drawn(self, place: str, words: str, pictures: int) -> list[np.ndarray]:
        """The pictures uint8 (H, W, 3), once `words` stand in `place` and nothing is still to come."""
        urls = self.page.wait_for_function("""([place, words, pictures]) => {
            const images = [...document.querySelectorAll('#pictures img')].map(image => image.src)
            return document.querySelector('#' + place).innerText.includes(words) && images.length == pictures
                && !document.querySelector('#pictures figure div') && images }""", arg=[place, words, pictures], timeout=60_000)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls.json_value()]

    def problem(self, place: str) -> str:
        return self.page.wait_for_selector(f"#{place} .problem", timeout=60_000).inner_text()

    def headings(self) -> list[str]:
        return [text.partition("\n")[0] for text in self.page.locator("#pictures h3").all_inner_texts()]

    def captions(self) -> list[str]:
        return self.page.eval_on_selector_all("#pictures figcaption", "all => all.map(one => one.innerText)")

    def shot(self, name: str) -> None:
        if folder := os.environ.get("DEMO_SCREENSHOTS"):
            self.page.screenshot(path=f"{folder}/{name}.png", full_page=True)

    def end(self) -> None:
        assert not [url for url in self.requests if not url.startswith((self.address, "data:", "blob:"))]
        assert not self.complaints
        assert self.page.evaluate("window.ran") is None
        self.page.context.close()


def expected(model: str, runs: Path, prompt: str, seeds: int = SEEDS, strength: float = 1.0) -> list[np.ndarray]:
    """The base's pictures of the first seeds, then the run's."""
    studio = plain(model)
    studio.add(str(runs / "first"))
    return [studio.draw(name, PictureRequest(prompt, seed, 3, 2.0, (16, 32), strength=strength))
            for name in ("", "first, epoch 5") for seed in range(1, seeds + 1)]


def same(found: list[np.ndarray], pictures: list[np.ndarray]) -> bool:
    return len(found) == len(pictures) and all(map(np.array_equal, found, pictures))


def test_the_first_example_is_drawn_as_the_page_opens_without_a_click(browser, server, runs, model):
    visit = Visit(browser, server[0])
    found = visit.drawn("status", f"{EXAMPLES[0]} | seeds 1 to {SEEDS}", 2 * SEEDS)
    assert same(found, expected(model, runs, EXAMPLES[0]))
    visit.shot("opened")
    visit.end()


def test_a_page_without_any_adapter_opens_with_the_base_and_no_error(browser, serve, tmp_path):
    visit = Visit(browser, serve("--output-dir", str(tmp_path), "--num-seeds", "2", "--prompts", "words")[0])
    visit.drawn("status", EXAMPLES[0], 2)
    assert visit.headings() == ["base"] and not visit.page.locator(".problem").count()
    assert "No run under" in visit.page.locator("#notes").inner_text()                     # what was drawn does not replace it
    visit.shot("without-adapter")
    visit.end()


def test_a_click_on_an_example_from_the_runs_test_prompts_draws_it(browser, server, runs, model):
    visit = Visit(browser, server[0])
    buttons = visit.page.locator("#examples button")
    assert buttons.all_inner_texts() == EXAMPLES
    visit.drawn("status", EXAMPLES[0], 2 * SEEDS)
    buttons.nth(2).click()
    assert same(visit.drawn("status", EXAMPLES[2], 2 * SEEDS), expected(model, runs, EXAMPLES[2]))
    visit.end()


def test_base_stands_above_tuned_with_a_seed_in_a_column_and_their_scores(browser, server):
    visit = Visit(browser, server[0])
    visit.draw(PROMPT, 2 * SEEDS)
    boxes = [image.bounding_box() for image in visit.page.locator("#pictures img").all()]
    base, tuned = boxes[:SEEDS], boxes[SEEDS:]
    assert len({box["y"] for box in base}) == len({box["y"] for box in tuned}) == 1 and base[0]["y"] < tuned[0]["y"]
    assert [box["x"] for box in base] == [box["x"] for box in tuned] and len({box["x"] for box in base}) == SEEDS
    assert visit.headings() == ["base", "first, epoch 5"]
    captions = visit.captions()
    assert [caption.split("\n")[0] for caption in captions] == [f"seed {seed}" for seed in range(1, SEEDS + 1)] * 2
    assert all("rapidocr_line " in caption for caption in captions)
    visit.shot("drawn")
    visit.end()


def test_the_number_of_seeds_is_the_readers(browser, server, runs, model):
    visit = Visit(browser, server[0])
    visit.fill("num_seeds", "1")
    assert same(visit.draw(PROMPT, 2), expected(model, runs, PROMPT, seeds=1))
    visit.end()


def test_the_slider_leads_from_the_base_to_the_adapter(browser, server, runs, model):
    visit = Visit(browser, server[0])
    visit.draw(PROMPT, 2 * SEEDS)

    def at_strength(value: str) -> list[np.ndarray]:
        slider = visit.page.locator("#strength input[type=range]")
        slider.fill(value)
        slider.dispatch_event("pointerup")
        return visit.drawn("pictures", f"strength {value}", 2 * SEEDS)

    found = at_strength("0")
    assert same(found[:SEEDS], found[SEEDS:])
    assert same(at_strength("0.5"), expected(model, runs, PROMPT, strength=0.5))
    visit.end()


def test_what_goes_wrong_is_said_in_the_page_and_the_demo_lives_on(browser, server, runs):
    visit = Visit(browser, server[0])
    pictures = visit.draw(PROMPT, 2 * SEEDS)
    visit.fill("path", "no/such/place")
    visit.page.click("#add")
    assert "'no/such/place' does not exist" in visit.problem("added")
    visit.fill("height", "20")
    visit.page.click("#draw")
    assert "takes multiples of 8" in visit.problem("status")
    visit.fill("height", "16")
    visit.fill("num_seeds", "17")
    visit.page.click("#draw")
    visit.page.wait_for_selector("#status .problem:has-text('seeds is 17')", timeout=60_000)
    visit.fill("num_seeds", str(SEEDS))
    visit.fill("prompt", "a lamp without quotes")
    visit.page.click("#draw")
    visit.page.wait_for_selector("text=double quotes", timeout=60_000)
    visit.shot("wrong")
    for image, expected in zip(visit.draw(PROMPT, 2 * SEEDS), pictures, strict=True):
        assert np.array_equal(image, expected)
    visit.end()


@pytest.mark.parametrize("width, height, scheme", [(1280, 900, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def test_prompts_and_names_that_hold_markup_are_shown_and_not_run_and_the_page_fits(browser, server, runs, width, height, scheme):
    visit = Visit(browser, server[0], width, height, scheme)
    visit.page.wait_for_selector("#pictures img", timeout=60_000)                          # by then it knows all adapters
    visit.fill("negative", EVIL)
    visit.draw(EVIL, SEEDS * (visit.page.locator("#adapters input").count() + 1))
    assert visit.page.locator("#status").inner_text().count(EVIL) == 2
    visit.fill("path", EVIL)
    visit.page.click("#add")
    assert EVIL in visit.problem("added")
    visit.fill("path", str(runs.parent / EVIL_NAME))
    visit.page.click("#add")
    visit.page.wait_for_function("name => document.querySelector('#added').innerText.includes(name)", arg=EVIL_NAME,
                                 timeout=60_000)
    assert EVIL_NAME in visit.page.locator("#adapters").inner_text()
    visit.draw(EVIL + " again", 3 * SEEDS)
    assert EVIL_NAME in visit.headings()[2]
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.shot(f"markup-{width}")
    visit.end()


def test_the_server_calls_nobody(browser, server):
    Visit(browser, server[0])
    called = {line for line in server[1].read_text().splitlines() if line.startswith("NETWORK")}
    assert called and not [line for line in called if "127.0.0.1" not in line and "localhost" not in line], called


@pytest.mark.parametrize("width", [1400, 390])
def test_an_exported_gallery_opens_from_the_disk_and_fits(browser, runs, tmp_path, width):
    assert demo.main(["--export", str(tmp_path), "--output-dir", str(runs), "--num-prompts", "2", "--num-seeds", "4"]) == 0
    page = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto((tmp_path / "index.html").as_uri())
    for image in page.locator("img").all():
        image.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every(image => image.naturalWidth == 32)")
    assert page.locator("img").count() == 2 * 2 * 4 and not complaints
    assert all(url.startswith(tmp_path.as_uri()) for url in requests)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()
