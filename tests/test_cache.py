"""The two caches: the same episodes, and no token is read twice."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model
from test_sample import greedy_without_cache
from transformers import LlamaConfig, LlamaForCausalLM

import cache
import sample
from cache import AnyCache, Gemma2Cache, cache_for
from sample import Sampling, rollout
from sft import builtin_tokenizer
from tasks import read_chat


@pytest.fixture
def any_cache(monkeypatch):
    """Let Gemma 2 take the path of any other model, when called."""

    def switch():
        monkeypatch.setattr(sample, "cache_for", lambda model, rows, columns: AnyCache(model))

    return switch


def tokens_and_logp(episodes):
    tokens = [[y.tokens for y in e.attempts] for e in episodes]
    return tokens, torch.tensor([x for e in episodes for y in e.attempts for x in y.logp])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_both_caches_sample_the_same_episodes(model, chat, problems, any_cache, temperature):
    sampling = Sampling(3, 6, temperature, seed="s")
    fast = rollout(model, chat, problems * 8, sampling)
    assert isinstance(cache_for(model, 1, 1), Gemma2Cache)
    any_cache()
    tokens, logp = tokens_and_logp(rollout(model, chat, problems * 8, sampling))
    assert tokens == tokens_and_logp(fast)[0]
    torch.testing.assert_close(logp, tokens_and_logp(fast)[1], rtol=0, atol=1e-4)
    lengths = {len(y) for row in tokens for y in row}
    assert len(lengths) > 3  # rows did finish at different times


def test_first_attempts_from_another_model_are_read_and_continued_by_both(
    model, chat, problems, any_cache
):
    sampling = Sampling(2, 6, 1.0, seed="s")
    begun = rollout(make_model(3), chat, problems, replace(sampling, attempts=1))
    fast = rollout(model, chat, problems, sampling, begun)
    any_cache()
    slow = rollout(model, chat, problems, sampling, begun)
    assert tokens_and_logp(slow)[0] == tokens_and_logp(fast)[0]


def test_another_causal_lm_decodes_as_without_cache(problems):
    tokenizer = builtin_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    llama = LlamaForCausalLM(config).eval()
    assert isinstance(cache_for(llama, 1, 1), AnyCache)
    chat = replace(read_chat(tokenizer, llama, "sums"), end_ids=(2, *range(20, 60)))
    episodes = rollout(llama, chat, problems, Sampling(3, 6, temperature=0.0))
    for episode in episodes:
        expected = greedy_without_cache(llama, chat, episode.x1, 3, 6)
        assert [y.tokens for y in episode.attempts] == expected
    assert len({len(y.tokens) for e in episodes for y in e.attempts}) > 1


def test_each_token_is_read_once_and_a_prompt_once_for_all_its_samples(
    model, chat, problems, monkeypatch
):
    read, last_hidden = [], cache.last_hidden

    def counted(model, tokens, *rest):
        read.append(len(tokens))
        return last_hidden(model, tokens, *rest)

    monkeypatch.setattr(cache, "last_hidden", counted)
    groups = [problem for problem in problems for _ in range(4)]
    episodes = rollout(model, chat, groups, Sampling(2, 6, 1.0))
    prompts = sum(len(e.x1) for e in episodes[::4])
    first = sum(len(e.attempts[0].tokens) for e in episodes)
    closing = sum(not e.attempts[0].finished for e in episodes)
    again = closing + len(episodes) * len(chat.p1)
    second = sum(len(e.attempts[1].tokens) - 1 for e in episodes)  # nothing follows the last
    assert read[0] == prompts
    assert sum(read) == prompts + first + again + second


def test_what_stands_in_unused_columns_is_never_seen(model, chat, problems, monkeypatch):
    plain = rollout(model, chat, problems, Sampling(2, 6, 1.0))
    make = Gemma2Cache.__init__

    def dirty(self, *args):
        make(self, *args)
        for keys, values in self.layers:
            keys.fill_(1e4)
            values.fill_(1e4)

    monkeypatch.setattr(Gemma2Cache, "__init__", dirty)
    assert rollout(model, chat, problems, Sampling(2, 6, 1.0)) == plain


@torch.inference_mode()
def test_finished_rows_leave_and_come_back_in_their_place():
    rows = Gemma2Cache(make_model(0), rows=5, columns=9)
    live, _ = rows.read([[2, 5], [2, 6, 7], [2], [2, 5], [2, 9]])
    kept = rows.keep(torch.tensor([False, True, True, False, True]))
    assert sorted(live[kept].tolist()) == [1, 2, 4]
    assert rows.row_at[:3].tolist() == live[kept].tolist()
    assert rows.held[:3].tolist() == [[2, 3, 1, 2, 2][row] for row in live[kept]]
    rows.step(torch.tensor([11, 12, 13]))
    given = dict(zip(live[kept].tolist(), [11, 12, 13], strict=True))
    contexts = [[2, 5], [2, 6, 7], [2], [2, 5], [2, 9]]
    contexts = [c + [given.get(i, 14), 20, 21] for i, c in enumerate(contexts)]
    again, logits = rows.read(contexts)
    assert sorted(again.tolist()) == list(range(5))
    for row, found in zip(again.tolist(), logits, strict=True):
        alone = make_model(0)(torch.tensor([contexts[row]])).logits[0, -1]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_sampled_and_scored_log_probs_agree_to_its_rounding(chat, problems):
    model = make_model(0).to(torch.bfloat16)
    gaps = []
    for episode in rollout(model, chat, problems * 4, Sampling(1, 6, 1.0)):
        y = episode.attempts[0]
        ids = torch.tensor([episode.x1 + y.tokens])
        with torch.no_grad():
            scored = model(ids).logits[0].float().log_softmax(-1)[len(episode.x1) - 1 : -1]
        picked = scored.gather(1, torch.tensor(y.tokens)[:, None])[:, 0]
        gaps += (picked - torch.tensor(y.logp)).abs().tolist()
    assert 0 < sum(gaps) / len(gaps) < 0.05
