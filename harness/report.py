"""What a run says: statistics of its updates over all ranks, lines on the terminal, progress bars."""

import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import distributed
from config import Config
from distributed import is_main
from grpo import zero_variance_groups
from harness import signals
from harness.faults import Interrupted, NonFiniteUpdate


class Statistics:
    """Statistics of an epoch's updates, kept on the device until an update ends.

    An update is: `add` for each batch of rows, `end_backward`, and after the optimizer's step `end_update`.
    """

    NAMES = ("policy_loss", "kl", "approx_kl", "clip_fraction_high", "clip_fraction_low", "ratio")

    def __init__(self):
        self.updates: list[dict[str, float]] = []                # of each: means over its rows, and its norm
        self.skipped = self.overflows = 0
        self.before: float | None = None    # largest |ratio - 1| before the weights change
        self._start_update()

    def updates_left(self, count: int) -> Iterator[int]:
        """Yield each update's number, and the same one again after an overflow of float16's loss scale."""
        while (done := len(self.updates) + self.skipped) < count:
            yield done

    def _start_update(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows, self._deviations = 0, []

    def add(self, ratio_deviation: Tensor, **values: Tensor) -> None:
        """Add a batch of rows. All are (M,)."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double().sum()
        self._rows += len(ratio_deviation)
        self._deviations.append(ratio_deviation.detach().max())

    def end_backward(self, rows: int) -> None:  # all ranks
        """Put all ranks' sums and stop flags together, in the one small collective of an update.

        rows: of the update over all ranks. Those left out for their zero advantage add nothing to the loss,
        and nothing is known of their ratios.
        Raises Interrupted or NonFiniteUpdate on all ranks alike.
        """
        sums = (self._sums.get(name, torch.zeros(())).double().cpu() for name in self.NAMES)
        largest = torch.stack(self._deviations).max().item() if self._deviations else 0.0
        own = [*sums, self._rows, largest, signals.stop_asked()]
        every_rank = distributed.gather_vectors(torch.tensor(own, dtype=torch.float64))
        *sums, counted, _, stop = every_rank.sum(0).tolist()
        if stop:
            raise Interrupted
        self._update = dict(zip(self.NAMES, sums)) | {
            "rows": rows, "replayed": counted, "ratio_deviation": every_rank[:, -2].max().item()}
        if not np.isfinite(sums).all():
            raise NonFiniteUpdate("loss")

    def end_update(self, grad_norm: float, may_overflow: bool) -> None:
        """The optimizer stepped if the norm is finite. may_overflow: if not, the loss scale is to blame."""
        if np.isfinite(grad_norm):
            self.updates.append(self._update | {"grad_norm": grad_norm})
        elif may_overflow:
            self.overflows += 1
        else:
            raise NonFiniteUpdate("gradient")
        self._start_update()

    def leave_out_update(self) -> None:
        self.skipped += 1
        self._start_update()

    def check_ratio(self, first: bool, config: Config, epoch: int) -> None:
        """Warn if a ratio is not 1 in an epoch's first update, where the policy is the one that sampled.

        Call it in every update before the weights change. first: whether it is this process's first update,
        which gets a line in any case.
        """
        if self.before is not None:
            return
        self.before = self._update["ratio_deviation"]
        if first:
            say(f"before the first update, max |ratio - 1| is {self.before:.1e}; "
                f"clip_range is {config.clip_range:g}")
        if self.before > config.clip_range:
            warn(f"before the first update of epoch {epoch} a ratio is {self.before:.1e} from 1, more than "
                 f"clip_range {config.clip_range:g}; usual causes: batches of other sizes in training than "
                 "in the rollout, above all in half precision; another dtype; dropout")

    def metrics(self) -> dict[str, float]:
        """Means over the epoch's rows, gradient norms, and how often an update overflowed or was left out."""
        known = {} if self.before is None else {"ratio_deviation_before": self.before}
        if self.updates:
            total = {name: sum(update[name] for update in self.updates)
                     for name in (*self.NAMES, "rows", "replayed")}
            known |= {name: total[name] / max(total["replayed"], 1) for name in self.NAMES}
            known["policy_loss"] = total["policy_loss"] / total["rows"]
            if not total["replayed"]:
                known["ratio"] = 1.0
            known["ratio_deviation"] = max(update["ratio_deviation"] for update in self.updates)
            known["grad_norm"] = float(np.mean([update["grad_norm"] for update in self.updates]))
        return known | {"overflows": self.overflows, "skipped_updates": self.skipped}


def spreads(name: str, thumbnails: Tensor) -> dict[str, float]:
    """How much the pictures of a set differ, of 255, averaged over leading dimensions.

    thumbnails: (..., P, 3, 8, 8) of P pictures. The first figure is the standard deviation of their mean
    colours, averaged over channels. The finer one takes each of the 8 x 8 parts by itself.
    """
    colours = thumbnails.mean((-2, -1))                                     # (..., P, 3)
    return {f"spread/{name}": colours.std(-2, correction=0).mean().item(),
            f"spread/{name}_fine": thumbnails.std(-4, correction=0).mean().item()}


def reward_metrics(scores: dict[str, Tensor], group_ids: Tensor) -> dict[str, float]:
    """Means and spreads of an epoch's rewards and pictures. scores: (N,), and "thumbnail": (N, 3, 8, 8)."""
    groups = scores["thumbnail"].unflatten(0, (len(group_ids.unique()), -1))       # (G, K, 3, 8, 8)
    return {**mean_scores("reward", scores), "reward_std": scores["total"].std(correction=0).item(),
            "zero_variance_groups": zero_variance_groups(scores["total"], group_ids),
            **spreads("group", groups)}


def mean_scores(prefix: str, scores: dict[str, Tensor]) -> dict[str, float]:
    """Mean of each score and metric, over the samples that it says something about."""
    return {f"{prefix}/{name}": values.double().nanmean().item() for name, values in scores.items()
            if values.ndim == 1 and not values.isnan().all()}


def spread_shares(metrics: dict, history: list[dict]) -> dict[str, float]:
    """Each spread as a share of its value before training, which is the first that the run recorded."""
    names = ("spread/group", "spread/eval")
    first = {name: value for m in reversed([*history, metrics]) for name, value in m.items() if name in names}
    return {f"{name}_share": metrics[name] / value for name, value in first.items()
            if name in metrics and value}


def say(text: str) -> None:
    """Print a line on the main rank without disturbing a progress bar."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    if is_main():
        tqdm.write(f"warning: {text}", file=sys.stderr)


def progress(items: Sequence, what: str) -> Iterator:
    """The items, under a progress bar on the main rank's terminal, until a signal asks this rank to stop."""
    off = None if is_main() else True            # None: unless there is a terminal
    for item in tqdm(items, desc=what, leave=False, disable=off):
        if signals.stop_asked():
            return
        yield item


def epoch_line(metrics: dict, history: list[dict], config: Config) -> str:
    """An epoch in a line. history: the epochs before."""
    line, recent = f"epoch {metrics['epoch']}/{config.epochs}: ", [*history[-4:], metrics]
    if "approx_kl" not in metrics:
        return f"{line}skipped, {metrics['seconds']:.1f} s"
    first = next((m["reward/total"] for m in history if "reward/total" in m), metrics["reward/total"])
    left = (config.epochs - metrics["epoch"]) * np.median([m["seconds"] for m in recent if "seconds" in m])
    return line + (
        f"reward {metrics['reward/total']:.4f} ({metrics['reward/total'] - first:+.4f}), "
        f"approx_kl {metrics['approx_kl']:.1e}, "
        f"clipped {metrics['clip_fraction_high'] + metrics['clip_fraction_low']:.2f}, "
        f"gradient {metrics['grad_norm']:.1e}, {metrics['images_per_second']:.1f} images/s, "
        f"{timedelta(seconds=round(left))} left")
