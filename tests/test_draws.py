"""What an epoch draws and deals out is a function of (seed, epoch, sample), and each row is trained once."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from helpers import fuzz
from hypothesis import strategies as st

from config import Config, parse_config, validate
from draws import (
    EVAL_NOISE, GROUP_NOISE, TRAIN_NOISE, batches, deal_samples, draw_epoch, draw_noise, draw_first_steps, noise_levels,
    rank_slice, training_batches)
from harness.batches import batch_plan


# ---- noise and windows -------------------------------------------------------------------------------------

def test_the_noise_of_a_sample_does_not_depend_on_its_batch():
    together = draw_noise(1, TRAIN_NOISE, 5, [0, 7, 2], 2, (3, 4))                       # (2, B, 3, 4)
    assert torch.equal(together[:, 1:2], draw_noise(1, TRAIN_NOISE, 5, [7], 2, (3, 4)))


def test_noise_is_the_same_while_another_thread_has_changed_the_default_dtype():
    expected = draw_noise(1, TRAIN_NOISE, 5, [0, 7], 2, (3, 4))
    torch.set_default_dtype(torch.bfloat16)                  # as transformers does while it loads a network
    try:
        found = draw_noise(1, TRAIN_NOISE, 5, [0, 7], 2, (3, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_no_two_samples_epochs_seeds_or_purposes_share_noise():
    keys = [(1, TRAIN_NOISE, 5, [0, 1, 2]), (1, TRAIN_NOISE, 6, [0]), (2, TRAIN_NOISE, 5, [0]), (1, EVAL_NOISE, 5, [0]),
            (1, GROUP_NOISE, 5, [0])]
    values = torch.cat([draw_noise(*key, 2, (3, 4)).flatten() for key in keys])
    assert len(values.unique()) == len(values)


def test_windows_are_drawn_for_each_group_and_epoch_within_their_range():
    _, config = parse_config("--window-size 2 --window-range 1 6 --groups-per-epoch 50".split())
    first, second = draw_first_steps(config, 1), draw_first_steps(config, 2)
    assert set(first.tolist()) == {1, 2, 3, 4} and not torch.equal(first, second)
    assert torch.equal(first, draw_first_steps(config, 1))


def test_a_step_is_stochastic_in_its_samples_window_and_nowhere_else():
    _, config = parse_config("--window-size 2 --window-range 0 5 --num-steps 5 --noise-level 0.5".split())
    levels = noise_levels(torch.tensor([0, 3]), config)
    assert levels.dtype == torch.float64 and levels.T.tolist() == [[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 0.5]]


def test_without_a_window_every_step_is_stochastic():
    _, config = parse_config("--window-size 0 --num-steps 3 --noise-level 0.5".split())
    assert noise_levels(torch.tensor([0, 0]), config).tolist() == [[0.5, 0.5]] * 3


# ---- parts -------------------------------------------------------------------------------------------------

def even_and_in_order(parts: list, items: list) -> bool:
    sizes = [len(part) for part in parts]
    return [i for part in parts for i in part] == items and max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize("total, ranks", [(0, 3), (1, 1), (2, 3), (7, 3), (8, 8), (192, 5), (1152, 48)])
def test_rank_slices_are_a_partition_in_order_that_differs_by_one_at_most(total, ranks):
    assert even_and_in_order([rank_slice(total, rank, ranks) for rank in range(ranks)], list(range(total)))


@fuzz(50, total=st.integers(0, 200), size=st.integers(1, 50))
def test_batches_are_even_parts_as_few_as_their_size_allows(total, size):
    parts = batches(range(total), size)
    assert even_and_in_order(parts, list(range(total)))
    assert len(parts) == -(-total // size) and max(map(len, parts), default=0) <= size


@pytest.mark.parametrize("total, size, sizes", [(72, 48, [36, 36]), (9, 4, [3, 3, 3]), (5, 8, [5]), (0, 3, [])])
def test_no_batch_is_a_small_remainder(total, size, sizes):
    assert sorted(len(part) for part in batches(range(total), size)) == sizes


# ---- ranks -------------------------------------------------------------------------------------------------

def dealt_config(group_size: int, shared: bool) -> Config:
    _, config = parse_config(["--groups-per-epoch", "48", "--group-size", str(group_size), "--updates-per-epoch", "2",
                              "--num-steps", "10", "--window-size", "2", "--window-range", "0", "5"])
    return dataclasses.replace(config, shared_start_noise=shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("group_size", [6, 5])                               # which the two updates divide, or do not
def test_ranks_have_equally_many_samples_of_each_update(world_size, group_size, shared):
    config = dealt_config(group_size, shared)
    for epoch in range(20):
        first_steps = draw_first_steps(config, epoch)
        dealt = [deal_samples(first_steps, config, rank, world_size) for rank in range(world_size)]
        for update in range(2):
            counts = [sum(i % 2 == update for i in samples) for samples in dealt]
            assert max(counts) - min(counts) <= 1


def work_of_the_busiest(config: Config, world_size: int) -> int:
    """Steps that images take on their own, over twenty epochs."""
    work = 0
    for epoch in range(20):
        first_steps = draw_first_steps(config, epoch)
        work += max(sum(10 - int(first_steps[i // config.group_size]) for i in deal_samples(first_steps, config, rank, world_size))
                    for rank in range(world_size))
    return work


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shared_starts_even_out_the_work_of_ranks(world_size):
    apart, shared = (work_of_the_busiest(dealt_config(6, shared), world_size) for shared in (False, True))
    assert shared < 0.99 * apart


@pytest.mark.parametrize("group_size, world_size", [(6, 1), (6, 50), (5, 3)])
def test_where_nothing_can_be_evened_out_shared_starts_cost_nothing(group_size, world_size):
    apart, shared = (work_of_the_busiest(dealt_config(group_size, shared), world_size) for shared in (False, True))
    assert shared <= apart


# ---- an epoch ----------------------------------------------------------------------------------------------

@st.composite
def epochs(draw, **fixed):
    """(settings, number of ranks, advantages)"""
    groups, size = draw(st.integers(1, 6)), draw(st.integers(2, 7))
    choices = dict(
        rollout_batch=st.integers(1, 12), train_batch=st.integers(1, 12), window_size=st.integers(0, 2),
        updates_per_epoch=st.integers(1, groups * size), shared_start_noise=st.booleans(),
        beta=st.sampled_from([0.0, 0.1]), dtype=st.sampled_from(["float32", "bfloat16"]))
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in fixed}
    config = dataclasses.replace(Config(), groups_per_epoch=groups, group_size=size, num_steps=4, window_range=(0, 4),
                                 **drawn, **fixed)
    validate(config)
    N = groups * size
    advantages = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, -1.0]), min_size=N, max_size=N))
    return config, draw(st.integers(1, 9)), torch.tensor(advantages)


def of_all_ranks(config: Config, ranks: int) -> list:
    return [draw_epoch(config, 9, 1, rank, ranks) for rank in range(ranks)]


@fuzz(60, epoch=epochs())
def test_the_ranks_together_hold_each_sample_once(epoch):
    config, ranks, advantages = epoch
    held = [i for draw in of_all_ranks(config, ranks) for i in draw.indices]
    assert sorted(held) == list(range(len(advantages)))


@fuzz(60, epoch=epochs())
def test_ranks_agree_on_prompts_and_windows(epoch):
    config, ranks, _ = epoch
    first, *others = of_all_ranks(config, ranks)
    assert all(draw.prompts == first.prompts and torch.equal(draw.first_steps, first.first_steps) for draw in others)


@fuzz(40, epoch=epochs(shared_start_noise=True))
def test_a_rollout_batch_with_a_shared_start_has_one_window(epoch):
    config, ranks, _ = epoch
    for draw in of_all_ranks(config, ranks):
        for batch in draw.rollout_batches:
            assert len({int(draw.first_steps[i // config.group_size]) for i in batch}) == 1


def trained_rows(config: Config, draw, update: int, advantages) -> list[list[tuple[int, int]]]:
    """A rank's batches of an update, as (sample, trained step)."""
    return [[(draw.indices[j], k) for j, k in zip(*batch, strict=True)]
            for batch in training_batches(draw, update, advantages, config)]


@fuzz(80, epoch=epochs())
def test_every_row_with_an_advantage_or_a_kl_is_trained_once_in_its_update(epoch):
    config, ranks, advantages = epoch
    times = Counter()
    for draw, update in itertools.product(of_all_ranks(config, ranks), range(config.updates_per_epoch)):
        for batch in trained_rows(config, draw, update, advantages):
            assert all(i % config.updates_per_epoch == update for i, _ in batch)
            times.update(batch)
    rows = list(itertools.product(range(len(advantages)), range(config.trained_steps)))
    assert set(times) <= set(rows) and max(times.values(), default=1) == 1
    assert all(times[i, k] == 1 for i, k in rows if config.beta or advantages[i])


@fuzz(60, epoch=epochs(beta=0.0, dtype="float32"))
def test_full_precision_leaves_out_every_row_without_advantage(epoch):
    config, ranks, advantages = epoch
    for draw, update in itertools.product(of_all_ranks(config, ranks), range(config.updates_per_epoch)):
        assert all(advantages[i] for batch in trained_rows(config, draw, update, advantages) for i, _ in batch)


@fuzz(60, epoch=epochs(beta=0.0, dtype="bfloat16", train_batch=12))
def test_half_precision_replays_the_rollouts_batches_that_have_an_advantage(epoch):
    """Each whole, in its order, at one trained step at a time: training batches have room for any rollout batch."""
    config, ranks, advantages = epoch
    for draw in of_all_ranks(config, ranks):
        replayed = [batch for update in range(config.updates_per_epoch)
                    for batch in trained_rows(config, draw, update, advantages)]
        expected = [[(i, k) for i in batch] for batch in draw.rollout_batches if any(advantages[i] for i in batch)
                    for k in range(config.trained_steps)]
        assert sorted(replayed) == sorted(expected)


@fuzz(40, epoch=epochs(dtype="bfloat16"))
def test_a_half_precision_batch_is_a_part_of_one_rollout_batch_at_one_step(epoch):
    config, ranks, advantages = epoch
    for draw, update in itertools.product(of_all_ranks(config, ranks), range(config.updates_per_epoch)):
        for batch in trained_rows(config, draw, update, advantages):
            samples, steps = zip(*batch)
            assert len(set(steps)) == 1 and len(batch) <= config.train_batch
            assert any(set(samples) <= set(rollout) for rollout in draw.rollout_batches)


# ---- the plan ----------------------------------------------------------------------------------------------

@fuzz(80, epoch=epochs())
def test_the_plan_counts_samples_batches_and_the_largest_batch(epoch):
    """With a KL, all rows are trained. A shared start divides rollouts by windows, which the plan does not know."""
    config, ranks, advantages = epoch
    plan, everything = batch_plan(config, ranks), torch.ones(len(advantages))
    held = of_all_ranks(config, ranks)
    trained = [[batch for update in range(config.updates_per_epoch)
                for batch in trained_rows(config, draw, update, everything)] for draw in held]
    assert plan.samples == len(advantages) and plan.samples_per_rank == max(len(draw.indices) for draw in held)
    assert max(len(batch) for rank in trained for batch in rank) <= config.train_batch
    assert plan.replay_calls == sum(len(batch) for rank in trained for batch in rank)
    if not config.shared_start_noise:
        assert plan.rollout_batches == max(len(draw.rollout_batches) for draw in held)
        assert plan.rollout_images == max(len(batch) for draw in held for batch in draw.rollout_batches)
        assert plan.train_batches == max(map(len, trained))
        assert plan.train_rows == max(len(batch) for rank in trained for batch in rank)


def test_the_plan_of_a_shared_prefix_is_its_average_over_windows():
    words = "--window-size 2 --window-range 0 5 --shared-start-noise --groups-per-epoch 4 --group-size 6"
    _, config = parse_config(words.split())
    calls = [4 * 6 * config.num_steps - 4 * 5 * first for first in range(4)]         # by where a window may start
    assert batch_plan(config, 1).rollout_calls == sum(calls) / len(calls)
