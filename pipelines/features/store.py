"""The feature store: one clip table, and for every feature a *series* of tar shards beside it.

    store.json              format, audio settings, seed and size of the shards; never written again
    parts/000000.json       what one ingest added: which clips and shards, in which files, and its report
    clips/, rejected/, withdrawn/   the files that parts name, by content (`pipelines.features.table`)
    mel/series.json         the recipe of a series
    mel/…                   its shards, its journal and its index (`pipelines.features.ledger`)
    jobs/, mel/claims/      who works here, and at which shards (`pipelines.features.jobs`)

Every series has the same shard numbers and the same clip order, so series zip together, a new feature never
rewrites an old one, and any WebDataset reader can read a single series. A shard exists when its ledger row does:
the row is written last, so whatever was interrupted before that is done again. Bytes depend on the
clips alone; those of encoders also on how sums are rounded, that is on the device and the threads of a worker.

Nothing is locked: what several jobs could write at once is made by conditional writes, of which one wins.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.features import DEFAULT_SHARD_SIZE, jobs
from pipelines.features.jobs import NOBODY
from pipelines.features.ledger import JOURNAL, Ledger, LedgerRow, Rejection, StoreWarning, compact, journal_names, warn
from pipelines.features.reader import StoreReader
from pipelines.features.shards import Member, ShardWriter, completing_command
from pipelines.features.table import CLIP_SCHEMA, REJECTED_SCHEMA, WITHHELD, ClipTable, Part, conform, same_parts, write_part
from pipelines.leases import lease
from stages.audio import AudioConfig
from stages.config import differences
from stages.errors import UserError
from stages.files import Place

__all__ = ["CLIP_SCHEMA", "REJECTED_SCHEMA", "FeatureStore", "NoStoreError", "StoreWarning"]

STORE_FORMAT = 2
PARTS, RECIPE = "parts", "series.json"


class NoStoreError(UserError):
    """There is no feature store at that place."""


class FeatureStore:
    """A feature store on a local disk or at any URL. A snapshot: what later ingests add is seen when it is opened again.

    Pickles into workers; holds no open files.
    """

    def __init__(self, place: Place, card: Mapping[str, Any], parts: Sequence[Part], job: str = NOBODY) -> None:
        self.place, self._card, self.job = place, dict(card), job
        self.table = ClipTable(place, parts, int(card["shard_size"]))

    @classmethod
    def open(cls, root: str | Path | Place) -> FeatureStore:
        """The store at `root`. Raises UserError when there is none, or one of another format."""
        place = Place.of(root)
        try:
            card = json.loads((place / "store.json").read())
        except FileNotFoundError:
            raise NoStoreError(f"{place} contains no feature store (no store.json); make one with `loa ingest`") from None
        except ValueError as error:
            raise UserError(f"{place}/store.json is damaged ({error}); make the store again with `loa ingest`") from None
        if card.get("format") != STORE_FORMAT:
            raise UserError(
                f"{place} has store format {card.get('format')}, this version of loa reads {STORE_FORMAT}; "
                "ingest the recordings again into another folder"
            )
        parts = _parts(place)
        if not parts:
            raise NoStoreError(f"{place} contains no clips yet: its ingest was interrupted; run `loa ingest` again")
        return cls(place, card, parts)

    @classmethod
    def find(cls, root: str | Path | Place, audio: AudioConfig, seed: int = 0, shard_size: int = DEFAULT_SHARD_SIZE) -> FeatureStore | None:
        """The store at `root`, None where there is none. Raises UserError when it has other settings, and names them."""
        try:
            store = cls.open(root)
        except NoStoreError:
            return None
        if changes := differences(store._card, _card(audio, seed, shard_size)):
            raise UserError(
                f"{root} is already a feature store with other settings ({changes}). Choose another folder with --work, "
                f"or delete {root} to make it and all its features again"
            )
        return store

    @classmethod
    def create(
        cls,
        root: str | Path | Place,
        audio: AudioConfig,
        clips: pa.Table,
        rejected: pa.Table,
        seed: int = 0,
        shard_size: int = DEFAULT_SHARD_SIZE,
        report: Mapping[str, Any] | None = None,
    ) -> FeatureStore:
        """Make a store of these clips, or add those that are new to the one that is there.

        Clips are dealt to shards by a seeded shuffle that starts from their sorted ids. What is in the store keeps its
        place, its row and its shards; new clips get shards of their own. Where nothing is new, nothing is written.

        Args:
            clips: one row per clip, the columns of CLIP_SCHEMA.
            rejected: what was left out, the columns of REJECTED_SCHEMA.
            report: kept with the part, for people.

        Raises:
            UserError: the store has other settings, or somebody else added clips at the same moment.
        """
        if shard_size < 1:
            raise UserError(f"shard_size is {shard_size}; expected at least 1")
        clips, rejected = conform(clips, CLIP_SCHEMA), conform(rejected, REJECTED_SCHEMA)
        if not clips.num_rows:
            raise UserError("there are no clips to store: every recording was rejected, or none was found")
        store = cls.find(root, audio, seed, shard_size)
        if store is None:
            card = _card(audio, seed, shard_size)
            (Place.of(root) / "store.json").write_json(card)
            store = cls(Place.of(root), card, [])
        known = list(store.table.numbers(clips["clip_id"])) if len(store.table) else []
        if known:
            clips = clips.filter(pc.invert(pc.is_in(clips["clip_id"], value_set=pa.array(known, pa.string()))))
        if not clips.num_rows:
            return store
        _add(store.place, write_part(store.place, store.table, clips, rejected, seed, dict(report or {})))
        return cls.open(root)

    # ------------------------------------------------------------------------------------------------- what it holds

    @property
    def audio(self) -> AudioConfig:
        """The audio settings of every clip."""
        return AudioConfig.from_dict(self._card["audio"])

    def require_audio(self, audio: AudioConfig, who: str) -> None:
        """Refuse `who`, a variant or a job that has the settings `audio`, when the clips were ingested with others.

        Raises UserError naming the settings that differ, with both values.
        """
        if changes := differences(self.audio, audio):
            raise UserError(
                f"the store {self.root} was ingested with other audio settings than {who} has ({changes}); name the variant it was "
                "ingested for (and --tiny, if it was), or ingest again into another folder"
            )

    @property
    def seed(self) -> int:
        """Seed of the shuffle that dealt clips to shards."""
        return int(self._card["seed"])

    @property
    def num_clips(self) -> int:
        """Clips of the table."""
        return len(self.table)

    @property
    def shard_size(self) -> int:
        """Clips of every shard but the last of each part."""
        return self.table.shard_size

    @property
    def num_shards(self) -> int:
        """Shards of every complete series."""
        return self.table.num_shards

    @property
    def root(self) -> str:
        """Where the store lies, a path or URL as `open` takes it."""
        return str(self.place)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What every ingest added, the first first."""
        return self.table.parts

    @property
    def digest(self) -> str:
        """Names the clips of the store and what is withheld from training, by content."""
        return same_parts(self.parts)

    def recipes(self) -> dict[str, dict[str, Any]]:
        """How every series begun so far is made, read afresh."""
        found = {}
        for name in self.place.folders():
            try:
                found[name] = json.loads((self.place / name / RECIPE).read())
            except FileNotFoundError:
                continue
        return found

    def clips(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The clip table in shard order, or some columns of it, with the splits that hold now. It is copied: for small stores."""
        table = self.table.table().select(list(columns or self.table.table().column_names))
        for name in {"corpus", "split", "licence"} & set(table.column_names):
            table = table.set_column(table.column_names.index(name), name, pc.cast(table[name], pa.string()))
        frame = table.to_pandas()
        if "split" in frame:
            frame.loc[self.table.withdrawn, "split"] = WITHHELD
        return frame

    def rejected(self) -> pd.DataFrame:
        """What the ingests left out."""
        return pd.concat([pd.read_parquet(io.BytesIO((self.place / part.rejected).read())) for part in self.parts], ignore_index=True)

    def shard_rows(self, shard: int) -> list[dict[str, Any]]:
        """The clips of one shard as dicts, in order, with their `number`."""
        first, end = self.table.shard_starts[shard : shard + 2].tolist()
        return self.table.rows(first, end)

    def shard_count(self, shard: int) -> int:
        """How many clips the table deals to a shard."""
        first, end = self.table.shard_starts[shard : shard + 2].tolist()
        return int(end - first)

    # --------------------------------------------------------------------------------------------------------- series

    def series_folder(self, series: str) -> Place:
        """Where a series lies. Raises UserError for a name that is no series'."""
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", series):
            raise UserError(f"{series!r} is no name of a series; expected letters, digits and dashes, such as loa-8")
        return self.place / series

    def begin_series(self, series: str, recipe: Mapping[str, Any]) -> None:
        """Announce how a series is made, before its first shard or before continuing it.

        Everything in `recipe` identifies the data, except what stands under "provenance": that is kept from the
        first run and not compared. What jobs that are gone left behind is removed, and the journal is compacted.

        Raises:
            UserError: the series has shards of another recipe, or a living job may be making some; the message shows both values.
        """
        folder = self.series_folder(series)
        data = (json.dumps(recipe, indent=2, ensure_ascii=False) + "\n").encode()
        if not (folder / RECIPE).create(data):
            known = json.loads((folder / RECIPE).read())
            changes = differences(recipe_identity(known), recipe_identity(json.loads(data)))
            begun = any(name.endswith(".tar") for name in folder.list()) or jobs.living(self.place) - {self.job}
            if changes and begun:
                raise UserError(
                    f"the series {series!r} of {self.root} was made with other settings ({changes}); "
                    f"use another store, or delete {folder} to recompute the series"
                )
            if changes:
                (folder / RECIPE).write(data)
        jobs.tidy(self.place, folder)
        compact(folder)

    @contextmanager
    def working(self, command: str = "") -> Iterator[FeatureStore]:
        """This store in the hands of a job: others leave its drafts and the shards that it claims alone as long as it lives."""
        job = uuid.uuid4().hex[:12]
        with lease(jobs.lease_of(self.place, job), f"the job {job}", command=command):
            yield FeatureStore(self.place, self._card, self.parts, job)

    @contextmanager
    def claim(self, series: Sequence[str], shard: int, remake: bool = False) -> Iterator[tuple[str, ...]]:
        """Claim a shard for this job during the block; yields those of `series` that it has to make.

        None where a living job is at it, or where the shard has been made since it was found missing (but for `remake`).
        """
        with jobs.claim(self.place, self.series_folder(series[0]), shard, self.job) as mine:
            yield tuple(name for name in series if remake or not self._has(name, shard)) if mine else ()

    def _has(self, series: str, shard: int) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoreWarning)  # told before, by `missing_shards`
            return shard in Ledger(self.series_folder(series), "", [shard])

    def discard(self, series: str, shards: Iterable[int]) -> None:
        """Let shards exist no longer, so that they are made again."""
        folder, listed = self.series_folder(series), Ledger(self.series_folder(series), "", check=False)
        gone = {shard: listed[shard].object for shard in shards if shard in listed}
        compact(folder, gone)
        for name in gone.values():
            (folder / name).remove()

    def shard_writer(self, series: str, shard: int, remake: bool = False) -> ShardWriter:
        """A context that writes one shard, for passes that fill several series at once; with `remake` in place of one that exists."""
        numbers = {row["clip_id"]: row["number"] for row in self.shard_rows(shard)}
        return ShardWriter(self.series_folder(series), shard, numbers, self.job, remake)

    def write_shard(
        self,
        series: str,
        shard: int,
        samples: Iterable[tuple[str, Mapping[str, Member]]],
        rejected: Iterable[Rejection] = (),
    ) -> LedgerRow:
        """Write one shard from (clip_id, members) pairs in the order of the clip table."""
        with self.shard_writer(series, shard) as writer:
            for clip_id, members in samples:
                writer.add(clip_id, members)
            for rejection in rejected:
                writer.reject(rejection.clip_id, rejection.reason)
        assert writer.row is not None
        return writer.row

    def ledger(self, series: str) -> Ledger:
        """The shards that exist, by number. A shard whose size is not the ledger's counts as missing, with a warning."""
        return Ledger(self.series_folder(series), completing_command(series))

    def missing_shards(self, series: str) -> list[int]:
        """Shards that a pass still has to make."""
        there = self.ledger(series)
        return [shard for shard in range(self.num_shards) if shard not in there]

    def compact(self, series: str) -> None:
        """Fold the ledger rows of a series into its index, which then opens at once."""
        compact(self.series_folder(series))

    def verify(self, series: str) -> list[int]:
        """Read every shard and compare checksums; corrupt shards lose their ledger row, so that they are redone.

        Returns the numbers of the corrupt shards, those of a wrong size included.
        """
        folder, repair = self.series_folder(series), completing_command(series)
        compact(folder)
        listed, there = Ledger(folder, repair, check=False), self.ledger(series)

        def corrupt(shard: int) -> bool:
            if shard not in there:
                return True  # of a wrong size, and told by the ledger
            row = there[shard]
            if damage := self.damage(series, row):
                warn(f"{folder / row.object} is {damage}", repair)
            return bool(damage)

        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as threads:
            lost = [shard for shard, bad in zip(listed, threads.map(corrupt, listed), strict=True) if bad]
        self.discard(series, lost)
        damaged = journal_names(folder)  # the compaction took all that can be read
        for name in damaged.values():
            (folder / JOURNAL / name).remove()
        return sorted({*lost, *damaged})

    def damage(self, series: str, row: LedgerRow) -> str:
        """What is wrong with the bytes of a shard, in words that follow "is"; "" for nothing. Reads all of it, changes nothing."""
        return "" if _checksum(self.series_folder(series) / row.object) == row.sha256 else "corrupt: its sha256 is not the ledger's"

    def reader(self, series: Sequence[str], shards: Iterable[int] | None = None) -> StoreReader:
        """Random access to the clips that all of `series` hold.

        Args:
            series: names of series; together they must not name a member twice.
            shards: only these shards; by default all.

        Raises:
            UserError: a series is incomplete (the message says which command completes it).
        """
        wanted = range(self.num_shards) if shards is None else sorted(shards)
        few = None if shards is None else list(wanted)
        ledgers = {name: Ledger(self.series_folder(name), completing_command(name), few) for name in series}
        for name, ledger in ledgers.items():
            there = sum(shard in ledger for shard in wanted)
            if there < len(wanted):
                raise UserError(
                    f"the series {name!r} of {self.root} is incomplete: {there} of {len(wanted)} shards exist; "
                    f"complete it with `{completing_command(name)}`"
                )
        return StoreReader(self.table, ledgers, wanted)


def _card(audio: AudioConfig, seed: int, shard_size: int) -> dict[str, Any]:
    return {"format": STORE_FORMAT, "audio": audio.to_dict(), "seed": seed, "shard_size": shard_size}


def _parts(place: Place) -> list[Part]:
    names = sorted(name for name in (place / PARTS).list() if re.fullmatch(r"\d{6}\.json", name))
    try:
        return [Part.from_json((place / PARTS / name).read()) for name in names]
    except ValueError as error:
        raise UserError(f"a file of {place / PARTS} is damaged ({error}); make the store again with `loa ingest`") from None


def _add(place: Place, part: Part) -> None:
    """Let a part exist whose files are written. Raises UserError when another one took its number first."""
    if not (place / PARTS / f"{part.number:06d}.json").create(part.to_json()):
        there = Part.from_json((place / PARTS / f"{part.number:06d}.json").read())
        if there.files != part.files:
            raise UserError(f"another ingest added clips to {place} meanwhile; run this one again")


def recipe_identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a series' recipe identifies its data: all but its "provenance"."""
    return {key: value for key, value in recipe.items() if key != "provenance"}


def _checksum(place: Place) -> str:
    digest = hashlib.sha256()
    with place.open() as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
