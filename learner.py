"""What an update changes: trained weights, AdamW's moments, float16's loss scale, the average over updates.

All of it is one state. It is saved, restored, and taken back to the last whole epoch if an epoch does not
end.
"""

import contextlib
import math
import sys

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from config import Config
from distributed import is_main
from policy import Policy


def learning_rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch, from 1 on.

    It does not depend on how many epochs there will be, so that a run can be made longer.
    """
    half_life = config.learning_rate_half_life
    return config.learning_rate * (0.5 ** ((epoch - 1) / half_life) if half_life else 1.0)


FIRST_SCALE = 2.0**30                            # of float16's losses


class Learner:
    """The policy's trained weights and all that goes with them from update to update."""

    def __init__(self, policy: Policy, config: Config):
        self.policy, self.config = policy, config
        self.optimizer = torch.optim.AdamW(policy.parameters, lr=config.learning_rate, betas=(0.9, 0.999),
                                           eps=1e-8, weight_decay=config.weight_decay, fused=True)
        # Start the loss scale at 2^30. The loss is a mean over thousands of rows, so one row's gradient is
        # small, and float16 holds nothing below 6e-8. On an H200, with SD3.5-M's size, the gradients of a
        # step are off from float32's: at the usual 2^16 by 24 %, queries' by 94 %; at 2^24 by under 1 %, but
        # those of the text stream's queries by 49 %; at 2^30 all by under 1 %. If 2^30 is too much, the scale
        # halves itself, and the update is computed again.
        self.scaler = torch.amp.GradScaler(policy.device.type, init_scale=FIRST_SCALE, growth_interval=100,
                                           enabled=config.dtype == "float16")
        # Make its state now, because a rank may have nothing to scale.
        self.scaler.scale(torch.zeros((), device=policy.device))
        self.average = WeightAverage(policy.parameters, config.ema_decay, config.ema_every)
        self.skipped = 0                         # updates that were not finite
        self.started = False                     # whether there was an update in this process
        self._before: dict | None = None
        self._changed = False                    # whether the weights are between two whole epochs

    def state(self, epoch: int) -> dict:
        """Everything from which training goes on after `epoch`: tensors and plain data."""
        return {"epoch": epoch, "trained": [p.detach() for p in self.policy.parameters],
                "average": self.average.average, "average_steps": self.average.steps, "skipped": self.skipped,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, state: dict) -> int:
        """Put everything back; the number of epochs done."""
        torch._foreach_copy_(self.average.weights, state["trained"])
        torch._foreach_copy_(self.average.average, state["average"])
        self.average.steps = state["average_steps"]
        self.optimizer.state.clear()                             # the old moments go before the new ones come
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
        return state["epoch"]

    def step(self, max_grad_norm: float) -> tuple[float, bool]:
        """Take one optimizer step on the accumulated gradients.

        Returns their norm, and whether float16's loss scale may have made it infinite. If the norm is not
        finite, the weights stay as they are.
        """
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters, max_grad_norm).item()
        finite = math.isfinite(grad_norm)
        self._changed |= finite
        if finite or self.scaler.is_enabled():                          # the scaler skips the step by itself
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if finite:
            self.average.step()
        # Blame the scale if it has come down by this, and not below 1.
        may_overflow = 1 <= self.scaler.get_scale() < scale
        self.started |= finite or may_overflow
        return grad_norm, may_overflow

    def begin_updates(self, epoch: int) -> None:
        """Set the learning rate of `epoch`, from 1 on, and keep the state before it for `undo_updates`.

        The state is in the host memory of the main rank, because that rank saves. With one update an epoch
        nothing is kept, because nothing can fail between two updates.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, epoch)
        if is_main() and self.config.updates_per_epoch > 1:
            self._before = tree_map_only(Tensor, lambda t: t.to("cpu", copy=True), self.state(epoch - 1))

    def end_updates(self) -> None:
        self._before, self._changed = None, False

    def undo_updates(self) -> bool:
        """Go back to the last whole epoch if its state was kept; whether the weights are those of one."""
        if self._before is not None:
            self.restore(self._before)
            self.end_updates()
        return not self._changed

    def skip(self, error: Exception, updates: int) -> None:
        """Leave out what was not finite, where --skip-nonfinite allows it; else raise it."""
        most = self.config.skip_nonfinite
        if self.skipped + updates > most:
            raise error
        self.skipped += updates
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            self.scaler.update(FIRST_SCALE)      # the update has halved it in vain
        if is_main():
            tqdm.write(f"warning: {error}; skipped, {self.skipped} of {most} updates", file=sys.stderr)


class WeightAverage:
    """Moving average of trained weights, decay min((1 + n) / (10 + n), decay) after n optimizer steps."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float, every: int):
        self.decay, self.every = decay, every
        self.steps = 0                           # optimizer steps seen
        self.weights = [p.detach() for p in parameters]          # the same memory, without gradients
        self.average = [weight.clone() for weight in self.weights]

    def step(self) -> None:
        """Call once after each optimizer step."""
        self.steps += 1
        if self.steps % self.every == 0:
            decay = min((1 + self.steps) / (10 + self.steps), self.decay)
            torch._foreach_lerp_(self.average, self.weights, 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Within, the trained weights are the average; afterwards they are themselves again."""
        kept = [weight.clone() for weight in self.weights]
        torch._foreach_copy_(self.weights, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(self.weights, kept)
