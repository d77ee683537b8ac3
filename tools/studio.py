"""Pictures of a base model and of its adapters, scored: what the demo shows, without its page."""

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adapters import PEFT_FILES, read_adapter
from config import Config
from harness.scoring import check_reward_prompts
from policy import Policy
from prompts import Prompt
from rewards import RewardError, Rewards
from sampler import rollout, timestep_schedule

MOST_CACHED = 128                # pictures that are not drawn again when they are asked for again
MOST_STEPS, MOST_GUIDANCE, MOST_STRENGTH, MOST_PIXELS = 100, 15.0, 2.0, 2048


# ---- runs on disk ------------------------------------------------------------------------------------------

CHECKPOINT = re.compile(r"(?:epoch_|checkpoint-)(\d+)")       # ours, and those of Flow-GRPO's authors


def newest_weights(run: Path) -> Path | None:
    """The last checkpoint of a run that holds an adapter: `epoch_N/adapter`, or the authors'
    `checkpoint-N/lora`. They lie in the run's `checkpoints`, or in `run` itself.
    """
    found = [path.parents[1] for below in ("checkpoints/", "") for layout in ("*/adapter/", "*/lora/")
             for path in run.glob(below + layout + PEFT_FILES[1])]
    numbers = {place: int(number[1]) for place in found if (number := CHECKPOINT.fullmatch(place.name))}
    return max(numbers, key=numbers.get, default=None)


def newest_run(output_dir: str, model: str = "") -> Path | None:
    """The run whose newest adapter was written last, of those that trained `model` if one is given.

    A run of Flow-GRPO's authors does not say what it trained, and counts if a model is given.
    """
    runs = [(weights.stat().st_mtime, run) for run in Path(output_dir).glob("*")
            if (weights := newest_weights(run))]
    for _, run in sorted(runs, reverse=True):
        with contextlib.suppress(ValueError, OSError):           # of a run that is torn: not the one to show
            trained = read_config(run).model if (run / "config.json").exists() else model
            if trained and model in ("", trained):
                return run
    return None


def run_containing(adapter: str) -> Path | None:
    """The run that `adapter` is, or lies in."""
    place = Path(adapter).absolute()
    return next((p for p in (place, *place.parents[:4])
                 if (p / "checkpoints").is_dir() and (p / "config.json").exists()), None)


def read_config(run: Path) -> Config:
    """A run's settings. Raises ValueError in one line."""
    try:
        saved = json.loads((run / "config.json").read_text())
        return Config(**{f.name: saved[f.name] for f in dataclasses.fields(Config) if f.name in saved})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{run / 'config.json'} holds no settings of a run ({error})") from error


def locate(adapter: str) -> tuple[str, str]:
    """The adapter's name on the page, and where its files are. Of a run these are its newest weights.

    Raises ValueError in one line.
    """
    if not adapter:
        raise ValueError("no adapter given: give a run, a checkpoint, an adapter's directory or a hub id")
    place = Path(adapter)
    weights = newest_weights(place)
    if weights or (place / "checkpoints").is_dir():
        weights = weights or max(place.glob("checkpoints/epoch_*[0-9]/transformer"), default=None)
        if weights is None:
            raise ValueError(f"the run {adapter!r} has no checkpoint yet: it makes one after --save-every "
                             "epochs")
        place = weights
    if (place / "transformer").is_dir() or place.name == "transformer":
        raise ValueError(f"{adapter!r} is a whole transformer (--full-finetune), no adapter on a shared "
                         "base: save it as a pipeline of its own, `pipe.transformer = ...; "
                         "pipe.save_pretrained(...)`, and give that as --model")
    path = str(place) if place.exists() else adapter     # a hub id, or a mistake
    read_adapter(path)
    return checkpoint_name(place.absolute()) or adapter, path


def checkpoint_name(place: Path) -> str:
    """The run and the number of the checkpoint that `place` is or lies in, or "" if it is in none."""
    run = run_containing(str(place))
    for checkpoint in (place, place.parent):
        if number := CHECKPOINT.fullmatch(checkpoint.name):
            if run:
                return f"{run.name}, epoch {int(number[1])}"
            # The authors name a run by its task and its model: logs/ocr/sd3.5-M/checkpoints/checkpoint-60.
            theirs = [part for part in checkpoint.parent.parts if part != "checkpoints"][-2:]
            return f"{'/'.join(theirs)}, checkpoint {int(number[1])}"
    return ""


# ---- pictures ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PictureRequest:
    """Everything besides the adapter that decides a picture. Raises ValueError for values out of range."""

    prompt: str
    seed: int
    num_steps: int
    guidance_scale: float
    resolution: tuple[int, int]        # height, width
    negative_prompt: str = ""
    strength: float = 1.0              # of the adapter: 0 is the base, 1 as trained

    def __post_init__(self):
        number = int | float
        for name, kind, least, most in [
                ("seed", int, 0, 2**32 - 1), ("num_steps", int, 1, MOST_STEPS),
                ("guidance_scale", number, 1, MOST_GUIDANCE), ("strength", number, 0, MOST_STRENGTH)]:
            value = getattr(self, name)
            if not isinstance(value, kind) or not least <= value <= most:
                whole = "a whole number from " if kind is int else "from "
                raise ValueError(f"{name.replace('_', ' ')} is {value}: it must be {whole}{least} to {most}")
        if any(not isinstance(size, int) or size > MOST_PIXELS for size in self.resolution):
            raise ValueError(f"height and width are {self.resolution}: they must be whole numbers up to "
                             f"{MOST_PIXELS}")


@dataclass(frozen=True)
class Picture:
    name: str                          # of the adapter; "" for the base
    image: np.ndarray                  # uint8 (H, W, 3)
    scores: dict[str, float]           # of each reward, and "total"
    score_problem: str = ""            # why there are no scores, if there should be some


class Studio:
    """One model, its adapters by name, the rewards, and the last pictures that they made."""

    def __init__(self, policy: Policy, rewards: Rewards | None, examples: list[Prompt] = []):
        """Without rewards, nothing is scored. examples: prompts with what rewards need to know of them."""
        self.policy, self.rewards, self.examples = policy, rewards, examples
        self.adapters: dict[str, str] = {}       # name -> where it was loaded from
        self.cache: dict[tuple[str, PictureRequest], Picture] = {}
        self.lock = threading.Lock()             # a cancelled request's thread goes on for a while

    def add(self, adapter: str) -> str:
        """Load an adapter and return its name. Raises ValueError in one line, and is then as it was."""
        name, path = locate(adapter.strip())
        if path in self.adapters.values():
            raise ValueError(f"adapter {adapter!r} is here already")
        name = path if name in self.adapters else name           # two runs may have the same name
        with self.lock:
            # In torch, a name holds no dots, so number the adapters.
            self.policy.add_adapter(f"adapter{len(self.adapters)}", path)
            self.adapters[name] = path
        return name

    def draw(self, name: str, request: PictureRequest,
             on_step: Callable[[], None] = lambda: None) -> np.ndarray:
        """Draw with an adapter, or with the base if `name` is "": uint8 (H, W, 3).

        on_step: called before each step. Raises ValueError in one line.
        """
        policy = self.policy
        policy.set_resolution(request.resolution)
        if name:
            policy.use_adapter(f"adapter{list(self.adapters).index(name)}", request.strength)
        else:
            policy.use_adapter("", 0.0)
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(1, *policy.latent_shape, generator=generator)                    # (1, C, H, W)
        sigmas = timestep_schedule(request.num_steps, **policy.schedule_arguments(request.num_steps))
        velocity = policy.velocity(policy.encode([request.prompt]), request.guidance_scale,
                                   negative_prompt=request.negative_prompt)

        def counted_velocity(latents, sigma):
            on_step()
            return velocity(latents, sigma)

        latents = rollout(counted_velocity, noise.to(policy.device), sigmas, 0.0, None).final
        if not latents.isfinite().all():
            raise ValueError(f"the latents of {name or 'the base'} are not finite: lower strength or "
                             "guidance, or start with --dtype bfloat16 or float32")
        return policy.decode(latents)[0].cpu().numpy()

    def score(self, image: np.ndarray, prompt: str) -> tuple[dict[str, float], str]:
        """Score a picture by each reward and in "total". If that fails: no scores, and the reason."""
        if not self.rewards:
            return {}, ""
        metadata = next((example.metadata for example in self.examples if example.text == prompt), {})
        try:
            check_reward_prompts(self.rewards.weights, [prompt], [metadata])
            scores = self.rewards(image[None], [prompt], [metadata])
            return {name: float(value[0]) for name, value in scores.items()}, ""
        except (ValueError, RewardError) as error:
            return {}, str(error)

    def draw_and_score(self, name: str, request: PictureRequest,
                       on_step: Callable[[], None] = lambda: None) -> Picture:
        """Draw a picture and score it, or take it from the cache. What could not be scored is not kept."""
        if not name:
            request = dataclasses.replace(request, strength=0.0)
        if (name, request) in self.cache:
            return self.cache[name, request]
        with self.lock:
            image = self.draw(name, request, on_step)
        picture = Picture(name, image, *self.score(image, request.prompt))
        if not picture.score_problem:
            self.cache[name, request] = picture
            if len(self.cache) > MOST_CACHED:
                self.cache.pop(next(iter(self.cache)))
        return picture
