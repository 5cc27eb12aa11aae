"""The maths of the two stages, and one update."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from conftest import make_model

import score
from models import adam, trained
from sample import Attempt, Sampling, collate, rollout, transcript
from score import (
    STAGES,
    AttemptBatch,
    Config,
    Learner,
    adapted_beta2,
    bonus,
    kl_divergence,
    leave_one_out,
    single_turn_objective,
    stage1_objective,
    stage2_objective,
    update,
)
from sft import builtin_model

# --- 1. The exact gradient: a vocabulary of 3, attempts of 2 tokens, 81 episodes ---------------

ATTEMPTS = list(itertools.product(range(3), repeat=2))  # 9 attempts; attempt 2 also depends on y1
EPISODES = [(one, two) for one in range(9) for two in range(9)]
R1 = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.float64)  # of attempts at this problem
ALPHA, BETA1, BETA2 = 10.0, 0.3, 0.7


class Tabular:
    """Logits for every prefix: attempt 1 (3), (3, 3); attempt 2 (9, 3), (9, 3, 3)."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(3,), (3, 3), (9, 3), (9, 3, 3)]
        self.logits = [
            torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in shapes
        ]

    def log_probs(self):
        """Next-token log-probs along each of the 81 episodes; (81, 4, 3)."""
        first, second, third, fourth = (logits.log_softmax(-1) for logits in self.logits)
        rows = []
        for one, two in EPISODES:
            rows.append(
                [first, second[ATTEMPTS[one][0]], third[one], fourth[one, ATTEMPTS[two][0]]]
            )
        return torch.stack([torch.stack(row) for row in rows])

    def attempts(self):
        """log π(y1), (9,), and log π(y2 | y1), (9, 9)."""
        first, second, third, fourth = (logits.log_softmax(-1) for logits in self.logits)
        one = torch.stack([first[a] + second[a, b] for a, b in ATTEMPTS])
        two = torch.stack([third[:, a] + fourth[:, a, b] for a, b in ATTEMPTS], dim=1)
        return one, two


def equation(stage, policy, ref):
    """Eq. 3 and Eq. 4 with the bonus, by enumeration; y1 is a given in the terms of y2 (γ = 0)."""
    log_one, log_two = policy.attempts()
    ref_one, ref_two = (table.detach() for table in ref.attempts())
    one, two = log_one.exp(), log_two.exp()
    kl_one = (one * (log_one - ref_one)).sum()
    kl_two = (two * (log_two - ref_two)).sum(dim=1)  # (9,) by y1
    if stage == "0":
        return one @ R1 - BETA1 * kl_one
    if stage == "1":
        return one.detach() @ (two @ R1 - BETA1 * kl_two) - BETA2 * kl_one
    shaped = R1[None, :] + ALPHA * (R1[None, :] - R1[:, None])  # (y1, y2)
    second = one.detach() @ ((two * shaped).sum(dim=1) - BETA1 * kl_two)
    return one @ R1 - BETA1 * kl_one + second


def surrogate(stage, policy, ref, k=2):
    """Our objective, averaged over all groups of two siblings with their exact probability."""
    log_probs, ref_log_probs = policy.log_probs(), ref.log_probs().detach()
    actions = torch.tensor([[*ATTEMPTS[one], *ATTEMPTS[two]] for one, two in EPISODES])
    logp = log_probs.gather(2, actions[..., None])[..., 0]  # (81, 4)
    kl = kl_divergence(log_probs, ref_log_probs)
    pairs = torch.cartesian_prod(torch.arange(81), torch.arange(81))  # (6561, 2)
    rows = pairs.flatten()
    probability = logp.sum(dim=1).exp().detach()[pairs].prod(dim=1)  # (6561,)
    own = torch.tensor([1, 1, 2, 2])
    reward = [R1[[one for one, _ in EPISODES]], R1[[two for _, two in EPISODES]]]
    y1, y2 = (
        AttemptBatch(
            reward[n - 1][rows],
            leave_one_out(reward[n - 1][rows], k),
            (logp * (own == n))[rows],
            (kl * (own == n))[rows],
        )
        for n in (1, 2)
    )
    if stage == "0":
        objective = single_turn_objective(y1, BETA1)
    elif stage == "1":
        objective = stage1_objective([y1, y2], BETA1, BETA2)
    else:
        objective = stage2_objective([y1, y2], BETA1, ALPHA)
    return probability @ objective.view(-1, k).mean(dim=1)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_the_gradient_is_exactly_that_of_the_equation(stage):
    policy, ref = Tabular(seed=1), Tabular(seed=2)
    expected = torch.autograd.grad(equation(stage, policy, ref), policy.logits)
    actual = torch.autograd.grad(surrogate(stage, policy, ref), policy.logits)
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
        assert two.abs().max() > 1e-3  # a gradient of zero would prove nothing


def test_single_turn_rl_is_eq_2_on_attempt_1_and_leaves_attempt_2_alone():
    policy, ref = Tabular(seed=1), Tabular(seed=2)
    expected = torch.autograd.grad(equation("0", policy, ref), policy.logits[:2])
    actual = torch.autograd.grad(surrogate("0", policy, ref), policy.logits)
    for one, two in zip(actual[:2], expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
        assert two.abs().max() > 1e-3
    assert all(gradient.abs().max() == 0 for gradient in actual[2:])


def test_of_three_unbiased_kl_gradients_the_exact_one_has_the_least_variance():
    """`kl_penalty` against log π/π_ref in the return, whole or from each token on."""
    policy, ref = Tabular(seed=1), Tabular(seed=2)
    log_probs, ref_log_probs = policy.log_probs()[::9, :2], ref.log_probs().detach()[::9, :2]
    actions = torch.tensor(ATTEMPTS)[..., None]
    logp = log_probs.gather(2, actions)[..., 0]  # (9, 2), attempt 1 alone
    ratio = (logp - ref_log_probs.gather(2, actions)[..., 0]).detach()
    exact = AttemptBatch(R1, R1, logp, kl_divergence(log_probs, ref_log_probs))
    to_go = ratio.flip(1).cumsum(1).flip(1)
    total = ratio.sum(dim=1)
    probability = logp.sum(dim=1).exp().detach()  # (9,)
    mean, variance = {}, {}
    for name, terms in {
        "exact": score.kl_penalty(exact)[:, None].expand(9, 9),
        "to go": (to_go * logp).sum(dim=1)[:, None].expand(9, 9),
        "whole": (total[:, None] - total[None, :]) * logp.sum(dim=1)[:, None],  # minus a sibling's
    }.items():
        rows = [
            torch.autograd.grad(x, policy.logits[:2], retain_graph=True) for x in terms.flatten()
        ]
        gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])  # (81, 12)
        weights = (probability[:, None] * probability[None, :]).flatten()
        mean[name] = weights @ gradients
        variance[name] = (weights @ (gradients - mean[name]) ** 2).sum()
    torch.testing.assert_close(mean["to go"], mean["exact"])
    torch.testing.assert_close(mean["whole"], mean["exact"])
    assert variance["exact"] < 0.5 * min(variance["to go"], variance["whole"])


# --- 2. Which number multiplies which token ----------------------------------------------------


def scored(r, baseline, kl=0.0):
    """An attempt of two tokens for each episode, with log-probs that take a gradient."""
    logp = torch.full((len(r), 2), -1.0, requires_grad=True)
    return AttemptBatch(torch.tensor(r), torch.tensor(baseline), logp, torch.full((len(r), 2), kl))


def coefficients(objective, attempt):
    return torch.autograd.grad(objective.sum(), attempt.logp, retain_graph=True)[0]


def test_stage1_multiplies_attempt_1_by_nothing_and_attempt_2_by_its_reward():
    y1, y2 = scored([1.0, 0.0], [0.0, 0.0]), scored([1.0, 0.0], [0.25, 0.25])
    objective = stage1_objective([y1, y2], beta1=0.0, beta2=0.0)
    assert coefficients(objective, y1).tolist() == [[0, 0], [0, 0]]
    assert coefficients(objective, y2).tolist() == [[0.75, 0.75], [-0.25, -0.25]]


@pytest.mark.parametrize(
    ("r1", "r2", "expected"),
    [(0.0, 1.0, 11.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, -10.0)],
)
def test_the_four_transitions_earn_11_1_0_and_minus_10_at_alpha_10(r1, r2, expected):
    assert r2 + bonus(torch.tensor([r1]), torch.tensor([r2]), 10.0).item() == expected


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_stage2_multiplies_attempt_2_by_11_times_its_advantage_after_any_attempt_1(r1):
    y1, y2 = scored([r1], [0.5]), scored([1.0], [0.25])
    objective = stage2_objective([y1, y2], beta1=0.0, alpha=10.0)
    torch.testing.assert_close(coefficients(objective, y2), torch.full((1, 2), 11 * 0.75))


def test_stage2_never_credits_attempt_1_with_attempt_2():
    y1 = scored([1.0, 0.0], [0.5, 0.5])
    for r2, alpha in ([1.0, 0.0], 10.0), ([0.0, 1.0], 10.0), ([1.0, 1.0], 0.0):
        objective = stage2_objective([y1, scored(r2, [0.0, 1.0])], beta1=0.0, alpha=alpha)
        assert coefficients(objective, y1).tolist() == [[0.5, 0.5], [-0.5, -0.5]]


def test_a_token_pays_for_the_later_kl_of_its_own_attempt_only():
    y1, y2 = scored([0.0], [0.0], kl=3.0), scored([0.0], [0.0], kl=5.0)
    objective = stage1_objective([y1, y2], beta1=0.1, beta2=1.0)
    torch.testing.assert_close(coefficients(objective, y1), torch.tensor([[-3.0, 0.0]]))
    torch.testing.assert_close(coefficients(objective, y2), torch.tensor([[-0.5, 0.0]]))


def test_the_kl_is_that_of_policy_to_reference_not_the_reverse():
    policy, ref = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    by_hand = 0.5 * torch.log(torch.tensor(0.5 / 0.9)) + 0.5 * torch.log(torch.tensor(0.5 / 0.1))
    torch.testing.assert_close(kl_divergence(policy.log(), ref.log()), by_hand)


def test_the_baseline_is_the_mean_of_the_siblings_without_the_own_sample():
    r = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(leave_one_out(r, 3), torch.tensor([0.0, 0.5, 0.5, 1.0, 0.5, 0.5]))
    torch.testing.assert_close(r + 5 - leave_one_out(r + 5, 3), r - leave_one_out(r, 3))
    of_both = leave_one_out(torch.stack([r, 1 - r], dim=1), 3)  # each attempt has its own baseline
    torch.testing.assert_close(of_both[:, 1], leave_one_out(1 - r, 3))


# --- 3. One update on a model ------------------------------------------------------------------


@pytest.fixture
def learner(model, chat):
    ref = copy.deepcopy(model).requires_grad_(False)
    return make_learner(model, ref, chat, Config(k=4, batch=20))


def make_learner(policy, ref, chat, cfg):
    return Learner(policy, ref, None, adam(policy, cfg.lr), chat, [], cfg)


def collated(learner, episodes):
    return collate([transcript(episode, learner.chat) for episode in episodes], "cpu")


@pytest.fixture
def episodes(learner, problems):
    """Twenty episodes with made-up rewards, so that advantages are not zero."""
    made = score.sample_episodes(learner, [p for p in problems for _ in range(4)], STAGES["2"], "0")
    coin = torch.Generator().manual_seed(3)
    return [with_rewards(e, torch.randint(2, (2,), generator=coin).tolist()) for e in made]


def with_rewards(episode, rewards):
    attempts = zip(episode.attempts, rewards, strict=True)
    return replace(episode, attempts=tuple(replace(y, reward=float(r)) for y, r in attempts))


def gradient(learner, episodes, stage, **settings):
    """The gradient that `update` would follow, by parameter; the policy stays as it is."""
    cfg = replace(learner.cfg, clip=1e9, **settings)
    twin = make_learner(copy.deepcopy(learner.policy), learner.ref, learner.chat, cfg)
    twin.optimizer = Recorder(trained(twin.policy).values())
    metrics = update(twin, episodes, STAGES[stage], cfg.beta2)
    return twin.optimizer.gradient, metrics


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradient and leaves the weights alone."""

    def step(self):
        self.gradient = [p.grad.clone() for p in self.param_groups[0]["params"]]


def assert_same(one, two):
    scale = max(g.abs().max() for g in two)
    assert scale > 1e-4  # a gradient of zero would prove nothing
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(scale))


def test_an_update_of_single_turn_rl_follows_r1_and_not_r2(learner, episodes):
    pairs = [[y.reward for y in episode.attempts] for episode in episodes]
    other_r2 = [with_rewards(e, [r1, 1 - r2]) for e, (r1, r2) in zip(episodes, pairs, strict=True)]
    other_r1 = [with_rewards(e, [1 - r1, r2]) for e, (r1, r2) in zip(episodes, pairs, strict=True)]
    expected = gradient(learner, episodes, "0")[0]
    assert_same(gradient(learner, other_r2, "0")[0], expected)
    # only the reward counts here: the KL is still zero
    assert_same([-g for g in gradient(learner, other_r1, "0")[0]], expected)


def test_sampled_log_probs_equal_the_scored_ones_for_both_attempts(learner, episodes):
    lengths = {len(y.tokens) for e in episodes for y in e.attempts}
    assert len(lengths) > 3 and any(not y.finished for e in episodes for y in e.attempts)
    assert_scored_as_sampled(learner, episodes, gap=1e-4)


def assert_scored_as_sampled(learner, episodes, gap):
    """The log-probs of both attempts, to the gap; returns the KL of all tokens."""
    tokens, own, _, places = collated(learner, episodes)
    logp, kl = score.log_probs_and_kl(learner, tokens, places)
    for row, episode in enumerate(episodes):
        for number, attempt in enumerate(episode.attempts, start=1):
            mine = logp[row][own[row] == number]
            torch.testing.assert_close(mine, torch.tensor(attempt.logp), rtol=0, atol=gap)
    return kl


def test_the_kl_is_zero_on_every_token_while_the_policy_is_the_reference(learner, episodes):
    tokens, _, _, places = collated(learner, episodes)
    _, kl = score.log_probs_and_kl(learner, tokens, places)
    assert kl.abs().max() == 0


def test_log_probs_of_attempt_tokens_equal_the_full_ones_with_both_softcaps(learner, episodes):
    tokens, own, _, places = collated(learner, episodes)
    logp, _ = score.log_probs_and_kl(learner, tokens, places)
    full = learner.policy(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    by_hand = full[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(logp, by_hand * (own > 0))
    assert learner.policy.config.final_logit_softcapping == 30.0
    for layer in learner.policy.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped = learner.policy(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    assert (uncapped - full).abs().max() > 1e-2  # the softcap changes the result


@pytest.mark.parametrize("stage", ["1", "2"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(learner, episodes, stage):
    learner.policy = make_model(seed=5)
    whole, _ = gradient(learner, episodes, stage)
    for budget in (200, 500):
        assert_same(gradient(learner, episodes, stage, micro_tokens=budget)[0], whole)


def test_rows_padded_together_learn_as_rows_alone(learner, episodes):
    learner.policy = make_model(seed=5)
    together, _ = gradient(learner, episodes, "2")
    alone, _ = gradient(learner, episodes, "2", micro_tokens=1)
    assert_same(alone, together)


def test_with_both_betas_zero_stage1_has_no_gradient_from_attempt_1(learner, episodes):
    learner.policy = make_model(seed=5)
    without = [replace(e, offline=True) for e in episodes]  # y1 in no term at all
    assert_same(
        gradient(learner, episodes, "1", beta1=0.0, beta2=0.0)[0],
        gradient(learner, without, "1", beta1=0.0, beta2=0.0)[0],
    )


def test_beta2_pulls_attempt_1_back_to_the_reference(learner, problems):
    learner.policy = builtin_model(learner.chat.tokenizer, seed=0)
    learner.ref = copy.deepcopy(learner.policy)
    for p in learner.policy.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    cfg = replace(learner.cfg, beta1=0.0, beta2=1.0, lr=1e-3)
    learner = make_learner(learner.policy, learner.ref, learner.chat, cfg)
    kls = []
    for seed in range(12):
        fresh = score.sample_episodes(
            learner, [p for p in problems for _ in range(4)], STAGES["2"], str(seed)
        )
        flat = [with_rewards(e, [0.0, 0.0]) for e in fresh]  # nothing but KL
        kls.append(update(learner, flat, STAGES["1"], cfg.beta2)["kl_t1"])
    assert kls[0] > 0.1
    assert kls[-1] < 0.7 * kls[0]


def test_an_offline_attempt_1_is_in_no_loss_but_its_reward_is_in_the_bonus(learner, problems):
    learner.policy = make_model(seed=5)
    learner.cfg = replace(learner.cfg, offline=0.6)
    made = score.sample_episodes(learner, [p for p in problems for _ in range(4)], STAGES["2"], "0")
    assert [e.offline for e in made] == [True] * 12 + [False] * 8
    online = rollout(learner.ref, learner.chat, [made[0].problem], Sampling(1, seed="0"))
    assert online[0].attempts[0].tokens == made[0].attempts[0].tokens  # y1 is the base model's
    _, numbers, _, _ = collated(learner, made)
    assert [bool((row == 1).any()) for row in numbers] == [False] * 12 + [True] * 8
    assert all((row == 2).any() for row in numbers)
    r1, r2 = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    assert bonus(r1, r2, 10.0).tolist() == [10.0, 0.0]
    assert gradient(learner, made, "2")[1]["on_policy_gap"] < 1e-3


@pytest.mark.parametrize(("number", "offline"), [(0, False), (1, False), (0, True)])
def test_the_on_policy_gap_is_that_of_all_own_attempts(learner, problems, number, offline):
    episodes = score.sample_episodes(
        learner, [p for p in problems for _ in range(4)], STAGES["2"], "0"
    )
    y = episodes[3].attempts[number]
    other = replace(y, logp=[y.logp[0] + 2.0, *y.logp[1:]])
    attempts = [other if i == number else y for i, y in enumerate(episodes[3].attempts)]
    episodes[3] = replace(episodes[3], attempts=tuple(attempts), offline=offline)
    gap = gradient(learner, episodes, "2")[1]["on_policy_gap"]
    assert gap < 1e-3 if offline else gap == pytest.approx(2.0, abs=1e-3)


def test_training_samples_at_temperature_1_from_the_raw_softmax(learner, problems):
    made = score.sample_episodes(learner, problems[:1] * 4000, STAGES["2"], "0")
    first = torch.tensor([e.attempts[0].tokens[0] for e in made])
    with torch.no_grad():
        exact = learner.policy(torch.tensor([made[0].x1])).logits[0, -1].softmax(-1)
    seen = torch.bincount(first, minlength=len(exact)) / len(made)
    spread = (exact * (1 - exact) / len(made)).sqrt()
    assert ((seen - exact).abs() < 4.5 * spread + 1e-3).all()
    sharper = exact.sqrt() / exact.sqrt().sum()  # what temperature 2 would give
    assert ((sharper - exact).abs() > 4.5 * spread + 1e-3).any()


def test_the_end_token_is_in_the_loss_and_everything_else_after_it_is_not(chat, problems):
    close, other = chat.close_id, chat.end_ids[1]
    cut = Attempt([5, 6, 7], [0.0] * 3, "0 1 2", None, finished=False, reward=0.0)
    ended = Attempt([8, other], [0.0] * 2, "3", None, finished=True, reward=1.0)
    empty = Attempt([close], [0.0], "", None, finished=True, reward=0.0)
    x1 = chat.x1(problems[0])
    for y1, y2 in itertools.product((cut, ended, empty), repeat=2):
        episode = score.Episode(problems[0], x1, (y1, y2))
        longer = score.Episode(problems[0], x1 + x1, (cut, cut))  # so that the other is padded
        rows = [transcript(episode, chat), transcript(longer, chat)]
        tokens, numbers, _, places = collate(rows, "cpu")
        assert tokens[0, 1:][numbers[0] == 1].tolist() == y1.tokens
        assert tokens[0, 1:][numbers[0] == 2].tolist() == y2.tokens
        assert places.tolist() == (numbers.flatten() > 0).nonzero()[:, 0].tolist()
        forced = [close] if y1 is cut else []
        expected = [*x1, *y1.tokens, *forced, *chat.p1, *y2.tokens]
        assert tokens[0][: len(expected)].tolist() == expected
        assert not numbers[0][len(expected) - 1 :].any()


def test_an_update_moves_the_policy_and_not_the_reference(learner, episodes):
    before = [p.clone() for p in learner.ref.parameters()]
    update(learner, episodes, STAGES["2"], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.ref.parameters(), strict=True))
    moved = zip(before, learner.policy.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_products_in_tf32_move_the_gradient_by_less_than_a_hundredth(
    learner, episodes, problems, monkeypatch
):
    """Imitates a float32 run on a GPU, whose products have operands of 10 bits of mantissa."""
    learner.policy = builtin_model(learner.chat.tokenizer, seed=1)  # without steep attention
    exact, _ = gradient(learner, episodes, "2")
    linear = torch.nn.functional.linear

    def rounded(x):
        bits = x.detach().contiguous().view(torch.int32) + 2**12 & ~(2**13 - 1)
        return x + (bits.view(torch.float32) - x).detach()

    def coarse_linear(x, weight, bias=None):
        return linear(rounded(x), rounded(weight), bias)

    monkeypatch.setattr(torch.nn.functional, "linear", coarse_linear)
    coarse, _ = gradient(learner, episodes, "2")
    fresh = score.sample_episodes(
        learner, [p for p in problems for _ in range(4)], STAGES["2"], "1"
    )
    off = sum((a - b).square().sum() for a, b in zip(coarse, exact, strict=True)).sqrt()
    size = sum(b.square().sum() for b in exact).sqrt()
    assert 1e-5 * size < off < 1e-2 * size
    assert 0 < gradient(learner, fresh, "2")[1]["on_policy_gap"] < 5e-3


# --- 3. Three attempts, and β2 that adapts -----------------------------------------------------

R = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)  # of one-token attempts
ROLLOUTS = torch.tensor(list(itertools.product(range(3), repeat=3)))  # 27


def three_attempts(stage, k=2):
    """Expected gradients of equation and surrogate for 3 tokens, 1 token an attempt, 3 attempts."""
    make = torch.Generator().manual_seed(5)
    shapes = [(3,), (3, 3), (3, 3, 3)]
    policy, ref = (
        [torch.randn(s, generator=make, dtype=torch.float64, requires_grad=True) for s in shapes]
        for _ in range(2)
    )
    ours, its = ([logits.log_softmax(-1) for logits in one] for one in (policy, ref))
    its = [table.detach() for table in its]
    p1, p2, p3 = (table.exp() for table in ours)
    kl1, kl2, kl3 = ((a.exp() * (a - b)).sum(-1) for a, b in zip(ours, its, strict=True))
    before2, before3 = p1.detach(), (p1[:, None] * p2).detach()  # y1, and y1 y2, as givens
    beta1, beta2, alpha = 0.3, 0.7, 10.0
    if stage == "1b":
        value = (before3 * (p3 @ R - beta1 * kl3)).sum() - beta2 * (before2 @ kl2 + kl1)
    else:
        paid2 = R[None, :] + alpha * (R[None, :] - R[:, None])  # (y1, y2), and (y2, y3)
        value = p1 @ R - beta1 * kl1 + before2 @ ((p2 * paid2).sum(1) - beta1 * kl2)
        value = value + (before3 * ((p3 * paid2[None]).sum(2) - beta1 * kl3)).sum()
    expected = torch.autograd.grad(value, policy, retain_graph=True)

    a, b, c = ROLLOUTS.T
    logp = [ours[0][a], ours[1][a, b], ours[2][a, b, c]]
    kl = [
        kl_divergence(ours[0], its[0]).expand(27),
        kl_divergence(ours[1], its[1])[a],
        kl_divergence(ours[2], its[2])[a, b],
    ]
    pairs = torch.cartesian_prod(torch.arange(27), torch.arange(27))
    rows, probability = pairs.flatten(), sum(logp).exp().detach()[pairs].prod(dim=1)
    y = []
    for i in range(3):
        r = R[ROLLOUTS[rows, i]]
        y.append(AttemptBatch(r, leave_one_out(r, k), logp[i][rows, None], kl[i][rows, None]))
    objective = STAGES[stage].objective(y, Config(beta1=beta1, alpha=alpha, beta2=beta2))
    actual = torch.autograd.grad(probability @ objective.view(-1, k).mean(dim=1), policy)
    return expected, actual


@pytest.mark.parametrize("stage", ["1b", "2"])
def test_the_gradient_with_three_attempts_is_that_of_the_equations(stage):
    for one, two in zip(*three_attempts(stage), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
        assert one.abs().max() > 1e-3


def test_beta2_follows_the_ratio_of_reward_and_kl_by_a_tenth_a_step_within_bounds():
    cfg = Config(beta2=0.1)
    for beta2, advantage, kl, expected in (
        (0.1, 0.21, 2.0, 0.105),  # 0.105 x 2.0 = 0.21: both are as large
        (0.1, 0.5, 2.0, 0.11),  # wanted 0.25: a tenth more
        (0.1, 0.1, 2.0, 0.1 / 1.1),  # wanted 0.05
        (0.1, 0.3, 0.0, 0.11),  # a policy that is still the base
        (0.99, 0.5, 0.01, 1.0),  # the upper bound: ten times --beta2
        (0.0105, 0.0, 2.0, 0.01),
    ):
        line = {"stage": "1", "advantage": advantage, "kl_t1": kl, "kl_t2": 99.0}
        assert adapted_beta2(beta2, line, cfg) == pytest.approx(expected)
        both = {**line, "stage": "1b", "kl_t1": kl / 4, "kl_t2": 3 * kl / 4, "kl_t3": 99.0}
        assert adapted_beta2(beta2, both, cfg) == pytest.approx(expected)
