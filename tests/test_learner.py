"""What a stage changes: who samples, the reference, where it starts; STaR, three attempts, β2."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_runs import SMALL, assert_equal, interrupt_at, run_score, signals, tree  # noqa: F401

import learner as learners
import runs
import score
from models import load_checkpoint
from score import STAGES
from tasks import TASKS


@pytest.fixture
def rewarding(monkeypatch):
    """Let a hash of an attempt decide if it is right, so that a random model earns rewards."""
    sums = TASKS["sums"]
    bits = lambda texts, _: [zlib.crc32(t.encode()) % 2.0 for t in texts]  # noqa: E731
    fair = replace(sums, states=lambda text, _: text, keeps="", rewards=bits)
    monkeypatch.setitem(TASKS, "sums", fair)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_each_iteration_of_star_samples_the_one_before_and_learns_from_the_start_anew(
    checkpoint, tmp_path, monkeypatch, rewarding
):
    out, first = tmp_path / "run", tmp_path / "first"
    one_step, starts = score.one_step, {}

    def watched(its, run, progress, stage):
        if progress.step == 0 and run.folder == out:
            starts[progress.index] = weights(its.policy), weights(its.sampler)
        return one_step(its, run, progress, stage)

    monkeypatch.setattr(score, "one_step", watched)
    flags = ["--model", checkpoint, *SMALL, "--lr", "0.01"]
    assert run_score(*flags, "--stage", "1", "--steps1", 1, "--out", first) == 0
    init = first / "stage1"
    plan = "star,star,pair"
    assert run_score(*flags, "--init", init, "--stage", plan, "--out", out) == 0
    made = {name: weights(load_checkpoint(str(out / name))[0]) for name in ("star", "star-2")}
    begun = weights(load_checkpoint(str(init))[0])
    assert not equal(made["star"], begun) and not equal(made["star-2"], made["star"])
    assert equal(starts[0][0], begun) and equal(starts[0][1], begun)
    assert equal(starts[1][0], begun) and equal(starts[1][1], made["star"])
    assert equal(starts[2][0], made["star-2"]) and equal(starts[2][1], made["star-2"])
    lines = tree(out)["lines"]
    assert [line["stage"] for line in lines] == ["star"] * 6 + ["pair"] * 3  # each has 3 steps
    assert {line["learned"] for line in lines} - {0.0, 1.0}  # some learn from a part of a batch
    assert set(tree(out)["results"]) == {"base", "base, sampled", "star", "star-2", "pair"}


def test_alarms_are_raised_only_where_the_policy_itself_samples(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "raise_alarms", lambda *_, **__: ["rang"])
    flags = ["--model", checkpoint, "--out", tmp_path, *SMALL, "--steps1", 1, "--steps2", 1]
    assert run_score(*flags, "--stage", "1,star,0,pair") == 0
    assert [line["alarms"] for line in tree(tmp_path)["lines"]] == [["rang"], [], ["rang"], []]


def test_the_last_checkpoint_of_sft_is_kept_even_off_the_saving_grid(
    checkpoint, tmp_path, monkeypatch, rewarding
):
    one_step, steps = score.one_step, []

    def watched(its, *rest):
        line = one_step(its, *rest)
        steps.append(weights(its.policy))
        return line

    monkeypatch.setattr(score, "one_step", watched)
    flags = ["--model", checkpoint, "--out", tmp_path, *SMALL, "--stage", "pair", "--lr", "0.01"]
    assert run_score(*flags) == 0  # 3 steps, saved every 2
    kept = weights(load_checkpoint(str(tmp_path / "pair"))[0])
    assert equal(kept, steps[2]) and not equal(kept, steps[1])


@pytest.mark.parametrize("plan", ["star,star", "1,1b,2"])
def test_an_interrupted_run_of_any_stages_goes_on_bit_for_bit(
    plan, checkpoint, tmp_path, monkeypatch, rewarding
):
    flags = ["--model", checkpoint, *SMALL, "--steps1", 3, "--steps2", 3, "--stage", plan]
    flags += ["--lr", "0.01"]
    flags += ["--attempts", 3] if "1b" in plan else []
    # at the end of the first stage, and after a save within the second
    assert_goes_on_as_if_never_interrupted(flags, (2, 5), tmp_path, monkeypatch)


def assert_goes_on_as_if_never_interrupted(flags, steps, tmp_path, monkeypatch):
    """A run that is interrupted after one of these steps, and resumed, equals the whole run."""
    assert run_score(*flags, "--out", tmp_path / "whole") == 0
    for step in steps:
        out = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:

            def interrupt():
                raise RuntimeError("a bug, or a full disk")

            interrupt_at(patch, step, interrupt)
            with pytest.raises(RuntimeError):
                run_score(*flags, "--out", out)
        assert run_score("--resume", "--out", out) == 0
        assert_equal(tree(out), tree(tmp_path / "whole"))


def test_stage_1b_teaches_attempt_3_and_is_held_at_the_model_of_stage_1a(
    checkpoint, tmp_path, monkeypatch, capsys
):
    one_step, refs = score.one_step, {}

    def watched(its, run, progress, stage):
        refs.setdefault(stage.name, weights(its.ref))
        line = one_step(its, run, progress, stage)
        assert ("acc_t3" in line) == (stage.name != "1") == ("kl_t3" in line)
        return line

    monkeypatch.setattr(score, "one_step", watched)
    flags = ["--model", checkpoint, "--out", tmp_path / "run", *SMALL, "--lr", "0.01"]
    assert run_score(*flags, "--stage", "1,1b,2", "--attempts", 3, "--steps1", 2) == 0
    base = weights(load_checkpoint(str(checkpoint))[0])
    taught = weights(load_checkpoint(str(tmp_path / "run" / "stage1"))[0])
    assert equal(refs["1"], base) and equal(refs["2"], base) and equal(refs["1b"], taught)
    assert not equal(base, taught)
    assert "acc@t1  acc@t2  acc@t3   delta" in capsys.readouterr().out
    results = tree(tmp_path / "run")["results"]
    assert list(results) == ["base", "base, sampled", "stage1", "stage1b", "stage2"]
    assert all("acc_t3" in metrics for metrics in results.values())


def test_an_adaptive_beta2_is_logged_used_and_resumed(checkpoint, tmp_path, monkeypatch):
    flags = ["--model", checkpoint, *SMALL, "--stage", "1,1,2", "--adaptive-beta2"]
    used, objective = [], score.stage1_objective

    def watched(y, beta1, beta2):
        if y[0].kl.shape[1] > 1:  # score.multipliers calls it, too, with one token
            used.append(beta2)
        return objective(y, beta1, beta2)

    monkeypatch.setattr(score, "stage1_objective", watched)
    assert run_score(*flags, "--out", tmp_path / "whole") == 0
    logged = [line["beta2"] for line in tree(tmp_path / "whole")["lines"]]
    assert logged[0] == 0.1 == logged[5] and len(set(logged)) > 2 and used == logged[:10]
    assert logged[10:] == [0.1] * 3  # Stage II has none
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, lambda: (_ for _ in ()).throw(RuntimeError()))
        with pytest.raises(RuntimeError):
            run_score(*flags, "--out", tmp_path / "two")
    assert run_score("--resume", "--out", tmp_path / "two") == 0
    assert [line["beta2"] for line in tree(tmp_path / "two")["lines"]] == logged


def test_stage_2_in_a_second_command_goes_on_from_the_last_stage_of_the_first(
    checkpoint, tmp_path, monkeypatch, rewarding
):
    flags = ["--model", checkpoint, "--out", tmp_path / "run", *SMALL, "--lr", "0.01"]
    assert run_score(*flags, "--stage", "1,1b", "--attempts", 3) == 0
    one_step, begun = score.one_step, []

    def watched(its, *rest):
        begun.append(weights(its.policy))
        return one_step(its, *rest)

    monkeypatch.setattr(score, "one_step", watched)
    assert run_score("--stage", "2", "--out", tmp_path / "run") == 0
    assert equal(begun[0], weights(load_checkpoint(str(tmp_path / "run" / "stage1b"))[0]))
    assert not equal(begun[0], weights(load_checkpoint(str(tmp_path / "run" / "stage1"))[0]))
    assert "acc_t3" in tree(tmp_path / "run")["results"]["stage2"]
    typed = {"out": str(tmp_path / "other"), "stage": "star", "model": str(checkpoint)}
    cfg, plan, run, init, _ = runs.prepare_run(typed, STAGES)
    its = SimpleNamespace(cfg=cfg, plan=plan)
    assert init == "" and learners.checkpoint_before(its, run.folder, 0) == str(checkpoint)
