"""Sampling: exact tokens, exact distribution, exact ends."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model

import sample
from metrics import measure
from ranks import micro_batches
from sample import Sampling, draw, rollout, segments
from sft import builtin_tokenizer
from tasks import read_chat


def greedy_without_cache(model, chat, x1, attempts, max_new_tokens):
    """Plain decoding: one row, no cache, no padding."""
    context, answers = list(x1), []
    for _ in range(attempts):
        answer = []
        while len(answer) < max_new_tokens and not (answer and answer[-1] in chat.end_ids):
            with torch.no_grad():
                logits = model(torch.tensor([context + answer]), use_cache=False).logits
            answer.append(logits[0, -1].argmax().item())
        answers.append(answer)
        context += answer + ([] if answer[-1] in chat.end_ids else [chat.close_id]) + chat.p1
    return answers


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_rollout_is_decoding_without_cache_token_for_token(chat, problems, seed):
    model, greedy = make_model(seed), Sampling(3, 6, temperature=0.0)
    first = [episode.attempts[0].tokens for episode in rollout(model, chat, problems, greedy)]
    ends = (
        chat.close_id,
        *(tokens[len(tokens) // 2] for tokens in first[:3]),
    )  # so that some attempts do end
    chat = replace(chat, end_ids=ends)
    episodes = rollout(model, chat, problems, greedy)
    for episode in episodes:
        expected = greedy_without_cache(model, chat, episode.x1, 3, 6)
        assert [y.tokens for y in episode.attempts] == expected
    finished = [y.finished for e in episodes for y in e.attempts]
    assert any(finished) and not all(finished)


def test_greedy_evaluation_is_the_same_from_run_to_run_and_ignores_the_seed(model, chat, problems):
    one = rollout(model, chat, problems, Sampling(2, 6, 0.0, seed="a"))
    two = rollout(model, chat, problems, Sampling(2, 6, 0.0, seed="b"))
    assert one == two


def test_a_row_does_not_depend_on_the_rest_of_the_batch(model, chat, problems):
    sampling = Sampling(2, 6, 1.0, seed="s")
    together = rollout(model, chat, problems * 2, sampling)
    alone = [rollout(model, chat, [problem], sampling)[0] for problem in problems]
    tokens = [[y.tokens for y in e.attempts] for e in together]
    assert tokens[:5] == [[y.tokens for y in e.attempts] for e in alone]
    assert tokens[5:] != tokens[:5]  # the second sample of a problem is another one


def test_two_parts_sampled_apart_are_the_whole_if_both_hold_a_problem(model, chat, problems):
    sampling = Sampling(2, 6, 1.0, seed="s")
    parts = [rollout(model, chat, problems * 2, sampling, part=slice(i, i + 5)) for i in (0, 5)]
    whole = rollout(model, chat, problems * 2, sampling)
    tokens = [[[y.tokens for y in e.attempts] for e in es] for es in (parts[0] + parts[1], whole)]
    assert tokens[0] == tokens[1] and tokens[1][:5] != tokens[1][5:]


def test_a_hostile_generation_config_changes_nothing(model, chat, problems):
    plain = rollout(model, chat, problems, Sampling(2, 6, 1.0, seed="s"))
    hostile = {"temperature": 0.05, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.3}
    model.generation_config.update(do_sample=True, **hostile)
    assert rollout(model, chat, problems, Sampling(2, 6, 1.0, seed="s")) == plain


def test_draws_follow_the_softmax_and_their_log_prob_is_that_of_the_distribution_drawn_from():
    logits = torch.tensor([[2.0, 0.0, -float("inf"), 1.0, -1.0]])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    for temperature in (1.0, 0.5):
        exact = (logits[0] / temperature).softmax(-1)
        tokens, logp = draw(logits.expand(10_000, 5), uniform, temperature)
        seen = torch.bincount(tokens, minlength=5) / 10_000
        torch.testing.assert_close(seen, exact, rtol=0, atol=2e-4)
        torch.testing.assert_close(logp.exp(), exact[tokens])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_extreme_uniforms_never_draw_a_token_of_probability_zero(uniform):
    logits = torch.tensor([[-float("inf"), 0.0, 3.0, -float("inf")]])
    token, _ = draw(logits, torch.tensor([uniform]), 1.0)
    assert token.item() in (1, 2)


def test_an_attempt_ends_at_any_end_token_and_keeps_it(model, chat, problems):
    episodes = rollout(model, chat, problems * 20, Sampling(2, 6, 1.0))
    attempts = [y for e in episodes for y in e.attempts]
    assert len({y.tokens[-1] for y in attempts if y.finished}) > 3  # several kinds of end
    assert any(len(y.tokens) == 1 and y.finished for y in attempts)  # an end token at once
    for y in attempts:
        assert not any(token in chat.end_ids for token in y.tokens[:-1])
        assert y.finished == (y.tokens[-1] in chat.end_ids)
        assert y.finished or len(y.tokens) == 6


def test_attempt_2_is_conditioned_on_the_exact_ids_of_x1_and_y1(model, chat, problems):
    """The log-probs of y2 are those after x1 y1 [close] p1, for finished and cut-off attempts."""
    for episode in rollout(model, chat, problems * 4, Sampling(2, 4, 1.0)):
        y1, y2 = episode.attempts
        x2 = episode.x1 + y1.tokens + ([] if y1.finished else [chat.close_id]) + chat.p1
        assert [t for part, _ in segments(chat, episode.x1, [y1]) for t in part] == x2
        with torch.no_grad():
            logits = model(torch.tensor([x2 + y2.tokens]), use_cache=False).logits[0]
        logp = logits.log_softmax(-1)[len(x2) - 1 : -1].gather(1, torch.tensor(y2.tokens)[:, None])
        torch.testing.assert_close(logp[:, 0], torch.tensor(y2.logp), rtol=0, atol=1e-4)


def test_the_pad_token_may_be_the_end_token(problems):
    tokenizer = builtin_tokenizer()
    model = make_model(0)
    plain = rollout(model, read_chat(tokenizer, model, "sums"), problems, Sampling(2, 6, 1.0))
    tokenizer.pad_token = tokenizer.eos_token
    same = rollout(model, read_chat(tokenizer, model, "sums"), problems, Sampling(2, 6, 1.0))
    assert same == plain


def test_micro_batches_hold_rows_of_similar_length_within_the_budget():
    lengths = [3, 10, 4, 9, 2, 30, 8, 1]
    batches = micro_batches(lengths, budget=20)
    assert batches == [[5], [1, 3], [6, 2], [0, 4, 7]]  # longest first; 30, over budget, is alone
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    for batch in batches[1:]:
        assert max(lengths[row] for row in batch) * len(batch) <= 20


def test_continued_episodes_keep_their_first_attempts(model, chat, problems):
    sampling = Sampling(2, 6, 1.0, seed="s")
    begun = rollout(make_model(3), chat, problems, replace(sampling, attempts=1))
    continued = rollout(model, chat, problems, sampling, begun)
    assert [e.attempts[0] for e in continued] == [e.attempts[0] for e in begun]
    assert all(e.offline for e in continued) and not any(e.offline for e in begun)


def test_ok_states_what_the_attempt_before_states_through_any_number_of_attempts(
    model, problems, monkeypatch
):
    chat, problem = read_chat(builtin_tokenizer(), model, "sums"), problems[0]
    wrong = " ".join("1" if digit == "0" else "0" for digit in problem.answer.split())
    said = [f"fast {wrong}", "ok", "ok", f"no {problem.answer}", "ok", f"ok {wrong}", "ok"]
    encode = chat.tokenizer.convert_tokens_to_ids
    replies = iter([[*encode(text.split()), chat.close_id] for text in said])

    def decode(cache, contexts, *_):
        reply = next(replies)
        return [[(token, 0.0) for token in reply] for _ in contexts]

    monkeypatch.setattr(sample, "decode", decode)
    (begun,) = rollout(model, chat, [problem], Sampling(1, 12))
    (episode,) = rollout(model, chat, [problem], Sampling(7, 12), [begun])  # and continued
    right = problem.answer
    stated = [attempt.stated for attempt in episode.attempts]
    assert stated == [wrong, wrong, wrong, right, right, None, None]
    assert [attempt.reward for attempt in episode.attempts] == [0, 0, 0, 1, 1, 0, 0]
    assert measure([episode])["copied"] == 1  # although attempt 2 has other words
