"""What SCoRe is compared with: STaR and Pair-SFT, maximum likelihood on traces of repair.

A trace is x1 y1 p1 y2 with a right y2, and the likelihood of y2 is raised (section 4.1):

    star    D       y1 wrong, y2 right, as one policy sampled them one after the other
    star+   D+      and those where both are right
    pair    D       y1 wrong, y2 any right answer to the same problem, of either attempt
    pair+   D+      and right y1, paired in the same way, maybe with itself

STaR is repeated, `--stage star,star,star`: each time the model of the time before samples, and the
base model learns anew (ReST^EM). Pair-SFT is done once.

NOT STATED: whether y1 is in the loss (here not: it would teach mistakes), which wrong answers
Pair-SFT has (here first attempts), how long and in what batches to learn. NOT IN PAPER: there is no
data set on disk. Each step samples episodes as SCoRe's do, k for a problem, and learns once from
the traces among them, so all methods have the same number of samples and of updates; that is one
epoch. The ReST^EM paper takes at most 10 traces of a problem, here there are at most k.
Next to read: learner.py.
"""

import random
from dataclasses import replace

from sample import Episode

SFT = ("star", "star+", "pair", "pair+")  # stages


def traces(stage: str, episodes: list[Episode], k: int, seed: str) -> list[Episode]:
    """What a stage of SFT learns from, of sampled episodes (k of a problem adjacent).

    y1 is marked offline, so it is in no loss.
    """
    rng, found = random.Random(seed), []
    for start in range(0, len(episodes), k):
        siblings = episodes[start : start + k]
        pool = [y for episode in siblings for y in episode.attempts if y.reward]
        for episode in siblings:
            y1, y2 = episode.attempts
            if stage.startswith("pair") and pool:
                y2 = rng.choice(pool)
            if y2.reward and (stage.endswith("+") or not y1.reward):
                found.append(replace(episode, attempts=(y1, y2), offline=True))
    return found
