"""One HTML page about a run or an evaluation: learning curves, results, episodes to look at.

    python eval.py --report runs/sums                     writes runs/sums/report.html
    python eval.py --report runs/sums runs/direct         two runs side by side
    python eval.py --report runs/sums/eval/stage2         one evaluation, with all its transcripts

report.html beside this file is the template. The measurements are put into it as JSON, so the page
is a single file and needs no network. It can be made while a run goes on. Next to read: runs.py.
"""

import json
import time
from collections import Counter
from pathlib import Path

from data import InputError
from figures import PANELS
from metrics import intervals
from runs import EPISODES, METRICS, RESULTS, read_json, read_log, write_atomically
from score import STAGES

TEMPLATE = Path(__file__).parent / "report.html"
COLUMNS = {"acc_t1": "acc@t1", "acc_t2": "acc@t2", "acc_t3": "acc@t3", "delta": "delta"}
COLUMNS |= {"delta_i_to_c": "i→c", "delta_c_to_i": "c→i", "copied": "copied"}
COLUMNS |= {"cut_off": "cut off", "unreadable": "unreadable"}


def write(folders: list[Path], out: Path) -> Path:
    """Write the page about one or two folders into `out`; returns its path."""
    if len(folders) > 2:
        raise InputError(f"--report compares two folders at most, not {len(folders)}: name fewer")
    runs = [contents(folder) for folder in folders]
    measured = {name for run in runs for row in run["table"] for name in row["metrics"]}
    found = {
        "runs": runs,
        "panels": [{"title": title, "curves": names} for title, names in PANELS.items()],
        "columns": {name: words for name, words in COLUMNS.items() if name in measured},
    }
    # the text stands in a script element, which only a "<" could end
    text = json.dumps(found).replace("<", "\\u003c")
    name = "report.html" if len(folders) == 1 else f"report-{folders[1].resolve().name}.html"
    write_atomically(out / name, TEMPLATE.read_text("utf-8").replace("DATA", text, 1))
    return out / name


def contents(folder: Path) -> dict:
    """What the page shows of a run or an evaluation; InputError for any other folder."""
    made = time.strftime("%Y-%m-%d %H:%M")
    common = {"name": str(folder), "made": made, "stages": [], "steps": [], "curves": {}}
    common |= {"held_out": [], "alarms": [], "table": [], "episodes": []}
    if (folder / "config.json").exists() and (folder / RESULTS).exists():
        return common | of_run(folder)
    if (folder / "transcripts.jsonl").exists():
        return common | of_evaluation(folder)
    raise InputError(f"--report {folder} holds no run and no evaluation: name a folder that does")


def of_run(folder: Path) -> dict:
    """Settings, curves, alarms, results and episodes of a run, which may still go on."""
    lines = read_log(folder / METRICS) if (folder / METRICS).exists() else []
    episodes = read_log(folder / EPISODES) if (folder / EPISODES).exists() else []
    count = Counter(episode["source"] for episode in episodes)
    table = [
        row(name, metrics, count[f"{name}, held out"])
        for name, metrics in read_json(folder / RESULTS).items()
        if name != "base, sampled"  # not greedy like the others
    ]
    for path in sorted(folder.glob("eval/*/metrics.json")):
        evaluation = of_evaluation(path.parent)["table"][0]
        table.append(evaluation | {"name": f"eval/{path.parent.name}"})
    return {
        "kind": "run",
        "settings": read_json(folder / "config.json").get("settings", {}),
        "stages": [
            {"title": STAGES[line["stage"]].title, "start": line["step"]}
            for before, line in zip([{}, *lines], lines, strict=False)
            if line["stage"] != before.get("stage")
        ],
        "steps": [line["step"] for line in lines],
        "curves": {n: [line.get(n) for line in lines] for names in PANELS.values() for n in names},
        "held_out": [x["held_out"] | {"step": x["step"]} for x in lines if "held_out" in x],
        "alarms": [{"step": line["step"], "text": t} for line in lines for t in line["alarms"]],
        "table": table,
        "episodes": episodes,
    }


def row(name: str, metrics: dict, problems: int, bounds: dict | None = None) -> dict:
    """A line of the table of results; if the number of problems is 0, it has no intervals."""
    bounds = bounds or (intervals(metrics, problems) if problems else {})
    return {"name": name, "problems": problems, "metrics": metrics, "intervals": bounds}


def of_evaluation(folder: Path) -> dict:
    """Settings, results and every transcript of an evaluation."""
    record, episodes = read_json(folder / "metrics.json"), read_log(folder / "transcripts.jsonl")
    name = Path(record["settings"].get("model", "all")).name
    every = [row(name, record["metrics"], len(episodes), record["intervals"])]
    for name, metrics in record["groups"].items():  # their names end in their size, "(12)"
        every.append(row(name, metrics, int(name.rpartition("(")[2].rstrip(")"))))
    return {
        "kind": "evaluation",
        "settings": record["settings"],
        "table": every,
        "episodes": [{"source": "evaluation", **of_transcript(line)} for line in episodes],
    }


def of_transcript(line: dict) -> dict:
    """A line of transcripts.jsonl in the form that metrics.as_record gives an episode."""
    kept = ("question", "answer", "level", "subject")
    long = ("tokens", "logp")
    attempts = [{k: v for k, v in y.items() if k not in long} for y in line["attempts"]]
    return {name: line[name] for name in kept} | {"attempts": attempts}
