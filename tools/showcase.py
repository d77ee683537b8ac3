"""Rows of pictures as HTML, a base above its adapters, a column a seed; and a gallery of many prompts.

The gallery stands in one directory and opens from the file system, without a server or a network:

    DIR/index.html
    DIR/pictures-<random>/000-seed1-base.png, 000-seed1-adapter1.png ...
"""

import base64
import contextlib
import io
import math
import secrets
import shutil
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from harness.checkpoint import write_whole
from tools.studio import Picture, PictureRequest, Studio

MARK = '<meta name="generator" content="nano-flow-grpo, tools.demo">'      # tells our index.html from others

ROWS_CSS = """
.rows { --line: var(--border-color-primary, #8885); }
.rows h3 { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline;
  gap: 0 16px; margin: 18px 0 8px; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
.rows h3:first-child { margin-top: 8px; }
.rows .scores { font-weight: 400; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
.rows .row { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px; }
.rows figure { max-width: 560px; margin: 0; border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }
.rows figure > div { background: var(--line); opacity: 0.4; }
.rows img { display: block; width: 100%; height: auto; margin: 0; }
.rows img.small { image-rendering: pixelated; }
.rows figcaption { display: flex; flex-wrap: wrap; gap: 0 12px; padding: 5px 8px 6px; font-size: 0.8rem;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.rows figcaption :first-child { margin-right: auto; }
"""

PAGE_CSS = """
:root { color-scheme: light dark; font-family: ui-sans-serif, system-ui, sans-serif; line-height: 1.45; }
body { max-width: 1240px; margin: 0 auto; padding: 16px 20px 48px; }
h1 { font-size: 1.5rem; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 75ch; overflow-wrap: anywhere; }
section { margin-top: 28px; padding-top: 18px; border-top: 1px solid #8885; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 12px 0; }
th, td { text-align: right; padding: 5px 14px; border-bottom: 1px solid #8885; }
th:first-child { text-align: left; padding-left: 0; }
.problem { border-left: 5px solid #d33; padding-left: 12px; }
"""


# ---- scores ------------------------------------------------------------------------------------------------

def mean_scores(pictures: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over those pictures that have it. A total of one reward is left out."""
    names = dict.fromkeys(name for scores in pictures for name in scores
                          if name != "total" or len(scores) > 2)
    values = {name: [scores[name] for scores in pictures if math.isfinite(scores.get(name, math.nan))]
              for name in names}
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def score_text(value: float, of_base: float) -> str:
    """A score, and in brackets what it gains on the base's."""
    gain = value - of_base
    return f"{value:.3f} ({gain:+.3f})" if gain else f"{value:.3f}"


# ---- rows of pictures --------------------------------------------------------------------------------------

def png_url(picture: Picture, request: PictureRequest) -> str:
    """A picture as a data: URL, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(picture.image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def rows_html(rows: dict[str, list[Picture]], requests: list[PictureRequest],
              url: Callable[[Picture, PictureRequest], str] = png_url) -> str:
    """A row for the base and for each adapter, a column for each request. Words are escaped.

    rows: name ("" for the base, which is first) -> its pictures, of the first requests. Pictures that are
    still to come have their place.
    """
    height, width = requests[0].resolution
    small = ' class="small"' if max(height, width) < 256 else ""           # few pixels, shown as they are
    place = f'<div style="aspect-ratio: {width} / {height}"></div>'

    def figure(name: str, request: PictureRequest, picture: Picture | None) -> str:
        shown, captions = place, [f"seed {request.seed}"]
        if picture:
            source = escape(url(picture, request))
            shown = (f'<img{small} src="{source}" width="{width}" height="{height}" loading="lazy" '
                     f'alt="{escape(name or "base")}, seed {request.seed}">')
            if not source.startswith("data:"):               # browsers open no data: URL
                shown = f'<a href="{source}">{shown}</a>'
            captions += [f"{key} {value:.3f}" for key, value in mean_scores([picture.scores]).items()]
        spans = "".join(f"<span>{escape(caption)}</span>" for caption in captions)
        return f"<figure>{shown}<figcaption>{spans}</figcaption></figure>"

    def row(name: str, pictures: list[Picture]) -> str:
        scores = mean_scores([picture.scores for picture in pictures])
        base = mean_scores([picture.scores for picture in rows[""][:len(pictures)]])       # of the same seeds
        mean = "mean " if len(pictures) > 1 else ""
        texts = [f"{mean}{key} {score_text(value, base.get(key, value))}" for key, value in scores.items()]
        strength = f", strength {requests[0].strength:g}" if name and requests[0].strength != 1 else ""
        missing = [None] * (len(requests) - len(pictures))
        figures = "".join(figure(name, *pair) for pair in zip(requests, [*pictures, *missing]))
        return (f'<h3>{escape((name or "base") + strength)}<span class="scores">'
                f'{escape(", ".join(texts))}</span></h3><div class="row">{figures}</div>')

    return f'<div class="rows">{"".join(row(*item) for item in rows.items())}</div>'


# ---- the gallery -------------------------------------------------------------------------------------------

@contextlib.contextmanager
def new_pictures(directory: Path) -> Iterator[Path]:
    """A new folder in `directory`, which replaces earlier ones in the end, and is removed after an error.

    Raises ValueError in one line, before anything is drawn, if no gallery can stand in `directory`.
    """
    place, index = f"--export {str(directory)!r}", directory / "index.html"
    pictures = directory / f"pictures-{secrets.token_hex(4)}"
    try:
        if index.exists() and MARK not in index.read_text(errors="replace"):
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
    for older in directory.glob("pictures-*"):
        if older != pictures:
            shutil.rmtree(older, ignore_errors=True)


def write_gallery(studio: Studio, columns: list[list[PictureRequest]], pictures: Path, about: str) -> Path:
    """Draw requests, a list for each prompt, with the base and each adapter; return the page of them.

    pictures: a folder of `new_pictures`. The page beside it is replaced when all is drawn.
    Raises ValueError, OSError.
    """
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

            sections.append(f"<section><h2>{escape(requests[0].prompt)}</h2>"
                            f"{rows_html(rows, requests, save)}</section>")
    page = pictures.parent / "index.html"
    write_whole(page, gallery_html(about, scores, problems, sections))
    return page


def gallery_html(about: str, scores: dict[str, list[dict[str, float]]], problems: list[str],
                 sections: list[str]) -> str:
    """The whole page. scores: name -> those of all its pictures."""
    means = {name: mean_scores(found) for name, found in scores.items()}
    keys = list(dict.fromkeys(key for mean in means.values() for key in mean))

    def line(name: str, mean: dict[str, float]) -> str:
        cells = [score_text(mean[key], means[""].get(key, mean[key])) if key in mean else "" for key in keys]
        return f'<tr><th>{escape(name or "base")}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'

    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "".join(line(*item) for item in means.items())
    table = (f'<div class="table"><table><tr><th>Mean of all pictures</th>{head}</tr>{body}</table></div>'
             if keys else "")
    count = sum(map(len, scores.values()))
    said = "".join(f'<p class="problem">No score for {len(problems)} of {count} pictures, first because of: '
                   f'{escape(problem)}</p>' for problem in problems[:1])
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">{MARK}
<title>Base and tuned, seed by seed</title><style>{PAGE_CSS}{ROWS_CSS}</style></head><body>
<h1>Base and tuned, seed by seed</h1><p>{escape(about)}</p>{table}{said}
{"".join(sections)}
</body></html>
"""
