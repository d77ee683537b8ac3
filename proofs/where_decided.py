"""At which step are a picture's colour, layout and strokes decided?

    python -m proofs.where_decided [--out FILE]

The model draws held-out prompts by the ODE. At step k, x_k = (1 - sigma) x0 + sigma x1 holds the picture x0
and the noise x1 that the velocity implies. Replace x1 by fresh noise, go on by the ODE, and see what of the
finished picture changes. A feature that x0 already decides stays. One that later steps decide changes.

The table gives each change as a share of that at k = 0, where two pictures share their prompt alone:

    colour   mean colour                                        root mean square over channels
    layout   8 x 8 means of brightness, less the mean           where things are; 1 - correlation
    strokes  what these means leave of the brightness           how they are drawn; 1 - correlation

FILE gets the pictures, one row for each of the first prompts: the undisturbed one, then k = 0, 1, ...
"""

import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from config import PRESETS
from draws import EVAL_NOISE, draw_noise
from policy import Policy
from prompts import load_prompts
from sampler import rollout, timestep_schedule

CPU = torch.device("cpu")


def features(images: Tensor) -> dict[str, Tensor]:
    """images (B, H, W, 3) uint8 -> feature -> (B, numbers) float32."""
    pixels = images.permute(0, 3, 1, 2).float()                                      # (B, 3, H, W)
    colour, brightness = pixels.mean((2, 3)), pixels.mean(1, keepdim=True)           # (B, 3), (B, 1, H, W)
    coarse = F.adaptive_avg_pool2d(brightness, 8)                                    # (B, 1, 8, 8)
    fine = brightness - F.interpolate(coarse, brightness.shape[2:], mode="bilinear")
    return {"colour": colour, "layout": coarse.flatten(1), "strokes": fine.flatten(1)}


def change(feature: str, before: Tensor, after: Tensor) -> float:
    """How much a feature differs, averaged over pictures. before, after: (B, numbers)."""
    if feature == "colour":
        return ((before - after) ** 2).mean(1).sqrt().mean().item()
    a, b = (x - x.mean(1, keepdim=True) for x in (before, after))
    return (1 - F.cosine_similarity(a, b)).mean().item()


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--out", default="", help="where the pictures go, a .png")
    options = parser.parse_args()
    config = PRESETS["tiny_ocr"]
    policy = Policy(config.model, CPU, resolution=config.resolution, lora_rank=0,
                    max_sequence_length=config.max_sequence_length)
    prompts = [p.text for p in load_prompts(config.prompts, "test")[:options.num_prompts]]
    sigmas = timestep_schedule(options.num_steps, **policy.schedule_arguments(options.num_steps))   # (T + 1,)
    # Fresh noise has another seed than the start noise.
    start, fresh = (draw_noise(seed, EVAL_NOISE, 0, list(range(len(prompts))), 1, policy.latent_shape)[0]
                    for seed in (0, 1))                                              # (B, C, H, W)
    velocity = policy.velocity(policy.encode(prompts))
    undisturbed = policy.decode(rollout(velocity, start, sigmas, 0.0, None).final)   # (B, H, W, 3)
    before, whole, rows, x = features(undisturbed), {}, [undisturbed], start
    print(f"| step k | sigma | {' | '.join(before)} |\n|{'---|' * (2 + len(before))}")
    for k, sigma in enumerate(sigmas[:-1]):
        x0 = x - sigma * velocity(x, sigma.expand(len(x)))
        disturbed = (1 - sigma) * x0 + sigma * fresh
        images = policy.decode(rollout(velocity, disturbed, sigmas[k:], 0.0, None).final)
        changes = {name: change(name, before[name], after) for name, after in features(images).items()}
        whole = whole or changes                                                     # those at k = 0
        print(f"| {k} | {sigma:.3f} | " + " | ".join(f"{changes[n] / whole[n]:.2f}" for n in changes) + " |",
              flush=True)
        rows.append(images)
        x = rollout(velocity, x, sigmas[k:k + 2], 0.0, None).final
    if options.out:
        sheet = np.stack([images[:8].numpy() for images in rows], 1)                 # (8, T + 1, H, W, 3)
        sheet = np.pad(sheet, ((0, 0), (0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
        height, width = sheet.shape[2:4]
        sheet = sheet.swapaxes(1, 2).reshape(len(sheet) * height, -1, 3)
        Image.fromarray(sheet).save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
