"""Maximum likelihood: the built-in base model, and STaR and Pair-SFT, to compare SCoRe with.

The paper's base models can do more than their first attempt shows. Asked again, they mostly keep
their answer. `fit_builtin` makes such a model for column addition (NOT IN PAPER: it stands in for
Gemini). It learns from transcripts of up to ten attempts. The first word says what follows:

    attempt 1   fast 7 9 1    sees no carry: each column is added alone
                slow 8 0 1    sees a carry if it starts at most FAR columns away
    later ones  ok            keeps the answer before
                no 8 0 1      rewrites it: right, or with a slip (one carry is wrong)

First the model learns to do all of these, then to do them in up to ten attempts. Then it learns how
often: most first attempts are `fast`, nearly all later ones are `ok`, and most rewrites have a
slip. So the greedy base model adds each column alone and keeps its answer, though it could correct.

STaR and Pair-SFT raise the likelihood of y2 in traces x1 y1 p1 y2 with a right y2 (section 4.1):

    star            D     y1 is wrong, y2 is right; one policy sampled them one after the other
    pair            D     y1 is wrong; y2 is drawn from all right attempts at the same problem
    star+, pair+    D+    the same, and also traces with a right y1

STaR is repeated (`--stage star,star,star`): each time, the model of the time before samples, and
the base model is trained again from its start (ReST^EM). Pair-SFT is done once.

NOT STATED: whether y1 is in the loss (not here, it would teach mistakes), which wrong answers
Pair-SFT takes (here: first attempts), how long to train and on what batches. NOT IN PAPER: no data
set is stored. As in SCoRe, a step samples k episodes of a problem, and it learns once from the
traces among them. So all methods have as many samples and updates. (ReST^EM: at most 10 a problem)
"""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from data import COLUMNS, Problem, add_columns
from sample import Episode
from tasks import Chat, find_task, keeps_answer, load_problems, read_chat

# --- 1. The built-in base model ------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Steps of fitting, and what their transcripts show.

    attempts: how many a transcript has; each step draws one of these numbers. slow: a share of the
    first attempts; right, slip: shares of the later ones.
    """

    steps: int
    attempts: tuple[int, ...]
    slow: float
    right: float
    slip: float


FAR = 3
PHASES = (
    Phase(400, (3,), slow=0.5, right=0.5, slip=0.3),
    Phase(600, (3, 10), slow=0.5, right=0.5, slip=0.3),
    Phase(120, (3, 10), slow=0.3, right=0.018, slip=0.026),
)
FIT_BATCH = 384  # attempts a step
FIT_LR, FIT_RAMP, FIT_DECAY = 6e-3, 20, 200  # peak; steps of linear rise and of linear decay

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message.content }}"
    "{% if message.role == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
)


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each column (`4+7`), digit, word and special token; spaces separate them."""
    columns = [f"{upper}+{lower}" for upper in range(10) for lower in range(10)]
    words = ["<pad>", "<bos>", "<end>", "again", "=", "ok", "no", "fast", "slow"]
    words += [*map(str, range(10)), *columns]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        name_or_path="builtin",
    )


def builtin_model(tokenizer, seed: int) -> Gemma2ForCausalLM:
    """An untrained Gemma 2 of 2 layers and hidden size 64: 81,920 weights; not fused (fused.py)."""
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
        max_position_embeddings=256,
        sliding_window=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # the one that keeps Gemma 2's softcap
    )
    return Gemma2ForCausalLM(config)


def fit_builtin(seed: int) -> tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]:
    """The built-in base model and its tokenizer, fitted by maximum likelihood (float32, CPU)."""
    tokenizer = builtin_tokenizer()
    model = builtin_model(tokenizer, seed)
    chat = read_chat(tokenizer, model, "sums")
    rng, problems = random.Random(seed), load_problems("sums", "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT_LR, weight_decay=0.01)
    plan = [phase for phase in PHASES for _ in range(phase.steps)]
    bar = tqdm(plan, desc="base model", unit="step")
    for step, phase in enumerate(bar):
        ramp = min(1.0, (step + 1) / FIT_RAMP, (len(plan) - step) / FIT_DECAY)
        optimizer.param_groups[0]["lr"] = FIT_LR * ramp
        attempts = rng.choice(phase.attempts)
        drawn = rng.choices(problems, k=FIT_BATCH // attempts)
        rows = [draw(chat, problem, phase, attempts, rng) for problem in drawn]
        loss = negative_log_likelihood(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval(), tokenizer


def draw(
    chat: Chat, problem: Problem, phase: Phase, attempts: int, rng: random.Random
) -> list[tuple[int, bool]]:
    """x1 y1 p1 y2 p1 y3 .. as (token, is it in the loss?): attempts are, prompts are not."""
    encode = chat.tokenizer.convert_tokens_to_ids
    transcript = [(token, False) for token in encode(["<bos>", *problem.question.split()])]
    for number in range(attempts):
        transcript += [(token, False) for token in chat.p1] if number else []
        attempt = draw_later(problem, phase, rng) if number else draw_first(problem, phase, rng)
        transcript += [(token, True) for token in [*encode(attempt.split()), chat.close_id]]
    return transcript


def draw_first(problem: Problem, phase: Phase, rng: random.Random) -> str:
    slow = rng.random() < phase.slow
    digits = add_shortsightedly(columns_of(problem), reach=FAR if slow else 0)
    return f"{'slow' if slow else 'fast'} {digits}"


def draw_later(problem: Problem, phase: Phase, rng: random.Random) -> str:
    chance = rng.random()
    if chance < phase.right:
        return f"no {problem.answer}"
    if chance < phase.right + phase.slip:
        return f"no {add_columns(columns_of(problem), flipped=rng.randrange(COLUMNS))}"
    return "ok"


def columns_of(problem: Problem) -> list[tuple[int, int]]:
    return [tuple(map(int, word.split("+"))) for word in problem.question.split()[:-1]]


def add_shortsightedly(columns: list[tuple[int, int]], reach: int) -> str:
    """The digits of a sum when a carry is seen only if it starts at most `reach` columns away."""
    digits = []
    for index in range(len(columns)):
        in_sight = add_columns(columns[index : index + 1 + reach]).split()
        digits.append(in_sight[-len(columns[index : index + 1 + reach])])
    return " ".join(digits)


def negative_log_likelihood(model, rows: list[list[tuple[int, bool]]]) -> torch.Tensor:
    """Mean over the tokens in the loss; rows are padded on the right."""
    width = max(map(len, rows))
    padded = torch.tensor([row + [(0, False)] * (width - len(row)) for row in rows])  # (B, T, 2)
    tokens, taught = padded[..., 0], padded[:, 1:, 1].bool()
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
    return F.cross_entropy(logits[taught], tokens[:, 1:][taught])


# --- 2. Traces of STaR and Pair-SFT --------------------------------------------------------------


def star_traces(episodes: list[Episode], k: int, seed: str, keep_right=False) -> list[Episode]:
    """Traces of STaR, as they were sampled: D, or D+ with keep_right."""
    return with_right_y2(episodes, keep_right)


def pair_traces(episodes: list[Episode], k: int, seed: str, keep_right=False) -> list[Episode]:
    """Traces of Pair-SFT: y2 is drawn from all right attempts of the k siblings; D or D+.

    A reply such as "ok" states no answer of its own: after another y1 it would not be right.
    """
    rng, paired, task = random.Random(seed), [], find_task(episodes[0].problem.task)
    for start in range(0, len(episodes), k):
        siblings = episodes[start : start + k]
        attempts = [y for episode in siblings for y in episode.attempts]
        right = [y for y in attempts if y.reward and not keeps_answer(y.text, task)]
        for episode in siblings if right else []:
            paired.append(replace(episode, attempts=(episode.attempts[0], rng.choice(right))))
    return with_right_y2(paired, keep_right)


def with_right_y2(episodes: list[Episode], keep_right: bool) -> list[Episode]:
    """The episodes with a right y2 and a wrong y1; with keep_right, those with a right y1, too.

    They are marked offline, so that y1 is in no loss.
    """
    pairs = ((episode, *(y.reward for y in episode.attempts)) for episode in episodes)
    kept = [episode for episode, r1, r2 in pairs if r2 and (keep_right or not r1)]
    return [replace(episode, offline=True) for episode in kept]
