"""Rows of pictures as HTML, a base above its adapters, a column a seed; and a gallery of many prompts.

The gallery stands in one directory and opens from the file system, without a server or a network:

    DIR/index.html
    DIR/pictures-<random>/000-seed1-base.png, 000-seed1-adapter1.png ...
"""

import base64
import contextlib
import itertools
import math
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from harness.checkpoint import write_whole
from harness.gallery import TEMPLATES
from rewards import picture_file
from tools.studio import Picture, PictureRequest, Studio

MARK = '<meta name="generator" content="nano-flow-grpo, tools.demo">'      # tells our index.html from others


def mean_scores(pictures: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over those pictures that have it. A total of one reward is left out."""
    names = dict.fromkeys(name for scores in pictures for name in scores
                          if name != "total" or len(scores) > 2)
    values = {name: [scores[name] for scores in pictures if math.isfinite(scores.get(name, math.nan))]
              for name in names}
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def score_texts(pictures: list[dict[str, float]], of_base: list[dict[str, float]]) -> dict[str, str]:
    """The mean of each score, and in brackets what it gains on the base's."""
    base = mean_scores(of_base)
    gains = {name: (value, value - base.get(name, value)) for name, value in mean_scores(pictures).items()}
    return {name: f"{value:.3f} ({gain:+.3f})" if gain else f"{value:.3f}"
            for name, (value, gain) in gains.items()}


def png_url(picture: Picture, request: PictureRequest) -> str:
    """A picture as a data: URL, lossless."""
    return "data:image/png;base64," + base64.b64encode(picture_file(picture.image, "PNG")).decode()


def rows_html(rows: dict[str, list[Picture]], requests: list[PictureRequest],
              url: Callable[[Picture, PictureRequest], str] = png_url) -> str:
    """A row for the base and for each adapter, a column for each request. Words are escaped.

    rows: name ("" for the base, which is first) -> its pictures, of the first requests. Pictures that are
    still to come have their place.
    """
    def figure(request: PictureRequest, picture: Picture | None) -> dict:
        return {"seed": request.seed, "source": url(picture, request) if picture else "",
                "scores": mean_scores([picture.scores]) if picture else {}}

    def row(name: str, pictures: list[Picture]) -> dict:
        of_base = [picture.scores for picture in rows[""][:len(pictures)]]                 # of the same seeds
        return {"name": name or "base", "strength": requests[0].strength if name else 1,
                "scores": score_texts([picture.scores for picture in pictures], of_base),
                "is_mean": len(pictures) > 1,
                "figures": [figure(*pair) for pair in itertools.zip_longest(requests, pictures)]}

    height, width = requests[0].resolution
    return TEMPLATES.get_template("rows.html").render(rows=[row(*item) for item in rows.items()],
                                                      height=height, width=width)


@contextlib.contextmanager
def new_pictures(directory: Path) -> Iterator[Path]:
    """A new folder in `directory`, which replaces an earlier gallery's in the end. An error removes it.

    Raises ValueError in one line, before anything is drawn, if no gallery can stand in `directory`.
    """
    place, index = f"--export {str(directory)!r}", directory / "index.html"
    pictures = directory / f"pictures-{secrets.token_hex(4)}"
    try:
        earlier = index.read_text(errors="replace") if index.exists() else MARK
        if MARK not in earlier:
            raise ValueError(f"{place} holds an index.html that is no gallery of this program, and stays: "
                             "give another directory")
        pictures.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{place} is no directory that can be written ({error.strerror}): "
                         "give another") from error
    try:
        yield pictures
    except BaseException:
        shutil.rmtree(pictures, ignore_errors=True)
        raise
    # Remove only what the earlier page shows, because another folder may be the user's.
    for older in set(re.findall(r'src="(pictures-[0-9a-f]{8})/', earlier)):
        shutil.rmtree(directory / older, ignore_errors=True)


def write_gallery(studio: Studio, columns: list[list[PictureRequest]], pictures: Path, about: str) -> Path:
    """Draw each prompt's requests with the base and all adapters into `pictures`; return the page."""
    names = ["", *studio.adapters]
    scores, problems, sections = {name: [] for name in names}, [], []
    with tqdm(total=sum(map(len, columns)) * len(names), desc="pictures", leave=False, disable=None) as bar:
        for number, requests in enumerate(columns):
            rows = {name: [] for name in names}
            for request in requests:
                for name, row in rows.items():
                    row.append(studio.draw_and_score(name, request))
                    scores[name].append(row[-1].scores)
                    problems += filter(None, [row[-1].score_problem])
                    bar.update()

            def save(picture: Picture, request: PictureRequest) -> str:
                of = f"adapter{names.index(picture.name)}" if picture.name else "base"
                file = pictures / f"{number:03d}-seed{request.seed}-{of}.png"
                Image.fromarray(picture.image).save(file)
                return f"{pictures.name}/{file.name}"

            sections.append((requests[0].prompt, rows_html(rows, requests, save)))
    means = {name: score_texts(found, scores[""]) for name, found in scores.items()}
    page = pictures.parent / "index.html"
    write_whole(page, TEMPLATES.get_template("showcase.html").render(
        mark=MARK, about=about, names=list(dict.fromkeys(itertools.chain(*means.values()))), means=means,
        problems=problems, count=sum(map(len, scores.values())), sections=sections))
    return page
