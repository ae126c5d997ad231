"""The feature store: one clip table, and for every feature a *series* of tar shards beside it.

    store.json              format, audio settings, how clips were dealt to shards, and the recipe of every series
    clips.parquet           one row per clip in shard order; row group i is shard i
    rejected.parquet        what ingest could not take, and why
    mel/000000.tar          WebDataset members `<clip_id>.mel.npy`, in the order of the clip table
    mel/000000.json         the ledger row: size, sha256, clips, rejections, where each member lies

Every series has the same shard numbers and the same clip order, so series zip together, a new feature never
rewrites an old one, and any WebDataset reader can read a single series. A shard exists when its ledger row does:
the row is written last, so whatever was interrupted before that is done again. Bytes depend on the
clips alone; those of encoders also on how sums are rounded, that is on the device and the threads of a worker.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipelines.features import DEFAULT_SHARD_SIZE
from pipelines.features.reader import StoreReader
from pipelines.features.shards import LedgerRow, Member, Rejection, ShardWriter, completing_command
from stages.audio import AudioConfig
from stages.config import differences
from stages.errors import UserError

STORE_FORMAT = 1

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),  # unique, without dots and slashes: it names tar members
        ("corpus", pa.string()),
        ("path", pa.string()),  # the recording: an absolute path or a URL
        ("start", pa.float64()),  # seconds
        ("seconds", pa.float64()),
        ("captions", pa.list_(pa.string())),
        ("transcript", pa.string()),  # "" when there is none
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),  # train, validation or test
        ("licence", pa.string()),
    ]
)
REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("corpus", "path", "clip_id", "reason")])

_FORBIDDEN_IN_IDS = frozenset("./\\ \t\n")


class StoreWarning(UserWarning):
    """A shard that exists but cannot be trusted; the next run of its pass makes it again."""


class NoStoreError(UserError):
    """There is no feature store at that place."""


class FeatureStore:
    """A feature store on a local folder or any fsspec URL. Pickles into workers; holds no open files."""

    def __init__(self, fs: fsspec.AbstractFileSystem, folder: str, card: dict[str, Any]) -> None:
        self.fs, self._folder, self._card = fs, folder, card

    @classmethod
    def open(cls, root: str | Path) -> FeatureStore:
        """The store at `root`. Raises UserError when there is none, or one of another format."""
        fs, path = fsspec.core.url_to_fs(str(root))
        try:
            card = json.loads(fs.cat_file(posixpath.join(path, "store.json")))
        except FileNotFoundError:
            raise NoStoreError(f"{root} contains no feature store (no store.json); make one with `loa ingest`") from None
        except ValueError as error:
            raise UserError(f"{root}/store.json is damaged ({error}); make the store again with `loa ingest`") from None
        if card.get("format") != STORE_FORMAT:
            raise UserError(f"{root} has store format {card.get('format')}, this version of loa reads {STORE_FORMAT}")
        return cls(fs, path, card)

    @classmethod
    def create(
        cls,
        root: str | Path,
        audio: AudioConfig,
        clips: pa.Table,
        rejected: pa.Table,
        seed: int = 0,
        shard_size: int = DEFAULT_SHARD_SIZE,
    ) -> FeatureStore:
        """Deal the clips to shards by a seeded shuffle and write the clip table.

        The shuffle starts from the sorted ids, so it depends on the set of clips and the seed alone. Asking again for
        the same store returns it with its series; asking for another one in its place is refused.

        Args:
            clips: one row per clip, the columns of CLIP_SCHEMA.
            rejected: what was left out, the columns of REJECTED_SCHEMA.
        """
        table = _deal(_conform(clips, CLIP_SCHEMA), seed, shard_size)
        fs, path = fsspec.core.url_to_fs(str(root))
        card = {
            "format": STORE_FORMAT,
            "audio": audio.to_dict(),
            "seed": seed,
            "shard_size": shard_size,
            "num_clips": table.num_rows,
            "clips_sha256": _table_digest(table),
            "series": {},
        }
        store = cls(fs, path, card)
        if fs.exists(store.path("store.json")):
            there = cls.open(root)
            changes = differences({**there._card, "series": {}}, card)
            if changes:
                raise UserError(
                    f"{root} is already a feature store of other clips or settings ({changes}); choose another folder or delete it"
                )
            store = there
        fs.makedirs(path, exist_ok=True)
        for name, content in (("rejected.parquet", _conform(rejected, REJECTED_SCHEMA)), ("clips.parquet", table)):
            buffer = io.BytesIO()
            pq.write_table(content, buffer, row_group_size=shard_size, compression="zstd", write_statistics=False)
            store.write(buffer.getvalue(), name)
        if store._card is card:
            store._write_card(card)
        return store

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
        return int(self._card["num_clips"])

    @property
    def shard_size(self) -> int:
        """Clips of every shard but the last."""
        return int(self._card["shard_size"])

    @property
    def num_shards(self) -> int:
        """Shards of every complete series."""
        return -(-self.num_clips // self.shard_size)

    @property
    def root(self) -> str:
        """Where the store lies, a path or URL as `open` takes it."""
        return self._folder if self._local else str(self.fs.unstrip_protocol(self._folder))

    def recipes(self) -> dict[str, dict[str, Any]]:
        """How every series begun so far is made, read afresh."""
        series: dict[str, dict[str, Any]] = self._read_card()["series"]
        return series

    def clips(self) -> pd.DataFrame:
        """The clip table in shard order."""
        return pq.read_table(io.BytesIO(self._read("clips.parquet"))).to_pandas()

    def rejected(self) -> pd.DataFrame:
        """What ingest left out."""
        return pq.read_table(io.BytesIO(self._read("rejected.parquet"))).to_pandas()

    def shard_rows(self, shard: int) -> list[dict[str, Any]]:
        """The clips of one shard as dicts, in order."""
        with self.fs.open(self.path("clips.parquet"), "rb") as stream:
            rows: list[dict[str, Any]] = pq.ParquetFile(stream).read_row_group(shard).to_pylist()
        return rows

    def shard_count(self, shard: int) -> int:
        """How many clips the table deals to a shard."""
        return min(self.shard_size, self.num_clips - shard * self.shard_size)

    # --------------------------------------------------------------------------------------------------------- series

    def begin_series(self, series: str, recipe: Mapping[str, Any]) -> None:
        """Announce how a series is made, before its first shard or before continuing it.

        Everything in `recipe` identifies the data, except what stands under "provenance": that is kept from the
        first run and not compared. Drafts left by a killed run are removed.

        Raises:
            UserError: the series has shards of another recipe; the message shows both values.
        """
        recipe = json.loads(json.dumps(recipe))
        with self._locked():
            card = self._read_card()
            known = card["series"].get(series)
            changes = differences(_identity(known), _identity(recipe)) if known is not None else ""
            if changes and any(name.endswith(".json") for name in self._listing(series)):
                raise UserError(
                    f"the series {series!r} of {self.root} was made with other settings ({changes}); "
                    f"use another store, or delete {self.path(series)} to recompute the series"
                )
            if known is None or changes:
                card["series"][series] = recipe
                self._write_card(card)
        for name in self._listing(series):
            if ".tar.draft-" in name:
                self.fs.rm_file(self.path(series, name))

    def shard_writer(self, series: str, shard: int) -> ShardWriter:
        """A context that writes one shard, for passes that fill several series at once."""
        return ShardWriter(self, series, shard)

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

    def ledger(self, series: str) -> dict[int, LedgerRow]:
        """The shards that exist, by number. A shard whose size is not the ledger's counts as missing, with a warning."""
        sizes, rows = self._listing(series), {}
        for name in sorted(name for name in sizes if name.endswith(".json")):
            try:
                row = LedgerRow.from_json(self._read(series, name))
            except ValueError as error:
                _warn(f"{self.path(series, name)} is damaged ({error})", series)
                continue
            tar = f"{row.shard:06d}.tar"
            if sizes.get(tar) != row.num_bytes:
                there = "is missing" if tar not in sizes else f"has {sizes[tar]} bytes where its ledger says {row.num_bytes}"
                _warn(f"{self.path(series, tar)} {there}", series)
                continue
            rows[row.shard] = row
        return rows

    def missing_shards(self, series: str) -> list[int]:
        """Shards that a pass still has to make."""
        there = self.ledger(series)
        return [shard for shard in range(self.num_shards) if shard not in there]

    def verify(self, series: str) -> list[int]:
        """Read every shard and compare checksums; corrupt shards lose their ledger row, so that they are redone.

        Returns the numbers of the corrupt shards, those of a wrong size included.
        """
        there, corrupt = self.ledger(series), []
        for name in self._listing(series):
            if not name.endswith(".json"):
                continue
            shard = int(name.removesuffix(".json"))
            row = there.get(shard)
            damage = self.damage(series, row) if row is not None else ""
            if row is not None and not damage:
                continue
            if damage:
                _warn(f"{self.path(series, f'{shard:06d}.tar')} is {damage}", series)
            self.fs.rm_file(self.path(series, name))
            corrupt.append(shard)
        return sorted(corrupt)

    def damage(self, series: str, row: LedgerRow) -> str:
        """What is wrong with the bytes of a shard, in words that follow "is"; "" for nothing. Reads all of it, changes nothing."""
        return "" if self._checksum(series, f"{row.shard:06d}.tar") == row.sha256 else "corrupt: its sha256 is not the ledger's"

    def reader(self, series: Sequence[str], shards: Iterable[int] | None = None) -> StoreReader:
        """Random access to the clips that all of `series` hold.

        Args:
            series: names of series; together they must not name a member twice.
            shards: only these shards; by default all.

        Raises:
            UserError: a series is incomplete (the message says which command completes it).
        """
        wanted = range(self.num_shards) if shards is None else sorted(shards)
        ledgers = {}
        for name in series:
            rows = self._rows(name, wanted) if shards is not None else self.ledger(name)
            missing = [shard for shard in wanted if shard not in rows]
            if missing:
                raise UserError(
                    f"the series {name!r} of {self.root} is incomplete: {len(wanted) - len(missing)} of {len(wanted)} shards exist; "
                    f"complete it with `{completing_command(name)}`"
                )
            ledgers[name] = [rows[shard] for shard in wanted]
        return StoreReader(self, ledgers)

    def _rows(self, series: str, shards: Iterable[int]) -> dict[int, LedgerRow]:
        rows = {}
        for shard in shards:
            try:
                rows[shard] = LedgerRow.from_json(self._read(series, f"{shard:06d}.json"))
            except FileNotFoundError:
                pass
            except ValueError as error:
                _warn(f"{self.path(series, f'{shard:06d}.json')} is damaged ({error})", series)
        return rows

    # ---------------------------------------------------------------------------------------------------------- files

    @property
    def _local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Path of something in the store, as its filesystem wants it."""
        return posixpath.join(self._folder, *parts)

    def write(self, data: bytes, *parts: str) -> None:
        """Write a small file whole or not at all."""
        final = self.path(*parts)
        if not self._local:  # an object store shows an object when all of it has arrived
            self.fs.pipe_file(final, data)
            return
        draft = f"{final}.draft-{uuid.uuid4().hex}"
        self.fs.pipe_file(draft, data)
        self.rename(draft, final)

    def rename(self, draft: str, final: str) -> None:
        """Put a finished draft in its place."""
        if self._local:
            os.replace(draft, final)
        else:
            self.fs.mv(draft, final)

    def _read(self, *parts: str) -> bytes:
        data: bytes = self.fs.cat_file(self.path(*parts))
        return data

    def _listing(self, series: str) -> dict[str, int]:
        """Files of a series with their sizes, as they are now."""
        folder = self.path(series)
        self.fs.invalidate_cache(folder)
        try:
            entries = self.fs.ls(folder, detail=True)
        except FileNotFoundError:
            return {}
        return {posixpath.basename(entry["name"]): entry["size"] for entry in entries if entry["type"] == "file"}

    def _checksum(self, *parts: str) -> str:
        digest = hashlib.sha256()
        with self.fs.open(self.path(*parts), "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _read_card(self) -> dict[str, Any]:
        card: dict[str, Any] = json.loads(self._read("store.json"))
        return card

    def _write_card(self, card: dict[str, Any]) -> None:
        self.write((json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode(), "store.json")
        self._card = card

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps passes that start at the same moment from overwriting each other's line in a local store.json."""
        if not self._local:
            yield
            return
        import fcntl

        with open(self.path(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _warn(what: str, series: str) -> None:
    warnings.warn(f"{what}; it counts as missing, `{completing_command(series)}` makes it again", StoreWarning, stacklevel=3)


def _identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "provenance"}


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ValueError(f"the table lacks the columns {', '.join(missing)}")
    return table.select(schema.names).cast(schema)


def _deal(clips: pa.Table, seed: int, shard_size: int) -> pa.Table:
    """The clip table in shard order, with the columns `shard` and `position`."""
    ids = clips["clip_id"].to_pylist()
    if not ids:
        raise UserError("there are no clips to store: every recording was rejected, or none was found")
    if shard_size < 1:
        raise UserError(f"shard_size is {shard_size}; expected at least 1")
    if len(set(ids)) != len(ids):
        raise ValueError("clip ids are not unique")
    for clip_id in ids:
        if not clip_id or not _FORBIDDEN_IN_IDS.isdisjoint(clip_id):
            raise ValueError(f"{clip_id!r} is no clip id: it names tar members, so no dots, slashes or blanks")
    by_name = np.array(sorted(range(len(ids)), key=ids.__getitem__))
    order = by_name[np.random.default_rng(seed).permutation(len(ids))]
    position = np.arange(len(ids), dtype=np.int32)
    return (
        clips.take(pa.array(order))
        .append_column("shard", pa.array(position // shard_size))
        .append_column("position", pa.array(position % shard_size))
        .combine_chunks()
    )


def _table_digest(table: pa.Table) -> str:
    """sha256 over the values of a table."""
    digest = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=4096):
        digest.update(json.dumps(batch.to_pylist()).encode())
    return digest.hexdigest()
