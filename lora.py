"""LoRA: small trained adapters beside a frozen base model (Hu et al. 2021), by the library peft.

    W x   becomes   W x + 32/R · B (A x)      W frozen, A (R, in) random, B (out, R) 0 at first

    python score.py --lora 16                                adapters of rank 16: R above
    python lora.py --merge runs/sums/stage2 --out runs/sums/merged     a model without adapters

Policy and reference share one copy of the frozen weights, and the policy also has the adapters.
These are float32 in every run, so Adam needs no masters. In new adapters B is 0, so at step 0 the
KL is exactly 0. On many GPUs, each GPU has all weights, and ranks.py averages the gradients of the
adapters. stage1/ and stage2/ hold only the adapters, in peft's format.

NOT IN PAPER: LoRA, since the paper trains all weights. From "LoRA Without Regret" (Schulman et al.
2025) are adapters on all linear layers but the head, 32 for every rank, and ten times the learning
rate. Next to read: ranks.py.
"""

import argparse
import copy
import os
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig

import models
import ranks
from config import raise_input_error
from data import InputError, first_line
from runs import base_of_run, disk_errors_explained, locked, read_json

SCALE = 32
PREFIX = "base_model.model."  # of a weight's name in peft's files


def import_peft():
    """The peft library; InputError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise InputError("LoRA needs peft: run pip install -r requirements-lora.txt") from error
    return peft


# --- 1. Models with adapters -----------------------------------------------------------------


def has_adapters(checkpoint: str) -> bool:
    """Does a checkpoint folder hold adapters, not a whole model?"""
    return (Path(checkpoint) / models.ADAPTERS).exists()


def settings_of(checkpoint: str):
    """peft's settings of the adapters in a checkpoint folder; InputError if they are damaged."""
    peft = import_peft()
    try:
        return peft.PeftConfig.from_pretrained(checkpoint)
    except Exception as error:  # whatever a damaged file raises
        reason = first_line(error)
        raise InputError(
            f"{checkpoint}/{models.ADAPTERS} cannot be read ({reason}): restore it"
        ) from error


def with_adapters(base, rank: int, seed: int, checkpoint: str = ""):
    """A model that shares the weights of `base`, with a checkpoint's adapters, or else new ones.

    Only the adapters can be trained. New ones depend on the seed alone, not on the machine.
    """
    peft = import_peft()
    size = base.config.get_text_config().hidden_size
    if rank > size:
        raise InputError(f"--lora {rank} is above the hidden size of the model, {size}: give less")
    model = copy.deepcopy(base, memo={id(weight): weight for weight in base.parameters()})
    if has_adapters(checkpoint):
        settings = settings_of(checkpoint)
    else:
        settings = peft.LoraConfig(
            r=rank, lora_alpha=SCALE, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # peft and transformers warn about each other
        model.add_adapter(settings)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()
    name = model.name_or_path
    settings.base_model_name_or_path = os.path.abspath(name) if os.path.exists(name) else name
    if has_adapters(checkpoint):
        read_weights(model, checkpoint)
    return model.eval()


def read_weights(model, checkpoint: str) -> None:
    """Read a checkpoint's adapters into those of a model; InputError if they do not fit."""
    peft = import_peft()
    try:
        saved = peft.load_peft_weights(checkpoint, device="cpu")
        saved = {name.removeprefix(PREFIX): weight for name, weight in saved.items()}
        found = peft.set_peft_model_state_dict(model, saved)
    except Exception as error:  # whatever a damaged file raises
        raise InputError(
            f"{checkpoint} cannot be loaded ({first_line(error)}): restore its adapters"
        ) from error
    missing = [name for name in found.missing_keys if ".lora_" in name]
    if missing or found.unexpected_keys:
        raise InputError(
            f"{checkpoint} has adapters for another model than {model.name_or_path}: name others"
        )


def base_of(checkpoint: str) -> str:
    """The base model of a checkpoint: its run's, or the one that its adapters name; else itself."""
    run = Path(checkpoint).resolve().parent
    name = read_json(run / "config.json").get("settings", {}).get("model")
    if name:
        return base_of_run(run, name)
    named = settings_of(checkpoint).base_model_name_or_path if has_adapters(checkpoint) else ""
    return named or checkpoint


def whole_of(checkpoint: str) -> str:
    """The whole model that a checkpoint needs: the base of adapters, or the checkpoint itself."""
    return base_of(checkpoint) if has_adapters(checkpoint) else checkpoint


def check_init(init: str, rank: int, base) -> None:
    """Raise InputError unless `init` is the base model, or adapters of this rank for it."""
    precision, whole = str(base.dtype).removeprefix("torch."), whole_of(init)
    same = Path(whole).resolve() == Path(base.name_or_path).resolve()
    of_init = base if same else models.load_model(whole, precision)
    if models.fingerprint(of_init) != models.fingerprint(base):
        raise InputError(
            f"--init {init} is neither the base model {base.name_or_path} nor adapters of it: "
            "leave out --lora, or name it with --model as the base model"
        )
    if has_adapters(init):
        found = settings_of(init).r
        if found != rank:
            raise InputError(
                f"--lora {rank} differs from --init {init}, which has rank {found}: "
                f"give --lora {found}"
            )


# --- 2. Finished checkpoints -------------------------------------------------------------------


def load_checkpoint(name: str, precision: str = "float32"):
    """Model and tokenizer of a checkpoint with adapters, or of a whole one (models.py)."""
    base = models.load_model(whole_of(name), precision)
    model = with_adapters(base, 0, 0, name) if has_adapters(name) else base
    return model, load_tokenizer(name, base)


def load_tokenizer(checkpoint: str, model):
    """The tokenizer of a checkpoint, or that of its base if it has none of its own."""
    own = (Path(checkpoint) / "tokenizer_config.json").exists()
    return models.load_tokenizer(checkpoint if own else whole_of(checkpoint), model)


def merge(checkpoint: str, out: Path) -> None:
    """Write W + 32/R B A as W: computed in float32, saved in the precision of the base."""
    if not has_adapters(checkpoint):
        inside = [p for p in models.checkpoints_in(Path(checkpoint)) if has_adapters(str(p))]
        raise InputError(
            f"--merge {checkpoint} holds no adapters (no {models.ADAPTERS}): name one that does"
            + (f", such as {inside[-1]}" if inside else "")
        )
    if any(out.glob("*")):
        raise InputError(f"--out {out} holds something already: name a new folder")
    base = models.load_model(base_of(checkpoint))
    for layer in with_adapters(base, 0, 0, checkpoint).modules():
        if isinstance(layer, import_peft().tuners.tuners_utils.BaseTunerLayer):
            layer.merge()  # into the weight, which the base shares
    precision = AutoConfig.from_pretrained(base_of(checkpoint)).get_text_config().dtype
    tokenizer = load_tokenizer(checkpoint, base)
    models.save_checkpoint(out, base.to(precision or torch.float32), tokenizer)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input."""
    words, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=words, allow_abbrev=False)
    parser.add_argument("--merge", required=True, help="checkpoint folder with adapters")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the whole model")
    parser.error = raise_input_error
    try:
        args = parser.parse_args(argv)
        with locked(args.out), disk_errors_explained():
            merge(args.merge, args.out)
        print(f"wrote {args.out}")
    except InputError as error:
        print(f"lora.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    ranks.run_command(main)
