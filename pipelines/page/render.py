"""The report's HTML: its frame from `report.html`, and a section for each subject that the project folder has something on."""

from __future__ import annotations

import io
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from pipelines import plots
from pipelines.evaluation.records import MEASURES
from pipelines.evaluation.results import SYSTEMS, WITH_SOUND, Evaluation, classes_picture, confusion_picture
from pipelines.features.store import FeatureStore
from pipelines.page.markup import absent, data_uri, definitions, duration, escape, memory, pretty
from pipelines.page.project import Project
from pipelines.page.runs import Run
from stages.audio import Waveform, encode_flac
from stages.config import tiny_name
from stages.files import code_version

FILES = Path(__file__).parent  # report.html, report.css and report.js
MOST_BYTES = 11_000_000  # of base64 sounds and spectrograms; charts and text stay below 1 MB
MOST_PANELS = 6  # curves of one stage
NO_CURVES = ("grad_norm", "learning_rate", "loss/", "critic_")


# ------------------------------------------------------------------------------------------------------------ the page


def render(project: Project, num_clips: int = 12) -> str:
    """The page as HTML."""
    evaluation = project.evaluation
    parts = [
        ("results", "Results", _results(evaluation) if evaluation else absent("evaluation", "loa evaluate")),
        ("listen", "Listen", _listen(project, evaluation, num_clips) if evaluation else ""),
        ("classes", "Class by class", _by_class(evaluation) if evaluation else ""),
        ("training", "Training", _training(project)),
        ("cost", "Time and memory", _cost(project.steps)),
        ("data", "Recordings", _recordings(project.store)),
        ("provenance", "Provenance", _provenance(project)),
        ("next", "Next", _commands(project)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in parts)
    sections = "".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in parts)
    return Template((FILES / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(_variant(project)),
        style=(FILES / "report.css").read_text(encoding="utf-8"),
        script=(FILES / "report.js").read_text(encoding="utf-8"),
        lead=_lead(project),
        tiles=_tiles(project),
        links=links,
        sections=sections,
        version=escape(code_version()[:12]),
        date=time.strftime("%Y-%m-%d %H:%M %Z"),
    )


def _variant(project: Project) -> str:
    for source in (project.bundle, project.evaluation.protocol if project.evaluation else {}, *project.stages.values()):
        if source.get("variant"):
            return tiny_name(source["variant"]) if project.bundle.get("tiny") else str(source["variant"])
    return project.work.name


def _lead(project: Project) -> str:
    said = []
    if project.stages:
        said.append(f"{len(project.stages)} stages trained")
    if project.store is not None:
        said.append(f"on {project.store.num_clips:,} clips of {project.store.audio.clip_seconds:g} s")
    if project.evaluation is not None:
        said.append(f"then evaluated on {len(project.evaluation.clips)} held-out captions")
    text = " ".join(said[:2]) + (", " if len(said) > 2 else " " if said else "") + " ".join(said[2:])
    return escape(text.strip().capitalize() + "." if said else "Nothing has been trained here yet.")


def _tiles(project: Project) -> str:
    """The headline numbers, each with what it is to be read against."""
    tiles: list[str] = []
    evaluation = project.evaluation
    if evaluation is not None:
        for name in ("accuracy", "clap_score", "frechet_clap", "frechet_classifier"):
            values = evaluation.scores.get(name, {})
            if "generated" in values and len(tiles) < 3:
                tiles.append(_tile(MEASURES[name].title, MEASURES[name].form.format(values["generated"]), _ladder(name, values)))
    if project.steps:
        seconds = sum(step["seconds"] for step in project.steps)
        peak = max(step["peak_memory_mb"] for step in project.steps)
        tiles.append(_tile("Time, all steps", duration(seconds), f"<p>peak memory {memory(peak)}</p>"))
    return f"<div class=tiles>{''.join(tiles)}</div>" if tiles else ""


def _tile(title: str, value: str, below: str) -> str:
    return f"<div class=tile><h3>{escape(title)}</h3><p class=big>{escape(value)}</p>{below}</div>"


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


def _results(evaluation: Evaluation) -> str:
    columns = [s for s in SYSTEMS if any(s in values for values in evaluation.scores.values())]
    head = "".join(f'<th scope=col class="{s}">{escape(SYSTEMS[s])}</th>' for s in columns)
    rows = []
    for name, measure in MEASURES.items():
        arrow, word = ("↑", "higher is better") if measure.better == "higher" else ("↓", "lower is better")
        label = f'<th scope=row>{escape(measure.title)} <abbr title="{word}">{arrow}</abbr><small>{escape(measure.about)}</small></th>'
        if name in evaluation.scores:
            cells = "".join(f'<td class="{s}">{_score(evaluation, name, s)}</td>' for s in columns)
            rows.append(f"<tr>{label}{cells}</tr>")
        elif name in evaluation.missing:
            rows.append(f"<tr>{label}<td class=reason colspan={len(columns)}>not measured: {escape(evaluation.missing[name])}</td></tr>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in evaluation.notes)
    return (
        "<p>The same held-out clips, four ways: <b>generated</b> from the caption alone; the real clip through <b>VAE + vocoder</b>, "
        "a reconstruction, blurred clip by clip (no upper bound: what is generated may be recognised more often); its spectrogram through "
        "the <b>vocoder</b>; and the <b>real</b> recording.</p>"
        f"<div class=scroll><table class=scores><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + (f"<ul class=notes>{notes}</ul>" if notes else "")
    )


def _score(evaluation: Evaluation, name: str, system: str) -> str:
    value = evaluation.scores[name].get(system)
    if value is None:
        return "<span class=none>–</span>"
    form = MEASURES[name].form.format
    between = evaluation.intervals.get(name, {}).get(system)
    return form(value) + (f"<small>{form(between[0])} – {form(between[1])}</small>" if between else "")


def _listen(project: Project, evaluation: Evaluation, num_clips: int) -> str:
    """Captions side by side: generated, restored, real; as many as the page can carry."""
    cards: list[str] = []
    size = 0
    for row in evaluation.clips[:num_clips]:
        sounds = {system: sound for system in WITH_SOUND if (sound := project.sound(row, system)) is not None}
        players = "".join(_player(project, sound, system, row) for system, sound in sounds.items())
        card = f"<article class=clip>{_caption(row)}<div class=sounds>{players}</div></article>"
        size += len(card)
        if not sounds or (size > MOST_BYTES and cards):
            break
        cards.append(card)
    if not cards:
        return ""
    every = "all" if len(cards) == len(evaluation.clips) else f"the first {len(cards)} of"
    return (
        f"<p>These are {every} {len(evaluation.clips)} evaluated captions, in the order of the list, not chosen by ear. "
        f"{evaluation.protocol['num_inference_steps']} steps, guidance {evaluation.protocol['guidance_scale']:g}, "
        f"candidates per caption: {evaluation.protocol['candidates']}. "
        f"Click a spectrogram to hear it.</p>{''.join(cards)}"
    )


def _caption(row: dict[str, Any]) -> str:
    said = row["transcript"] or row["text"]
    chips = [f"<span class=chip>{escape(row['label'])}</span>"] if row["label"] else []
    if "recognised" in row and row["label"]:
        right = row["recognised"] == row["label"]
        chips.append(
            f'<span class="chip {"right" if right else "wrong"}">{"✓" if right else "✗"} recognised as {escape(row["recognised"])}</span>'
        )
    if "clap_score" in row:
        chips.append(f"<span class=number>CLAP {row['clap_score']:.2f} · real {row['clap_score_real']:.2f}</span>")
    return f"<header><h3>{escape(said)}</h3><p>{''.join(chips)}<code>{escape(row['clip_id'])}</code></p></header>"


def _player(project: Project, waveform: Waveform, system: str, row: dict[str, Any]) -> str:
    picture = io.BytesIO()
    Image.fromarray(plots.mel_image(project.mel(waveform), scale=2)).save(picture, "JPEG", quality=86, subsampling=0)
    sound = data_uri("audio/flac", encode_flac(waveform, project.audio().sample_rate))
    label = escape(f"{SYSTEMS[system]}: {row['transcript'] or row['text']}")
    return (
        f'<figure class="{system}"><div class=player><img alt="" src="{data_uri("image/jpeg", picture.getvalue())}"><i></i>'
        f'<button type=button aria-label="Play {label}"></button></div><audio controls preload=none src="{sound}"></audio>'
        f"<figcaption>{escape(SYSTEMS[system])}</figcaption></figure>"
    )


def _by_class(evaluation: Evaluation) -> str:
    pictures = []
    for title, picture in (
        ("Recognised, by class", classes_picture(evaluation)),
        ("Asked for and recognised", confusion_picture(evaluation)),
    ):
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
        about = f"{steps:,} steps" + (f", {duration(spent)}" if spent else "")
        state = "" if run.status == "FINISHED" else f'<span class="chip wrong">{escape(run.status.lower())}</span>'
        chart = plots.curves(panels).svg(f"Curves of {name}: {', '.join(panels)}")
        blocks.append(f"<figure class=chart><figcaption><b>{escape(name)}</b> <small>{about}</small> {state}</figcaption>{chart}</figure>")
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
        f"<tr><th scope=row>{escape(s['step'])}</th>"
        f"<td class=bar>{duration(s['seconds'])}<b style='width:{100 * s['seconds'] / longest:.1f}%'></b></td>"
        f"<td class=bar>{memory(s['peak_memory_mb'])}<b style='width:{100 * s['peak_memory_mb'] / largest:.1f}%'></b></td>"
        f"<td class=note>{escape(s.get('note', ''))}</td></tr>"
        for s in steps
    )
    total = (
        f"<tr class=total><th scope=row>together</th><td>{duration(sum(s['seconds'] for s in steps))}</td>"
        f"<td>{memory(max(s['peak_memory_mb'] for s in steps))}</td><td></td></tr>"
    )
    head = "<th scope=col>Time</th><th scope=col>Peak memory</th><th scope=col>Outcome</th>"
    return f"<div class=scroll><table class=cost><thead><tr><td></td>{head}</tr></thead><tbody>{rows}{total}</tbody></table></div>"


def _recordings(store: FeatureStore | None) -> str:
    if store is None:
        return ""
    clips = store.clips(["corpus", "split", "seconds", "texts"])
    rows = []
    for corpus, group in clips.groupby("corpus"):
        counts = group["split"].value_counts()
        cells = "".join(f"<td>{int(counts.get(split, 0)):,}</td>" for split in ("train", "validation", "test"))
        words = int((group["texts"] & 1).sum())  # the bit of captions
        rows.append(f"<tr><th scope=row>{escape(corpus)}</th>{cells}<td>{duration(group['seconds'].sum())}</td><td>{words:,}</td></tr>")
    left_out = store.rejected()
    reasons = left_out["reason"].value_counts().head(5)
    said = "; ".join(f"{count} × {escape(reason)}" for reason, count in reasons.items())
    after = f"<p>Left out at ingest: {said}.</p>" if said else "<p>No recording had to be left out.</p>"
    head = "".join(f"<th scope=col>{name}</th>" for name in ("train", "validation", "test", "length", "with captions"))
    return f"<div class=scroll><table class=data><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{after}"


def _provenance(project: Project) -> str:
    evaluation = project.evaluation
    blocks: list[tuple[str, dict[str, Any]]] = [("Stages", {name: _stage_line(card) for name, card in project.stages.items()})]
    if evaluation is not None:
        blocks.append(("Evaluation protocol", evaluation.protocol))
    if project.bundle:
        blocks.append(("Bundle", {k: v for k, v in project.bundle.items() if k not in ("audio", "provenance")}))
    if project.store is not None:
        blocks.append(("Feature store", {"root": project.store.root, **{f"series {k}": v for k, v in project.store.recipes().items()}}))
    blocks.append(("Machine", _machine()))
    lists = "".join(f"<h3>{title}</h3>{definitions(values)}" for title, values in blocks if values)
    config = next((card["config"] for card in project.stages.values() if "config" in card), None)
    shown = {"Configuration": config, "Where the bundle's weights come from": project.bundle.get("provenance")}
    folded = "".join(
        f"<details><summary>{title}</summary><pre>{escape(pretty(value))}</pre></details>" for title, value in shown.items() if value
    )
    return lists + folded


def _stage_line(card: dict[str, Any]) -> str:
    parts = [f"{card['steps']:,} steps" if "steps" in card else "", duration(card["seconds"]) if "seconds" in card else ""]
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
    folder = os.path.relpath(project.work.path) if project.work.local else str(project.work)
    own = project.uri == f"sqlite:///{project.work / 'mlflow.db'}"
    store = f"sqlite:///{folder}/mlflow.db" if own else project.uri
    prompt = next((row["text"] for row in project.evaluation.clips), "rain on a tin roof") if project.evaluation else "rain on a tin roof"
    lines = [
        ("Make a sound", f"loa generate {json.dumps(prompt, ensure_ascii=False)} --bundle {folder}/bundle -o sound.wav"),
        ("Serve it, with a page to try it", f"loa serve --bundle {folder}/bundle"),
        ("Every run, curve and sound", f"mlflow ui --backend-store-uri {store}"),
        ("Score it again, on more captions", f"loa evaluate --work {folder} --num-clips 500"),
    ]
    return "".join(f"<div class=command><p>{title}</p><pre><code>{escape(line)}</code></pre></div>" for title, line in lines)
