"""The copy promises of sampler.py and grpo.py: each file alone, in an empty directory, does what it says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SAMPLER = """
import torch
from sampler import replay, rollout, timestep_schedule

# The velocity of a point at 0: x_sigma = sigma eps, so v = x / sigma.
velocity = lambda latents, sigma: latents / sigma.view(-1, 1, 1, 1)
start, sigmas = torch.randn(4, 2, 3, 3, dtype=torch.float64), timestep_schedule(6, dtype=torch.float64)
assert rollout(velocity, start, sigmas, 0.0, None).final.abs().max() < 1e-12      # the data
trajectory = rollout(velocity, start, sigmas, 0.7, torch.Generator().manual_seed(0), num_trained=5)
for k in range(5):
    again, _, _ = replay(velocity, trajectory.rows(k))
    assert torch.equal(again, trajectory.log_probs[k])       # the policy that sampled has ratio 1
"""

GRPO = """
import torch
from grpo import clipped_loss, gaussian_kl, group_advantages

advantages = group_advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]))
assert advantages[0] == -advantages[1] > 0 and advantages[2] == advantages[3] == 0
log_prob = torch.zeros(4, requires_grad=True)
clipped_loss(log_prob, torch.zeros(4), advantages, clip_range=0.1).sum().backward()
assert torch.equal(log_prob.grad, -advantages)                                      # at ratio 1, REINFORCE's
mean = torch.ones(4, 2, 3, 3)
assert torch.allclose(gaussian_kl(mean, 0 * mean, torch.tensor(0.5)), torch.tensor(2.0))
"""


def run_beside_a_copy(name: str, script: str, directory: Path) -> None:
    shutil.copy(ROOT / name, directory)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=directory, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_sampler_works_as_a_single_copied_file(tmp_path):
    run_beside_a_copy("sampler.py", SAMPLER, tmp_path)


def test_grpo_works_as_a_single_copied_file(tmp_path):
    run_beside_a_copy("grpo.py", GRPO, tmp_path)
