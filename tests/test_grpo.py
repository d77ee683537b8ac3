"""Claims about grpo.py: advantages, the clipped loss, the KL, and what is watched."""

import numpy as np
import pytest
import torch

from grpo import (clipped_loss, gaussian_kl, group_advantages, guard_log_ratio, ratio_statistics,
                  weighted_advantages, zero_variance_groups)

F64 = torch.float64
STDS = ("global", "group")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def epoch(groups=5, size=6, seed=0):
    """Rewards (N,) and shuffled, gappy group ids (N,)."""
    ids = torch.tensor([7, -3, 1000, 0, 42])[:groups].repeat_interleave(size)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return normal(len(ids), seed=seed) + 0.1 * ids.sign(), ids[order]


# ---- advantages --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (F64, 1e-12)])
@pytest.mark.parametrize("std", STDS)
def test_advantages_are_the_formula_with_the_population_std(std, dtype, tolerance):
    rewards, ids = epoch()
    rewards = rewards.to(dtype)
    r, expected = rewards.double().numpy(), np.empty(len(rewards))
    for g in np.unique(ids):
        member = ids.numpy() == g
        scale = np.std(r if std == "global" else r[member], ddof=0)
        expected[member] = (r[member] - r[member].mean()) / (scale + 1e-4)
    advantages = group_advantages(rewards, ids, std)
    assert advantages.dtype == dtype and advantages.abs().max() < 5
    assert largest_difference(advantages.double(), torch.from_numpy(expected)) <= tolerance


def test_the_default_std_is_global():
    rewards, ids = epoch()
    assert torch.equal(group_advantages(rewards, ids), group_advantages(rewards, ids, "global"))
    assert not torch.allclose(group_advantages(rewards, ids), group_advantages(rewards, ids, "group"))


def test_advantages_of_the_sum_are_those_of_the_weighted_rewards():
    (first, ids), (second, _) = epoch(), epoch(seed=1)
    rewards, weights = {"a": first, "b": second, "logged": normal(len(ids))}, {"a": 0.5, "b": -2.0}
    for std in STDS:
        found = weighted_advantages(rewards, weights, ids, std=std)
        assert torch.equal(found, group_advantages(0.5 * first - 2 * second, ids, std))


@pytest.mark.parametrize("std", STDS)
def test_advantages_of_each_do_not_depend_on_a_rewards_scale(std):
    (first, ids), (second, _) = epoch(), epoch(seed=1)
    rewards = {"a": first, "b": second}
    weights = {"a": 1.0, "b": 1.0}
    each = weighted_advantages(rewards, weights, ids, of="each", std=std)
    scaled = weighted_advantages({**rewards, "b": 1e3 * second}, weights, ids, of="each", std=std)
    assert largest_difference(each, scaled) < 1e-3                       # eps, 1e-4, is added to deviations near 1
    # In a sum, the reward with the large scale is all that is left.
    drowned = weighted_advantages({**rewards, "b": 1e3 * second}, weights, ids, std=std)
    assert largest_difference(drowned, group_advantages(second, ids, std)) < 0.02
    assert largest_difference(each, drowned) > 0.5


def test_advantages_of_each_are_normalised_once_more_over_the_epoch():
    (first, ids), (second, _) = epoch(), epoch(seed=1)
    each = weighted_advantages({"a": first, "b": second}, {"a": 1.0, "b": 0.5}, ids, of="each")
    assert abs(each.std(correction=0).item() - 1) < 1e-3
    for g in ids.unique():
        assert abs(each[ids == g].mean().item()) < 1e-12
    parts = group_advantages(first, ids) + 0.5 * group_advantages(second, ids)
    assert largest_difference(each * parts.std(correction=0), parts) < 1e-3


def test_advantages_of_each_are_zero_in_a_group_whose_rewards_are_all_equal():
    ids = torch.arange(3).repeat_interleave(4)
    rewards = {"a": normal(12), "b": normal(12, seed=1)}
    for values in rewards.values():
        values[4:8] = values[4]
    each = weighted_advantages(rewards, {"a": 1.0, "b": 1.0}, ids, of="each")
    assert not each[4:8].any() and each[:4].all() and each[8:].all()


def test_advantages_of_something_else_are_refused():
    rewards, ids = epoch()
    with pytest.raises(ValueError, match="of is 'all': 'sum' or 'each'"):
        weighted_advantages({"a": rewards}, {"a": 1.0}, ids, of="all")


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [2, 3, 7, 24])
@pytest.mark.parametrize("std", STDS)
def test_equal_rewards_in_a_group_give_exactly_zero_advantage(std, size, dtype):
    for value in (0.1, 0.7, -0.3, 1 / 3, 0.0, 26.04):
        equal = torch.full((size,), value, dtype=dtype)
        assert not group_advantages(equal, torch.zeros(size, dtype=torch.int64), std).any()

        rewards = torch.cat([equal, torch.linspace(0, 1, size, dtype=dtype)])
        advantages = group_advantages(rewards, torch.arange(2).repeat_interleave(size), std)
        assert not advantages[:size].any()
        assert advantages.isfinite().all() and advantages[size:].any()


@pytest.mark.parametrize("std", STDS)
def test_rewards_that_are_all_equal_give_zero_and_no_nan(std):
    for sizes in ([3, 3], [7, 1, 24], [1]):
        ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        assert torch.equal(group_advantages(torch.full(ids.shape, 0.1), ids, std), torch.zeros(ids.shape))


def test_a_constant_added_to_a_group_changes_nothing_but_the_global_scale():
    rewards, ids = epoch()
    constant = torch.where(ids == 42, 3.0, -1.5).to(F64)
    moved = rewards + constant
    assert largest_difference(group_advantages(moved, ids, "group"), group_advantages(rewards, ids, "group")) <= 1e-12
    assert largest_difference(group_advantages(rewards + 10, ids), group_advantages(rewards, ids)) <= 1e-12
    scale = (rewards.std(correction=0) + 1e-4) / (moved.std(correction=0) + 1e-4)
    assert largest_difference(group_advantages(moved, ids), scale * group_advantages(rewards, ids)) <= 1e-12


@pytest.mark.parametrize("std", STDS)
def test_permuting_the_samples_permutes_the_advantages(std):
    rewards, ids = epoch()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    expected = group_advantages(rewards, ids, std)[order]
    assert largest_difference(group_advantages(rewards[order], ids[order], std), expected) <= 1e-12


@pytest.mark.parametrize("std", STDS)
def test_groups_are_told_apart_by_id_whatever_the_ids_are(std):
    rewards, ids = epoch()
    renamed = ids.clone()
    for old, new in zip(ids.unique().tolist(), (3, 9, -8, 2**40, 0)):
        renamed[ids == old] = new
    assert largest_difference(group_advantages(rewards, renamed, std), group_advantages(rewards, ids, std)) <= 1e-12

    # Two groups with the same rewards, as two of the same prompt may have, stay two.
    twice = torch.tensor([0.0, 1.0, 0.0, 1.0, 5.0, 5.0], dtype=F64)
    apart, together = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 1])
    assert largest_difference(group_advantages(twice, apart, std)[:2], group_advantages(twice, apart, std)[2:4]) == 0
    assert not torch.allclose(group_advantages(twice, apart, std), group_advantages(twice, together, std))


@pytest.mark.parametrize("std", STDS)
def test_advantages_are_clipped_to_plus_and_minus_5(std):
    ids = torch.zeros(64, dtype=torch.int64)
    one_won, one_lost = torch.zeros(64), torch.ones(64)
    one_won[9], one_lost[9] = 1, 0                                       # 7.9 standard deviations
    assert group_advantages(one_won, ids, std)[9] == 5 and group_advantages(one_lost, ids, std)[9] == -5
    assert group_advantages(one_won, ids, std, clip=2.0)[9] == 2
    assert group_advantages(one_won, ids, std, clip=10.0)[9] == pytest.approx(63**0.5, rel=2e-3)


def test_bad_rewards_are_refused_with_their_value():
    ids = torch.tensor([0, 0, 1])
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match=f"not finite: {value}"):
            group_advantages(torch.tensor([0.0, value, 1.0]), ids)
    with pytest.raises(ValueError, match="'batch'"):
        group_advantages(torch.zeros(3), ids, "batch")
    with pytest.raises(ValueError, match=r"\(4,\) and group_ids \(3,\)"):
        group_advantages(torch.zeros(4), ids)
    with pytest.raises(ValueError, match=r"\(3, 1\) and group_ids \(3, 1\)"):
        group_advantages(torch.zeros(3, 1), ids[:, None])


def test_zero_variance_groups_counts_the_groups_of_equal_rewards():
    ids = torch.tensor([5, 9, 5, 9, 5, -1, -1, 2])
    assert zero_variance_groups(torch.tensor([0.1, 0.2, 0.1, 0.3, 0.1, 1.0, 0.0, 0.5]), ids) == 2      # 5, and 2 alone
    assert zero_variance_groups(torch.full((8,), 0.1), ids) == 4
    assert zero_variance_groups(torch.arange(8.0)[:7], ids[:7]) == 0


# ---- the clipped loss --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clip_range", [2e-6, 1e-4, 0.2])
def test_at_rho_1_the_gradient_is_that_of_reinforce(clip_range):
    theta = normal(6).requires_grad_()
    features, actions, advantages = normal(8, 6, seed=1), normal(8, seed=2), normal(8, seed=3)
    log_prob = torch.distributions.Normal((features @ theta).tanh(), 0.5).log_prob(actions)
    reinforce, = torch.autograd.grad((-advantages * log_prob).sum(), theta, retain_graph=True)
    ours, = torch.autograd.grad(clipped_loss(log_prob, log_prob.detach(), advantages, clip_range).sum(), theta)
    assert reinforce.abs().min() > 0.1
    assert largest_difference(ours, reinforce) <= 1e-12


def test_the_clipped_loss_is_its_formula():
    log_prob, old, advantages = 0.3 * normal(50), 0.3 * normal(50, seed=1), normal(50, seed=2)
    rho, A = np.exp((log_prob - old).numpy()), advantages.numpy()
    expected = np.maximum(-A * rho, -A * np.clip(rho, 0.8, 1.2))
    assert (np.abs(rho - 1) > 0.2).any() and (np.abs(rho - 1) < 0.2).any()
    assert largest_difference(clipped_loss(log_prob, old, advantages, 0.2), torch.from_numpy(expected)) <= 1e-12


@pytest.mark.parametrize("rho, advantage, stops", [
    (1.3, 2.0, True), (0.7, 2.0, False),           # a winner is not pushed up further; one that fell is
    (0.7, -2.0, True), (1.3, -2.0, False),         # a loser is not pushed down further; one that rose is
    (1.1, 2.0, False), (0.9, -2.0, False)])        # inside the clip range nothing stops
def test_clipping_stops_the_gradient_only_where_the_policy_moved_with_the_advantage(rho, advantage, stops):
    log_prob = torch.tensor([rho], dtype=F64).log().requires_grad_()
    loss = clipped_loss(log_prob, torch.zeros(1, dtype=F64), torch.tensor([advantage], dtype=F64), 0.2)
    gradient, = torch.autograd.grad(loss.sum(), log_prob)
    assert gradient.item() == pytest.approx(0 if stops else -advantage * rho, abs=1e-12)


def test_the_published_clip_ranges_act_in_float32():
    for clip_range in (2e-6, 1e-5, 1e-4):
        log_prob = torch.tensor([2 * clip_range, clip_range / 2]).requires_grad_()
        loss = clipped_loss(log_prob, torch.zeros(2), torch.ones(2), clip_range)
        gradient, = torch.autograd.grad(loss.sum(), log_prob)
        assert gradient[0] == 0 and gradient[1].item() == pytest.approx(-1, abs=1e-3)


# ---- GRPO-Guard --------------------------------------------------------------------------------------------------

def gaussian_step(batch=64, seed=0, dtype=F64, move=1e-3):
    """std (B, 1, 1, 1), the old and the new mean of a step, and a sample of the old one."""
    std = torch.linspace(0.05, 1.5, batch, dtype=dtype).reshape(-1, 1, 1, 1)
    old_mean = normal(batch, 3, 4, 4, seed=seed).to(dtype)
    mean = old_mean + move * normal(batch, 3, 4, 4, seed=seed + 1).to(dtype)
    return std, old_mean, mean, old_mean + std * normal(batch, 3, 4, 4, seed=seed + 2).to(dtype)


def test_the_guard_ratio_is_its_formula_in_log_probs():
    std, old_mean, mean, sample = gaussian_step(move=0.1)
    log_prob, old_log_prob = (torch.distributions.Normal(m, std).log_prob(sample).mean((1, 2, 3)) for m in (mean, old_mean))
    square = ((mean - old_mean) ** 2).mean((1, 2, 3))
    flat = std.flatten()
    expected = flat * (log_prob - old_log_prob + square / (2 * flat**2))
    assert largest_difference(guard_log_ratio(sample, mean, old_mean, std), expected) <= 1e-13


def test_the_guard_ratio_is_centred_and_spreads_alike_at_every_std_where_the_plain_one_does_not():
    std = torch.tensor([0.05, 0.2, 1.0], dtype=F64).reshape(3, 1, 1, 1)
    old_mean, delta = torch.zeros(3, 1, 1, 20_000, dtype=F64), 0.03
    eps = normal(1, 1, 1, 20_000)
    guard = (guard_log_ratio(std * eps, old_mean + delta, old_mean, std) - delta * eps.mean()).abs().max()
    assert guard <= 1e-12                                              # mean(eps (mean - mean_old)), whatever the std
    plain = [torch.distributions.Normal(m, std).log_prob(std * eps).mean((1, 2, 3)) for m in (old_mean + delta, old_mean)]
    bias = -(delta**2 / (2 * std.flatten() ** 2))
    assert largest_difference(plain[0] - plain[1], bias + delta * eps.mean() / std.flatten()) <= 1e-12


def test_on_policy_the_guard_ratio_is_1_to_the_bit_and_its_gradient_is_reinforces_times_std():
    std, mean, _, sample = gaussian_step()
    mean = mean.requires_grad_()
    log_ratio = guard_log_ratio(sample, mean, mean.detach(), std)
    assert not log_ratio.detach().any()
    guard, = torch.autograd.grad(log_ratio.sum(), mean)
    log_prob = torch.distributions.Normal(mean, std).log_prob(sample).mean((1, 2, 3))
    reinforce, = torch.autograd.grad(log_prob.sum(), mean)
    assert largest_difference(guard, std * reinforce) <= 1e-12


def test_the_guard_ratio_keeps_the_published_clip_range_in_float32_where_log_probs_do_not():
    def by_log_probs(sample, mean, old_mean, std):
        log_prob, old = (torch.distributions.Normal(m, std).log_prob(sample).mean((1, 2, 3)) for m in (mean, old_mean))
        return std.flatten() * (log_prob - old + ((mean - old_mean) ** 2).mean((1, 2, 3)) / (2 * std.flatten() ** 2))

    sample, mean, old_mean, std = (gaussian_step(move=1e-4)[i] for i in (3, 2, 1, 0))
    exact = guard_log_ratio(sample, mean, old_mean, std)
    rounded = [ratio(*(t.float() for t in (sample, mean, old_mean, std))).double() for ratio in (guard_log_ratio, by_log_probs)]
    assert exact.abs().max() > 2e-6
    assert largest_difference(rounded[0], exact) < 0.01 * 2e-6 < 0.1 * 2e-6 < largest_difference(rounded[1], exact)


def test_a_deterministic_step_has_no_guard_ratio():
    with pytest.raises(ValueError, match="std is 0"):
        guard_log_ratio(*(normal(2, 3, 2, 2) for _ in range(3)), torch.tensor([0.3, 0.0]).reshape(2, 1, 1, 1))


# ---- the KL ------------------------------------------------------------------------------------------------------

def test_the_kl_is_that_of_torch_distributions_averaged_over_dimensions():
    mean, ref_mean = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    for std in (torch.tensor(0.3, dtype=F64), torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64).reshape(4, 1, 1, 1)):
        p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(ref_mean, std)
        expected = torch.distributions.kl_divergence(p, q).mean((1, 2, 3))
        assert largest_difference(gaussian_kl(mean, ref_mean, std), expected) <= 1e-12 * expected.max()


def test_the_kl_and_its_gradient_are_zero_at_equality_and_only_there():
    ref_mean, std = normal(4, 3, 2, 2), torch.tensor(0.3, dtype=F64)
    mean = ref_mean.clone().requires_grad_()
    kl = gaussian_kl(mean, ref_mean, std)
    assert torch.equal(kl, torch.zeros(4, dtype=F64)) and not torch.autograd.grad(kl.sum(), mean)[0].any()

    mean = (ref_mean + 0.01 * normal(4, 3, 2, 2, seed=1)).requires_grad_()
    kl = gaussian_kl(mean, ref_mean, std)
    gradient, = torch.autograd.grad(kl.sum(), mean)
    assert (kl > 0).all() and gradient.abs().min() > 0
    assert largest_difference(gradient, ((mean - ref_mean) / (12 * std**2)).detach()) <= 1e-12          # 12 dimensions


def test_a_deterministic_step_has_no_kl():
    mean = normal(2, 3, 2, 2)
    for std in (torch.tensor(0.0), torch.tensor([0.3, 0.0]).reshape(2, 1, 1, 1)):
        with pytest.raises(ValueError, match="std is 0"):
            gaussian_kl(mean, mean, std)


# ---- what is watched ---------------------------------------------------------------------------------------------

def test_ratio_statistics_are_their_formulas():
    log_prob, old = (0.3 * normal(50)).requires_grad_(), 0.3 * normal(50, seed=1)
    log_rho = (log_prob - old).detach().numpy()
    rho = np.exp(log_rho)
    expected = {"approx_kl": rho - 1 - log_rho, "clip_fraction_high": rho > 1.2, "clip_fraction_low": rho < 0.8,
                "ratio": rho, "ratio_deviation": np.abs(rho - 1)}
    statistics = ratio_statistics(log_prob, old, 0.2)
    assert set(statistics) == set(expected)
    for name, value in statistics.items():
        assert value.dtype == F64 and not value.requires_grad
        assert largest_difference(value, torch.from_numpy(expected[name].astype(float))) <= 1e-12
    assert 0 < statistics["clip_fraction_high"].mean() < 1 and 0 < statistics["clip_fraction_low"].mean() < 1


def test_approx_kl_is_precise_and_never_negative_at_the_ratios_of_the_published_clip_ranges():
    for size in (1e-6, 1e-5, 1e-4):
        log_rho = (size * normal(1000)).float()
        approx_kl = ratio_statistics(log_rho, torch.zeros(1000), 1e-5)["approx_kl"]
        assert (approx_kl >= 0).all()
        assert approx_kl.mean().item() == pytest.approx((log_rho.double() ** 2 / 2).mean().item(), rel=0.2)


def test_on_policy_nothing_is_clipped_and_no_ratio_deviates():
    log_prob = normal(9).float()
    for name, value in ratio_statistics(log_prob, log_prob, 1e-4).items():
        assert torch.equal(value, torch.full((9,), float(name == "ratio")))


def test_whole_number_rewards_are_as_good_as_floats():
    ids, rewards = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 1, 0, 0])
    assert torch.equal(group_advantages(rewards, ids), group_advantages(rewards.float(), ids))


@pytest.mark.parametrize("A, excess, expected", [(4.236, -1.0073e-5, -4.236), (4.236, 2e-5, 0.0), (-4.236, 2e-5, 4.236),
                                                 (-4.236, -2e-5, 0.0), (1.0, 0.0, -1.0), (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_the_clipped_loss_is_all_or_nothing(A, excess, expected, dtype):
    # In float32, -A rho and -A clip(rho) of the first case are one number, whose gradient a maximum would halve.
    log_prob = torch.tensor([excess], dtype=torch.float64).log1p().to(dtype).requires_grad_()
    clipped_loss(log_prob, torch.zeros(1, dtype=dtype), torch.tensor([A], dtype=dtype), 1e-5).backward()
    assert log_prob.grad.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("clip_range", [1e-5, 2e-6, 0.2])
def test_no_float32_pair_of_ratio_and_advantage_loses_half_its_gradient(clip_range):
    generator = torch.Generator().manual_seed(0)
    A = 5 * (2 * torch.rand(200_000, generator=generator) - 1)
    log_prob = (clip_range * 2 * torch.randn(200_000, generator=generator)).requires_grad_()
    clipped_loss(log_prob, torch.zeros_like(log_prob), A, clip_range).sum().backward()
    share = log_prob.grad / (-A * log_prob.detach().exp())
    assert bool(((share - 1).abs() < 1e-5).logical_or(share == 0).all())
