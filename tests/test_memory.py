"""The counter of experiments/memory.py, checked with real tensors and with sizes by hand."""

import pytest
import torch

from config import configure
from experiments import memory
from experiments.memory import CONFIGS, Counter, count, make_config, make_learner, peaks

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 20_000}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def settings(**given):
    base = {"task": "math", "rows": 8, "k": 4, "max_new_tokens": 12, "micro_tokens": 400}
    return configure({**base, **given})


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    monkeypatch.setattr(memory, "AGAIN", 6)


@pytest.mark.parametrize(
    ("name", "given"),
    [("gemma-2-2b", {}), ("gemma-2-2b", {"lora": 4}), ("qwen2.5-1.5b", {"lora": 4})],
)
def test_fake_tensors_are_counted_as_real_ones(name, given):
    config, cfg = make_config(name, **SMALL), settings(**given)
    real = peaks(Counter(), make_learner(config, cfg, prompt=30))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # of one process
    assert count(config, cfg, prompt=30, every=1) == pytest.approx(real, rel=0.02)


def test_a_storage_is_counted_once_until_no_tensor_holds_it():
    counter = Counter()
    with counter:
        x = torch.zeros(100)
        view = x[:50]
        assert counter.live == 400
        y = x + 1
        assert counter.live == 800
        del x, y
        assert counter.live == 400 and counter.peak == 800  # the view keeps it
        del view
    assert counter.live == 0


def test_lora_holds_the_weights_once_and_full_training_holds_all_copies():
    config = make_config("gemma-2-2b", **SMALL)
    with torch.device("meta"):
        weights = memory.transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    cfg = settings(rows=4, max_new_tokens=2)  # hardly any memory but that of weights
    full, _ = count(config, cfg, prompt=30)
    of_lora, _ = count(config, settings(rows=4, max_new_tokens=2, lora=1), prompt=30)
    assert 16 * weights < full < 20 * weights  # masters, Adam (4 + 8), reference, copy (2 + 2)
    assert 2 * weights < of_lora < 4 * weights
    of_eight, _ = count(config, cfg, world=8, prompt=30)
    assert 14 / 8 * weights + 2 * weights < of_eight < full / 2


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-3-1b", 999_885_952),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_the_configs_have_the_published_numbers_of_weights(name, weights):
    assert set(CONFIGS) >= {name}
    with torch.device("meta"):
        model = memory.transformers.AutoModelForCausalLM.from_config(make_config(name))
    assert model.num_parameters() == weights
