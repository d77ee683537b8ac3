"""Compare this project with the authors' own code, function by function, on the same inputs, on a CPU.

    git clone https://github.com/yifan123/flow_grpo
    git clone https://github.com/yifan123/reward-server
    python -m proofs.against_official --flow-grpo flow_grpo [--reward-server reward-server] [--trials 1000]

It prints a table: what was compared, how often, the largest difference found, and the difference that
rounding may make. Numbers in brackets are known departures, which it lists at the end. The exit code is 1 if
a comparison is out of its tolerance, and 2 if a directory is no checkout. It needs no weights and no GPU.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging

from proofs import official_data, official_sampler, official_training
from proofs.authors_code import Checkout, open_checkout
from proofs.comparison import Line, print_table

COMPARISONS: dict[str, Callable[[Checkout, int], list[Line]]] = {
    "Transitions and log-probs": official_sampler.transitions,
    "Whole trajectories on the bundled model": official_sampler.trajectories,
    "Advantages": official_training.advantages,
    "Losses and gradients": official_training.losses,
    "Weight average": official_training.weight_average,
    "Text rule": official_data.text_rule,
    "GenEval rules": official_data.geneval_rules,
    "Prompt sets": official_data.prompt_sets,
    "Adapters": official_data.adapters,
    "Settings": official_data.settings}

# Where this project computes something else than the authors' code, or did.
DEPARTURES = """
## Departures that the table names

- (1) Weight average: their loop steps it once per micro-batch while its step counter stands still, so
  each due update is applied as often as an optimizer step has micro-batches. Here it is stepped once per
  optimizer step, and the presets hold the decay that results.
- (2) KL: the authors divide by s, and under cps by the step's std. So does the default here. `--kl exact`
  divides by the step's std, which makes it 1 / D of theirs.
- (3) Samples with zero advantage: their SD3 scripts drop them from the policy loss and from the KL, and
  average over the rest. Here they stay in the denominator and, where beta is above 0, in the KL. Their
  FLUX scripts drop nothing.
- (10) GenEval, objects of one's own: their server leaves a position out where the colour is wrong, and
  its strict accuracy ignores `exclude`. Here the position always counts and `exclude` is heeded. No
  published prompt has a colour with a position.
- (11) A prompt that an epoch draws twice: their code groups by the prompt's text, so both draws are one
  group. Here they are two groups.
- (12) Ratios at the edge of the clip range: theirs are clipped as float32 numbers near 1, which lie 1e-7
  apart. Here rho - 1 decides, which keeps its digits. Pairs nearer than 3e-7 to the edge are left out of
  the table.
- (13) Guidance: their code of July 2025 detaches the unconditional branch, and that of November does not.
  Here gradients go through both branches.
- (14) GRPO-Guard: their centring term is averaged over the micro-batch too, because its `dim` is empty,
  so each sample gets the mean of all. Here each sample has its own. In micro-batches of one both are
  equal.
- (15) Text rule: all white space is left out here, and only U+0020 there.
- (16) GenEval's stray 1: after the 0 of a wrong position their server appends a 1 as well. Here it does
  not.

## Departures that the table does not measure

- (4) Windows: theirs are drawn per rank and sampling batch, so images of one group have different ones.
  Here a group has one window in an epoch.
- (5) OCR: their scorer hands RGB to an engine that takes BGR. Here the engine gets BGR.
- (6) GenEval's detector gets RGB there too, where it takes BGR. Here it gets the order that it was
  trained on.
- (7) GenEval's detector is mmdet's Mask2Former there, and transformers' weights of the same kind here.
- (8) Pictures go to their GenEval and DeQA servers as JPEG of quality 75. A local reward here gets the
  pixels.
- (9) CLIPScore: their resizing is bilinear on floats. Here it is CLIP's own, bicubic on bytes.
- (17) Most SD3 scripts shuffle an epoch's samples, all scripts draw noise per rank, and the FLUX scripts
  round latents to bfloat16 between steps. Here samples are split by index, noise is drawn per sample, and
  latents stay in float32.
"""
NOT_COMPARED = ("the reward networks and what needs their weights; SD3.5 and FLUX themselves; published "
                "adapters; mixed precision; more than one rank")


def main() -> int:
    parser = argparse.ArgumentParser("python -m proofs.against_official", description=__doc__.split("\n")[0])
    parser.add_argument("--flow-grpo", required=True, metavar="DIR", help="checkout of yifan123/flow_grpo")
    parser.add_argument("--reward-server", metavar="DIR", help="checkout of yifan123/reward-server")
    parser.add_argument("--trials", type=int, default=1000, help="scales the counts (default 1000)")
    options = parser.parse_args()
    try:
        checkout = open_checkout(options.flow_grpo, options.reward_server)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    started = time.monotonic()
    torch.set_num_threads(1)                 # because the tensors are small
    diffusers_logging.set_verbosity_error()
    server = version(checkout.server) if checkout.server else "not given, so GenEval's rules are not compared"
    print(f"# nano-flow-grpo against the authors' code\n\nflow_grpo: {version(checkout.root)}\n"
          f"reward-server: {server}")
    lines = []
    for topic, compare in COMPARISONS.items():
        found = run(topic, compare, checkout, options.trials)
        print_table(found)
        lines += found
    print(DEPARTURES)
    scripts = sorted({f"scripts/{case.script}.py" for case in official_training.cases()})
    missing = [f"{path} (not in this checkout)" for path in scripts if not checkout.has(path)]
    print("Not compared: " + "; ".join([NOT_COMPARED, *missing]))
    wrong = [line for line in lines if not line.holds]
    print(f"\n{len(lines)} comparisons in {time.monotonic() - started:.0f} s, {len(wrong)} out of tolerance"
          + "".join(f"\n  {line.topic}: {line.case}" for line in wrong))
    return int(bool(wrong))


def run(topic: str, compare: Callable[[Checkout, int], list[Line]], checkout: Checkout,
        trials: int) -> list[Line]:
    """Run a comparison on random inputs that do not depend on the others.

    One that does not run becomes a line that does not hold, because the checkout's code may be made for other
    packages than this machine's.
    """
    random.seed(topic)
    torch.manual_seed(random.getrandbits(32))
    try:
        return compare(checkout, trials)
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return [Line(topic, "did not run", 0, float("nan"), 0, message)]


def version(root: Path) -> str:
    """The commit of a checkout, if git knows it."""
    if not (root / ".git").exists():
        return "no git checkout"
    said = subprocess.run(["git", "-C", str(root), "log", "-1", "--format=%h of %cs"], capture_output=True,
                          text=True)
    return said.stdout.strip() or "unknown commit"


if __name__ == "__main__":
    sys.exit(main())
