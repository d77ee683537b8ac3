"""The web demo: a base model beside its adapters, the same prompt and seed, the reward beneath each picture.

    python demo.py [--model PATH_OR_HUB_ID] [--adapters A B ...] [--rewards name weight ...]

An adapter is a run under runs/ (its newest weights), a checkpoint of one, a peft or diffusers directory, or a hub id. Without
any, it is the newest run's; steps, guidance, size and rewards are those of its run. The picture of a seed is the one that
diffusers' pipeline makes with `generator=torch.Generator().manual_seed(seed)` and the adapter's weights.
"""

import base64
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import random
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from adapters import PEFT_FILES, find_adapter
from config import PRESETS, Config, parse_options, refuse_unknown
from families import FLUX
from harness.faults import is_out_of_memory
from harness.program import run_as_program
from policy import Policy, check_model
from rewards import RewardError, Rewards, build_rewards, check_reward_prompts
from sampler import rollout, timestep_schedule

KEPT = 32                                  # pictures that are not drawn again when they are asked for again
MOST_STEPS, MOST_GUIDANCE, MOST_STRENGTH, MOST_PIXELS = 100, 15.0, 2.0, 2048
REWARD_DEADLINE = 20.0                     # seconds for a served reward: somebody waits at the page


@dataclass(frozen=True)
class Options:
    """The base model beside its adapters, in the browser: same prompt, same seed, the reward beneath each picture."""

    model: str = ""
    """A StableDiffusion3Pipeline or FluxPipeline: a directory or hub id. Empty: the one that the first adapter's run trained."""
    adapters: tuple[str, ...] = ()
    """Runs, checkpoints, adapter directories or hub ids. Empty: the newest run of the model, if there is one."""
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


# ------------------------------------------------------------------------------------------------------------ runs on disk

def newest_weights(run: Path) -> Path | None:
    """The last checkpoint of a run that holds an adapter."""
    return max((p for p in run.glob("checkpoints/epoch_*[0-9]") if (p / "adapter" / PEFT_FILES[1]).exists()), default=None)


def newest_run(output_dir: str, model: str = "") -> Path | None:
    """The run whose newest adapter was written last, of those that trained `model`, if that is given."""
    def trained(run: Path) -> str | None:
        try:
            return run_config(run).model
        except (ValueError, OSError):                                      # not the one to show
            return None

    runs = [(weights.stat().st_mtime, run) for run in Path(output_dir).glob("*") if (weights := newest_weights(run))]
    return next((run for _, run in sorted(runs, reverse=True) if trained(run) and model in ("", trained(run))), None)


def run_of(adapter: str) -> Path | None:
    """The run that `adapter` is, or lies in."""
    place = Path(adapter).absolute()
    return next((p for p in (place, *place.parents[:4]) if (p / "checkpoints").is_dir() and (p / "config.json").exists()), None)


def run_config(run: Path) -> Config:
    """A run's settings. Raises ValueError in one line."""
    try:
        saved = json.loads((run / "config.json").read_text())
        return Config(**{f.name: saved[f.name] for f in dataclasses.fields(Config) if f.name in saved})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{run / 'config.json'} holds no settings of a run ({error})") from error


def locate(adapter: str) -> tuple[str, str]:
    """(how it is called in the page, where its files are), a run being its newest weights. Raises ValueError in one line."""
    if not adapter:
        raise ValueError("no adapter given: give a run, a checkpoint, an adapter's directory or a hub id")
    place = Path(adapter)
    if (place / "checkpoints").is_dir():
        weights = newest_weights(place) or max(place.glob("checkpoints/epoch_*[0-9]/transformer"), default=None)
        if weights is None:
            raise ValueError(f"the run {adapter!r} has no checkpoint yet: it makes one after --save-every epochs")
        place = weights
    if (place / "transformer").is_dir() or place.name == "transformer":
        raise ValueError(f"{adapter!r} is a whole transformer (--full-finetune), no adapter on a shared base: save it as a "
                         "pipeline of its own, `pipe.transformer = ...; pipe.save_pretrained(...)`, and give that as --model")
    path = str(place) if place.exists() else adapter                       # a hub id, or a mistake
    find_adapter(path)
    run, epoch = run_of(path), re.search(r".*epoch_(\d+)", str(place.absolute()))
    return (f"{run.name}, epoch {int(epoch[1])}" if run and epoch else adapter), path


def settings_for(options: Options) -> tuple[Config, tuple[str, ...]]:
    """Sampling settings and adapters: of the first adapter's run, or of the preset that is closest to the model.

    Raises ValueError in one line for what is not there. Loads nothing.
    """
    if options.model and Path(options.model).exists():
        options = dataclasses.replace(options, model=os.path.normpath(options.model))      # as runs and presets write it
    adapters = options.adapters
    if not adapters and (run := newest_run(options.output_dir, options.model)):
        adapters = (str(run),)
    run = run_of(adapters[0]) if adapters else None
    if run:
        config = run_config(run)
    else:
        model = options.model or Config.model
        presets = [preset for preset in PRESETS.values() if preset.model == model]
        config = presets[0] if presets else PRESETS["flux_pickscore" if check_model(model) is FLUX else "sd35m_ocr"]
        config = dataclasses.replace(config, model=model, rewards=config.rewards if model == Config.model else ())
    given = {name: getattr(options, name) for name in ("model", "rewards", "resolution", "max_sequence_length")}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value})
    check_model(config.model)
    for adapter in adapters:
        locate(adapter)
    return config, adapters


# ---------------------------------------------------------------------------------------------------------------- pictures

@dataclass(frozen=True)
class Request:
    """What a picture follows from, besides the adapter. Raises ValueError for what cannot be."""

    prompt: str
    seed: int
    num_steps: int
    guidance_scale: float
    resolution: tuple[int, int]        # height, width
    negative_prompt: str = ""
    strength: float = 1.0              # of the adapter: 0 is the base, 1 as trained

    def __post_init__(self):
        number = int | float
        for name, kind, least, most in (("seed", int, 0, 2**32 - 1), ("num_steps", int, 1, MOST_STEPS),
                                        ("guidance_scale", number, 1, MOST_GUIDANCE), ("strength", number, 0, MOST_STRENGTH)):
            value = getattr(self, name)
            if not isinstance(value, kind) or not least <= value <= most:
                whole = "a whole number from " if kind is int else "from "
                raise ValueError(f"{name.replace('_', ' ')} is {value}: it must be {whole}{least} to {most}")
        if any(not isinstance(size, int) or size > MOST_PIXELS for size in self.resolution):
            raise ValueError(f"height and width are {self.resolution}: they must be whole numbers up to {MOST_PIXELS}")


@dataclass(frozen=True)
class Picture:
    name: str                          # of the adapter; "" for the base
    image: np.ndarray                  # uint8 (H, W, 3)
    scores: dict[str, float]           # of each reward, and "total"
    unscored: str = ""                 # why there are none, if there should be


class Studio:
    """One model, its adapters by name, the rewards, and the last pictures that they made. For one thread at a time."""

    def __init__(self, policy: Policy, rewards: Rewards | None):
        """Without rewards, nothing is scored."""
        self.policy, self.rewards = policy, rewards
        self.adapters: dict[str, str] = {}                               # name -> where it was loaded from
        self.kept: dict[tuple[str, Request], Picture] = {}
        self.lock = threading.Lock()                                     # a cancelled request's thread goes on for a while

    def add(self, adapter: str) -> str:
        """Load an adapter; its name. Raises ValueError in one line, and is then as it was."""
        name, path = locate(adapter.strip())
        if path in self.adapters.values():
            raise ValueError(f"adapter {adapter!r} is here already")
        name = path if name in self.adapters else name                   # runs of one name in two places
        with self.lock:
            self.policy.add_adapter(f"adapter{len(self.adapters)}", path)    # in torch, a name holds no dots
            self.adapters[name] = path
        return name

    def draw(self, name: str, request: Request, on_step: Callable[[], None] = lambda: None) -> np.ndarray:
        """The picture uint8 (H, W, 3) of the base (`name` "") or of an adapter; `on_step` is called before each step."""
        policy = self.policy
        policy.set_resolution(request.resolution)
        if name:
            policy.use_adapter(f"adapter{list(self.adapters).index(name)}", request.strength)
        else:
            policy.use_adapter("", 0.0)
        noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(request.seed))    # (1, C, H, W)
        sigmas = timestep_schedule(request.num_steps, **policy.schedule_arguments(request.num_steps))
        velocity = policy.velocity(policy.encode([request.prompt]), request.guidance_scale,
                                   negative_prompt=request.negative_prompt)

        def counted(latents, sigma):
            on_step()
            return velocity(latents, sigma)

        latents = rollout(counted, noise.to(policy.device), sigmas, 0.0, None).final
        if not latents.isfinite().all():
            raise ValueError(f"the latents of {name or 'the base'} are not finite: lower strength or guidance, or start with "
                             "--dtype bfloat16 or float32")
        return policy.decode(latents)[0].cpu().numpy()

    def score(self, image: np.ndarray, prompt: str) -> tuple[dict[str, float], str]:
        """Of each reward, and "total"; else nothing, and why."""
        if not self.rewards:
            return {}, ""
        try:
            check_reward_prompts(self.rewards.weights, [prompt], [{}])
            return {name: float(value[0]) for name, value in self.rewards(image[None], [prompt], [{}]).items()}, ""
        except (ValueError, RewardError) as error:
            return {}, str(error)

    def picture(self, name: str, request: Request, on_step: Callable[[], None] = lambda: None) -> Picture:
        """`draw`, scored where that can be, and then kept."""
        if not name:
            request = dataclasses.replace(request, strength=0.0)
        if (name, request) in self.kept:
            return self.kept[name, request]
        with self.lock:
            image = self.draw(name, request, on_step)
        picture = Picture(name, image, *self.score(image, request.prompt))
        if not picture.unscored:
            self.kept[name, request] = picture
            if len(self.kept) > KEPT:
                self.kept.pop(next(iter(self.kept)))
        return picture


def expected(error: Exception) -> bool:
    """Whether it tells the user something; other errors are the programmer's, and get their traceback."""
    return isinstance(error, ValueError | OSError | ImportError | RewardError) or is_out_of_memory(error)


def in_words(error: Exception) -> str:
    """One line for the page, which has no --lora-path."""
    if is_out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out of memory: draw a smaller picture, or start the demo with --offload-text-encoders or --dtype bfloat16"
    line = " ".join(str(error).split())
    return line.replace("--lora-path", "adapter").replace("--resolution", "size (height, width)")


# -------------------------------------------------------------------------------------------------------------------- page

CSS = """
h1 { font-size: 1.5rem; font-weight: 700; margin: 8px 0 2px; }
.cards { display: flex; flex-wrap: wrap; gap: 16px; }
.cards figure { flex: 1 1 var(--card); max-width: 560px; margin: 0; border: 1px solid var(--border-color-primary);
  border-radius: 8px; overflow: hidden; background: var(--block-background-fill); }
.cards figure > div { background: var(--background-fill-secondary); }
.cards img { display: block; width: 100%; height: auto; margin: 0; }
.cards img.small { image-rendering: pixelated; }
.cards figcaption { padding: 8px 12px 10px; overflow-wrap: anywhere; }
.cards figcaption b { display: block; }
.cards .score { display: flex; justify-content: space-between; gap: 12px; font-variant-numeric: tabular-nums; }
#draw, #another, #add { align-self: center; }
.drawn { opacity: 0.75; margin: 0 2px; overflow-wrap: anywhere; white-space: pre-wrap; }
.note, .problem { margin: 0; padding: 10px 14px; border-radius: 8px; border: 1px solid var(--border-color-primary);
  border-left-width: 5px; overflow-wrap: anywhere; white-space: pre-wrap; }
.drawn + .problem { margin-top: 8px; }
.problem { border-left-color: #d33; }
.problem::before { content: "Error: "; font-weight: 600; }
"""


def png(image: np.ndarray) -> str:
    """As a data: URL, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def said(kind: str, text: str) -> str:
    return f'<p class="{kind}" role="{"alert" if kind == "problem" else "note"}">{escape(text)}</p>'


def caption(request: Request) -> str:
    without = f", without: {request.negative_prompt}" if request.negative_prompt else ""
    return said("drawn", f"{request.prompt} | seed {request.seed}, {request.num_steps} steps, guidance "
                         f"{request.guidance_scale:g}{without}")


def cards(pictures: list[Picture], request: Request, coming: list[str] = []) -> str:
    """The pictures, and the places of those to come, side by side where there is room; all words in it are escaped."""
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

    drawn = [card(p.name, f'<img{small} src="{png(p.image)}" width="{width}" height="{height}" alt="{escape(p.name or "base")}">',
                  p.scores) for p in pictures]
    waiting = [card(name, f'<div style="aspect-ratio: {width} / {height}"></div>', {}) for name in coming]
    return f'<div class="cards" style="--card: {280 if width > 1.5 * height else 130}px">{"".join(drawn + waiting)}</div>'


def build_page(studio: Studio, config: Config, notes: list[str]):
    """The gradio page, and how it is served. Text reaches it escaped, or in components that show text as text."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    guided = studio.policy.branches(2.0) == 2                              # by classifier-free guidance, in two branches

    def draw(prompt, negative, seed, steps, guidance, height, width, strength, names, progress=gr.Progress()):
        done, request = [], None
        try:
            request = Request(prompt, seed, steps, guidance, (height, width), negative if guidance != 1 else "", strength)
            names = ["", *(name for name in studio.adapters if name in names)]
            for i, name in enumerate(names):
                step = itertools.count(1)

                def on_step():
                    n = next(step)
                    progress((i * steps + n) / (len(names) * steps), f"{name or 'base'}, step {n} of {steps}")

                done.append(studio.picture(name, request, on_step))
                problems = dict.fromkeys(f"no score: {picture.unscored}" for picture in done if picture.unscored)
                status = caption(request) + "".join(said("problem", problem) for problem in problems)
                yield status, cards(done, request, names[i + 1:])
        except Exception as error:
            if not expected(error):
                raise
            yield said("problem", in_words(error)), cards(done, request) if done else ""

    def add(path, chosen):
        try:
            name = studio.add(path)
        except Exception as error:
            if not expected(error):
                raise
            return said("problem", in_words(error)), path, gr.update()
        return said("note", f"added {name}: draw again"), "", gr.update(choices=list(studio.adapters), value=[*chosen, name])

    with gr.Blocks(title="nano-flow-grpo", analytics_enabled=False) as page:
        gr.HTML("<h1>Base and tuned, side by side</h1>" + escape(f"{config.model} on {studio.policy.device}"))
        with gr.Row():
            prompt = gr.Textbox('the word "lamp"' if config.prompts == "words" else 'a sign that says "hello"', label="Prompt",
                                max_length=2000, scale=5, min_width=300, elem_id="prompt")
            go = gr.Button("Draw", variant="primary", scale=1, min_width=120, elem_id="draw")
        status = gr.HTML("".join(said("note", note) for note in notes), elem_id="status", js_on_load=None, min_height=56)
        pictures = gr.HTML("", elem_id="pictures", js_on_load=None)
        with gr.Row():
            strength = gr.Slider(0, MOST_STRENGTH, 1, step=0.05, label="Adapter strength", elem_id="strength", min_width=220,
                                 info="0 is the base, 1 as trained")
            steps = gr.Slider(1, MOST_STEPS, config.eval_num_steps, step=1, label="Steps", elem_id="steps", min_width=220,
                              info="of the ODE")
            guidance = gr.Slider(1, MOST_GUIDANCE, config.guidance_scale, step=0.1, label="Guidance", elem_id="guidance",
                                 info="1 is none" if guided else "an input of this model", min_width=220)
        with gr.Row():
            seed = gr.Number(1, label="Seed", precision=0, elem_id="seed", min_width=120)
            other = gr.Button("Another seed", min_width=120, elem_id="another")
            height = gr.Number(config.resolution[0], label="Height", precision=0, elem_id="height", min_width=100)
            width = gr.Number(config.resolution[1], label="Width", precision=0, elem_id="width", min_width=100)
        negative = gr.Textbox(label="Negative prompt", info="what guidance leads away from; without guidance it is unused",
                              max_length=2000, visible=guided, elem_id="negative")
        chosen = gr.CheckboxGroup(list(studio.adapters), value=list(studio.adapters), label="Adapters shown", elem_id="adapters")
        with gr.Row():
            path = gr.Textbox(label="Add an adapter", placeholder="a run, a checkpoint, a directory, or owner/name on the hub",
                              max_length=1000, scale=5, min_width=300, elem_id="path")
            more = gr.Button("Add", scale=1, min_width=120, elem_id="add")
        added = gr.HTML("", elem_id="added", js_on_load=None)

        one_at_a_time = dict(concurrency_limit=1, concurrency_id="model", api_visibility="private")
        drawing = dict(fn=draw, inputs=[prompt, negative, seed, steps, guidance, height, width, strength, chosen],
                       outputs=[status, pictures], show_progress_on=status, **one_at_a_time)
        another = other.click(lambda: random.randrange(2**32), None, seed, api_visibility="private", show_progress="hidden")
        gr.on([prompt.submit, go.click, strength.release], **drawing, trigger_mode="always_last")
        another.then(**drawing)
        gr.on([path.submit, more.click], add, [path, chosen], [added, path, chosen], show_progress_on=added, **one_at_a_time)
        page.load(lambda: gr.update(choices=list(studio.adapters), value=list(studio.adapters)), None, chosen,
                  api_visibility="private", show_progress="hidden")
    page.queue(max_size=32)
    font = ("ui-sans-serif", "system-ui", "sans-serif")                    # of the reader's own system: nothing is fetched
    return page, dict(css=CSS, theme=gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace")), footer_links=[],
                      run_history=False, ssr_mode=False, quiet=True)


# -------------------------------------------------------------------------------------------------------------------- main

def make_studio(options: Options, config: Config, adapters: tuple[str, ...]) -> tuple[Studio, list[str]]:
    """Everything that is loaded, and what the page should say of it. Raises ValueError, ImportError or OSError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    notes, rewards = [], None
    try:
        if config.rewards:
            rewards = build_rewards(dict(config.rewards), device=str(device), models=dict(config.reward_models),
                                    urls={name: url for name, url in config.reward_urls if name in dict(config.rewards)},
                                    deadline=REWARD_DEADLINE)
    except (ValueError, ImportError, OSError) as error:
        if options.rewards:
            raise
        notes.append(f"The run's rewards cannot be had, so nothing is scored: {error}. Others: --rewards name weight")
    studio = Studio(Policy(config.model, device, dtype, resolution=config.resolution,
                           max_sequence_length=config.max_sequence_length, lora_rank=0,
                           offload_text_encoders=options.offload_text_encoders), rewards)
    for adapter in adapters:
        studio.add(adapter)
    if not adapters:
        arguments = "" if config.model == Config.model else f" PRESET --model {config.model}"
        notes.append(f"No run under {options.output_dir}/ has an adapter for {config.model} yet, so this is the base alone. To "
                     f"make one: torchrun --nproc_per_node=1 train.py{arguments}, then start the demo again. Or add one below.")
    return studio, notes


def free_port(host: str, port: int) -> int:
    """The port, or for 0 any that is free. Raises ValueError in one line."""
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on --host {host} --port {port} ({error}); --port 0 takes any that is free") from error


def main(arguments: list[str]) -> int:
    try:
        options, unknown = parse_options(Options(), arguments, "demo.py", Options.__doc__)
        refuse_unknown(unknown, Options)
        port = free_port(options.host, options.port)                       # taken, it is an error now, before a model loads
        config, adapters = settings_for(options)
        if importlib.util.find_spec("gradio") is None:
            raise ImportError("the demo needs gradio: pip install -r requirements-extra.txt")
        studio, notes = make_studio(options, config, adapters)
        page, served = build_page(studio, config, notes)
        if options.share or options.host not in ("127.0.0.1", "localhost"):
            print("warning: whoever reaches this page can use it, and have it look for adapters on this machine's disk")
        _, address, link = page.launch(server_name=options.host, server_port=port, share=options.share,
                                       prevent_thread_lock=True, **served)
        print(f"{config.model} on {studio.policy.device}, with {', '.join(studio.adapters) or 'no adapter'}: {link or address}",
              flush=True)
        page.block_thread()
    except Exception as error:
        if not expected(error):
            raise
        print(f"error: {' '.join(str(error).split())}".replace("--lora-path", "--adapters"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_as_program(lambda: main(sys.argv[1:]))
