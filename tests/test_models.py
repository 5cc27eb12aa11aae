"""Checkpoints, the model in two parts (body and head), float32 masters, Adam, and bfloat16."""

import copy

import pytest
import torch
from conftest import make_model
from gemma import gemma_model, gemma_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import models
import ranks
from data import InputError
from models import head, last_hidden, load_checkpoint, save_checkpoint
from sample import Sampling, check_sampling, rollout
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
    check_sampling(model, 100)


def distributed(precision):
    """A policy, its reference and their plain copy, as `precision` asks for them."""
    ref = make_model(0).to(getattr(torch, precision))
    policy = copy.deepcopy(ref)
    plain = models.distribute(policy, ref.requires_grad_(False), precision)
    return policy, ref, plain


def loss_of(model, row):
    return head(model, last_hidden(model, row[None])[0]).square().mean()


def test_a_float32_policy_of_one_process_stays_as_it_is_and_samples_itself():
    policy, _, plain = distributed("float32")
    assert plain is None and ranks.unshard(policy, plain) is policy
    assert type(policy) is type(make_model(0))


def test_bfloat16_has_float32_masters_that_compute_as_the_plain_copy_does():
    policy, ref, copied = distributed("bfloat16")
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    plain = ranks.unshard(policy, copied)
    with torch.no_grad():
        hidden = [last_hidden(model, tokens(plain)) for model in (policy, ref, plain)]
        logits = [head(m, h) for m, h in zip((policy, ref, plain), hidden, strict=True)]
    assert hidden[0].dtype == torch.bfloat16 and logits[0].dtype == torch.float32
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_gradients_of_micro_batches_are_summed_in_float32():
    policy, _, _ = distributed("bfloat16")
    twin = make_model(0).to(torch.bfloat16)
    total = [torch.zeros(p.shape) for p in twin.parameters()]
    for row in tokens(twin):
        loss_of(policy, row).backward()
        loss_of(twin, row).backward()
        total = [g + p.grad.float() for g, p in zip(total, twin.parameters(), strict=True)]
        twin.zero_grad()
    for weight, gradient in zip(policy.parameters(), total, strict=True):
        assert weight.grad.dtype == torch.float32 and gradient.abs().max() > 0
        assert torch.equal(weight.grad.full_tensor(), gradient)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    policy, _, copied = distributed("bfloat16")
    before = ranks.unshard(policy, copied).model.embed_tokens.weight.clone()
    scale = before.float().abs().max().item()
    for _ in range(400):
        for weight in policy.parameters():
            weight.data += 1e-4 * scale  # half a unit in the last place of bfloat16 is 2e-3
    after = ranks.unshard(policy, copied).model.embed_tokens.weight
    moved = (after.float() - before.float()).mean().item()
    assert moved == pytest.approx(0.04 * scale, rel=0.05)
    direct = before.clone()
    for _ in range(400):
        direct += 1e-4 * scale
    large = before.float().abs() > scale / 2
    assert torch.equal(direct[large], before[large])  # what would happen without masters


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_policy_takes_all_weights_of_a_checkpoint(precision):
    policy, _, copied = distributed(precision)
    other = make_model(1).to(getattr(torch, precision))
    ranks.copy_weights(policy, other)
    plain = ranks.unshard(policy, copied)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True)
    )


def test_a_saved_adam_goes_on_as_if_it_had_never_stopped(tmp_path):
    torch.manual_seed(0)
    policy, again = make_model(0), make_model(1)
    optimizer, fresh = models.adam(policy, 1e-3), models.adam(again, 1e-3)
    twin = make_model(0)
    usual = torch.optim.Adam(twin.parameters(), 1e-3)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model, tokens(model)[0]).backward()
            optimizer.step()

    steps(policy, optimizer, 2)
    ranks.save_sharded(models.state_of(policy, optimizer), tmp_path / "state")
    ranks.load_sharded(models.state_of(again, fresh), tmp_path / "state")
    steps(policy, optimizer, 2)
    steps(again, fresh, 2)
    steps(twin, usual, 4)  # models.adam makes its state at the start: that changes nothing
    for one, two, three in zip(*(m.parameters() for m in (policy, again, twin)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


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


def test_recomputing_is_refused_where_a_model_does_not_support_it(monkeypatch):
    model = make_model(0)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="--recompute"):
        models.recompute_activations(model)


def test_loading_sets_the_precision_and_takes_dropout_out_and_gemma_2_keeps_its_softcap(
    tmp_path, monkeypatch
):
    config = GPT2Config(vocab_size=115, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.3)
    save_checkpoint(tmp_path / "gpt2", GPT2LMHeadModel(config), builtin_tokenizer())
    model, _ = load_checkpoint(str(tmp_path / "gpt2"), "bfloat16")
    assert model.dtype == torch.bfloat16
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    model.train()
    check_sampling(model, 100)
    with torch.no_grad():
        assert torch.equal(model(tokens(model)).logits, model(tokens(model)).logits)
    tiny = builtin_model(builtin_tokenizer(), 0)
    save_checkpoint(tmp_path / "gemma", tiny, builtin_tokenizer())
    asked, load = [], AutoModelForCausalLM.from_pretrained

    def recorded(*args, **settings):
        asked.append(settings["attn_implementation"])
        return load(*args, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    assert load_checkpoint(str(tmp_path / "gemma"))[0].config._attn_implementation == "grouped"
    load_checkpoint(str(tmp_path / "gpt2"))
    assert asked == ["eager", None]  # Gemma 2's default attention may drop the softcap


def test_the_kv_cache_is_gone_when_the_rollout_returns(chat, problems):
    import gc

    from cache import RowCache

    rollout(make_model(0), chat, problems, Sampling(2, 6, rows=2))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is RowCache]


def test_gemmas_end_tokens_and_ids_are_those_of_the_real_one():
    tokenizer = gemma_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<end_of_turn>"])
    assert ids == [0, 1, 2, 107]
    assert gemma_model(tokenizer).generation_config.eos_token_id == [1, 107]
