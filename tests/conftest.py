"""Small models for the tests: random weights, no network, on the CPU."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
# here and in the processes that tests start: two threads round differently on some processors
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # a missing model fails at once, without the network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks need two GPUs, or none

from experiments.compare import state_tensors as read_state  # noqa: F401
from fused import fuse
from models import save_checkpoint
from sft import builtin_model, builtin_tokenizer
from tasks import load_problems, read_chat


@pytest.fixture
def model():
    """A random built-in model whose attention softcap and sliding window change its results."""
    return make_model(seed=0)


def make_model(seed: int):
    model = fuse(builtin_model(builtin_tokenizer(), seed)).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 12  # small random weights never reach the softcap
        layer.self_attn.k_proj.weight.data *= 12
        layer.self_attn.sliding_window = 7
    model.config.sliding_window = 7
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
    model.lm_head.weight = torch.nn.Parameter(0.25 * head)  # a tied head repeats the last token
    return model


@pytest.fixture
def chat(model):
    """The built-in chat with many end tokens, so that the attempts of a random model differ."""
    chat = read_chat(builtin_tokenizer(), model, "sums")
    return replace(chat, end_ids=(chat.close_id, *range(20, 40)))


@pytest.fixture
def problems():
    """Five problems whose prompts differ in length."""
    sums = load_problems("sums", "train", 5)
    cut = [" ".join(p.question.split()[n:]) for n, p in enumerate(sums)]
    return [replace(p, question=q, id=q) for p, q in zip(sums, cut, strict=True)]


@pytest.fixture
def checkpoint(tmp_path_factory):
    """A random built-in model as a save_pretrained folder."""
    folder = tmp_path_factory.mktemp("models") / "random"
    save_checkpoint(folder, builtin_model(builtin_tokenizer(), seed=0), builtin_tokenizer())
    return folder
