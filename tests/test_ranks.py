"""Many processes make the same run as one, and none of them waits for ever."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import read_state
from gemma import FILES, fitted_checkpoint
from test_runs import assert_equal, run_score, signals, tree  # noqa: F401

import eval as evaluation
import models
import ranks
import score
from config import configure
from data import InputError
from learner import build
from models import load_checkpoint, save_checkpoint

# Attempts of many lengths, live rewards, micro-batches that do not divide evenly.
# The policy does not begin at the base itself (--init): where the gradient is 0, Adam would turn
# rounding errors into whole steps.
FLAGS = ["--task", "math", "--data", FILES, "--precision", "float32", "--batch", "12", "--k", "4"]
FLAGS += ["--steps1", "4", "--steps2", "2", "--problems", "5", "--max-new-tokens", "40"]
FLAGS += ["--micro-tokens", "1500", "--save-every", "2", "--show-every", "1", "--lr", "5e-5"]
FLAGS += ["--stage", "1,star+,2"]  # in star+, one model samples and another one learns


def torchrun(script, *flags, processes=2, agent=()):
    """Start torchrun with so many processes, of one thread each, as is torchrun's default."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [*agent, script, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment["PET_MASTER_PORT"] = str(free_port())  # other tests may run at the same time
    return subprocess.Popen(list(map(str, command)), env=environment, **pipes)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(process, status=0):
    out, err = process.communicate(timeout=120)
    assert (process.returncode == 0) == (status == 0), err
    return out, err


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base, init = fitted_checkpoint(folder / "base"), folder / "init"
    policy, tokenizer = load_checkpoint(str(base))
    noise = torch.Generator().manual_seed(0)
    for weight in policy.parameters():
        weight.data += 0.01 * torch.randn(weight.shape, generator=noise)
    save_checkpoint(init, policy, tokenizer)
    return ["--model", base, "--init", init, *FLAGS]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert run_score("--out", out, *flags) == 0
    return out


@pytest.fixture(scope="module")
def pair(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pair"
    printed, _ = finish(torchrun(score.__file__, "--out", out, *flags))
    assert printed.count("done in") == 1  # only rank 0 prints
    return out


def assert_close(one: Path, two: Path, atol: float):
    """The same tokens, and numbers and weights within atol."""
    first, second = tree(one), tree(two)
    assert first["samples"] == second["samples"]
    assert first["progress"].keys() == second["progress"].keys()
    for a, b in zip(first["lines"], second["lines"], strict=True):
        assert all(a.pop(name) == b.pop(name) for name in ("alarms", "stage"))
        assert a == pytest.approx(b, abs=atol, rel=1e-4)
    for name, metrics in first["results"].items():
        assert metrics == pytest.approx(second["results"][name], abs=1e-6)
    for name, tensor in first["tensors"].items():
        torch.testing.assert_close(tensor, second["tensors"][name], rtol=0, atol=atol, msg=name)


def test_two_processes_learn_the_same_as_one(alone, pair):
    lines = tree(alone)["lines"]
    assert any(line["acc_t1"] + line["acc_t2"] > 0 for line in lines)  # some rewards are 1
    assert {line["length_t1"] for line in lines} != {40.0}  # not all attempts are cut off
    assert_close(alone, pair, atol=1e-5)


def test_the_export_of_two_processes_is_their_weights(pair):
    model, _ = load_checkpoint(str(pair / "stage2"))
    state, tokens = read_state(pair), torch.arange(30)[None]
    with torch.no_grad():
        exported = model(tokens).logits
        for name, weight in model.named_parameters():
            weight.copy_(state[f"weights.{name}"])
        assert torch.equal(model(tokens).logits, exported)
    assert json.loads((pair / "stage2" / "config.json").read_text())["dtype"] == "float32"


DRIVER = """
import sys
sys.path.insert(0, {root!r})
import ranks, score
one_step = score.one_step
def stepped(learner, run, *rest):
    if ranks.rank() == 1 and len(run.lines) == 1:
        {fault}
    return one_step(learner, run, *rest)
score.one_step = stepped
ranks.run_command(score.main)
"""


def faulty(folder: Path, fault: str) -> Path:
    """score.py, except that `fault` runs on the second rank before the second step."""
    folder.mkdir(exist_ok=True)
    (folder / "driver.py").write_text(
        DRIVER.format(root=str(Path(score.__file__).parent), fault=fault)
    )
    return folder / "driver.py"


@pytest.fixture(scope="module")
def preempted(flags, tmp_path_factory):
    """A run of two processes of which one got SIGTERM in the middle."""
    out = tmp_path_factory.mktemp("runs") / "preempted"
    script = faulty(out.parent, "import os; os.kill(os.getpid(), 15)")
    printed, _ = finish(torchrun(script, "--out", out, *flags))  # status 0: nothing went wrong
    assert f"torchrun --nproc_per_node=2 score.py --resume --out {out}" in printed
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    return out


def test_two_processes_resume_what_two_left_bit_for_bit(preempted, pair, tmp_path):
    shutil.copytree(preempted, tmp_path / "run")
    finish(torchrun(score.__file__, "--resume", "--out", tmp_path / "run"))
    resumed, whole = tree(tmp_path / "run"), tree(pair)
    assert_equal(resumed, whole)


def test_one_process_resumes_what_two_left(preempted, pair, tmp_path):
    shutil.copytree(preempted, tmp_path / "run")
    assert run_score("--resume", "--out", tmp_path / "run") == 0
    assert_close(tmp_path / "run", pair, atol=1e-5)


def test_one_process_reads_exactly_what_two_ranks_saved(preempted):
    saved = read_state(preempted)
    cfg = configure({**json.loads((preempted / "config.json").read_text())["settings"]})
    learner, _ = build(cfg, [], "", reuse_base=True)
    tensors = models.state_of(learner.policy, learner.optimizer)
    ranks.load_sharded(tensors, preempted / "state")
    for name, weight in learner.policy.named_parameters():
        assert torch.equal(weight, saved[f"weights.{name}"])
        for key, value in learner.optimizer.state[weight].items():
            assert torch.equal(value, saved[f"adam.{name}.{key}"])
    assert any(value.abs().max() > 0 for name, value in saved.items() if "exp_avg" in name)


def test_two_processes_go_on_from_what_one_left(flags, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert run_score("--out", whole, *flags, "--stage", "1,2") == 0
    assert run_score("--out", out, *flags, "--stage", "1") == 0
    finish(torchrun(score.__file__, "--stage", "2", "--out", out))
    one, two = tree(out), tree(whole)
    assert one["samples"] == two["samples"]


def test_two_nodes_learn_the_same_as_two_processes(flags, pair, tmp_path):
    nodes, port = [], free_port()
    for node in range(2):
        agent = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1"]
        agent += [f"--master_port={port}"]
        out = ["--out", tmp_path / "run"]
        nodes.append(torchrun(score.__file__, *out, *flags, processes=1, agent=agent))
    for process in reversed(nodes):  # the agent of node 0 waits for that of node 1
        finish(process)
    assert_equal(tree(tmp_path / "run"), tree(pair))


def test_evaluation_by_two_processes_gives_the_same_as_by_one(pair, tmp_path, capsys):
    asked = ["--model", pair / "stage2", "--task", "math", "--data", FILES, "--temperature", "1"]
    asked += ["--problems", "7", "--max-new-tokens", "40", "--precision", "float32"]
    assert evaluation.main([*map(str, asked), "--out", str(tmp_path / "one")]) == 0
    printed, _ = finish(torchrun(evaluation.__file__, *asked, "--out", tmp_path / "two"))
    numbers = capsys.readouterr().out.rpartition("wrote")[0]
    assert len(numbers) > 500 and printed.startswith(numbers)
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert one["metrics"] == two["metrics"]
    texts = [
        [json.loads(line) for line in (tmp_path / n / "transcripts.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*texts, strict=True):
        assert [y["tokens"] for y in a["attempts"]] == [y["tokens"] for y in b["attempts"]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise RuntimeError('the second GPU fell off')", "the second GPU fell off"),
        ("raise score.InputError('the disk of node 2 is full')", "the disk of node 2 is full"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_its_message(fault, message, flags, tmp_path):
    out, began = tmp_path / "run", time.monotonic()
    _, err = finish(torchrun(faulty(tmp_path, fault), "--out", out, *flags), status=1)
    assert message in err
    assert time.monotonic() - began < 60
    assert not (out / "state.part").exists() and (out / "state").exists()


def test_bad_input_is_reported_once(flags, tmp_path):
    for wrong, words in ((["--k", "1"], "leaves no sibling"), (["--model", "no/such"], "no/such")):
        _, err = finish(
            torchrun(score.__file__, *flags, "--out", tmp_path / "run", *wrong), status=2
        )
        told = [line for line in err.splitlines() if line.startswith("score.py: ")]
        assert len(told) == 1 and words in told[0]
    assert not (tmp_path / "run").exists()


# --- One process ---------------------------------------------------------------------------------


@pytest.fixture
def of_three(monkeypatch):
    """This process as one of three."""

    def be(rank):
        monkeypatch.setattr(ranks, "world", lambda: 3)
        monkeypatch.setattr(ranks, "rank", lambda: rank)

    return be


def test_every_item_is_in_one_share_and_samples_of_a_problem_stay_together(of_three):
    shares = []
    for rank in range(3):
        of_three(rank)
        shares.append(ranks.local_slice(40, unit=4))
    assert [(part.start, part.stop) for part in shares] == [(0, 12), (12, 24), (24, 40)]


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 31])
def test_every_row_is_on_one_rank_and_all_make_as_many_backward_passes(rows, of_three):
    lengths = [7 + 13 * row % 50 for row in range(rows)]
    hands = []
    for rank in range(3):
        of_three(rank)
        hands.append(ranks.local_micro_batches(lengths, 100))
    assert len({len(hand) for hand in hands}) == 1
    in_the_loss = [row for hand in hands for batch, weight in hand if weight for row in batch]
    assert sorted(in_the_loss) == list(range(rows))
    assert {weight for hand in hands for _, weight in hand} <= {0.0, 3.0}
    tokens = [sum(lengths[row] for batch, w in hand if w for row in batch) for hand in hands]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_an_input_error_on_another_rank_ends_this_one_silently(of_three, monkeypatch):
    of_three(1)
    monkeypatch.setattr(ranks, "all_gather", lambda things: [InputError("on rank 2"), *things])
    with pytest.raises(SystemExit) as left:
        ranks.on_all_ranks(int, "3")
    assert left.value.code == 2
    of_three(0)
    with pytest.raises(InputError, match="on rank 2"):
        ranks.on_all_ranks(int, "3")


TWO_GRADIENTS = """
import copy, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import models, ranks
from conftest import make_model
with ranks.process_group():
    ref = make_model(0).to(torch.bfloat16)
    policy, total = copy.deepcopy(ref), 0.0
    models.distribute(policy, copy.deepcopy(ref).requires_grad_(False), "bfloat16")
    rows = torch.arange(40).view(2, 20)
    for rank, model in ((ranks.rank(), policy), (0, ref), (1, ref)):
        hidden = models.last_hidden(model, rows[rank : rank + 1])[0]
        models.head(model, hidden).square().mean().backward()
        if model is ref:
            total = total + ref.model.norm.weight.grad.float() / 2
            ref.zero_grad()
    found = ranks.full_tensor(policy.model.norm.weight.grad)
    assert found.dtype == torch.float32 and torch.equal(found, total), (found, total)
ranks.run_command(lambda: 0)
"""


def test_gradients_of_two_ranks_are_summed_in_float32(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(TWO_GRADIENTS.format(root=str(Path(score.__file__).parent)))
    finish(torchrun(script))
