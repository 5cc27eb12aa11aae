"""The models: how checkpoints are read and written, and the body and the head of a causal LM.

A bfloat16 policy is kept twice. Adam updates float32 masters, which are rounded to bfloat16 when
they compute (ranks.py). The rounded weights sample, and a checkpoint holds them. So the policy that
is scored is the one that was sampled, and while it equals the reference, their KL is exactly 0.
Next to read: fused.py.
"""

import copy
import errno
import hashlib
import logging
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ranks
from data import InputError, first_line
from fused import fuse

# --- 1. Checkpoints --------------------------------------------------------------------------


def quiet_transformers() -> None:
    """Silence the progress bars and warnings of transformers; errors are still raised."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it would report each retry


ADAPTERS = "adapter_config.json"  # peft's name for the settings of adapters (lora.py)
TEXT_PART = {  # names of weights in a model that also sees pictures, and in a text model
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
}


def load_checkpoint(name: str, precision: str = "float32"):
    """`load_model` and the tokenizer of a checkpoint folder or a hub name."""
    model = load_model(name, precision)
    return model, load_tokenizer(name, model)


def load_tokenizer(name: str, model):
    """The tokenizer of a checkpoint folder or a hub name; InputError if it does not fit a model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a damaged file raises
        raise InputError(
            f"the tokenizer of {name} cannot be loaded ({first_line(error)}): mend that, or name "
            "another checkpoint"
        ) from error
    known, rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if known < rows / 2:  # transformers makes one up if its files are missing
        raise InputError(
            f"{name} has a tokenizer of {known} tokens for {rows} embeddings: copy the files of "
            "the model's tokenizer (tokenizer.json, tokenizer_config.json ..) into it"
        )
    return tokenizer


def load_model(name: str, precision: str = "float32"):
    """The model of a checkpoint folder or a hub name, in eval mode.

    precision: "float32" or "bfloat16", whatever the checkpoint was saved in. Models with an
    attention softcap (Gemma 2) are loaded with eager attention: sdpa may drop the softcap. Of a
    model that also sees pictures (Gemma 3 4B), the text part is loaded.
    """
    quiet_transformers()
    check_name(name)
    try:
        whole = AutoConfig.from_pretrained(name)
        config = whole.get_text_config()
        without_dropout(config)
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, precision),
            attn_implementation=attention,
            output_loading_info=True,
            **({} if config is whole else {"key_mapping": TEXT_PART}),
        )
    except Exception as error:  # whatever a damaged folder or an absent network raises
        reason = first_line(error)
        known = Path(name).exists()
        hint = "mend that" if known else "allow the network, or log in by hf auth login"
        raise InputError(
            f"{name} cannot be loaded ({reason}): {hint}, or name another checkpoint"
        ) from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise InputError(f"{name} is incomplete, weights are missing: name another checkpoint")
    return fuse(model if config is whole else plain_copy(model, attention)).eval()


def plain_copy(model, attention: str | None):
    """A copy that saves its weights by its own names, not by those that it was loaded from."""
    config, dtype = model.config, model.dtype
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config, fresh.name_or_path = model.generation_config, model.name_or_path
    return fresh


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders in a folder that hold a whole model or adapters."""
    return sorted(
        {path.parent for name in ("config.json", ADAPTERS) for path in folder.glob(f"*/{name}")}
    )


def check_name(name: str) -> None:
    """Raise InputError for a folder that is no checkpoint; print it if the hub will be asked."""
    folder = Path(name)
    if not folder.exists():
        run = folder.parent
        if (run / "metrics.jsonl").exists():
            found = ", ".join(path.name for path in checkpoints_in(run)) or "its logs"
            raise InputError(
                f"the run {run} has no {folder.name}, only {found}: correct the name, or go on "
                f"with the run by python score.py --resume --out {run}"
            )
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"there is no checkpoint folder {name}: correct the path")
        if not ranks.rank():
            print(f"{name} is no folder here: asking the Hugging Face hub", file=sys.stderr)
    elif not (folder / "config.json").exists() or (folder / "metrics.jsonl").exists():
        if (folder / ADAPTERS).exists():
            raise InputError(
                f"{name} holds LoRA adapters, not a whole model: go on with them by --lora and "
                f"--init, or make a whole model by python lora.py --merge {name} --out FOLDER"
            )
        inside = list(map(str, checkpoints_in(folder)))
        what = "it has no config.json" if folder.is_dir() else "it is a file, not a folder"
        hint = f"name a folder in it, such as {', '.join(inside[-3:])}" if inside else what
        raise InputError(f"{name} is no checkpoint: {hint}")


def fingerprint(model) -> str:
    """A hash of the first numbers of each weight, to tell checkpoints apart on any machine."""
    parts = [weight.detach().flatten()[:256].float().cpu() for weight in model.parameters()]
    return hashlib.blake2b(torch.cat(parts).numpy().tobytes(), digest_size=8).hexdigest()


def without_dropout(config) -> None:
    """Set dropout to 0: with it, the scored policy would not be the sampled one."""
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def save_checkpoint(folder: Path, model, tokenizer) -> None:
    """Write a plain save_pretrained folder; it replaces the one before when it is complete.

    Other files in the folder are kept.
    """
    quiet_transformers()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, str(error), str(part)) from error
    tokenizer.save_pretrained(part)
    for path in folder.glob("*"):
        if not (part / path.name).exists():
            copy_it = shutil.copytree if path.is_dir() else shutil.copy2
            copy_it(path, part / path.name)
    replace_folder(folder, part)


def replace_folder(folder: Path, part: Path) -> None:
    """Replace a folder by `part`, which is complete; a kill in between leaves it as .old."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def distribute(policy, ref, precision: str):
    """Put both on their devices, sharded if need be; returns the full copy that samples for them.

    A float32 policy of a single process needs no full copy, since it can sample itself. Others get
    float32 masters: bfloat16 has 8 bits, so a step of 5e-6 would be rounded away.
    """
    if ranks.world() == 1 and precision == "float32":
        policy.to(ranks.device())
        ref.to(ranks.device())
        return None
    full_copy = copy.deepcopy(ref.to(ranks.device()))
    ranks.shard(policy.float(), precision, run_body)
    ranks.shard(ref, precision, run_body)
    return full_copy


def recompute_activations(policy) -> None:
    """In training mode, keep only the input of each layer, and run the layer again in backward."""
    name = "activation_checkpointing_enable"  # since transformers 5.23
    enable = getattr(policy, name, None) or policy.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"--recompute 1 is not for {policy.name_or_path}: give 0") from error


def compile_body(model, backend: str = "inductor") -> None:
    """Compile the body by torch.compile, for any length; of a sharded model, layer by layer.

    The policy is scored with gradients, the reference without. Compiled, the two may round in
    different ways, so the KL of equal models may differ from 0 by rounding.
    """
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise InputError("--compile 1 needs a C++ compiler such as g++: install one, or give 0")
    layers = model._no_split_modules if hasattr(model, "gathered") else ()
    parts = [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in layers]
    for part in parts or [model.base_model]:
        part.compile(dynamic=True, backend=backend)


# --- 2. Body and head ------------------------------------------------------------------------
# They are apart, since the head computes V = 256,000 logits for a position, and few positions need
# them.
# Shapes: B rows, S columns, N chosen positions, d hidden size, V vocabulary.


def last_hidden(model, tokens: torch.Tensor) -> torch.Tensor:
    """The head's input, (B, S) -> (B, S, d). Rows are padded on the right, so no mask is needed."""
    gathered = getattr(model, "gathered", None)  # of a sharded model
    return gathered(tokens) if gathered else run_body(model, tokens)


def run_body(model, tokens: torch.Tensor) -> torch.Tensor:
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def head(model, hidden: torch.Tensor) -> torch.Tensor:
    """float32 logits, (N, d) -> (N, V), rounded where the model's own forward rounds them."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits.float()


# --- 3. What learns ------------------------------------------------------------------------------


def trained(policy) -> dict[str, torch.nn.Parameter]:
    """The weights that learn, by name: all, or only those of adapters (lora.py)."""
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def adam(policy, lr: float) -> torch.optim.Adam:
    """Adam whose state exists from the start, so that a saved state can be read into it."""
    on_gpu = next(policy.parameters()).is_cuda
    weights = trained(policy).values()
    optimizer = torch.optim.Adam(weights, lr=lr, fused=on_gpu)
    for weight in weights:
        means = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        step = torch.zeros((), device=weight.device if on_gpu else "cpu")
        optimizer.state[weight] = {"step": step, **means}
    return optimizer


def state_of(policy, optimizer) -> dict[str, dict]:
    """Weights and Adam's state by name: the tensors themselves, to be saved or read into."""
    weights = trained(policy)
    return {"weights": weights, "adam": {name: optimizer.state[w] for name, w in weights.items()}}
