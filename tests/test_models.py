"""Checkpoints, the head by hand, masters, and bfloat16."""

import copy

import pytest
import torch
from conftest import make_model
from gemma import gemma_model, gemma_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import models
from data import InputError
from models import check_head, head, last_hidden, load_checkpoint, make_masters, save_checkpoint
from sample import Sampling, rollout
from sft import builtin_model, builtin_tokenizer


def tokens(model):
    return torch.arange(40).view(2, 20) % model.config.vocab_size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_body_and_head_are_the_models_own_forward_bit_for_bit(precision):
    model = make_model(0).to(getattr(torch, precision))
    with torch.no_grad():
        ours = head(model, last_hidden(model, tokens(model)))
        its = model(tokens(model), use_cache=False).logits.float()
    assert torch.equal(ours, its) and ours.abs().max() > 1
    check_head(model)


def test_a_model_with_another_head_is_refused():
    model = make_model(0)
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits / 3
        return out

    model.forward = scaled
    with pytest.raises(InputError, match="scales its logits"):
        check_head(model)


def test_float32_weights_are_their_own_masters():
    model = make_model(0)
    for weight, master in zip(model.parameters(), make_masters(model), strict=True):
        assert master.data_ptr() == weight.data_ptr() and master.dtype == torch.float32


def test_masters_gather_the_gradients_of_all_micro_batches_in_float32_and_the_policy_keeps_none():
    model = make_model(0).to(torch.bfloat16)
    twin = copy.deepcopy(model)
    masters = make_masters(model)
    total = [torch.zeros(p.shape) for p in twin.parameters()]
    for row in tokens(model):
        for net in (model, twin):
            net(row[None], use_cache=False).logits.float().square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        total = [g + p.grad.float() for g, p in zip(total, twin.parameters(), strict=True)]
        twin.zero_grad()
    assert all(torch.equal(m.grad, g) for m, g in zip(masters, total, strict=True))
    assert any(g.abs().max() > 0 for g in total)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    model = make_model(0).to(torch.bfloat16)
    masters = make_masters(model)
    before = [p.clone() for p in model.parameters()]
    scale = before[0].float().abs().max()
    for _ in range(400):
        for master in masters:
            master.data += 1e-4 * scale  # half a unit in the last place of bfloat16 is 2e-3
        models.round_into(model, masters)
    moved = (model.model.embed_tokens.weight.float() - before[0].float()).mean()
    torch.testing.assert_close(moved, 0.04 * scale, rtol=0.05, atol=0)
    direct = before[0].clone()
    for _ in range(400):
        direct += 1e-4 * scale
    large = before[0].float().abs() > scale / 2
    assert torch.equal(direct[large], before[0][large])  # what would happen without masters


def test_taking_over_makes_the_policy_the_master():
    model = make_model(0).to(torch.bfloat16)
    masters = make_masters(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    models.take_over(masters, model)
    for weight, master in zip(model.parameters(), masters, strict=True):
        assert torch.equal(weight.float(), master)


def test_recomputed_activations_give_the_same_gradient_and_sampling_still_has_its_cache():
    plain = make_model(0)
    lean = copy.deepcopy(plain)
    models.recompute_activations(lean)
    gradients, calls = [], []
    lean.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, lean):
        model.train()
        head(model, last_hidden(model, tokens(model))).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.eval()
    assert len(calls) == 2  # forward, and again in backward
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_recomputing_is_refused_where_a_model_does_not_know_it(monkeypatch):
    model = make_model(0)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="--recompute"):
        models.recompute_activations(model)


def test_loading_sets_the_precision_and_takes_dropout_out_and_gemma_2_gets_eager(
    tmp_path, monkeypatch
):
    config = GPT2Config(vocab_size=115, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.3)
    save_checkpoint(tmp_path / "gpt2", GPT2LMHeadModel(config), builtin_tokenizer())
    model, _ = load_checkpoint(str(tmp_path / "gpt2"), "bfloat16")
    assert model.dtype == torch.bfloat16
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    model.train()
    check_head(model)
    with torch.no_grad():
        assert torch.equal(model(tokens(model)).logits, model(tokens(model)).logits)
    tiny = builtin_model(builtin_tokenizer(), 0)
    save_checkpoint(tmp_path / "gemma", tiny, builtin_tokenizer())
    asked, load = [], AutoModelForCausalLM.from_pretrained

    def recorded(*args, **settings):
        asked.append(settings["attn_implementation"])
        return load(*args, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    assert load_checkpoint(str(tmp_path / "gemma"))[0].config._attn_implementation == "eager"
    load_checkpoint(str(tmp_path / "gpt2"))
    assert asked == ["eager", None]  # asked for by name, since the default may drop the softcap


def test_the_kv_cache_is_gone_when_the_rollout_returns(chat, problems):
    import gc

    from cache import Gemma2Cache

    rollout(make_model(0), chat, problems, Sampling(2, 6, rows=2))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Gemma2Cache]


def test_gemmas_end_tokens_and_ids_are_those_of_the_real_one():
    tokenizer = gemma_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<end_of_turn>"])
    assert ids == [0, 1, 2, 107]
    assert gemma_model(tokenizer).generation_config.eos_token_id == [1, 107]
