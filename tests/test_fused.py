"""Fewer operations, the same model: its results, its weights, and how many operations are left."""

import copy

import pytest
import torch
from test_cache import FAMILIES, make
from transformers import AutoModelForCausalLM

import fused
import models
from cache import RowCache
from experiments.bench import operations
from fused import GROUPED, Attention, GatedMlp, Norm, fuse, join
from models import load_model, save_checkpoint
from sample import Sampling, rollout
from sft import builtin_tokenizer

KNOWN = [family for family in FAMILIES if family not in ("Phi3", "GPT2")]


@pytest.fixture(params=FAMILIES)
def pair(request):
    """A model with its own modules, and the same model fused; their norms have random weights."""
    own = make(request.param)
    with torch.no_grad():
        for weight in own.parameters():
            weight.add_(0.2 * torch.rand_like(weight) * (weight.dim() == 1))
    return own, fuse(copy.deepcopy(own))


def tokens_of(rows: int = 3, width: int = 40) -> torch.Tensor:
    return torch.randint(3, 900, (rows, width), generator=torch.Generator().manual_seed(1))


def gradient(model, tokens: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(tokens, use_cache=False).logits.log_softmax(dim=-1)[..., 5].sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


# --- 1. The same results -------------------------------------------------------------------------


def test_fusing_changes_neither_results_nor_gradient(pair):
    own, ours = pair
    tokens = tokens_of()
    torch.testing.assert_close(ours(tokens).logits, own(tokens).logits, rtol=0, atol=2e-5)
    there, here = gradient(own, tokens), gradient(ours, tokens)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5 * there.abs().max().item())


@pytest.mark.parametrize("family", KNOWN)
def test_all_norms_mlps_and_attentions_of_a_family_are_replaced(family):
    model = fuse(make(family))
    kinds = [type(module).__name__ for module in model.modules()]
    assert not [kind for kind in kinds if kind.endswith(("RMSNorm", "MLP", family + "Attention"))]
    layers = model.config.num_hidden_layers
    for kind, count in ((Attention, layers), (GatedMlp, layers)):
        assert sum(isinstance(module, kind) for module in model.modules()) == count


def test_weights_keep_their_names_and_order_and_are_not_copied(pair):
    own, ours = pair
    assert list(own.state_dict()) == list(ours.state_dict())
    assert [n for n, _ in own.named_parameters()] == [n for n, _ in ours.named_parameters()]
    same = fuse(own)
    ids = [id(weight) for weight in own.parameters()]
    assert ids == [id(weight) for weight in fuse(same).parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Gemma2", "Llama"])
def test_a_norm_is_its_formula(family, dtype):
    norm = next(m for m in fuse(make(family)).to(dtype).modules() if isinstance(m, Norm))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 2, len(norm.weight)))
    x = torch.randn(5, len(norm.weight), generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    exact = exact * (norm.weight.double() + (family == "Gemma2"))
    bound = 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(norm(x).double(), exact, rtol=bound, atol=bound)


def test_in_bfloat16_a_fused_model_is_as_near_to_float32_as_its_own(pair):
    own, ours = pair
    tokens = tokens_of()
    with torch.no_grad():
        exact = own(tokens).logits
        errors = [
            (model.to(torch.bfloat16)(tokens).logits.float() - exact).square().mean().sqrt().item()
            for model in (copy.deepcopy(own), ours)
        ]
    assert errors[1] < 1.25 * errors[0]


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3Text", "Qwen2"])
def test_generate_of_transformers_goes_on_as_before(family):
    own = make(family)
    ours = fuse(copy.deepcopy(own))
    join(ours)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        own.generate(tokens_of(), **settings), ours.generate(tokens_of(), **settings)
    )


def test_rotation_moves_each_position_by_its_angle():
    """Position p of a head of two numbers is turned by p radians, counterclockwise."""
    model = fuse(make("Llama", hidden_size=8, head_dim=2, num_attention_heads=4))
    cos, sin = model.model.rotary_emb(torch.zeros(1, 3, 8), torch.tensor([[0, 1, 2]]))
    x = torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2)
    turned = x * cos[:, :, None] + fused.half_turned(x) * sin[:, :, None]
    angle = torch.tensor([0.0, 1.0, 2.0])
    expected = torch.stack([angle.cos(), angle.sin()], dim=-1)[None, :, None]
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention_is_its_formula(softcap):
    """Heads 0 and 1 share the first keys, 2 and 3 the second. Scores are large for the softcap."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 5, 8, generator=draw) for n in (4, 2, 2))
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    found, _ = fused.grouped_attention(None, 4 * query, key, value, mask, 0.5, softcap)
    for row, head, position in ((0, 0, 0), (0, 1, 4), (1, 2, 3), (1, 3, 2)):
        seen = slice(position + 1)
        scores = key[row, head // 2, seen] @ query[row, head, position] * 4 * 0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        expected = scores.softmax(dim=0) @ value[row, head // 2, seen]
        torch.testing.assert_close(found[row, position, head], expected)


# --- 2. Products that are joined -----------------------------------------------------------------


def sampled(model):
    """Logits of a read and a step by RowCache."""
    with torch.inference_mode():
        rows = RowCache(model, 2, 8)
        _, logits = rows.read([[2, 5, 6], [2, 7]])
        return torch.stack([logits, rows.step(torch.tensor([8, 9]))])


@pytest.fixture(params=KNOWN)
def joined(request):
    model = fuse(make(request.param))
    join(model)
    return model


def parts_of(model):
    return [m for m in model.modules() if isinstance(m, Attention | GatedMlp)]


def test_joining_moves_weights_and_changes_none(joined):
    apart = fuse(
        make(joined.config.model_type.split("_")[0].title().replace("Gemma3", "Gemma3Text"))
    )
    for one, two in zip(joined.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, two)
    pointers = [weight.data_ptr() for weight in joined.parameters()]
    join(joined)
    assert pointers == [weight.data_ptr() for weight in joined.parameters()]


def test_joined_products_are_used_in_sampling_and_follow_an_update(joined, monkeypatch):
    calls, call = [], fused.Joined.__call__
    monkeypatch.setattr(fused.Joined, "__call__", lambda j, x: calls.append(j) or call(j, x))
    sampled(joined)
    assert len(calls) == 2 * len(parts_of(joined))
    optimizer = torch.optim.SGD(joined.parameters(), lr=0.3)
    calls.clear()
    gradient(joined, tokens_of())
    assert not calls
    optimizer.step()
    after = sampled(joined)
    monkeypatch.setattr(fused, "usable", lambda joined: None)
    torch.testing.assert_close(after, sampled(joined), rtol=0, atol=1e-4)


def test_weights_that_were_joined_while_sampling_still_learn():
    model = fuse(make("Llama"))
    with torch.inference_mode():
        join(model)
    assert not any(weight.is_inference() for weight in model.parameters())
    gradient(model, tokens_of())
    torch.optim.Adam(model.parameters(), fused=True).step()


def test_a_copied_or_moved_model_is_not_sampled_with_the_old_weights(joined):
    other = copy.deepcopy(joined)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    with torch.inference_mode():
        assert fused.usable(parts_of(joined)[0].joined)
        assert not fused.usable(parts_of(other)[0].joined)
    moved = copy.deepcopy(joined).double()
    with torch.inference_mode():
        assert not fused.usable(parts_of(moved)[0].joined)
    parts_of(joined)[0].q_proj = torch.nn.Sequential(parts_of(joined)[0].q_proj)  # like an adapter
    join(joined)
    assert parts_of(joined)[0].joined is None


def test_a_joined_model_is_saved_once_and_loads_in_transformers(joined, tmp_path):
    before = [weight.clone() for weight in joined.parameters()]
    save_checkpoint(tmp_path / "model", joined, builtin_tokenizer())
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size < 1.1 * sum(weight.nbytes for weight in before) + 2**14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for one, two in zip(loaded.parameters(), before, strict=True):
        assert torch.equal(one, two)


# --- 3. Fewer operations, and torch.compile ------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_decoding_of_26_layers_starts_at_most_700_operations(dtype):
    own, ours = (operations(dtype, fused, scoring=False) for fused in (False, True))
    assert ours.total() <= 700 < 2 * ours.total() < own.total()
    own, ours = (operations(dtype, fused, scoring=True) for fused in (False, True))
    assert ours.total() < 0.6 * own.total()


def test_a_compiled_model_samples_and_learns_the_same(chat, problems):
    """The backends only trace it, forward and backward: inductor takes minutes on a CPU."""
    model = fuse(make("Gemma2", num_hidden_layers=1))
    sampler, learner = copy.deepcopy(model), copy.deepcopy(model)
    models.compile_body(sampler, backend="eager")
    models.compile_body(learner, backend="aot_eager")
    torch._dynamo.reset()
    found = torch._dynamo.utils.counters
    found.clear()

    def graphs(count: int, width: int) -> int:
        """The graphs so far, after `count` problems are sampled and rows of `width` are learned."""
        asked = problems[:count]
        there, here = (rollout(m, chat, asked, Sampling(2, 4, 1.0)) for m in (model, sampler))
        assert [e.attempts for e in there] == [e.attempts for e in here]
        ids = tokens_of(count, width)
        torch.testing.assert_close(gradient(learner, ids), gradient(model, ids))
        return found["stats"]["unique_graphs"]

    assert 0 < graphs(2, 20) <= graphs(5, 13) == graphs(3, 30)
    assert not found["graph_break"]


def test_compiling_without_a_compiler_is_refused_in_one_sentence(model, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(models.InputError, match=r"--compile 1 needs a C\+\+ compiler"):
        models.compile_body(model)


def test_a_loaded_model_is_fused(checkpoint):
    model = load_model(str(checkpoint))
    assert parts_of(model) and model.config._attn_implementation == GROUPED
