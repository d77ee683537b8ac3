"""A run from its command line to its end.

Start-up, resuming, the epoch that counts whole or not at all, and what follows an epoch.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars

import distributed
from adapters import read_adapter
from config import Config, parse_config, validate
from distributed import LostRank, is_main
from harness import signals
from harness.batches import choose_batches, describe
from harness.card import find_license, write_card
from harness.checkpoint import (Record, checkpoint_path, cut_metrics, load_state, newest_whole, open_run,
                                write_metrics, write_settings)
from harness.faults import (DoesNotFit, Interrupted, NonFinite, TrainingError, raise_if_stopping,
                            within_memory)
from harness.gallery import Display
from harness.program import leave
from harness.report import epoch_line, say, spread_shares, warn
from harness.scoring import Scorer, check_reward_prompts, own_random_streams, probe
from learner import Learner, learning_rate
from pipelines import check_memory, check_model
from policy import DTYPES, Policy
from prompts import Prompt, load_prompts
from rewards import NonFiniteScore, RewardError, Rewards, build_rewards, check_reward_weights
from sampler import timestep_schedule


def launch(arguments: list[str], train: Callable[["Run"], None], evaluate: Callable) -> int:
    """Start a run as the command line says, give it to `train`, and end it. Returns the exit code.

    evaluate: train.evaluate, which this file does not import because train imports this file.
    """
    plan, command, held = "", "", contextlib.ExitStack()       # holds the lock on the run's directory
    try:
        run = start(arguments, evaluate, held)
        plan, command = run.plan, run.command
        with signals.stopping_on_signals(command):
            with run.saved_whatever_happens():
                run.evaluate_only() if run.config.eval_only else train(run)
            if not run.config.eval_only:
                run.finish()
    except BaseException as error:
        end_with(error, plan, command)
        raise                                                  # a fault of this program
    finally:
        held.close()
    run.scorer.thread.shutdown()
    distributed.shutdown()
    return 0


def end_with(error: BaseException, plan: str, command: str) -> None:
    """End the process with one line for an error that is not a fault of this program.

    command: what goes on from the last whole epoch; "" before training, where nothing is to go on.
    """
    if command:
        # Other errors have a line of their own.
        said = ["stopped by a signal"] if isinstance(error, Interrupted) else []
        say("; ".join([*said, *getattr(error, "__notes__", ()), f"to go on: {command}"]))
    if isinstance(error, Interrupted):
        leave(0)
    if isinstance(error, LostRank):
        # Another rank ended, and its own error is the one to read.
        print(f"rank {distributed.rank()}: stopped, another rank is gone or did not answer ({error})",
              file=sys.stderr)
        leave(1)
    mistakes = (RewardError, NonFinite) if command else (RewardError, ValueError, OSError, ImportError)
    if isinstance(error, (*mistakes, TrainingError, DoesNotFit)):
        # Nearly all mistakes are met by all ranks, so the main rank speaks for all. Let it end first, because
        # torchrun then ends the others. Out of memory, and an epoch not saved, may be one rank's alone.
        if isinstance(error, mistakes) and not is_main():
            time.sleep(30)
        if isinstance(error, DoesNotFit) and "the plan was" not in str(error):
            error = f"{error}; the plan was: {plan}"
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        leave(2)
    if command and isinstance(error, SystemExit):              # of user code, before the run came to its end
        raise RuntimeError(f"the run was ended by {error!r}") from error


def prepare(arguments: list[str]) -> tuple[str, Config, list[Prompt], list[Prompt]]:
    """Find everything that can be found wrong before a model loads.

    Returns preset, config, prompts of training and of evaluation. Raises ValueError, OSError, ImportError.
    """
    preset, config = parse_config(arguments, quiet=not is_main())
    validate(config)
    # Set the device before a file with rewards is imported, because it may put a model there.
    device = distributed.own_device()
    weights = dict(config.rewards) | dict.fromkeys(config.eval_rewards, 0.0)
    with own_random_streams():
        check_reward_weights(weights, config.urls)
    train_prompts, test_prompts = (load_prompts(config.prompts, split) for split in ("train", "test"))
    prompts = [*train_prompts, *test_prompts]
    check_reward_prompts(weights, [p.text for p in prompts], [p.metadata for p in prompts], config.urls)
    family = check_model(config.model, config.guidance_scale)
    check_memory(family, config.model, DTYPES[config.dtype], device)
    if config.lora_path:
        read_adapter(config.lora_path)
    spec = importlib.util.find_spec("wandb") if config.wandb else None
    if config.wandb and not (spec and spec.origin):       # a mere directory wandb/ has no origin
        stray = f" (the directory {list(spec.submodule_search_locations)[0]} is not it)" if spec else ""
        raise ImportError(f"--wandb needs the package wandb: pip install wandb{stray}")
    return preset, config, train_prompts, test_prompts[:config.eval_prompts or None]


def make_rewards(config: Config, device: torch.device) -> Rewards:
    """Build the rewards of training and of evaluation, which have the weight 0."""
    # The rewards' threads set the CUDA device, because it is per thread and a reward may say "cuda" alone.
    start_thread = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else lambda: None
    with own_random_streams():
        rewards = build_rewards(
            dict(config.rewards) | dict.fromkeys(config.eval_rewards, 0.0), start_thread,
            threads=config.reward_threads, device=str(device), batch=config.reward_batch,
            models=dict(config.reward_models), urls=config.urls, deadline=config.reward_deadline,
            max_unanswered=config.max_unanswered, trust_remote_code=config.trust_remote_code)
    # A reward's file may have changed these, which training needs.
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    return rewards


def make_policy(config: Config, device: torch.device) -> Policy:
    """Load the policy. Every rank gets the same weights, also an adapter's random start."""  # all ranks
    torch.manual_seed(config.seed)
    with within_memory("the model itself is too large: start fewer processes, or --offload-text-encoders",
                       describe(config, distributed.world_size())):
        policy = Policy(
            config.model, device, config.dtype, resolution=config.resolution,
            max_sequence_length=config.max_sequence_length, lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha, lora_targets=config.lora_targets,
            full_finetune=config.full_finetune, with_reference=config.beta > 0, lora_path=config.lora_path,
            offload_text_encoders=config.offload_text_encoders,
            gradient_checkpointing=config.gradient_checkpointing, compile=config.compile)
        distributed.broadcast_parameters(policy.parameters)
        # Sum gradients once, because NCCL takes its buffers at the first call, outside PyTorch's reserve, and
        # batch sizes are chosen by the memory that is left.
        distributed.sum_gradients(policy.parameters)
    for p in policy.parameters:
        p.grad = None
    if distributed.world_size() > 1:
        checksums = distributed.gather_objects(policy.checksum())
        if others := [rank for rank, found in enumerate(checksums) if found != checksums[0]]:
            raise ValueError(f"rank {others[0]} has other weights of {config.model} than rank 0: fetch its "
                             "files again there, or give --model a directory that all nodes see")
    for field in ("num_steps", "eval_num_steps"):          # a model's schedule may need more than one
        try:
            steps = getattr(config, field)
            timestep_schedule(steps, **policy.schedule_arguments(steps))
        except ValueError as error:
            raise ValueError(f"--{field.replace('_', '-')} does not fit {config.model}: {error}") from error
    policy.before_call = raise_if_stopping
    return policy


def start(arguments: list[str], evaluate: Callable, held: contextlib.ExitStack) -> "Run":  # all ranks
    """The run that is asked for. `held` gets the lock."""
    preset, config, train_prompts, test_prompts = prepare(arguments)
    signals.end_with_launcher()
    device = distributed.setup(config.collective_timeout)
    command = signals.command_line() or "the same command"
    # torchrun --max-restarts starts us again without a name: the run is the one that its first start named.
    if not config.run_name:
        name = signals.remembered("run_name", f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        config, command = replace(config, run_name=name), f"{command} --run-name {name}"
    found = None
    if is_main():
        directory, lock, config = open_run(config)
        held.enter_context(lock)
        checkpoint = newest_whole(directory, set_aside=not config.eval_only)
        found = directory, config, checkpoint, train_prompts, test_prompts
    # The main rank's prompts are those of all, because a file may differ between nodes.
    directory, config, checkpoint, train_prompts, test_prompts = distributed.broadcast_object(found)
    # A machine's first rank builds its rewards first, because engines may fetch models without a lock.
    goes_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not goes_first:
        disable_progress_bars()                # of downloads, which the first rank shows
        distributed.wait_for_all()
    rewards = make_rewards(config, device)
    probe(rewards, train_prompts[0], config.resolution)
    if goes_first:
        distributed.wait_for_all()
    say(f"loading {config.model}")
    policy = make_policy(config, device)
    config = choose_batches(policy, train_prompts, config)
    if is_main():
        write_settings(directory, config, preset)
    return Run(config, directory, checkpoint, policy=policy, rewards=rewards, prompts=train_prompts,
               test_prompts=test_prompts, evaluate_policy=evaluate, command=command)


@dataclass
class Run:
    """What a run has, and what it does around its epochs. Only the main rank keeps the record."""

    config: Config
    directory: Path
    checkpoint: Path | None            # to go on from
    policy: Policy
    rewards: Rewards
    prompts: list[Prompt]              # to train on
    test_prompts: list[Prompt]
    evaluate_policy: Callable          # train.evaluate
    command: str                       # that goes on with this run

    def __post_init__(self):
        config, policy = self.config, self.policy
        self.learner, self.eval_scorer = Learner(policy, config), Scorer(self.rewards, policy, config)
        trained = Rewards(dict(config.rewards), self.rewards.components, self.rewards.start_thread)
        self.scorer = Scorer(trained, policy, config, self.eval_scorer.thread)
        self.plan = describe(config, distributed.world_size(), policy.branches(config.guidance_scale))

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one, and say what this run is."""
        config, checkpoint = self.config, self.checkpoint
        self.done, self.whole = 0, {"epoch": 0}              # epochs, and metrics of the last whole one
        if checkpoint:
            try:
                state = load_state(checkpoint)
            except OSError as error:
                raise TrainingError(f"rank {distributed.rank()} cannot read {checkpoint} ({error}): "
                                    "--output-dir must be storage that all nodes see") from error
            self.done, self.whole = self.learner.restore(state), state["metrics"]
        keeps = is_main() and not config.eval_only           # the record; on other ranks it stays empty
        history = cut_metrics(self.directory, self.done if checkpoint else -1) if keeps else []
        self.record = Record(self.directory, self.done, history, config.keep_checkpoints)
        # The first epoch that is not in the history
        missing = self.done + bool(history and history[-1]["epoch"] == self.done) if keeps else None
        self.display = Display(self.directory, missing, config.wandb) if is_main() else None
        self.license = find_license(config.model) if keeps else {}
        weights = sum(p.numel() for p in self.policy.parameters)
        rewards = ", ".join(f"{name} x {weight:g}" for name, weight in config.rewards)
        say(f"{self.directory}: {config.model} on {distributed.world_size()} x {self.policy.device}, "
            f"{weights:,} trained weights, {len(self.prompts)} prompts, {len(self.test_prompts)} for "
            f"evaluation, rewards: {rewards}")
        if {p.text for p in self.test_prompts} <= {p.text for p in self.prompts}:
            warn("the evaluation's prompts are trained on, so its score is not held out: a directory with "
                 "train.txt and test.txt keeps them apart")
        if config.eval_only and not checkpoint:
            say(f"evaluating the model as it is, because {self.directory} has no checkpoint")
        if not config.eval_only:
            say(self.plan)
        if checkpoint:
            doing = "evaluating" if config.eval_only else "continuing after"
            say(f"{doing} epoch {self.done}, from {checkpoint}")

    def epochs_left(self) -> Iterator[int]:
        """The epochs to train. First it concludes the last whole one if that is still due."""  # all ranks
        if self.checkpoint and self.done >= self.config.epochs:
            say(f"epoch {self.done} of --epochs {self.config.epochs} is done; a higher --epochs goes on")
        if is_main() and self.checkpoint:
            self.record.reduce_older()
        # An epoch may have been saved before it was evaluated.
        history = self.record.history
        if distributed.broadcast_object(not history or history[-1]["epoch"] != self.done):
            self.conclude(self.whole)
        yield from range(self.done + 1, self.config.epochs + 1)

    @contextlib.contextmanager
    def all_or_nothing(self, epoch: int) -> Iterator[dict]:
        """Within, an epoch samples and trains, and puts its metrics into the dict.

        Samples that are not finite leave the epoch out if --skip-nonfinite allows it, because advantages need
        all scores of the epoch. Other errors end the run, and `saved_whatever_happens` undoes the epoch.
        """
        config, started, metrics = self.config, time.perf_counter(), {"epoch": epoch}
        self.scorer.waited = 0.0
        try:
            yield metrics
            images = config.groups_per_epoch * config.group_size
            metrics |= {"learning_rate": learning_rate(config, epoch),
                        "images_per_second": images / (time.perf_counter() - started)}
        except (NonFinite, NonFiniteScore) as error:
            self.learner.skip(error, config.updates_per_epoch)
            metrics["skipped_updates"] = config.updates_per_epoch
        metrics["seconds"] = time.perf_counter() - started
        self.learner.end_updates()
        self.whole = metrics
        # Ranks meet again after the epoch counts, because one of them may be gone.
        waited = distributed.gather_vectors(torch.tensor([self.scorer.waited]))
        metrics["reward_wait"] = waited.mean().item()
        say(epoch_line(metrics, self.record.history, config))

    @contextlib.contextmanager
    def saved_whatever_happens(self) -> Iterator[None]:
        """Within, the run trains. Whatever ends it, the last whole epoch is saved; the error's note tells."""
        self.resume()
        try:
            yield
        except BaseException as error:
            signals.safe_point.set()
            try:
                if not self.config.eval_only and self.learner.undo_updates():
                    self.save(self.whole)
            except Exception as failure:         # after a fault of the device or program, the error to read
                print(f"warning: epoch {self.whole['epoch']} could not be saved ({failure})", file=sys.stderr)
            saved, whole = self.record.saved, self.whole["epoch"]
            note = f"epoch {saved} is saved" if saved else "that was before the first epoch was whole"
            lost = is_main() and not self.config.eval_only and saved < whole
            if lost:
                note = f"epoch {whole} was whole and is not saved: epoch {saved} is the last one that is"
            error.add_note(note)
            # Wait for the others after these errors alone, because any other may be this rank's alone.
            if isinstance(error, (RewardError, NonFinite, Interrupted)):
                distributed.wait_for_all()
            if lost and isinstance(error, Interrupted):
                raise TrainingError(f"stopped by a signal; {note}") from error
            raise

    def conclude(self, metrics: dict) -> None:  # all ranks
        """Evaluate, log and save after an epoch, as far as they are due."""
        epoch, config = metrics["epoch"], self.config
        if epoch == 0 or epoch % config.eval_every == 0 or epoch == config.epochs:
            metrics = {**metrics, **self.evaluate(epoch)}
        with signals.taking_its_time():
            if is_main():
                metrics |= spread_shares(metrics, self.record.history)
                self.warn_of_collapse(metrics)
                self.record.add(metrics)
                self.display.curves(metrics)
                if "eval/total" in metrics:
                    self.display.page()
            self.whole = metrics
            if epoch % config.save_every == 0 or epoch == config.epochs:
                self.save(metrics)
            distributed.wait_for_all()           # nobody goes on, or ends the run, while this is written

    def warn_of_collapse(self, metrics: dict) -> None:
        """Say once that the pictures have become alike, because a score does not show it."""
        sets = (("spread/group_share", "pictures of a group"),
                ("spread/eval_share", "pictures of the evaluation"))
        for name, pictures in sets:
            if metrics.get(name, 1) < 1 / 3 and not any(m.get(name, 1) < 1 / 3 for m in self.record.history):
                warn(f"the {pictures} differ by {metrics[name]:.0%} of what they did before training, by "
                     "their mean colour; --shared-start-noise with a late --window-range keeps diversity")

    def evaluate(self, epoch: int) -> dict[str, float]:  # all ranks
        """Metrics of the evaluation's prompts. The images go to the page."""
        metrics, images, scores = self.evaluate_policy(self.learner, self.eval_scorer, self.test_prompts,
                                                       self.config)
        with signals.taking_its_time():          # because many large pictures take a while
            if is_main():
                prompts = [p.text for p in self.test_prompts[:len(images)]]
                self.display.pictures(epoch, images, prompts, scores)
            distributed.wait_for_all()
        say(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics

    def evaluate_only(self) -> None:  # all ranks
        """Score the last checkpoint and draw the page. Nothing that was recorded changes."""
        metrics = {"epoch": self.done, **self.evaluate(self.done)}
        if is_main():
            if not (self.directory / "metrics.jsonl").exists():
                write_metrics(self.directory, metrics)
            self.display.page()
            say(f"images: {self.directory / 'index.html'}")

    def save(self, metrics: dict) -> None:
        """Write a checkpoint of the weights as they are after the epoch of `metrics`, unless there is one."""
        if is_main() and (epoch := metrics["epoch"]) != self.record.saved:
            state = {**self.learner.state(epoch), "metrics": metrics}
            self.record.save(epoch, functools.partial(self.save_weights, epoch), state)

    def save_weights(self, epoch: int, directory: Path) -> None:
        """Write the averaged weights, and the model card beside them."""
        with self.learner.average.applied():
            self.policy.save(directory)
        for folder in filter(Path.is_dir, directory.iterdir()):
            try:
                write_card(folder, checkpoint_path(self.directory, epoch) / folder.name, self.config,
                           type(self.policy.pipe).__name__, command=self.command, license=self.license,
                           history=self.record.history, epoch=epoch)
            except OSError:                      # of the disk, which then lacks the checkpoint too
                raise
            except Exception as error:           # because no checkpoint is lost for a card
                warn(f"epoch {epoch} is saved without a model card ({type(error).__name__}: {error})")

    def finish(self) -> None:
        """Say the score before and after, and where things are. TrainingError if the end is not saved."""
        if not is_main():
            return
        self.display.close()
        record, directory = self.record, self.directory
        evaluated = [m for m in record.history if "eval/total" in m]
        if not evaluated:
            return say(f"no evaluation in {directory / 'metrics.jsonl'}")
        first, last = evaluated[0], evaluated[-1]
        after = f", {last['eval/total']:.4f} after {last['epoch']} epochs" if last is not first else ""
        say(f"eval/total {first['eval/total']:.4f} before training{after}")
        if last is not first and max(m["eval/total"] for m in evaluated[1:]) <= first["eval/total"]:
            say("no evaluation after training was above the one before it")
        if "spread/eval_share" in last:
            say(f"spread of the evaluation's mean colours, of 255: {first['spread/eval']:.1f} before "
                f"training, {last['spread/eval']:.1f} after ({last['spread/eval_share']:.0%})")
        if (directory / "index.html").exists():
            say(f"images and curves: {directory / 'index.html'}")
        if picture := self.display.comparison(first["epoch"], last["epoch"]):
            say(f"before above after: {picture}")
        best, newest = record.best() or 0, record.saved
        named = {"best": best, "last": newest} if best != newest else {"best and last": best}
        for which, epoch in named.items():
            # The weights are in a directory, adapter or transformer.
            for weights in filter(Path.is_dir, checkpoint_path(directory, epoch).glob("*")):
                say(f"the {which} weights, of epoch {epoch}: {weights}")
        say(f"metrics: {directory / 'metrics.jsonl'}")
        if record.saved != self.config.epochs > self.done:
            raise TrainingError(f"epoch {self.config.epochs} is not saved: make room, and the same command "
                                f"goes on from epoch {record.saved}")
