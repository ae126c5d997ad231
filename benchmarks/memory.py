"""Peak memory of `loa ingest` and of the mel pass: with twenty times the recordings, and with a recording of three hours.

Each command runs in a process of its own, without Ray (--workers 0), so its peak is all there is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

RATE, FEW, MANY, HOURS = 16_000, 100, 2000, 3


def short(folder: Path, count: int) -> Path:
    """Recordings of two seconds."""
    folder.mkdir()
    rng = np.random.default_rng(count)
    for i in range(count):
        soundfile.write(folder / f"{i:05d}.wav", 0.1 * rng.standard_normal(2 * RATE), RATE)
    return folder


def long(folder: Path) -> Path:
    """One recording of three hours, as FLAC."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(folder / "long.flac", "w", RATE, 1) as file:
        for _ in range(60 * HOURS):
            file.write(0.1 * rng.standard_normal(60 * RATE))
    return folder


def peak(*words: str) -> float:
    """MB at most of a command and what it starts."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    command = [sys.executable, "-c", code, sys.executable, "-m", *words]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Print the peaks and their ratios."""
    with tempfile.TemporaryDirectory() as temporary:
        root, peaks = Path(temporary), {}
        for name, folder in (("few", short(root / "a", FEW)), ("many", short(root / "b", MANY)), ("long", long(root / "c"))):
            work = root / f"work-{name}"
            ingest = peak("pipelines.ingest", str(folder), "--work", str(work), "--workers", "0")
            peaks[name] = ingest, peak("pipelines.preprocess", "mel", "--work", str(work), "--workers", "0")
        few = peaks["few"]
        for name, said in (("few", f"{FEW} recordings of 2 s"), ("many", f"{MANY} of them"), ("long", f"one of {HOURS} hours")):
            ratios = [now / before for now, before in zip(peaks[name], few, strict=True)]
            print(
                f"{said}: ingest {peaks[name][0]:.0f} MB ({ratios[0]:.2f}), mel pass {peaks[name][1]:.0f} MB ({ratios[1]:.2f})", flush=True
            )


if __name__ == "__main__":
    main()
