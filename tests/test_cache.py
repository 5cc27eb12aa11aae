"""Sampling, for every family of models: what is read, where it is kept, and what is refused."""

import copy
import os
import signal

import pytest
import torch
import transformers
from conftest import make_model
from gemma import gemma_tokenizer
from test_runs import assert_equal, interrupt_at, run_score, signals, tree  # noqa: F401
from test_sample import greedy_without_cache
from torch import nn

import cache
from cache import RowCache
from data import InputError, Problem
from models import load_checkpoint, save_checkpoint
from sample import Sampling, check_sampling, rollout, transcript
from tasks import read_chat

# --- 1. Families -------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 900}
SIZES |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
ENDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
NARROW = {"sliding_window": 12}  # narrower than any prompt
HEADS = {"head_dim": 16, "query_pre_attn_scalar": 24}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT2 = {"vocab_size": 900, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
FAMILIES = {
    "Llama": SIZES,
    "Qwen2": {**SIZES, **NARROW, "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {**SIZES, "head_dim": 16},
    "Mistral": {**SIZES, **NARROW},
    "Gemma2": {**SIZES, **NARROW, **HEADS},
    "Gemma3Text": {**SIZES, **NARROW, **HEADS, **MIXED},
    "Phi3": {**SIZES, **NARROW},
    "GPT2": GPT2,
}


def make(family: str, **settings):
    """A random model of a family, whose attention and window change its results."""
    settings = {**FAMILIES.get(family, SIZES), **ENDS, **settings}
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(0.15 * torch.randn_like(weight))
    return model


@pytest.fixture
def asked():
    """Two samples of each problem; the prompts differ in length."""
    problems = [Problem("much " * n + "is it?", "1", "math", str(n)) for n in (1, 17, 6)]
    return [problem for problem in problems for _ in range(2)]


def chat_of(model):
    """A chat with many end tokens, so that attempts end at different times."""
    chat = read_chat(gemma_tokenizer(), model, "sums")
    return chat.__class__(**{**vars(chat), "end_ids": (1, 107, *range(120, 320))})


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    save_checkpoint(tmp_path / "model", make(request.param), gemma_tokenizer())
    return load_checkpoint(str(tmp_path / "model"))[0]


def test_greedy_rollouts_are_decoding_without_cache_token_for_token(family, asked):
    chat = chat_of(family)
    check_sampling(family, 200)
    check_sampling(family, 200, training=True)
    episodes = rollout(family, chat, asked, Sampling(3, 9, temperature=0.0))
    for episode in episodes[::2]:
        expected = greedy_without_cache(family, chat, episode.x1, 3, 9)
        assert [y.tokens for y in episode.attempts] == expected


def test_sampled_log_probs_are_the_scored_ones_and_rows_are_independent(family, asked):
    chat, sampling = chat_of(family), Sampling(3, 9, 1.0)
    episodes = rollout(family, chat, asked, sampling)
    assert len({len(y.tokens) for e in episodes for y in e.attempts}) > 3
    for episode in episodes:
        tokens, ids, said = zip(*transcript(episode, chat), strict=True)
        with torch.no_grad():
            logits = family(torch.tensor([tokens]), use_cache=False).logits[0, :-1].float()
        logp = logits.log_softmax(dim=-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        scored = logp[torch.tensor(ids[1:]) > 0]
        sampled = torch.tensor([x for y in episode.attempts for x in y.logp])
        torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-4)
        assert sampled.equal(torch.tensor(said[1:])[torch.tensor(ids[1:]) > 0])
    alone = rollout(family, chat, asked, Sampling(3, 9, 1.0, rows=1))
    tokens = [[[y.tokens for y in e.attempts] for e in made] for made in (episodes, alone)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_stopped_run_of_each_family_resumes_bit_for_bit(kind, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model", make(kind), gemma_tokenizer())
    flags = ["--model", tmp_path / "model", "--stage", "1", "--steps1", "2", "--batch", "4"]
    flags += ["--k", "2", "--problems", "4", "--max-new-tokens", "4"]
    assert run_score("--out", tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_score("--out", tmp_path / "stopped", *flags) == 0
    assert run_score("--resume", "--out", tmp_path / "stopped") == 0
    assert_equal(tree(tmp_path / "stopped"), tree(tmp_path / "whole"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "stage1")


def test_only_the_text_part_of_a_model_that_sees_pictures_is_trained(tmp_path, asked):
    text = {**FAMILIES["Gemma3Text"], **ENDS}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    save_checkpoint(tmp_path / "whole", whole, gemma_tokenizer())
    part, tokenizer = load_checkpoint(str(tmp_path / "whole"))
    assert not any("vision" in name for name, _ in part.named_parameters())
    ids = torch.tensor([[2, *range(300, 330)]])
    with torch.no_grad():
        torch.testing.assert_close(part(ids).logits, whole(ids).logits)
    check_sampling(part, 100)
    save_checkpoint(tmp_path / "text", part, tokenizer)
    again, _ = load_checkpoint(str(tmp_path / "text"))
    assert type(again) is type(part) is transformers.Gemma3ForCausalLM


# --- 2. What is refused --------------------------------------------------------------------------


def scaled_logits():
    model = make("Llama")
    model.lm_head.register_forward_hook(lambda *_: _[2] / 3)
    forward = model.forward
    model.forward = lambda *args, **kwargs: scale(forward(*args, **kwargs))
    return model


def scale(out):
    out.logits = out.logits / 3
    return out


def noisy_in_training():
    model = make("Llama")

    class Noise(nn.Module):
        def forward(self, hidden):
            return hidden + torch.randn_like(hidden) * self.training

    model.model.norm = nn.Sequential(model.model.norm, Noise())
    return model


def long_rope():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    scaling |= {"factor": 4.0, "rope_theta": 100.0}
    return make("Phi3", rope_parameters=scaling, original_max_position_embeddings=64)


REFUSED = {
    "Mamba": lambda: make("Mamba"),
    "FalconMamba": lambda: make("FalconMamba", intermediate_size=64, state_size=4),
    "BART": lambda: make("Bart", d_model=32, decoder_layers=2, decoder_ffn_dim=64),
    "Bloom": lambda: make("Bloom"),
    "GptOss": lambda: make("GptOss", **NARROW, head_dim=16, num_local_experts=2),
    "Cohere": lambda: make("Cohere"),
    "other logits": scaled_logits,
    "other in training": noisy_in_training,
    "other when long": long_rope,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_is_sampled_and_scored_differently_is_refused_in_one_sentence(kind):
    model = REFUSED[kind]()
    with pytest.raises(InputError) as found:
        check_sampling(model, 200, training=kind == "other in training")
    message = str(found.value)
    assert ("samples and scores differently" in message) or ("cannot be sampled" in message)
    assert "\n" not in message and not model.training
    if kind in ("other in training", "other when long"):
        check_sampling(model, 60)


def test_a_weight_that_is_not_a_number_is_reported(asked):
    model = make("Llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="not a number"):
            rollout(model, chat_of(model), asked, Sampling(2, 4, temperature))


# --- 3. What is read, and where it is kept -------------------------------------------------------


def test_each_token_is_read_once_and_a_prompt_once_for_all_its_samples(
    model, chat, problems, monkeypatch
):
    read, forward = [], RowCache.forward

    def counted(rows, tokens, positions, columns):
        read.append(int((columns < rows.columns).sum()))  # pads are written to an extra column
        return forward(rows, tokens, positions, columns)

    monkeypatch.setattr(RowCache, "forward", counted)
    groups = [problem for problem in problems for _ in range(4)]
    episodes = rollout(model, chat, groups, Sampling(2, 6, 1.0))
    prompts = sum(len(e.x1) for e in episodes[::4])
    first = sum(len(e.attempts[0].tokens) for e in episodes)
    closing = sum(not e.attempts[0].finished for e in episodes)
    again = closing + len(episodes) * len(chat.p1)
    second = sum(len(e.attempts[1].tokens) - 1 for e in episodes)  # the last one is never read
    assert read[0] == prompts
    assert sum(read) == prompts + first + again + second


def test_what_stands_in_unused_columns_is_never_seen(model, chat, problems, monkeypatch):
    plain = rollout(model, chat, problems, Sampling(2, 6, 1.0))
    make_room = cache.Layer.lazy_initialization

    def dirty(layer, *states):
        make_room(layer, *states)
        layer.keys.fill_(1e4)
        layer.values.fill_(1e4)

    monkeypatch.setattr(cache.Layer, "lazy_initialization", dirty)
    assert rollout(model, chat, problems, Sampling(2, 6, 1.0)) == plain


def test_the_model_attends_as_before_after_it_has_sampled(model, chat, problems):
    usual = model.config._attn_implementation
    rollout(model, chat, problems, Sampling(2, 6, 1.0))
    assert model.config._attn_implementation == usual == "grouped"


@torch.inference_mode()
def test_finished_rows_leave_and_come_back_in_their_place():
    rows = RowCache(make_model(0), rows=5, columns=9)
    live, _ = rows.read([[2, 5], [2, 6, 7], [2], [2, 5], [2, 9]])
    kept = rows.keep(torch.tensor([False, True, True, False, True]))
    live = [live[i] for i in kept]
    assert sorted(live) == [1, 2, 4]
    assert rows.row_at[:3] == live
    assert rows.held[:3] == [[2, 3, 1, 2, 2][row] for row in live]
    rows.step(torch.tensor([11, 12, 13]))
    given = dict(zip(live, [11, 12, 13], strict=True))
    contexts = [[2, 5], [2, 6, 7], [2], [2, 5], [2, 9]]
    contexts = [c + [given.get(i, 14), 20, 21] for i, c in enumerate(contexts)]
    again, logits = rows.read(contexts)
    assert sorted(again) == list(range(5))
    for row, found in zip(again, logits, strict=True):
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


def test_first_attempts_from_another_model_are_read_and_continued(model, chat, problems):
    begun = rollout(make_model(3), chat, problems, Sampling(1, 6, 1.0))
    episodes = rollout(model, chat, problems, Sampling(2, 6, 0.0), begun)
    for episode, first in zip(episodes, begun, strict=True):
        assert episode.attempts[0] == first.attempts[0] and episode.offline
        y1 = first.attempts[0]
        closing = [] if y1.finished else [chat.close_id]
        context = [*episode.x1, *y1.tokens, *closing, *chat.p1]
        expected = greedy_without_cache(model, copy.copy(chat), context, 1, 6)
        assert [episode.attempts[1].tokens] == expected
