"""The web demo: a base model beside its adapters, the same prompt and seed, the reward beneath each picture.

    python -m tools.demo [--model PATH_OR_HUB_ID] [--adapters A B ...] [--rewards name weight ...]

An adapter is a run under runs/ (its newest weights), a checkpoint of one, a peft or diffusers directory, or a
hub id. Without any, it is the newest run's. Steps, guidance, size and rewards are those of its run. The
picture of a seed is the one that diffusers' pipeline makes with the adapter's weights and
`generator=torch.Generator().manual_seed(seed)`.
"""

import base64
import dataclasses
import importlib.util
import io
import itertools
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from PIL import Image

from config import PRESETS, Config, parse_options, refuse_unknown
from families import FLUX
from harness.faults import is_out_of_memory
from harness.program import run_as_program
from policy import Policy, check_model
from rewards import RewardError, Rewards, build_rewards
from tools.studio import (
    MOST_GUIDANCE, MOST_STEPS, MOST_STRENGTH, Picture, PictureRequest, Studio, locate, newest_run,
    read_config, run_containing)

REWARD_DEADLINE = 20.0           # seconds for a served reward, because somebody waits at the page


@dataclass(frozen=True)
class DemoOptions:
    """The base model beside its adapters, in the browser: same prompt, same seed, the reward beneath."""

    model: str = ""
    """A StableDiffusion3Pipeline or FluxPipeline: a directory or hub id. Empty: the first adapter's run's."""
    adapters: tuple[str, ...] = ()
    """Runs, checkpoints, adapter directories or hub ids. Empty: the model's newest run, if there is one."""
    rewards: tuple[tuple[str, float], ...] = ()
    """Rewards and their weights, as train.py takes them. Empty: those of the first adapter's run."""
    resolution: tuple[int, int] | None = None
    """Height and width at the start, in pixels. None: the run's."""
    max_sequence_length: int | None = None
    """T5 tokens of a prompt. None: the run's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the network's weights and arithmetic; auto is float32 on a CPU, bfloat16 on a GPU."""
    offload_text_encoders: bool = False
    """Text encoders wait in host memory and visit the device for new prompts."""
    output_dir: str = "runs"
    """Where runs are kept."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 7860
    """Port to listen on; 0 for any that is free."""
    share: bool = False
    """Open a public link through gradio's servers."""


def choose_settings(options: DemoOptions) -> tuple[Config, tuple[str, ...]]:
    """Sampling settings and adapters: of the first adapter's run, or of the preset closest to the model.

    Raises ValueError in one line for what is not there. Loads nothing.
    """
    if options.model and Path(options.model).exists():           # as runs and presets write it
        options = dataclasses.replace(options, model=os.path.normpath(options.model))
    adapters = options.adapters
    if not adapters and (run := newest_run(options.output_dir, options.model)):
        adapters = (str(run),)
    run = run_containing(adapters[0]) if adapters else None
    if run:
        config = read_config(run)
    else:
        model = options.model or Config.model
        config = next((preset for preset in PRESETS.values() if preset.model == model), None)
        config = config or PRESETS["flux_pickscore" if check_model(model) is FLUX else "sd35m_ocr"]
        rewards = config.rewards if model == Config.model else ()
        config = dataclasses.replace(config, model=model, rewards=rewards)
    names = ("model", "rewards", "resolution", "max_sequence_length")
    given = {name: value for name in names if (value := getattr(options, name))}
    config = dataclasses.replace(config, **given)
    check_model(config.model)
    for adapter in adapters:
        locate(adapter)
    return config, adapters


# ---- errors ------------------------------------------------------------------------------------------------

def is_for_user(error: Exception) -> bool:
    """Whether the error tells the user something. Other errors are the programmer's, and get a traceback."""
    return isinstance(error, ValueError | OSError | ImportError | RewardError) or is_out_of_memory(error)


def one_line(error: Exception) -> str:
    """The error in one line for the page, which has no flags."""
    if is_out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return ("out of memory: draw a smaller picture, or start the demo with --offload-text-encoders or "
                "--dtype bfloat16")
    line = " ".join(str(error).split())
    return line.replace("--lora-path", "adapter").replace("--resolution", "size (height, width)")


# ---- HTML --------------------------------------------------------------------------------------------------

CSS = """
h1 { font-size: 1.5rem; font-weight: 700; margin: 8px 0 2px; }
.cards { display: flex; flex-wrap: wrap; gap: 16px; }
.cards figure { flex: 1 1 var(--card); max-width: 560px; margin: 0;
  border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden;
  background: var(--block-background-fill); }
.cards figure > div { background: var(--background-fill-secondary); }
.cards img { display: block; width: 100%; height: auto; margin: 0; }
.cards img.small { image-rendering: pixelated; }
.cards figcaption { padding: 8px 12px 10px; overflow-wrap: anywhere; }
.cards figcaption b { display: block; }
.cards .score { display: flex; justify-content: space-between; gap: 12px;
  font-variant-numeric: tabular-nums; }
#draw, #another, #add { align-self: center; }
.drawn { opacity: 0.75; margin: 0 2px; overflow-wrap: anywhere; white-space: pre-wrap; }
.note, .problem { margin: 0; padding: 10px 14px; border-radius: 8px;
  border: 1px solid var(--border-color-primary); border-left-width: 5px;
  overflow-wrap: anywhere; white-space: pre-wrap; }
.drawn + .problem { margin-top: 8px; }
.problem { border-left-color: #d33; }
.problem::before { content: "Error: "; font-weight: 600; }
"""


def png_url(image: np.ndarray) -> str:
    """A picture as a data: URL, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def message_html(kind: str, text: str) -> str:
    return f'<p class="{kind}" role="{"alert" if kind == "problem" else "note"}">{escape(text)}</p>'


def caption_html(request: PictureRequest) -> str:
    without = f", without: {request.negative_prompt}" if request.negative_prompt else ""
    return message_html("drawn", f"{request.prompt} | seed {request.seed}, {request.num_steps} steps, "
                                 f"guidance {request.guidance_scale:g}{without}")


def cards_html(pictures: list[Picture], request: PictureRequest, coming: list[str] = []) -> str:
    """The pictures, and the places of those to come, side by side if there is room. Words are escaped."""
    height, width = request.resolution
    small = ' class="small"' if max(height, width) < 256 else ""           # few pixels, shown as they are

    def score(name: str, value: float) -> str:
        gain = value - pictures[0].scores.get(name, value)
        against_base = f" ({gain:+.3f})" if gain else ""
        return f'<span class="score"><span>{escape(name)}</span><span>{value:.3f}{against_base}</span></span>'

    def card(name: str, content: str, scores: dict[str, float]) -> str:
        strength = f", strength {request.strength:g}" if name else ""
        shown = {key: value for key, value in scores.items() if key != "total" or len(scores) > 2}
        return (f"<figure>{content}<figcaption><b>{escape((name or 'base') + strength)}</b>"
                f"{''.join(score(*item) for item in shown.items())}</figcaption></figure>")

    def image(picture: Picture) -> str:
        return (f'<img{small} src="{png_url(picture.image)}" width="{width}" height="{height}" '
                f'alt="{escape(picture.name or "base")}">')

    place = f'<div style="aspect-ratio: {width} / {height}"></div>'
    figures = [card(picture.name, image(picture), picture.scores) for picture in pictures]
    figures += [card(name, place, {}) for name in coming]
    least_width = 280 if width > 1.5 * height else 130
    return f'<div class="cards" style="--card: {least_width}px">{"".join(figures)}</div>'


# ---- the page ----------------------------------------------------------------------------------------------

def build_page(studio: Studio, config: Config, notes: list[str]):
    """The gradio page, and how it is served. Text reaches it escaped, or in parts that show text as text."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    with gr.Blocks(title="nano-flow-grpo", analytics_enabled=False) as page:
        parts = lay_out(studio, config, notes)
        connect(page, parts, studio)
    page.queue(max_size=32)
    font = ("ui-sans-serif", "system-ui", "sans-serif")      # the reader's own, because nothing is fetched
    theme = gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace"))
    return page, dict(css=CSS, theme=theme, footer_links=[], run_history=False, ssr_mode=False, quiet=True)


def lay_out(studio: Studio, config: Config, notes: list[str]) -> SimpleNamespace:
    """Everything on the page, from top to bottom."""
    import gradio as gr

    parts = SimpleNamespace()
    guided = studio.policy.branches(2.0) == 2                # by classifier-free guidance
    example = 'the word "lamp"' if config.prompts == "words" else 'a sign that says "hello"'
    gr.HTML("<h1>Base and tuned, side by side</h1>" + escape(f"{config.model} on {studio.policy.device}"))
    with gr.Row():
        parts.prompt = gr.Textbox(example, label="Prompt", max_length=2000, scale=5, min_width=300,
                                  elem_id="prompt")
        parts.go = gr.Button("Draw", variant="primary", scale=1, min_width=120, elem_id="draw")
    parts.status = gr.HTML("".join(message_html("note", note) for note in notes), elem_id="status",
                           js_on_load=None, min_height=56)
    parts.pictures = gr.HTML("", elem_id="pictures", js_on_load=None)
    with gr.Row():
        parts.strength = gr.Slider(0, MOST_STRENGTH, 1, step=0.05, label="Adapter strength", min_width=220,
                                   info="0 is the base, 1 as trained", elem_id="strength")
        parts.steps = gr.Slider(1, MOST_STEPS, config.eval_num_steps, step=1, label="Steps", min_width=220,
                                info="of the ODE", elem_id="steps")
        parts.guidance = gr.Slider(1, MOST_GUIDANCE, config.guidance_scale, step=0.1, label="Guidance",
                                   info="1 is none" if guided else "an input of this model", min_width=220,
                                   elem_id="guidance")
    with gr.Row():
        parts.seed = gr.Number(1, label="Seed", precision=0, min_width=120, elem_id="seed")
        parts.other_seed = gr.Button("Another seed", min_width=120, elem_id="another")
        height, width = config.resolution
        parts.height = gr.Number(height, label="Height", precision=0, min_width=100, elem_id="height")
        parts.width = gr.Number(width, label="Width", precision=0, min_width=100, elem_id="width")
    parts.negative = gr.Textbox(label="Negative prompt", max_length=2000, visible=guided, elem_id="negative",
                                info="what guidance leads away from; without guidance it is unused")
    names = list(studio.adapters)
    parts.chosen = gr.CheckboxGroup(names, value=names, label="Adapters shown", elem_id="adapters")
    with gr.Row():
        parts.path = gr.Textbox(label="Add an adapter", max_length=1000, scale=5, min_width=300,
                                placeholder="a run, a checkpoint, a directory, or owner/name on the hub",
                                elem_id="path")
        parts.more = gr.Button("Add", scale=1, min_width=120, elem_id="add")
    parts.added = gr.HTML("", elem_id="added", js_on_load=None)
    return parts


def connect(page, parts: SimpleNamespace, studio: Studio) -> None:
    """What happens on the page: pictures are drawn, one request at a time, and adapters are added."""
    import gradio as gr

    def draw(prompt, negative, seed, steps, guidance, height, width, strength, names, progress=gr.Progress()):
        def request() -> PictureRequest:
            without = negative if guidance != 1 else ""
            return PictureRequest(prompt, seed, steps, guidance, (height, width), without, strength)

        yield from draw_cards(studio, request, names, progress)

    def add(path, chosen):
        try:
            name = studio.add(path)
        except Exception as error:
            if not is_for_user(error):
                raise
            return message_html("problem", one_line(error)), path, gr.update()
        chosen = gr.update(choices=list(studio.adapters), value=[*chosen, name])
        return message_html("note", f"added {name}: draw again"), "", chosen

    p, one_at_a_time = parts, dict(concurrency_limit=1, concurrency_id="model", api_visibility="private")
    quiet = dict(api_visibility="private", show_progress="hidden")
    inputs = [p.prompt, p.negative, p.seed, p.steps, p.guidance, p.height, p.width, p.strength, p.chosen]
    drawing = dict(fn=draw, inputs=inputs, outputs=[p.status, p.pictures], show_progress_on=p.status,
                   **one_at_a_time)
    gr.on([p.prompt.submit, p.go.click, p.strength.release], **drawing, trigger_mode="always_last")
    p.other_seed.click(lambda: random.randrange(2**32), None, p.seed, **quiet).then(**drawing)
    gr.on([p.path.submit, p.more.click], add, [p.path, p.chosen], [p.added, p.path, p.chosen],
          show_progress_on=p.added, **one_at_a_time)
    # An adapter may have been added since the page was built.
    page.load(lambda: gr.update(choices=list(studio.adapters), value=list(studio.adapters)), None, p.chosen,
              **quiet)


def draw_cards(studio: Studio, make_request: Callable[[], PictureRequest], names: list[str],
               progress: Callable[[float, str], None]) -> Iterator[tuple[str, str]]:
    """Draw the base and the adapters `names`: after each picture what the page says, and all cards."""
    done, request = [], None
    try:
        request = make_request()
        names = ["", *(name for name in studio.adapters if name in names)]
        for i, name in enumerate(names):
            step, steps = itertools.count(1), request.num_steps

            def on_step():
                n = next(step)
                progress((i * steps + n) / (len(names) * steps), f"{name or 'base'}, step {n} of {steps}")

            done.append(studio.draw_and_score(name, request, on_step))
            problems = dict.fromkeys(picture.score_problem for picture in done if picture.score_problem)
            messages = [message_html("problem", f"no score: {problem}") for problem in problems]
            yield caption_html(request) + "".join(messages), cards_html(done, request, names[i + 1:])
    except Exception as error:
        if not is_for_user(error):
            raise
        yield message_html("problem", one_line(error)), cards_html(done, request) if done else ""


# ---- program -----------------------------------------------------------------------------------------------

def make_rewards(options: DemoOptions, config: Config,
                 device: torch.device) -> tuple[Rewards | None, list[str]]:
    """The rewards, and a note for the page if those of the run cannot be built here.

    Rewards that the command line asks for raise what `build_rewards` raises.
    """
    if not config.rewards:
        return None, []
    weights = dict(config.rewards)
    urls = {name: url for name, url in config.reward_urls if name in weights}
    try:
        return build_rewards(weights, device=str(device), models=dict(config.reward_models), urls=urls,
                             deadline=REWARD_DEADLINE), []
    except (ValueError, ImportError, OSError) as error:
        if options.rewards:
            raise
        return None, [f"The run's rewards cannot be had, so nothing is scored: {error}. "
                      "Others: --rewards name weight"]


def make_studio(options: DemoOptions, config: Config, adapters: tuple[str, ...]) -> tuple[Studio, list[str]]:
    """Load everything, and say what the page should tell of it. Raises ValueError, ImportError or OSError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    rewards, notes = make_rewards(options, config, device)
    policy = Policy(config.model, device, dtype, resolution=config.resolution, lora_rank=0,
                    max_sequence_length=config.max_sequence_length,
                    offload_text_encoders=options.offload_text_encoders)
    studio = Studio(policy, rewards)
    for adapter in adapters:
        studio.add(adapter)
    if not adapters:
        arguments = "" if config.model == Config.model else f" PRESET --model {config.model}"
        notes.append(f"No run under {options.output_dir}/ has an adapter for {config.model} yet, so this is "
                     f"the base alone. To make one: torchrun --nproc_per_node=1 train.py{arguments}, then "
                     "start the demo again. Or add one below.")
    return studio, notes


def free_port(host: str, port: int) -> int:
    """The port, or any that is free if it is 0. Raises ValueError in one line."""
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on --host {host} --port {port} ({error}); --port 0 takes any that "
                         "is free") from error


def main(arguments: list[str]) -> int:
    try:
        options, unknown = parse_options(DemoOptions(), arguments, prog="python -m tools.demo",
                                         about=DemoOptions.__doc__)
        refuse_unknown(unknown, DemoOptions)
        port = free_port(options.host, options.port)         # find out now, before a model loads
        config, adapters = choose_settings(options)
        if importlib.util.find_spec("gradio") is None:
            raise ImportError("the demo needs gradio: pip install -r requirements-extra.txt")
        studio, notes = make_studio(options, config, adapters)
        page, served = build_page(studio, config, notes)
        if options.share or options.host not in ("127.0.0.1", "localhost"):
            print("warning: whoever reaches this page can use it, and have it look for adapters on this "
                  "machine's disk")
        _, address, link = page.launch(server_name=options.host, server_port=port, share=options.share,
                                       prevent_thread_lock=True, **served)
        shown = ", ".join(studio.adapters) or "no adapter"
        print(f"{config.model} on {studio.policy.device}, with {shown}: {link or address}", flush=True)
        page.block_thread()
    except Exception as error:
        if not is_for_user(error):
            raise
        print(f"error: {' '.join(str(error).split())}".replace("--lora-path", "--adapters"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_as_program(lambda: main(sys.argv[1:]))
