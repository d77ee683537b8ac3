"""The web demo: a base model above its adapters, the same prompt and seeds, the reward beneath each picture.

    python -m tools.demo [--model PATH_OR_HUB_ID] [--adapters A B ...] [--rewards name weight ...]
    python -m tools.demo --export DIR             # a gallery of test prompts, which needs no server

An adapter is a run (its newest weights), a checkpoint of one, a peft or diffusers directory, or a hub id. A
run is one of ours or of Flow-GRPO's authors. Without any, it is the newest run's. Steps, guidance, size,
prompts and rewards are those of its run. The picture of a seed is the one that diffusers' pipeline makes with
the adapter's weights and `generator=torch.Generator().manual_seed(seed)`.
"""

import contextlib
import dataclasses
import importlib.util
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

import torch

from config import PRESETS, Config, parse_options, refuse_unknown
from harness.faults import is_out_of_memory
from harness.gallery import ASSETS
from harness.program import run_as_program
from pipelines import check_model, is_distilled
from policy import Policy
from prompts import Prompt, load_prompts
from rewards import RewardError, build_rewards
from tools.showcase import new_pictures, rows_html, write_gallery
from tools.studio import (
    MOST_GUIDANCE, MOST_STEPS, MOST_STRENGTH, PictureRequest, Studio, locate, newest_run, read_config,
    run_containing)

REWARD_DEADLINE = 20.0           # seconds for a served reward, because somebody waits at the page
MOST_SEEDS = 16                  # side by side
COLUMNS = "A seed is the same noise for the base and for each adapter beneath it."


@dataclass(frozen=True)
class DemoOptions:
    """The base model above its adapters, in the browser: same prompt, same seeds, the reward beneath."""

    model: str = ""
    """A pipeline of a family that train.py knows: a directory or hub id. Empty: the first adapter's run's."""
    adapters: tuple[str, ...] = ()
    """Runs, checkpoints, adapter directories or hub ids. Empty: the model's newest run, if there is one."""
    rewards: tuple[tuple[str, float], ...] = ()
    """Rewards and their weights, as train.py takes them. Empty: those of the first adapter's run."""
    prompts: str = ""
    """A set, file or directory of prompts, of which the test split is shown. Empty: the run's."""
    num_prompts: int = 8
    """How many of them are examples on the page, or stand in the gallery."""
    num_seeds: int = 4
    """Pictures side by side: at the page's start, or in the gallery. The first seed is 1."""
    export: str = ""
    """Directory for a gallery that opens without a server; the program then ends and serves no page."""
    resolution: tuple[int, int] | None = None
    """Height and width at the start, in pixels. None: the run's."""
    max_sequence_length: int | None = None
    """Tokens of a prompt. None: the run's."""
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
        config = config or PRESETS[check_model(model).preset]
        if model != Config.model:                # a built-in set, because a preset's may be a file to fetch
            config = dataclasses.replace(config, model=model, prompts="ocr", rewards=())
    names = ("model", "prompts", "rewards", "resolution", "max_sequence_length")
    given = {name: value for name in names if (value := getattr(options, name))}
    config = dataclasses.replace(config, **given)
    for name, most in (("num_seeds", MOST_SEEDS), ("num_prompts", 10_000)):
        if not 1 <= (value := getattr(options, name)) <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be from 1 to {most}")
    check_model(config.model)
    if is_distilled(config.model):
        config = dataclasses.replace(config, guidance_scale=1.0)
    for adapter in adapters:
        locate(adapter)
    return config, adapters


# ---- what is said ------------------------------------------------------------------------------------------

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


def message_html(kind: str, text: str) -> str:
    return f'<p class="{kind}" role="{"alert" if kind == "problem" else "note"}">{escape(text)}</p>'


def caption_html(requests: list[PictureRequest]) -> str:
    first, last = requests[0], requests[-1]
    seeds = f"seed {first.seed}" if first == last else f"seeds {first.seed} to {last.seed}"
    without = f", without: {first.negative_prompt}" if first.negative_prompt else ""
    return message_html("drawn", f"{first.prompt} | {seeds}, {first.num_steps} steps, "
                                 f"guidance {first.guidance_scale:g}{without}")


# ---- the page ----------------------------------------------------------------------------------------------

def build_page(studio: Studio, config: Config, num_seeds: int, notes: list[str]):
    """The gradio page, and how it is served. Text reaches it escaped, or in parts that show text as text."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    with gr.Blocks(title="nano-flow-grpo", analytics_enabled=False) as page:
        parts = lay_out_pictures(studio, config, notes)
        lay_out_settings(parts, studio, config, num_seeds)
        connect(page, parts, studio)
    page.queue(max_size=32)
    font = ("ui-sans-serif", "system-ui", "sans-serif")      # the reader's own, because nothing is fetched
    theme = gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace"))
    return page, dict(css_paths=[ASSETS / "rows.css", ASSETS / "demo.css"], theme=theme, footer_links=[],
                      run_history=False, ssr_mode=False, quiet=True)


def lay_out_pictures(studio: Studio, config: Config, notes: list[str]) -> SimpleNamespace:
    """The upper part of the page: what is drawn."""
    import gradio as gr

    parts = SimpleNamespace()
    examples = [example.text for example in studio.examples]
    gr.HTML("<h1>Base and tuned, seed by seed</h1>" + escape(
        f"{config.model} on {studio.policy.device}. {COLUMNS}"))
    if notes:
        gr.HTML("".join(message_html("note", note) for note in notes), elem_id="notes", js_on_load=None)
    with gr.Row():
        parts.prompt = gr.Textbox([*examples, 'a sign that says "hello"'][0], label="Prompt", max_length=2000,
                                  scale=5, min_width=300, elem_id="prompt")
        parts.go = gr.Button("Draw", variant="primary", scale=1, min_width=120, elem_id="draw")
    parts.examples = gr.Examples([[text] for text in examples], parts.prompt, elem_id="examples",
                                 label=f"Examples, test prompts of {config.prompts}: click to draw",
                                 examples_per_page=100) if examples else None
    parts.status = gr.HTML("", elem_id="status", js_on_load=None, min_height=50)
    parts.pictures = gr.HTML("", elem_id="pictures", js_on_load=None)
    return parts


def lay_out_settings(parts: SimpleNamespace, studio: Studio, config: Config, num_seeds: int) -> None:
    """The lower part of the page: how it is drawn, and with which adapters."""
    import gradio as gr

    distilled = is_distilled(config.model)                   # it goes without guidance
    guided = studio.policy.branches(2.0) == 2 and not distilled      # by classifier-free guidance
    with gr.Row():
        parts.strength = gr.Slider(0, MOST_STRENGTH, 1, step=0.05, label="Adapter strength", min_width=220,
                                   info="0 is the base, 1 as trained", elem_id="strength")
        parts.steps = gr.Slider(1, MOST_STEPS, config.eval_num_steps, step=1, label="Steps", min_width=220,
                                info="of the ODE", elem_id="steps")
        parts.guidance = gr.Slider(1, MOST_GUIDANCE, config.guidance_scale, step=0.1, label="Guidance",
                                   info="1 is none" if guided else "an input of this model", min_width=220,
                                   visible=not distilled, elem_id="guidance")
    with gr.Row():
        parts.seed = gr.Number(1, label="First seed", precision=0, min_width=120, elem_id="seed")
        parts.num_seeds = gr.Number(num_seeds, label="Seeds", precision=0, min_width=120,
                                    elem_id="num_seeds")
        parts.other_seeds = gr.Button("Other seeds", min_width=120, elem_id="another")
        height, width = config.resolution
        parts.height = gr.Number(height, label="Height", precision=0, min_width=100, elem_id="height")
        parts.width = gr.Number(width, label="Width", precision=0, min_width=100, elem_id="width")
    parts.negative = gr.Textbox(label="Negative prompt", max_length=2000, visible=guided, elem_id="negative",
                                info="what guidance leads away from; without guidance it is unused")
    parts.chosen = gr.CheckboxGroup(label="Adapters shown", elem_id="adapters", **choices(studio))
    with gr.Row():
        parts.path = gr.Textbox(label="Add an adapter", max_length=1000, scale=5, min_width=300,
                                placeholder="a run, a checkpoint, a directory, or owner/name on the hub",
                                elem_id="path")
        parts.more = gr.Button("Add", scale=1, min_width=120, elem_id="add")
    parts.added = gr.HTML("", elem_id="added", js_on_load=None)


def choices(studio: Studio) -> dict:
    """Of the adapters, all chosen."""
    names = list(studio.adapters)
    return dict(choices=names, value=names, visible=bool(names))


def connect(page, parts: SimpleNamespace, studio: Studio) -> None:
    """What happens on the page: pictures are drawn, one request at a time, and adapters are added."""
    import gradio as gr

    def draw(prompt, negative, seed, count, steps, guidance, height, width, strength, names,
             progress=gr.Progress()):
        without = negative if guidance != 1 else ""
        make_requests = lambda: requests_of(PictureRequest(
            prompt, seed, steps, guidance, (height, width), without, strength), count)
        yield from draw_rows(studio, make_requests, names, progress)

    def add(path, chosen):
        try:
            name = studio.add(path)
        except Exception as error:
            if not is_for_user(error):
                raise
            return message_html("problem", one_line(error)), path, gr.update()
        shown = gr.update(**choices(studio) | dict(value=[*chosen, name]))
        return message_html("note", f"added {name}: draw again"), "", shown

    p, one_at_a_time = parts, dict(concurrency_limit=1, concurrency_id="model", api_visibility="private")
    quiet = dict(api_visibility="private", show_progress="hidden")
    inputs = [p.prompt, p.negative, p.seed, p.num_seeds, p.steps, p.guidance, p.height, p.width, p.strength,
              p.chosen]
    drawing = dict(fn=draw, inputs=inputs, outputs=[p.status, p.pictures], show_progress_on=p.status,
                   trigger_mode="always_last", **one_at_a_time)
    # An adapter may have been added since the page was built.
    opened = page.load(lambda: gr.update(**choices(studio)), None, p.chosen, **quiet).then(**drawing)
    asks = [p.prompt.submit, p.go.click, p.strength.release]
    clicks = [p.other_seeds.click, *([p.examples.dataset.click] if p.examples else [])]
    # Whoever asks does not wait for the rest of the pictures that nobody asked for. This stands before the
    # drawing, because gradio sends the events of a click in this order, and would end nothing afterwards.
    gr.on([*asks, *clicks], None, cancels=[opened])
    gr.on(asks, **drawing)
    p.other_seeds.click(lambda: random.randrange(2**32 - MOST_SEEDS), None, p.seed, **quiet).then(**drawing)
    if p.examples:
        p.examples.load_input_event.then(**drawing)
    gr.on([p.path.submit, p.more.click], add, [p.path, p.chosen], [p.added, p.path, p.chosen],
          show_progress_on=p.added, **one_at_a_time)


def requests_of(first: PictureRequest, count: int) -> list[PictureRequest]:
    """The request, and those of the seeds after it: `count` in all. Raises ValueError."""
    if not isinstance(count, int) or not 1 <= count <= MOST_SEEDS:
        raise ValueError(f"seeds is {count}: it must be a whole number from 1 to {MOST_SEEDS}")
    return [dataclasses.replace(first, seed=first.seed + i) for i in range(count)]


def draw_rows(studio: Studio, make_requests: Callable[[], list[PictureRequest]], names: list[str],
              progress: Callable[[float, str], None]) -> Iterator[tuple[str, str]]:
    """Draw the base and the adapters `names`: after each picture what the page says, and all rows."""
    rows = {name: [] for name in ("", *(name for name in studio.adapters if name in names))}
    problems, requests = {}, []
    try:
        requests = make_requests()
        for request, name in itertools.product(requests, rows):
            step, done = itertools.count(1), sum(map(len, rows.values()))

            def on_step():
                n, steps = next(step), request.num_steps
                progress((done + n / steps) / (len(rows) * len(requests)),
                         f"{name or 'base'}, seed {request.seed}, step {n} of {steps}")

            picture = studio.draw_and_score(name, request, on_step)
            rows[name].append(picture)
            if picture.score_problem:
                problems[message_html("problem", f"no score: {picture.score_problem}")] = True
            yield caption_html(requests) + "".join(problems), rows_html(rows, requests)
    except Exception as error:
        if not is_for_user(error):
            raise
        drawn = {name: row for name, row in rows.items() if row}
        yield (message_html("problem", one_line(error)),
               rows_html(drawn, requests[:len(drawn[""])]) if drawn else "")


# ---- program -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def noting(notes: list[str], asked: bool, text: str) -> Iterator[None]:
    """Within, what is of a run and cannot be had here is a note for the page, `text` with the error in it.

    asked: whether the command line asks for it, so that the error is raised.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        if asked:
            raise
        notes.append(text.format(error))


def load_examples(options: DemoOptions, config: Config) -> list[Prompt]:
    """Prompts from all over the test split. Raises what `load_prompts` raises."""
    prompts = load_prompts(config.prompts, "test")
    count = min(options.num_prompts, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def make_studio(options: DemoOptions, config: Config, adapters: tuple[str, ...]) -> tuple[Studio, list[str]]:
    """Load everything, and say what the page should tell of it. Raises ValueError, ImportError or OSError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usual_dtype = "bfloat16" if device.type == "cuda" else "float32"
    rewards, examples, notes = None, [], []
    weights = dict(config.rewards)
    with noting(notes, bool(options.rewards), "The run's rewards cannot be had, so nothing is scored: {}. "
                                              "Others: --rewards name weight"):
        rewards = build_rewards(
            weights, device=str(device), deadline=REWARD_DEADLINE,
            models={model: place for model, place in config.reward_models
                    if any(f"{model}.".startswith(f"{name}.") for name in weights)},
            urls={name: url for name, url in config.urls.items() if name in weights}) if weights else None
    with noting(notes, bool(options.prompts), "The run's prompts cannot be had: {}. Others: --prompts SET"):
        examples = load_examples(options, config)
    policy = Policy(config.model, device, usual_dtype if options.dtype == "auto" else options.dtype,
                    resolution=config.resolution, max_sequence_length=config.max_sequence_length,
                    lora_rank=0, offload_text_encoders=options.offload_text_encoders)
    studio = Studio(policy, rewards, examples)
    for adapter in adapters:
        studio.add(adapter)
    if not adapters:
        arguments = "" if config.model == Config.model else f" PRESET --model {config.model}"
        notes.append(f"No run under {options.output_dir}/ has an adapter for {config.model} yet, so this is "
                     f"the base alone. To make one: torchrun --nproc_per_node=1 train.py{arguments}, then "
                     "start the demo again. Or give one with --adapters.")
    return studio, notes


def free_port(host: str, port: int) -> int:
    """The port, or any that is free if it is 0. Raises ValueError in one line."""
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on --host {host} --port {port} ({error}); --port 0 takes any that "
                         "is free") from error


def export(options: DemoOptions) -> None:
    """Write the gallery. Raises ValueError, ImportError or OSError."""
    config, adapters = choose_settings(options)
    with new_pictures(Path(options.export).expanduser()) as pictures:
        studio, notes = make_studio(options, config, adapters)
        if not studio.examples:
            raise ValueError(notes[-1])
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        steps, guidance, (height, width) = config.eval_num_steps, config.guidance_scale, config.resolution
        about = (f"{config.model}, test prompts of {config.prompts}, {steps} steps, guidance {guidance:g}, "
                 f"height {height}, width {width}. {COLUMNS}")
        columns = [requests_of(PictureRequest(example.text, 1, steps, guidance, (height, width)),
                               options.num_seeds) for example in studio.examples]
        print(write_gallery(studio, columns, pictures, about))


def serve(options: DemoOptions) -> None:
    """Serve the page until it is stopped. Raises ValueError, ImportError or OSError."""
    port = free_port(options.host, options.port)         # find out now, before a model loads
    config, adapters = choose_settings(options)
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the demo needs gradio: pip install -r requirements-extra.txt")
    studio, notes = make_studio(options, config, adapters)
    page, served = build_page(studio, config, options.num_seeds, notes)
    if options.share or options.host not in ("127.0.0.1", "localhost"):
        print("warning: whoever reaches this page can use it, and have it look for adapters on this "
              "machine's disk")
    _, address, link = page.launch(server_name=options.host, server_port=port, share=options.share,
                                   prevent_thread_lock=True, **served)
    shown = ", ".join(studio.adapters) or "no adapter"
    print(f"{config.model} on {studio.policy.device}, with {shown}: {link or address}", flush=True)
    page.block_thread()


def main(arguments: list[str]) -> int:
    try:
        options, unknown = parse_options(DemoOptions(), arguments, prog="python -m tools.demo",
                                         about=DemoOptions.__doc__)
        refuse_unknown(unknown, DemoOptions)
        (export if options.export else serve)(options)
    except Exception as error:
        if not is_for_user(error):
            raise
        print(f"error: {' '.join(str(error).split())}".replace("--lora-path", "--adapters"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_as_program(lambda: main(sys.argv[1:]))
