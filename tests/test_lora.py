"""Adapters: the gradient, one copy of the weights, whole runs, checkpoints and bad input."""

import copy
import json
import shutil
import sys

import pytest
import torch
from conftest import make_model
from gemma import fitted_checkpoint, gemma_tokenizer
from peft import AutoPeftModelForCausalLM
from test_cache import FAMILIES, make
from test_learner import assert_goes_on_as_if_never_interrupted, rewarding  # noqa: F401
from test_ranks import FLAGS, assert_close, finish, torchrun
from test_runs import SMALL, run_score, signals, tree  # noqa: F401
from test_score import (
    ATTEMPTS,
    EPISODES,
    STAGES,
    Config,
    assert_scored_as_sampled,
    collated,
    episodes,  # noqa: F401
    equation,
    gradient,
    make_learner,
    surrogate,
    update,
)
from transformers import Gemma2Config, Gemma2ForCausalLM

import eval as evaluation
import lora
import score
from fused import fuse, join
from models import (
    load_checkpoint,
    load_model,
    recompute_activations,
    save_checkpoint,
    trained,
)
from sample import check_sampling
from sft import builtin_model, builtin_tokenizer

LORA = ["--lora", "4", "--lr", "0.02"]


def adapters(model):
    return list(trained(model).values())


def noisy(model, by=0.05):
    """The model, with noise added to its adapters, so that it differs from the base."""
    noise = torch.Generator().manual_seed(1)
    for weight in adapters(model):
        weight.data += by * torch.randn(weight.shape, generator=noise)
    return model


@pytest.fixture
def learner(model, chat):
    ref = model.requires_grad_(False)
    cfg = Config(k=4, batch=20, lora=4)
    return make_learner(noisy(lora.with_adapters(ref, 4, seed=0)), ref, chat, cfg)


# --- 1. The gradient ---------------------------------------------------------------------------


class Enumerated:
    """A model with a vocabulary of 3: its log-probs along all 81 episodes, in Tabular's form."""

    def __init__(self, model):
        self.model = model

    def log_probs(self):
        rows = [[0, *ATTEMPTS[one], 1, *ATTEMPTS[two]] for one, two in EPISODES]
        logits = self.model(torch.tensor(rows), use_cache=False).logits
        return logits[:, [0, 1, 3, 4]].log_softmax(-1)  # (81, 4, 3)

    def attempts(self):
        table = self.log_probs().view(9, 9, 4, 3)
        first, second = table[:, 0, 0], table[:, 0, 1]
        a, b = torch.tensor(ATTEMPTS).T
        own, each = torch.arange(9), torch.arange(9)[None]
        one = first[own, a] + second[own, b]
        return one, table[own[:, None], each, 2, a] + table[own[:, None], each, 3, b]


@pytest.mark.parametrize("stage", ["1", "2"])
def test_the_gradient_of_adapters_is_exactly_that_of_the_equation(stage):
    torch.manual_seed(0)
    sizes = {"vocab_size": 3, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    base = fuse(Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, pad_token_id=0)))
    for weight in base.parameters():
        weight.data += 0.5 * torch.randn(weight.shape)
    policy = noisy(lora.with_adapters(base, 2, seed=0)).double()
    enumerated, ref = Enumerated(policy), Enumerated(base)
    expected = torch.autograd.grad(equation(stage, enumerated, ref), adapters(policy))
    actual = torch.autograd.grad(surrogate(stage, enumerated, ref), adapters(policy))
    assert len(expected) == 14 and max(g.abs().max() for g in expected) > 1e-2
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"recompute": 1}, {"micro_tokens": 200}])
def test_an_update_follows_the_full_gradient_by_the_chain_rule(learner, episodes, settings):  # noqa: F811
    """Of W + s B A: the gradient is s G Aᵀ for B, and s Bᵀ G for A."""
    if "recompute" in settings:
        recompute_activations(learner.policy)
    mine, _ = gradient(learner, episodes, "2", **settings)
    whole = copy.deepcopy(learner.policy)
    layers = dict(whole.named_modules())
    scale, pairs = lora.SCALE / 4, {}
    for name, layer in list(layers.items()):
        if hasattr(layer, "lora_A"):
            pairs[name] = layer.lora_A.default.weight.data, layer.lora_B.default.weight.data
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(layers[parent], child, layer.base_layer)
    whole.requires_grad_(True)
    full = make_learner(whole, learner.ref, learner.chat, learner.cfg)
    found, _ = gradient(full, episodes, "2")
    names = [name for name, _ in whole.named_parameters()]
    full_gradient = dict(zip(names, found, strict=True))
    expected = []
    for name, (a, b) in pairs.items():
        g = full_gradient[f"{name}.weight"]
        expected += [scale * b.T @ g, scale * g @ a.T]
    assert len(expected) == len(mine) == 28
    size = max(g.abs().max() for g in expected)
    assert size > 1e-2
    for one, two in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4 * float(size))


# --- 2. One copy of the weights -------------------------------------------------------------------


def test_policy_and_reference_share_their_weights_and_only_adapters_move(learner, episodes):  # noqa: F811
    shared = {name: weight.clone() for name, weight in learner.ref.named_parameters()}
    before = [weight.clone() for weight in adapters(learner.policy)]
    update(learner, episodes, STAGES["2"], 0.0)
    own = {id(weight) for weight in learner.policy.parameters()}
    for name, weight in learner.ref.named_parameters():
        assert id(weight) in own and torch.equal(weight, shared[name])
    moved = zip(before, adapters(learner.policy), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)
    optimized = learner.optimizer.param_groups[0]["params"]
    assert list(map(id, optimized)) == list(map(id, adapters(learner.policy)))


def test_a_copy_after_a_rollout_makes_no_second_copy_of_the_weights(learner, episodes):  # noqa: F811
    join(learner.ref)  # as a rollout does
    own = {weight.untyped_storage().data_ptr() for weight in learner.ref.parameters()}
    again = lora.with_adapters(learner.ref, 4, seed=0)
    held = [layer.joined for layer in again.modules() if hasattr(layer, "joined")]
    assert held == [None] * 4
    frozen = [weight for weight in again.parameters() if not weight.requires_grad]
    assert {weight.untyped_storage().data_ptr() for weight in frozen} == own


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_new_adapters_are_float32_and_leave_the_kl_at_exactly_0(precision, chat, problems):
    ref = make_model(0).to(precision).requires_grad_(False)
    policy = lora.with_adapters(ref, 4, seed=0)
    assert {weight.dtype for weight in adapters(policy)} == {torch.float32}
    its = make_learner(policy, ref, chat, Config(k=2, batch=4))
    made = score.sample_episodes(its, [p for p in problems for _ in range(2)], STAGES["2"], "0")
    tokens, _, _, places = collated(its, made)
    assert score.log_probs_and_kl(its, tokens, places)[1].abs().max() == 0
    noisy(policy)
    _, kl = score.log_probs_and_kl(its, tokens, places)
    assert kl.abs().max() > 1e-3
    check_sampling(policy, 60)


def test_sampled_log_probs_of_adapters_equal_the_scored_ones(learner, episodes):  # noqa: F811
    kl = assert_scored_as_sampled(learner, episodes, gap=1e-4)
    assert kl.max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_every_family_sample_as_they_score_and_are_saved_whole(family, tmp_path):
    save_checkpoint(tmp_path / "base", make(family), gemma_tokenizer())
    base = load_model(str(tmp_path / "base"))
    model, tokens = noisy(lora.with_adapters(base, 2, seed=0)), torch.arange(30)[None]
    check_sampling(model, 100)
    save_checkpoint(tmp_path / "adapters", model, gemma_tokenizer())
    with torch.no_grad():
        again, _ = lora.load_checkpoint(str(tmp_path / "adapters"))
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert not torch.allclose(base(tokens).logits, model(tokens).logits, atol=1e-2)
        lora.merge(str(tmp_path / "adapters"), tmp_path / "merged")
        merged = load_model(str(tmp_path / "merged"))
        torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, rtol=0, atol=1e-3)


# --- 3. Whole runs -------------------------------------------------------------------------------


@pytest.fixture
def finished(checkpoint, tmp_path):
    assert run_score("--model", checkpoint, "--out", tmp_path / "whole", *SMALL, *LORA) == 0
    return tmp_path / "whole"


def test_a_checkpoint_of_adapters_loads_in_peft_and_in_eval_and_can_be_merged(
    finished, checkpoint, tmp_path, capsys
):
    lines = tree(finished)["lines"]
    assert lines[0]["kl_t1"] == 0 == lines[0]["kl_t2"] and lines[-1]["kl_t2"] > 0
    assert all(line["on_policy_gap"] < 1e-3 for line in lines)
    stage, tokens = finished / "stage2", torch.arange(30)[None]
    weights = sum(path.stat().st_size for path in stage.glob("*.safetensors"))
    assert weights < (checkpoint / "model.safetensors").stat().st_size / 5
    model, tokenizer = lora.load_checkpoint(str(stage))
    assert tokenizer.chat_template
    of_peft = AutoPeftModelForCausalLM.from_pretrained(stage, attn_implementation="eager")
    assert lora.main(["--merge", str(stage), "--out", str(tmp_path / "merged")]) == 0
    merged, _ = load_checkpoint(str(tmp_path / "merged"))
    base = load_model(str(checkpoint))
    with torch.no_grad():
        logits = model(tokens).logits
        torch.testing.assert_close(of_peft(tokens).logits, logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(merged(tokens).logits, logits, rtol=0, atol=1e-4)
        assert (base(tokens).logits - logits).abs().max() > 1e-3
    for model in (stage, tmp_path / "merged"):
        out = tmp_path / f"eval of {model.name}"
        flags = ["--task", "sums", "--model", str(model), "--problems", "8", "--out", str(out)]
        assert evaluation.main(flags) == 0
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        assert metrics == pytest.approx(tree(finished)["results"]["stage2"])


def test_a_merged_checkpoint_has_the_precision_of_its_base(tmp_path):
    base = builtin_model(builtin_tokenizer(), 0).to(torch.bfloat16)
    save_checkpoint(tmp_path / "base", base, builtin_tokenizer())
    policy = noisy(lora.with_adapters(load_model(str(tmp_path / "base")), 4, seed=0))
    save_checkpoint(tmp_path / "stage1", policy, builtin_tokenizer())
    lora.merge(str(tmp_path / "stage1"), tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    merged, tokens = load_model(str(tmp_path / "merged")), torch.arange(30)[None]
    with torch.no_grad():
        gap = (merged(tokens).logits - policy(tokens).logits).abs().max()
    assert 0 < gap < 0.02


@pytest.mark.parametrize("plan", ["star,star", "1,1b,2"])
def test_an_interrupted_run_with_adapters_goes_on_bit_for_bit(
    plan,
    checkpoint,
    tmp_path,
    monkeypatch,
    rewarding,  # noqa: F811
):
    flags = ["--model", checkpoint, *SMALL, "--steps1", 3, "--steps2", 3, "--stage", plan, *LORA]
    flags += ["--attempts", 3] if "1b" in plan else []
    assert_goes_on_as_if_never_interrupted(flags, (5,), tmp_path, monkeypatch)


def test_stage_1b_is_held_at_the_adapters_of_stage_1a(checkpoint, tmp_path, monkeypatch):
    one_step, refs, tokens = score.one_step, {}, torch.arange(30)[None]

    def watched(its, run, progress, stage):
        with torch.no_grad():
            refs.setdefault(stage.name, its.ref(tokens).logits)
        return one_step(its, run, progress, stage)

    monkeypatch.setattr(score, "one_step", watched)
    flags = ["--model", checkpoint, *SMALL, *LORA, "--stage", "1,1b,2", "--attempts", 3]
    assert run_score(*flags, "--out", tmp_path) == 0
    first, _ = lora.load_checkpoint(str(tmp_path / "stage1"))
    with torch.no_grad():
        torch.testing.assert_close(refs["1b"], first(tokens).logits)
    assert torch.equal(refs["1"], refs["2"]) and not torch.allclose(refs["1"], refs["1b"])


def test_training_goes_on_from_adapters(finished, checkpoint, tmp_path):
    flags = ["--model", checkpoint, *SMALL, *LORA, "--stage", "2", "--steps2", 1]
    assert run_score(*flags, "--init", finished / "stage1", "--out", tmp_path / "next") == 0
    [line] = tree(tmp_path / "next")["lines"]
    assert line["kl_t1"] + line["kl_t2"] > 0  # the reference is the base
    assert run_score(*flags, "--init", checkpoint, "--out", tmp_path / "anew") == 0
    [line] = tree(tmp_path / "anew")["lines"]
    assert line["kl_t1"] == 0 == line["kl_t2"]


def test_stage_2_goes_on_from_adapters_in_a_second_command_and_a_moved_folder(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    tokenizer = builtin_tokenizer()
    save_checkpoint(tmp_path / "m", builtin_model(tokenizer, 0), tokenizer)
    flags = ["--model", tmp_path / "m", *SMALL, *LORA]
    assert run_score(*flags, "--out", one, "--stage", "1") == 0
    shutil.move(one, two)
    assert run_score("--stage", "2", "--out", two) == 0  # with the run's --lora
    assert run_score(*flags, "--out", tmp_path / "whole") == 0
    results = [tree(folder)["results"]["stage2"] for folder in (two, tmp_path / "whole")]
    assert results[0] == results[1]
    assert run_score("--stage", "2", "--out", two, "--lora", "8") == 2
    assert "--out" in capsys.readouterr().err


def test_two_processes_learn_the_same_adapters_as_one(tmp_path):
    base, init = fitted_checkpoint(tmp_path / "base"), tmp_path / "init"
    model, tokenizer = load_checkpoint(str(base))
    save_checkpoint(init, noisy(lora.with_adapters(model, 4, seed=0), by=0.005), tokenizer)
    flags = ["--model", base, "--init", init, *FLAGS, "--lora", 4]
    assert run_score("--out", tmp_path / "one", *flags) == 0
    finish(torchrun(score.__file__, "--out", tmp_path / "two", *flags))
    lines = tree(tmp_path / "one")["lines"]
    assert any(line["acc_t1"] + line["acc_t2"] > 0 for line in lines)  # some rewards are 1
    assert_close(tmp_path / "one", tmp_path / "two", atol=1e-5)


# --- 4. Settings and bad input -------------------------------------------------------------------


def test_adapters_learn_ten_times_as_fast_unless_a_rate_is_given():
    from config import configure

    assert configure({"lora": 8}).lr == 10 * configure({}).lr
    of_math = configure({"task": "math"}).lr
    assert configure({"task": "math", "lora": 8}).lr == 10 * of_math
    assert configure({"lora": 8, "lr": 1e-4}).lr == 1e-4


def test_new_adapters_are_the_same_for_a_seed(model):
    one, two, three = (lora.with_adapters(model, 4, seed) for seed in (0, 0, 1))
    same = zip(adapters(one), adapters(two), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    other = zip(adapters(one), adapters(three), strict=True)
    assert any(not torch.equal(a, b) for a, b in other)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora", "-1"], "--lora -1 is negative: give 0 or more"),
        (["--lora", "9999"], "--lora 9999 is above the hidden size of the model"),
        (["--init", "adapters"], "holds LoRA adapters, not a whole model"),
        (["--model", "adapters", "--lora", "4"], "holds LoRA adapters, not a whole model"),
        (["--init", "adapters", "--lora", "8"], "has rank 4: give --lora 4"),
        (["--init", "stranger", "--lora", "4"], "neither the base model"),
        (["--init", "another", "--lora", "4"], "neither the base model"),
        (["--init", "cut", "--lora", "4"], "cut cannot be loaded"),
        (["--init", "torn", "--lora", "4"], "torn/adapter_config.json cannot be read"),
        (["--init", "narrow", "--lora", "4"], "adapters for another model"),
        (["--init", "homeless", "--lora", "4"], "/no/base"),
        (["--init", "no/such", "--lora", "4"], "no/such"),
    ],
)
def test_bad_input_gives_one_sentence_and_writes_nothing(
    flags, words, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tokenizer, base = builtin_tokenizer(), load_model(str(checkpoint))
    save_checkpoint(tmp_path / "adapters", lora.with_adapters(base, 4, seed=0), tokenizer)
    save_checkpoint(tmp_path / "another", builtin_model(tokenizer, 1), tokenizer)
    other = load_model("another")
    save_checkpoint(tmp_path / "stranger", lora.with_adapters(other, 4, seed=0), tokenizer)
    for name in ("cut", "torn", "narrow", "homeless"):
        shutil.copytree("adapters", name)
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"no weights")
    (tmp_path / "torn" / "adapter_config.json").write_text("{")
    record = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    fewer = {**record, "target_modules": ["q_proj"]}
    (tmp_path / "narrow" / "adapter_config.json").write_text(json.dumps(fewer))
    moved = {**record, "base_model_name_or_path": "/no/base"}
    (tmp_path / "homeless" / "adapter_config.json").write_text(json.dumps(moved))
    before = sorted(tmp_path.rglob("*"))
    model = [] if "--model" in flags else ["--model", str(checkpoint)]
    assert run_score(*model, *flags) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message and len(message.splitlines()) < 3
    assert sorted(tmp_path.rglob("*")) == before


def test_without_peft_one_sentence_says_what_to_install(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run_score("--model", checkpoint, "--lora", "4", "--out", tmp_path / "run") == 2
    assert "pip install -r requirements-lora.txt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--merge", "base", "--out", "new"], "holds no adapters"),
        (["--merge", ".", "--out", "new"], "name one that does, such as adapters"),
        (["--merge", "adapters", "--out", "base"], "holds something already"),
        (["--merge", "adapters"], "--out"),
        (["--merge", "adapters", "--out", "base/config.json"], "is a file"),
    ],
)
def test_a_merge_that_cannot_work_gives_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = builtin_tokenizer()
    save_checkpoint(tmp_path / "base", builtin_model(tokenizer, 0), tokenizer)
    policy = lora.with_adapters(load_model("base"), 4, seed=0)
    save_checkpoint(tmp_path / "adapters", policy, tokenizer)
    before = sorted(tmp_path.rglob("*"))
    assert lora.main(flags) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
