"""CNN14 over ten-second clips: a judge, in batches, against a plain loop over the same network, clip by clip.

python benchmarks/judges.py                           two threads, some minutes
python benchmarks/judges.py --clips 8 --rounds 2 --threads 1

Both hear the same clips in alternating rounds of one run. Wall time says how fast it is here; processor time is what a busy machine
distorts least.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stages.judges.catalogue import Listening, PublishedJudge, random_network
from stages.judges.weights import Provenance


def timed(call: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Wall seconds, processor seconds, and what was heard."""
    wall, processor = time.perf_counter(), time.process_time()
    heard = call()
    return time.perf_counter() - wall, time.process_time() - processor, heard


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--judge", default="cnn14-16k")
    options.add_argument("--clips", type=int, default=32)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(given.threads)

    network = random_network(given.judge, tiny=False).eval()
    judge = PublishedJudge(given.judge, copy.deepcopy(network), "", Provenance("", "", "random weights"), Listening(), given.batch)
    clips = 0.1 * torch.randn(given.clips, 10 * judge.sample_rate, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def plainly() -> Tensor:
        return torch.cat([network(clip[None])[0] for clip in clips])

    def ours() -> Tensor:
        return judge.embed(clips, judge.sample_rate).embedding

    judge.embed(clips[: given.batch], judge.sample_rate)
    rounds = []
    for _ in range(given.rounds):
        plain, mine = timed(plainly), timed(ours)
        difference = float((plain[2] - mine[2]).abs().max() / plain[2].abs().max())
        assert difference < 1e-5, difference
        rounds.append((plain, mine))
        print(
            f"  loop {given.clips / plain[0]:.2f} clips/s, judge {given.clips / mine[0]:.2f} clips/s, apart by {difference:.1e}", flush=True
        )
    for place, what in enumerate(("wall time", "processor time")):
        ratios = sorted(plain[place] / mine[place] for plain, mine in rounds)
        loop, best = (statistics.median(pair[who][place] for pair in rounds) for who in (0, 1))
        print(
            f"{given.judge}, {given.threads} thread(s), batch {given.batch}, {what}: judge {given.clips / best:.2f} clips/s, "
            f"loop {given.clips / loop:.2f} clips/s, x{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
