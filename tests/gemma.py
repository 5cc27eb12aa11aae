"""A small random Gemma 2 with the special tokens, the ids and the chat layout of the real one."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from models import save_checkpoint
from sft import negative_log_likelihood
from tasks import (
    CODE_CORRECTION,
    MATH_CORRECTION,
    MATH_PROMPT,
    MBPP_SHOTS,
    load_problems,
    read_chat,
)

FILES = Path(__file__).parent / "math"
CODE = Path(__file__).parent / "code"
TURNS = ["<start_of_turn>", "<end_of_turn>"]  # 106 and 107
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{i}>" for i in range(102)), *TURNS]
# No system role, contents trimmed, one BOS, "model" for the assistant, <end_of_turn> closes a turn.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma_tokenizer(task: str = "math") -> PreTrainedTokenizerFast:
    """Byte-fallback BPE like Gemma's, spaces as ▁, trained on the prompts and our own problems."""
    if task == "math":
        rows = [json.loads(line) for file in FILES.glob("t*.jsonl") for line in file.open()]
        texts = [row[key] for row in rows for key in ("problem", "solution")]
    else:
        problems = [p for s in ("mbpp", "test") for p in load_problems("code", s, data=str(CODE))]
        texts = [MBPP_SHOTS, CODE_CORRECTION, *(p.question + p.answer for p in problems)]
    core = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = BpeTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator([*texts, MATH_PROMPT, MATH_CORRECTION, "model", "user\n"], trainer)
    core.post_processor = processors.TemplateProcessing(  # adds <bos> by default, as Gemma's does
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=TEMPLATE,
        name_or_path="small gemma",
        additional_special_tokens=TURNS,
        **names,
    )


def gemma_model(tokenizer, seed: int = 0) -> Gemma2ForCausalLM:
    """Random weights; as in the real Gemma 2, generation_config has the end tokens 1 and 107."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=2048,
        sliding_window=64,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config)
    model.generation_config.eos_token_id = [1, 107]
    return model


FORMS = {
    "math": "Final Answer: The final answer is ${}$. I hope it is correct.",
    "code": "{}\n\n[DONE]",
}


def fitted_checkpoint(folder: Path, task: str = "math") -> Path:
    """A checkpoint that states some answer in the paper's form, so that some rewards are 1."""
    tokenizer = gemma_tokenizer(task)
    model, rng = gemma_model(tokenizer), random.Random(0)
    chat = read_chat(tokenizer, model, task)
    files, count, steps = (FILES, 4, 60) if task == "math" else (CODE, 3, 100)
    problems = load_problems(task, "train", count, str(files))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = []
        for problem in problems:
            row = [(token, False) for token in chat.x1(problem)]
            for number in range(2):
                text = FORMS[task].format(rng.choice(problems).answer)
                y = [*tokenizer(text, add_special_tokens=False).input_ids, chat.close_id]
                row += [(token, False) for token in chat.p1 * number]
                row += [(token, True) for token in y]
            rows.append(row)
        optimizer.zero_grad()
        negative_log_likelihood(model, rows).backward()
        optimizer.step()
    save_checkpoint(folder, model.to(torch.bfloat16), tokenizer)
    return folder
