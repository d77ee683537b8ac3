"""An epoch as one writes it first, one image and one step after another, beside train.py's: the same numbers, and how much sooner.

    python -m proofs.plain_loop [--rounds 3]
    python -m proofs.plain_loop --only-model DIR    # writes DIR/model, the copy of the bundled model that this uses

The setting is the full algorithm on the bundled model, its tokenizers padding to Stable Diffusion 3's 77 + 128 text tokens: 10 steps of
which 9 are trained, guidance 4.5, KL, 8 groups of 8, two updates. The loop here shares with the project the pipeline, the noise and the
choice of prompts, and none of its arithmetic: transition, log-prob, advantage, loss and KL stand here once more, as in the paper.

Prints the largest difference of the weights after an epoch in float64, of the first update's gradients in float32 (both relative to
the largest), and the images per second of both, which take turns: the plain loop in one process with the threads it likes, train.py's
on one rank per core.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import distributed  # noqa: E402
import train  # noqa: E402
from draws import TRAIN_NOISE, draw_noise, epoch_prompt_indices  # noqa: E402
from grpo import group_advantages  # noqa: E402
from harness.run import make_policy, make_rewards, prepare  # noqa: E402
from harness.scoring import Scorer  # noqa: E402
from learner import Learner  # noqa: E402
from sampler import timestep_schedule  # noqa: E402

SETTING = """tiny_ocr_collapse --rewards rapidocr_line 1 --max-sequence-length 128 --num-steps 10 --guidance-scale 4.5 --window-size 0 --timestep-fraction 0.9
    --noise-level 0.7 --beta 0.04 --groups-per-epoch 8 --group-size 8 --updates-per-epoch 2 --clip-range 1e-4
    --rollout-batch 16 --train-batch 16""".split()


def full_length_model(directory: Path) -> Path:
    """The bundled model, with CLIP tokenizers that pad to 77 tokens as the published ones do."""
    shutil.copytree(ROOT / "assets" / "tiny-sd3", directory / "model", dirs_exist_ok=True)
    for settings in directory.glob("model/tokenizer*/tokenizer_config.json"):
        content = json.loads(settings.read_text())
        if content["model_max_length"] < 77 and "CLIP" in content["tokenizer_class"]:
            settings.write_text(json.dumps({**content, "model_max_length": 77}))
    return directory / "model"


def our_epoch(learner, scorer, prompts, config, epoch: int) -> None:
    """Sample, score and train, as `train.train` does."""
    samples = train.sample(learner.policy, scorer, prompts, config, epoch)
    group_ids = torch.arange(config.groups_per_epoch).repeat_interleave(config.group_size)
    scores = distributed.gather_scores(samples.scores, samples.draw.indices, len(group_ids))
    train.update(learner, samples, group_advantages(scores["total"], group_ids, config.advantage_std), config, epoch)


def plain_epoch(learner, scorer, prompts, config, epoch: int) -> None:
    """Sample, score and train, one image at a time; the equations are those of arXiv 2505.05470."""
    policy, T, K, a = learner.policy, config.num_steps, config.group_size, config.noise_level
    sigmas = timestep_schedule(T, **policy.schedule_arguments(T), dtype=policy.compute_dtype).tolist()
    chosen = [prompts[i] for i in epoch_prompt_indices(len(prompts), config.groups_per_epoch, config.seed, epoch - 1)]
    trained, count = int(config.timestep_fraction * T), config.groups_per_epoch * K

    def encode(prompt):
        return [policy.family.encode(text, config.max_sequence_length, policy.device) for text in (prompt, "")]

    def step(x, k, texts):                       # mean, std and s of the k-th
        time_, sigma, D = torch.tensor([sigmas[k]], dtype=x.dtype), sigmas[k], sigmas[k] - sigmas[k + 1]
        conditional, unconditional = (policy.velocity(text)(x, time_) for text in texts)
        v = unconditional + config.guidance_scale * (conditional - unconditional)
        s = a * (sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) ** 0.5
        return x * (1 - s**2 * D / (2 * sigma)) - v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * D, s * D**0.5, s

    def log_prob(x, mean, std):
        return torch.distributions.Normal(mean, std).log_prob(x).mean()

    paths, old, r = [], [], []
    for i in range(count):
        prompt, path, log_probs = chosen[i // K], [], []
        noise = draw_noise(config.seed, TRAIN_NOISE, epoch, [i], T + 1, policy.latent_shape).to(policy.compute_dtype)
        with torch.no_grad():
            texts = encode(prompt.text)
            path.append(noise[0])
            for k in range(T):
                mean, std, _ = step(path[k], k, texts)
                path.append(mean + std * noise[k + 1])
                log_probs.append(log_prob(path[k + 1], mean, std))
        paths.append(path)
        old.append(log_probs)
        r.append(float(scorer.rewards(policy.decode(path[-1]).numpy(), [prompt.text], [prompt.metadata])["total"][0]))

    r = torch.tensor(r, dtype=torch.float64).view(-1, K)
    A = ((r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)).clamp(-5, 5).flatten().float()
    for update in range(config.updates_per_epoch):
        mine = range(update, count, config.updates_per_epoch)
        for i in mine:
            texts = encode(chosen[i // K].text)
            for k in range(trained):
                mean, std, s = step(paths[i][k], k, texts)
                with torch.no_grad(), policy.network.disable_adapter():
                    reference, _, _ = step(paths[i][k], k, texts)
                rho = (log_prob(paths[i][k + 1], mean, std) - old[i][k]).exp()
                clipped = rho.clamp(1 - config.clip_range, 1 + config.clip_range)
                loss = torch.maximum(-A[i] * rho, -A[i] * clipped) + config.beta * ((mean - reference) ** 2).mean() / (2 * s**2)
                (loss / (len(mine) * trained)).backward()
        learner.step(config.max_grad_norm)


def largest_difference(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> float:
    """Relative to the largest value."""
    ours, plain = (torch.cat([t.detach().flatten().clone() for t in tensors]) for tensors in (ours, plain))
    return ((ours - plain).abs().max() / plain.abs().max()).item()


def gradients(learner) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learner.policy.parameters]


def prepared(model: Path, device: torch.device, **changes) -> tuple:
    _, config, prompts, _ = prepare([*SETTING, "--model", str(model)])
    config = replace(config, **changes)
    learner = Learner(make_policy(config, device), config)
    return learner, Scorer(make_rewards(config, device), learner.policy, config), prompts, config


def keep_gradients(learner) -> list:
    """A list that will hold the gradients before each of the learner's steps."""
    kept, step = [], learner.step

    def keeping(max_grad_norm: float):
        kept.append(gradients(learner))
        return step(max_grad_norm)

    learner.step = keeping
    return kept


def images(prepared: tuple) -> int:
    """Of an epoch."""
    return prepared[-1].groups_per_epoch * prepared[-1].group_size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-model", type=Path, metavar="DIR")
    given = parser.parse_args()
    if given.only_model:
        full_length_model(given.only_model)
        return
    rounds = given.rounds
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory() as directory:
            model, cores = full_length_model(Path(directory)), os.cpu_count()
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cores}"]
            sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]], env={**os.environ, "MODEL": str(model)}).returncode)
    device, model = distributed.setup(), Path(os.environ["MODEL"])
    for dtype in ("float64", "float32"):         # on fewer images, since the plain loop takes its time
        few = dict(dtype=dtype, groups_per_epoch=2, group_size=4)
        ours, plain = prepared(model, device, **few), prepared(model, device, **few)
        kept = [keep_gradients(learner) for learner, *_ in (ours, plain)]
        our_epoch(*ours, 1)
        if distributed.is_main():
            plain_epoch(*plain, 1)
            print(f"{dtype}: first gradients differ by {largest_difference(kept[0][0], kept[1][0]):.1e}, weights after "
                  f"an epoch by {largest_difference(ours[0].policy.parameters, plain[0].policy.parameters):.1e}", flush=True)
        distributed.wait_for_all()
    ours, plain, seconds = prepared(model, device), prepared(model, device, groups_per_epoch=2), {"ours": [], "plain": []}
    for epoch in range(1, rounds + 2):
        distributed.wait_for_all()
        started = time.perf_counter()
        our_epoch(*ours, epoch)
        distributed.wait_for_all()
        seconds["ours"].append((time.perf_counter() - started) / images(ours))
        if distributed.is_main():
            torch.set_num_threads(os.cpu_count())
            started = time.perf_counter()
            plain_epoch(*plain, epoch)
            seconds["plain"].append((time.perf_counter() - started) / images(plain))
            torch.set_num_threads(1)
    if distributed.is_main():
        ours, plain = (1 / statistics.median(seconds[name][1:]) for name in ("ours", "plain"))      # the first round warms up
        print(f"{ours:.2f} images/s, the plain loop {plain:.2f}: {ours / plain:.2f} times as fast, medians of {rounds}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
