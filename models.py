"""What computes: checkpoints, the last layer by hand, and float32 masters of bfloat16 weights.

A policy that is fine-tuned in full on one GPU is kept twice:

    policy   bfloat16   samples, scores, and is what a checkpoint holds
    masters  float32    what Adam steps; they gather the policy's gradients, and are rounded into it

A step of 5e-6 is too small for bfloat16, which has 8 bits: it would be rounded away. Sampled and
scored is always the rounded policy, so that on-policy stays on-policy, and while it equals the
reference their KL is exactly 0. A float32 policy is its own master. Next to read: score.py.
"""

import copy
import shutil
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data import InputError
from sft import fit_builtin

# --- 1. Checkpoints --------------------------------------------------------------------------


def quiet_transformers() -> None:
    """No bars and warnings between ours; what goes wrong is an exception all the same."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_precision(precision: str) -> None:
    """Raise InputError for a precision that there is not."""
    if precision not in ("float32", "bfloat16"):
        raise InputError(f"--precision {precision} is unknown: choose float32 or bfloat16")


def load_checkpoint(name: str, precision: str = "float32"):
    """Model (eval mode) and tokenizer of a checkpoint folder or a hub name.

    precision: "float32" or "bfloat16", whatever the checkpoint was saved in. Models with an
    attention softcap (Gemma 2) get eager attention: sdpa may drop the softcap.
    """
    quiet_transformers()
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise InputError(f"{name} is no checkpoint: the folder has no config.json")
    try:
        config = AutoConfig.from_pretrained(name)
        without_dropout(config)
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, precision),
            attn_implementation=attention,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a damaged folder or an absent network raises
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{name} is no checkpoint that can be loaded: {reason}") from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise InputError(f"{name} is no whole checkpoint: weights are missing")
    return model.eval(), tokenizer


def without_dropout(config) -> None:
    """Dropout would make the scored policy another than the sampled one."""
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def save_checkpoint(folder: Path, model, tokenizer) -> None:
    """A plain save_pretrained folder; the one before is moved away when the new one is whole."""
    quiet_transformers()
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_pair(cfg, init: str, same_base: bool):
    """Policy and frozen reference, on the GPU if there is one, and their tokenizer.

    The reference is the base model: the built-in one is fitted, unless the run folder has the
    same_base already. The policy is the checkpoint `init`, or a copy of the base.
    """
    policy = load_checkpoint(init, cfg.precision)[0] if init else None
    base = str(Path(cfg.out) / "base") if cfg.model == "builtin" else cfg.model
    if cfg.model == "builtin" and not (same_base and Path(base).exists()):
        save_checkpoint(Path(base), *fit_builtin(cfg.seed))
    ref, tokenizer = load_checkpoint(base, cfg.precision)
    shapes = [[p.shape for p in model.parameters()] for model in (policy or ref, ref)]
    if shapes[0] != shapes[1]:
        raise InputError(f"--init {init} has another architecture than the base {cfg.model}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ref = ref.to(device).eval().requires_grad_(False)
    check_head(ref)
    policy = (policy or copy.deepcopy(ref)).to(device).eval().requires_grad_(True)
    if cfg.recompute:
        recompute_activations(policy)
    return policy, ref, tokenizer


def recompute_activations(policy) -> None:
    """In training mode, hold each layer's input only, and run the layer again in backward."""
    name = "activation_checkpointing_enable"  # since transformers 5.23
    enable = getattr(policy, name, None) or policy.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"--recompute 1 is not known to {policy.name_or_path}: give 0") from error


# --- 2. Body and head ------------------------------------------------------------------------
# Apart, because the head makes V = 256,000 numbers of every position, and few positions need them.
# Shapes: B rows, S columns, N chosen positions, d hidden size, V vocabulary.


def last_hidden(model, tokens: torch.Tensor) -> torch.Tensor:
    """What the head reads, (B, S) -> (B, S, d). Rows are padded on the right: no mask is needed."""
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def head(model, hidden: torch.Tensor) -> torch.Tensor:
    """float32 logits, (N, d) -> (N, V), rounded where the model's own forward rounds them."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits.float()


def check_head(model) -> None:
    """Raise InputError for a model that makes its logits in another way."""
    tokens = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        ours, its = head(model, last_hidden(model, tokens)[0]), model(tokens).logits[0].float()
    if not torch.allclose(ours, its, rtol=1e-2, atol=1e-2):
        raise InputError(f"{model.name_or_path} scales its logits in a way not known to models.py")


# --- 3. Master weights -------------------------------------------------------------------------


def make_masters(policy) -> list[torch.Tensor]:
    """float32 masters of the policy's weights; each backward will add its gradients to theirs."""
    masters = []
    for weight in policy.parameters():
        master = weight.detach().float().requires_grad_()  # the same memory if it is float32
        weight.register_post_accumulate_grad_hook(partial(hand_over, master=master))
        masters.append(master)
    return masters


def hand_over(weight: torch.Tensor, master: torch.Tensor) -> None:
    """Add a weight's gradient to its master's, and free it at once."""
    grad = weight.grad.float()
    master.grad = grad if master.grad is None else master.grad.add_(grad)
    weight.grad = None


@torch.no_grad()
def round_into(policy, masters: list[torch.Tensor]) -> None:
    for weight, master in zip(policy.parameters(), masters, strict=True):
        weight.copy_(master)


@torch.no_grad()
def take_over(masters: list[torch.Tensor], policy) -> None:
    """The policy's weights become the masters'."""
    for weight, master in zip(policy.parameters(), masters, strict=True):
        master.copy_(weight)
