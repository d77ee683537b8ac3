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
from tools.studio import PictureRequest

PROMPT, EVIL = 'the word "lamp"', '<script>window.ran = 1</script><img src=x onerror="window.ran = 1">${window.ran = 1}'
EVIL_NAME = "<img src=x onerror=window.ran=1>"
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
def server(runs):
    """(address, file of what it said)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = runs.parent / "said.txt"
    with open(said, "w") as file:
        process = subprocess.Popen([sys.executable, "-c", SERVER, "--output-dir", str(runs), "--port", str(port)], stdout=file,
                                   stderr=file, cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def answers() -> bool:
        assert process.poll() is None, said.read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers, 300)
        yield f"http://127.0.0.1:{port}/", said
    finally:
        process.kill()
        process.wait()


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


def test_a_prompt_gives_base_and_tuned_pictures_of_one_seed_scored_and_the_slider_leads_from_one_to_the_other(
        browser, server, runs, model):
    visit = Visit(browser, server[0])
    base, tuned = visit.draw(PROMPT, 2)
    request = PictureRequest(PROMPT, 1, 3, 2.0, (16, 32))
    studio = plain(model)
    studio.add(str(runs / "first"))
    assert np.array_equal(base, studio.draw("", request)) and np.array_equal(tuned, studio.draw("first, epoch 5", request))
    assert not np.array_equal(base, tuned)
    captions = visit.captions()
    assert captions[0].startswith("base\nrapidocr_line") and captions[1].startswith("first, epoch 5, strength 1\nrapidocr_line")
    visit.shot("drawn")

    def at_strength(value: str) -> np.ndarray:
        slider = visit.page.locator("#strength input[type=range]")
        slider.fill(value)
        slider.dispatch_event("pointerup")
        return visit.drawn("pictures", f"strength {value}\n", 2)[1]

    assert np.array_equal(at_strength("0"), base)
    assert np.array_equal(at_strength("0.5"), studio.draw("first, epoch 5", PictureRequest(PROMPT, 1, 3, 2.0, (16, 32), strength=0.5)))
    visit.end()


def test_what_goes_wrong_is_said_in_the_page_and_the_demo_lives_on(browser, server, runs):
    visit = Visit(browser, server[0])
    pictures = visit.draw(PROMPT, 2)
    visit.fill("path", "no/such/place")
    visit.page.click("#add")
    assert "'no/such/place' does not exist" in visit.problem("added")
    visit.fill("height", "20")
    visit.page.click("#draw")
    assert "takes multiples of 8" in visit.problem("status")
    visit.fill("height", "16")
    visit.fill("prompt", "a lamp without quotes")
    visit.page.click("#draw")
    visit.page.wait_for_selector("text=double quotes", timeout=60_000)
    visit.shot("wrong")
    for image, expected in zip(visit.draw(PROMPT, 2), pictures, strict=True):
        assert np.array_equal(image, expected)
    visit.end()


@pytest.mark.parametrize("width, height, scheme", [(1280, 900, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def test_prompts_and_names_that_hold_markup_are_shown_and_not_run_and_the_page_fits(browser, server, runs, width, height, scheme):
    visit = Visit(browser, server[0], width, height, scheme)
    visit.fill("negative", EVIL)
    visit.draw(EVIL, visit.page.locator("#adapters input").count() + 1)
    assert visit.page.locator("#status").inner_text().count(EVIL) == 2
    visit.fill("path", EVIL)
    visit.page.click("#add")
    assert EVIL in visit.problem("added")
    visit.fill("path", str(runs.parent / EVIL_NAME))
    visit.page.click("#add")
    visit.page.wait_for_function("name => document.querySelector('#added').innerText.includes(name)", arg=EVIL_NAME,
                                 timeout=60_000)
    assert EVIL_NAME in visit.page.locator("#adapters").inner_text()
    visit.draw(EVIL + " again", 3)
    assert EVIL_NAME in visit.captions()[2]
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.shot(f"markup-{width}")
    visit.end()


def test_the_server_calls_nobody(browser, server):
    Visit(browser, server[0])
    called = {line for line in server[1].read_text().splitlines() if line.startswith("NETWORK")}
    assert called and not [line for line in called if "127.0.0.1" not in line and "localhost" not in line], called
