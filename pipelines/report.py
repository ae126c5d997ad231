"""One page about one project folder: what it sounds like, how good it is, how it was trained, and how to go on.

`report.html` needs nothing but itself: sounds (FLAC), spectrograms, charts, style and script are inside. It shows what
there is; a folder without evaluation or without runs gives a shorter page that says what is missing.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipelines import plots
from pipelines.evaluation.records import MEASURES
from pipelines.evaluation.results import SYSTEMS, WITH_SOUND, Evaluation, classes_picture, confusion_picture
from pipelines.features.store import FeatureStore
from pipelines.tracking import Run, read_runs, tracking_uri
from stages import STAGES
from stages.audio import AudioConfig, encode_flac, load_audio, log_mel
from stages.config import to_dict
from stages.errors import UserError
from stages.files import code_version, replacing

MOST_BYTES = 11_000_000  # of base64 sounds and spectrograms; charts and text stay below 1 MB
MOST_PANELS = 6  # curves of one stage
NO_CURVES = ("grad_norm", "learning_rate")


@dataclass(frozen=True)
class Project:
    """Everything the page speaks of, as found in the project folder."""

    work: Path
    uri: str
    evaluation: Evaluation | None
    runs: list[Run]
    steps: list[dict[str, Any]]
    stages: dict[str, dict[str, Any]]  # cards of the released stages
    bundle: dict[str, Any]
    store: FeatureStore | None


def write_report(work: Path, *, tracking_uri: str | None = None, output: Path | None = None, num_clips: int = 12) -> Path:
    """Write the report of a project folder.

    Args:
        tracking_uri: where its runs are; by default as for `loa train`.
        output: `<work>/report.html` by default.
        num_clips: captions to hear at most; fewer where the page would grow too large.

    Returns:
        Where the report lies. It replaces an earlier one only when it is whole.
    """
    project = _gather(Path(work).absolute(), tracking_uri)
    output = Path(output or project.work / "report.html")
    with replacing(output) as draft:
        draft.write_text(render(project, num_clips), encoding="utf-8")
    return output


def _gather(work: Path, uri: str | None) -> Project:
    if not work.is_dir():
        raise UserError(f"there is no project folder {work}; run `loa demo`, or name another with --work")
    cards = {stage: card for stage in STAGES if (card := _json(work / "stages" / stage / "stage.json"))}
    try:
        store = FeatureStore.open(work / "store")
    except UserError:
        store = None  # a report of what was only evaluated here
    return Project(
        work=work,
        uri=tracking_uri(work, uri),
        evaluation=Evaluation.read(work),
        runs=read_runs(work, uri),
        steps=_json(work / "steps.json") or [],
        stages=cards,
        bundle=_json(work / "bundle" / "loa.json") or {},
        store=store,
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ------------------------------------------------------------------------------------------------------------ the page


def render(project: Project, num_clips: int = 12) -> str:
    """The page as HTML."""
    found = project.evaluation
    parts = [
        ("results", "Results", _results(found) if found else _absent("evaluation", "loa evaluate")),
        ("listen", "Listen", _listen(project, found, num_clips) if found else ""),
        ("classes", "Class by class", _by_class(found) if found else ""),
        ("training", "Training", _training(project)),
        ("cost", "Time and memory", _cost(project.steps)),
        ("data", "Recordings", _recordings(project.store)),
        ("provenance", "Provenance", _provenance(project)),
        ("next", "Next", _commands(project)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in parts)
    sections = "".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in parts)
    title = _variant(project)
    return (
        f'<!doctype html><html lang="en" class="plain"><head><meta charset="utf-8"><title>{_e(title)} · loa</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<style>{_STYLE}</style></head><body>"
        f"<header><p class=eyebrow>loa · report</p><h1>{_e(title)}</h1><p class=lead>{_lead(project)}</p>{_tiles(project)}</header>"
        f"<nav>{links}</nav><main>{sections}</main>"
        f"<footer>Made by loa {_e(code_version()[:12])} on {time.strftime('%Y-%m-%d %H:%M %Z')}. "
        "This page is one file and asks nothing of the network.</footer>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _variant(project: Project) -> str:
    for source in (project.bundle, project.evaluation.protocol if project.evaluation else {}, *project.stages.values()):
        if source.get("variant"):
            return str(source["variant"]) + (" · tiny" if project.bundle.get("tiny") else "")
    return project.work.name


def _lead(project: Project) -> str:
    said = []
    if project.stages:
        said.append(f"{len(project.stages)} stages trained")
    if project.store is not None:
        said.append(f"on {project.store.num_clips:,} clips of {project.store.audio.clip_seconds:g} s")
    if project.evaluation is not None:
        said.append(f"then heard on {len(project.evaluation.clips)} held-out captions")
    text = " ".join(said[:2]) + (", " if len(said) > 2 else " " if said else "") + " ".join(said[2:])
    return _e(text.strip().capitalize() + "." if said else "Nothing has been trained here yet.")


def _tiles(project: Project) -> str:
    """The headline numbers, each with what it is to be read against."""
    tiles: list[str] = []
    found = project.evaluation
    if found is not None:
        for name in ("accuracy", "clap_score", "frechet_clap", "frechet_classifier"):
            values = found.scores.get(name, {})
            if "generated" in values and len(tiles) < 3:
                tiles.append(_tile(MEASURES[name].title, MEASURES[name].form.format(values["generated"]), _ladder(name, values)))
    if project.steps:
        seconds = sum(step["seconds"] for step in project.steps)
        peak = max(step["peak_memory_mb"] for step in project.steps)
        tiles.append(_tile("Time, all steps", _duration(seconds), f"<p>peak memory {_memory(peak)}</p>"))
    return f"<div class=tiles>{''.join(tiles)}</div>" if tiles else ""


def _tile(title: str, value: str, below: str) -> str:
    return f"<div class=tile><h3>{_e(title)}</h3><p class=big>{_e(value)}</p>{below}</div>"


def _ladder(name: str, values: dict[str, float]) -> str:
    """Where the generated clips stand between no skill and real clips."""
    beside = {s: values[s] for s in ("chance", "vae", "real", "other_real") if s in values}
    words = " ".join(f"<span>{SYSTEMS[s]} {MEASURES[name].form.format(value)}</span>" for s, value in beside.items())
    low, high = min(0.0, *values.values()), max(values.values())
    if MEASURES[name].better == "lower" or high <= low:
        return f"<p>{words}</p>"
    marks = "".join(f'<i style="left:{100 * (value - low) / (high - low):.1f}%" title="{SYSTEMS[s]}"></i>' for s, value in beside.items())
    filled = 100 * (values["generated"] - low) / (high - low)
    return f'<div class=ladder><b style="width:{filled:.1f}%"></b>{marks}</div><p>{words}</p>'


# -------------------------------------------------------------------------------------------------------- its sections


def _results(found: Evaluation) -> str:
    columns = [s for s in SYSTEMS if any(s in values for values in found.scores.values())]
    head = "".join(f'<th scope=col class="{s}">{_e(SYSTEMS[s])}</th>' for s in columns)
    rows = []
    for name, measure in MEASURES.items():
        arrow, word = ("↑", "higher is better") if measure.better == "higher" else ("↓", "lower is better")
        label = f'<th scope=row>{_e(measure.title)} <abbr title="{word}">{arrow}</abbr><small>{_e(measure.about)}</small></th>'
        if name in found.scores:
            cells = "".join(f'<td class="{s}">{_score(found, name, s)}</td>' for s in columns)
            rows.append(f"<tr>{label}{cells}</tr>")
        elif name in found.missing:
            rows.append(f"<tr>{label}<td class=reason colspan={len(columns)}>not measured: {_e(found.missing[name])}</td></tr>")
    notes = "".join(f"<li>{_e(note)}</li>" for note in found.notes)
    return (
        "<p>The same held-out clips, four ways: <b>generated</b> from the caption alone; the real clip through <b>VAE + vocoder</b>, "
        "the most that any generation here can reach; its spectrogram through the <b>vocoder</b>; and the <b>real</b> recording.</p>"
        f"<div class=scroll><table class=scores><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + (f"<ul class=notes>{notes}</ul>" if notes else "")
    )


def _score(found: Evaluation, name: str, system: str) -> str:
    value = found.scores[name].get(system)
    if value is None:
        return "<span class=none>–</span>"
    form = MEASURES[name].form.format
    between = found.intervals.get(name, {}).get(system)
    return form(value) + (f"<small>{form(between[0])} – {form(between[1])}</small>" if between else "")


def _listen(project: Project, found: Evaluation, num_clips: int) -> str:
    """Captions side by side: generated, restored, real; as many as the page can carry."""
    place, rate = project.work / "evaluation", int(found.protocol["sample_rate"])
    audio = (
        project.store.audio if project.store is not None else AudioConfig(sample_rate=rate, clip_seconds=float(found.protocol["seconds"]))
    )
    cards: list[str] = []
    size = 0
    for row in found.clips[:num_clips]:
        systems = [s for s in WITH_SOUND if (place / row["files"][s]).is_file()]
        sounds = "".join(_sound(place / row["files"][s], s, row, audio) for s in systems)
        card = f"<article class=clip>{_caption(row)}<div class=sounds>{sounds}</div></article>"
        size += len(card)
        if not systems or (size > MOST_BYTES and cards):
            break
        cards.append(card)
    if not cards:
        return ""
    every = "all" if len(cards) == len(found.clips) else f"the first {len(cards)} of"
    return (
        f"<p>These are {every} {len(found.clips)} evaluated captions, in the order of the list, not chosen by ear. "
        f"{found.protocol['num_inference_steps']} steps, guidance {found.protocol['guidance_scale']:g}, "
        f"candidates per caption: {found.protocol['candidates']}. "
        f"Click a spectrogram to hear it.</p>{''.join(cards)}"
    )


def _caption(row: dict[str, Any]) -> str:
    said = row["transcript"] or row["text"]
    chips = [f"<span class=chip>{_e(row['label'])}</span>"] if row["label"] else []
    if "recognised" in row and row["label"]:
        right = row["recognised"] == row["label"]
        chips.append(f'<span class="chip {"right" if right else "wrong"}">{"✓" if right else "✗"} heard as {_e(row["recognised"])}</span>')
    if "clap_score" in row:
        chips.append(f"<span class=number>CLAP {row['clap_score']:.2f} · real {row['clap_score_real']:.2f}</span>")
    return f"<header><h3>{_e(said)}</h3><p>{''.join(chips)}<code>{_e(row['clip_id'])}</code></p></header>"


def _sound(path: Path, system: str, row: dict[str, Any], audio: AudioConfig) -> str:
    waveform = load_audio(path, audio.sample_rate)
    picture = io.BytesIO()
    mel = log_mel(torch.from_numpy(waveform)[None], audio)[0].numpy()  # at its own level: what is too quiet should look it
    Image.fromarray(plots.mel_image(mel, scale=2)).save(picture, "JPEG", quality=86, subsampling=0)
    sound = _data("audio/flac", encode_flac(waveform, audio.sample_rate))
    label = _e(f"{SYSTEMS[system]}: {row['transcript'] or row['text']}")
    return (
        f'<figure class="{system}"><div class=player><img alt="" src="{_data("image/jpeg", picture.getvalue())}"><i></i>'
        f'<button type=button aria-label="Play {label}"></button></div><audio controls preload=none src="{sound}"></audio>'
        f"<figcaption>{_e(SYSTEMS[system])}</figcaption></figure>"
    )


def _by_class(found: Evaluation) -> str:
    pictures = []
    for title, picture in (("Recognised, by class", classes_picture(found)), ("Asked for and recognised", confusion_picture(found))):
        if picture is not None:
            pictures.append(f"<figure class=chart><figcaption>{title}</figcaption>{picture.svg(title)}</figure>")
    return f"<div class=pair>{''.join(pictures)}</div>" if pictures else ""


def _training(project: Project) -> str:
    blocks = []
    for run in project.runs:
        panels = _panels(run)
        if not panels:
            continue
        name = run.job.removeprefix("train-")
        steps = max(int(steps[-1]) for steps, _ in run.metrics.values() if len(steps))
        spent = project.stages.get(name, {}).get("seconds")
        about = f"{steps:,} steps" + (f", {_duration(spent)}" if spent else "")
        state = "" if run.status == "FINISHED" else f'<span class="chip wrong">{_e(run.status.lower())}</span>'
        chart = plots.curves(panels).svg(f"Curves of {name}: {', '.join(panels)}")
        blocks.append(f"<figure class=chart><figcaption><b>{_e(name)}</b> <small>{about}</small> {state}</figcaption>{chart}</figure>")
    return f"<div class=runs>{''.join(blocks)}</div>" if blocks else ""


def _panels(run: Run) -> dict[str, list[plots.Curve]]:
    """The curves of a training run by what they measure, with training and validation in one picture."""
    names: dict[str, dict[str, plots.Curve]] = {}
    for key, (steps, values) in run.metrics.items():
        split, _, name = key.partition("/")
        if split in ("train", "val") and not name.startswith(NO_CURVES):
            word = "training" if split == "train" else "validation"
            names.setdefault(name, {})[split] = plots.Curve(word, steps, values)
    ordered = sorted(names, key=lambda name: (-len(names[name]), "train" not in names[name], name))[:MOST_PANELS]
    return {name.replace("_", " "): [names[name][split] for split in ("train", "val") if split in names[name]] for name in ordered}


def _cost(steps: Sequence[dict[str, Any]]) -> str:
    if not steps:
        return ""
    longest, largest = max(s["seconds"] for s in steps) or 1.0, max(s["peak_memory_mb"] for s in steps) or 1.0
    rows = "".join(
        f"<tr><th scope=row>{_e(s['step'])}</th>"
        f"<td class=bar>{_duration(s['seconds'])}<b style='width:{100 * s['seconds'] / longest:.1f}%'></b></td>"
        f"<td class=bar>{_memory(s['peak_memory_mb'])}<b style='width:{100 * s['peak_memory_mb'] / largest:.1f}%'></b></td>"
        f"<td class=note>{_e(s.get('note', ''))}</td></tr>"
        for s in steps
    )
    total = (
        f"<tr class=total><th scope=row>together</th><td>{_duration(sum(s['seconds'] for s in steps))}</td>"
        f"<td>{_memory(max(s['peak_memory_mb'] for s in steps))}</td><td></td></tr>"
    )
    head = "<th scope=col>Time</th><th scope=col>Peak memory</th><th scope=col>Outcome</th>"
    return f"<div class=scroll><table class=cost><thead><tr><td></td>{head}</tr></thead><tbody>{rows}{total}</tbody></table></div>"


def _recordings(store: FeatureStore | None) -> str:
    if store is None:
        return ""
    clips = store.clips()
    rows = []
    for corpus, group in clips.groupby("corpus"):
        counts = group["split"].value_counts()
        cells = "".join(f"<td>{int(counts.get(split, 0)):,}</td>" for split in ("train", "validation", "test"))
        words = sum(len(captions) > 0 for captions in group["captions"])
        rows.append(f"<tr><th scope=row>{_e(corpus)}</th>{cells}<td>{_duration(group['seconds'].sum())}</td><td>{words:,}</td></tr>")
    left_out = store.rejected()
    reasons = left_out["reason"].value_counts().head(5)
    said = "; ".join(f"{count} × {_e(reason)}" for reason, count in reasons.items())
    after = f"<p>Left out at ingest: {said}.</p>" if said else "<p>No recording had to be left out.</p>"
    head = "".join(f"<th scope=col>{name}</th>" for name in ("train", "validation", "test", "length", "with captions"))
    return f"<div class=scroll><table class=data><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{after}"


def _provenance(project: Project) -> str:
    found = project.evaluation
    blocks: list[tuple[str, dict[str, Any]]] = [("Stages", {name: _stage_line(card) for name, card in project.stages.items()})]
    if found is not None:
        blocks.append(("Evaluation protocol", found.protocol))
    if project.bundle:
        blocks.append(("Bundle", {k: v for k, v in project.bundle.items() if k not in ("audio", "provenance")}))
    if project.store is not None:
        blocks.append(("Feature store", {"root": project.store.root, **{f"series {k}": v for k, v in project.store.recipes().items()}}))
    blocks.append(("Machine", _machine()))
    lists = "".join(f"<h3>{title}</h3>{_definitions(values)}" for title, values in blocks if values)
    config = next((card["config"] for card in project.stages.values() if "config" in card), None)
    shown = {"Configuration": config, "Where the bundle's weights come from": project.bundle.get("provenance")}
    folded = "".join(
        f"<details><summary>{title}</summary><pre>{_e(_pretty(value))}</pre></details>" for title, value in shown.items() if value
    )
    return lists + folded


def _stage_line(card: dict[str, Any]) -> str:
    parts = [f"{card['steps']:,} steps" if "steps" in card else "", _duration(card["seconds"]) if "seconds" in card else ""]
    parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in (card.get("validation") or {}).items()]
    return " · ".join(part for part in parts if part)


def _machine() -> dict[str, str]:
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "ray", "diffusers", "transformers", "mlflow")]
    return {
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "packages": ", ".join(versions),
    }


def _commands(project: Project) -> str:
    place = os.path.relpath(project.work)
    own = project.uri == f"sqlite:///{project.work / 'mlflow.db'}"
    store = f"sqlite:///{place}/mlflow.db" if own else project.uri
    prompt = next((row["text"] for row in project.evaluation.clips), "rain on a tin roof") if project.evaluation else "rain on a tin roof"
    lines = [
        ("Make a sound", f"loa generate {json.dumps(prompt, ensure_ascii=False)} --bundle {place}/bundle -o sound.wav"),
        ("Serve it, with a page to try it", f"loa serve --bundle {place}/bundle"),
        ("Every run, curve and sound", f"mlflow ui --backend-store-uri {store}"),
        ("Score it again, on more captions", f"loa evaluate --work {place} --num-clips 500"),
    ]
    return "".join(f"<div class=command><p>{title}</p><pre><code>{_e(line)}</code></pre></div>" for title, line in lines)


# ----------------------------------------------------------------------------------------------------- small things


def _absent(what: str, command: str) -> str:
    return f"<p class=absent>There is no {what} yet; <code>{command}</code> makes one.</p>"


def _definitions(values: dict[str, Any]) -> str:
    rows: Iterable[str] = (
        f"<dt>{_e(str(k).replace('_', ' '))}</dt><dd>{_e(_plain(v))}</dd>" for k, v in values.items() if v not in (None, "")
    )
    return f"<dl>{''.join(rows)}</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def _pretty(value: Any) -> str:
    return json.dumps(to_dict(value), indent=2, ensure_ascii=False)


def _duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _memory(megabytes: float) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _e(text: Any) -> str:
    return html.escape(str(text))


_STYLE = """
:root {
  --paper: #ffffff; --raised: #f6f7f9; --ink: #1d2127; --soft: #5c6570; --faint: #8b949e; --line: #e3e6ea;
  --accent: #3f6bd0; --wash: #eaf0fd; --good: #1d7f5c; --good-wash: #e2f4ec; --bad: #b4461f; --bad-wash: #fbeae3;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #13161b; --raised: #1b1f26; --ink: #e4e7eb; --soft: #a3acb8; --faint: #7d8793; --line: #2c323b;
    --accent: #86a7f5; --wash: #1d2940; --good: #6fd0a8; --good-wash: #16322a; --bad: #f0936c; --bad-wash: #3a231a;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--font); -webkit-text-size-adjust: 100%; }
body > header, main, body > footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
body > header { padding-top: 56px; }
.eyebrow { margin: 0; color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: .06em; }
h1 { margin: 4px 0 6px; font-size: 38px; line-height: 1.15; letter-spacing: -.02em; }
.lead { margin: 0; color: var(--soft); font-size: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 14px; margin-top: 30px; }
.tile { padding: 16px 18px 14px; background: var(--raised); border-radius: 12px; }
.tile h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--soft); }
.tile p { margin: 0; font-size: 12.5px; line-height: 1.45; color: var(--soft); }
.tile p span { margin-right: 9px; white-space: nowrap; }
.tile .big { margin: 2px 0 8px; font-size: 32px; line-height: 1.2; font-weight: 650; letter-spacing: -.02em; color: var(--ink);
  font-variant-numeric: tabular-nums; }
.ladder { position: relative; height: 8px; margin: 8px 0 10px; border-radius: 4px; background: var(--line); }
.ladder b { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--accent); }
.ladder i { position: absolute; top: -3px; width: 2px; height: 14px; margin-left: -1px; border-radius: 1px; background: var(--soft); }
nav { position: sticky; top: 0; z-index: 2; margin-top: 34px; padding: 0 max(24px, calc(50vw - 516px)); overflow-x: auto;
  white-space: nowrap;
  background: color-mix(in srgb, var(--paper) 90%, transparent); backdrop-filter: blur(8px); border-bottom: 1px solid var(--line); }
nav a { display: inline-block; padding: 11px 0; margin-right: 24px; color: var(--soft); font-size: 14px; text-decoration: none; }
nav a:hover, nav a:focus-visible { color: var(--ink); }
section { padding-top: 44px; scroll-margin-top: 20px; }
h2 { margin: 0 0 10px; font-size: 24px; letter-spacing: -.01em; }
section > p { max-width: 74ch; margin: 0 0 18px; color: var(--soft); }
section > p b { color: var(--ink); font-weight: 600; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
thead th, thead td { padding: 8px 12px; border-bottom: 1px solid var(--line); color: var(--soft); font-size: 13px; font-weight: 500;
  text-align: right; white-space: nowrap; }
tbody th, tbody td { padding: 9px 12px; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400; vertical-align: top; }
tbody th { padding-left: 0; text-align: left; font-weight: 550; }
td small { white-space: nowrap; }
td small, th small { display: block; color: var(--faint); font-size: 12px; font-weight: 400; line-height: 1.4; }
abbr { color: var(--faint); text-decoration: none; }
.scores th.generated, .scores td.generated { background: var(--wash); color: var(--accent); font-weight: 650; }
.scores thead th.generated { border-radius: 8px 8px 0 0; }
.scores .none { color: var(--faint); }
.scores .reason { color: var(--soft); text-align: left; font-style: italic; }
.notes { margin: 16px 0 0; padding-left: 18px; color: var(--soft); font-size: 14px; }
.clip { padding: 20px 0 22px; border-bottom: 1px solid var(--line); }
.clip:last-child { border: 0; }
.clip h3 { margin: 0 0 4px; font-size: 18px; font-weight: 600; }
.clip h3::before { content: "\\201c"; } .clip h3::after { content: "\\201d"; }
.clip header p { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 0 0 12px; }
.chip { padding: 1px 9px; border-radius: 10px; background: var(--raised); color: var(--soft); font-size: 12.5px; }
.chip.right { background: var(--good-wash); color: var(--good); } .chip.wrong { background: var(--bad-wash); color: var(--bad); }
.number, .clip code { color: var(--faint); font-size: 12.5px; } .clip code { margin-left: auto; }
.sounds { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
figure { margin: 0; }
.sounds figcaption { margin-top: 5px; color: var(--soft); font-size: 13px; }
.sounds .generated figcaption { color: var(--accent); font-weight: 600; }
.player { position: relative; height: 104px; border-radius: 8px; overflow: hidden; background: #000; }
.generated .player { box-shadow: 0 0 0 2px var(--accent); }
.player img { display: block; width: 100%; height: 100%; object-fit: fill; }
.player i { position: absolute; inset: 0 auto 0 0; width: 2px; background: #fff; opacity: 0; pointer-events: none; }
.player.on i { opacity: .9; }
.player button { position: absolute; inset: 0; width: 100%; border: 0; background: none; cursor: pointer; }
.player button::before, .player button::after { content: ""; position: absolute; left: 10px; bottom: 10px; width: 30px; height: 30px; }
.player button::before { border-radius: 50%; background: rgba(255, 255, 255, .92); }
.player button::after { background: #1d2127; clip-path: polygon(40% 30%, 72% 50%, 40% 70%); }
.player.on button::after {
  clip-path: polygon(35% 32%, 45% 32%, 45% 68%, 35% 68%, 35% 32%, 55% 32%, 65% 32%, 65% 68%, 55% 68%, 55% 32%);
}
.player button:hover::before { background: #fff; transform: scale(1.1); }
.player button:focus-visible { outline: 3px solid var(--accent); outline-offset: -3px; border-radius: 8px; }
.sounds audio { display: none; width: 100%; height: 32px; margin-top: 6px; }
.plain .sounds audio { display: block; } .plain .player button { display: none; }
.runs { display: flex; flex-wrap: wrap; column-gap: 12px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 28px; align-items: start; }
.chart { overflow-x: auto; margin-bottom: 26px; }
.chart figcaption { margin-bottom: 8px; font-size: 14.5px; } .chart figcaption small { color: var(--faint); font-size: 13px; }
.chart figcaption b { font-weight: 600; }
.chart svg { display: block; font-family: var(--font); } .chart svg * { stroke-linejoin: round; }
.data { max-width: 720px; }
.scroll + p { margin-top: 12px; }
.cost th, .cost td { text-align: left; } .cost .bar { width: 22%; }
.cost th { white-space: nowrap; }
.cost .bar b { display: block; height: 3px; margin-top: 3px; border-radius: 2px; background: var(--accent); opacity: .55; }
.cost .note { color: var(--soft); font-size: 13.5px; }
.cost thead th { text-align: left; } .total th, .total td { border-bottom: 0; font-weight: 650; }
dl { display: grid; grid-template-columns: minmax(130px, max-content) 1fr; gap: 4px 20px; margin: 0 0 22px; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
section h3 { margin: 18px 0 8px; font-size: 15px; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); font-size: 14.5px; }
pre { margin: 8px 0 0; padding: 13px 16px; overflow-x: auto; border-radius: 8px; background: var(--raised); font: 13px/1.5 var(--mono); }
details pre { max-height: 460px; }
code { font-family: var(--mono); font-size: .9em; }
pre code { font-size: inherit; }
.command { margin-bottom: 14px; } .command p { margin: 0; color: var(--soft); font-size: 14.5px; } .command pre { margin-top: 4px; }
.absent { padding: 14px 18px; border-radius: 8px; background: var(--raised); }
body > footer { padding-top: 40px; padding-bottom: 48px; color: var(--faint); font-size: 13px; }
@media (max-width: 560px) { h1 { font-size: 30px; } .runs { display: flex; flex-wrap: wrap; column-gap: 12px; }
.pair { grid-template-columns: 1fr; } .sounds { grid-template-columns: 1fr 1fr;
  } .clip code, .scores th small { display: none; } }
@media print { nav, .player button { display: none; } section { break-inside: avoid-page; } }
"""

_SCRIPT = """
document.documentElement.classList.remove("plain");
let current = null;
for (const player of document.querySelectorAll(".player")) {
  const audio = player.parentElement.querySelector("audio"), head = player.querySelector("i");
  const follow = () => {
    head.style.left = 100 * (audio.currentTime / audio.duration || 0) + "%";
    if (!audio.paused) requestAnimationFrame(follow);
  };
  audio.addEventListener("play", () => {
    if (current && current !== audio) current.pause();
    current = audio;
    player.classList.add("on");
    follow();
  });
  audio.addEventListener("pause", () => player.classList.remove("on"));
  audio.addEventListener("ended", () => { audio.currentTime = 0; });
  player.querySelector("button").addEventListener("click", () => {
    if (!audio.paused) { audio.pause(); return; }
    audio.currentTime = 0;
    audio.play();
  });
}
"""
