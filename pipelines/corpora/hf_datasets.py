"""A Hugging Face data set on disk: Arrow shards as `save_to_disk` writes them, or the Parquet files of the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corpora.fields import dealt, shards, split_of, words
from pipelines.corpora.files import MALFORMED, MISSING, inside, printable, safe_id
from pipelines.corpora.records import Record, Rejected
from stages.recordings import row_of, stretch_of

LAYOUT = "a Hugging Face data set (*.arrow or *.parquet with a column of sounds)"
CORPUS = "hf_datasets"
DAMAGED = "malformed shard"
SUFFIXES = (".arrow", ".parquet")

Sound = tuple[str, str, str]  # its address, else the name of its file, else why there is none


def detect(root: Path) -> bool:
    """Whether the folder holds Arrow or Parquet shards with a column of sounds; the first readable one decides."""
    for path in shards(root, *SUFFIXES):
        import pyarrow as pa  # only now: every folder is asked, and most have no shard

        try:
            return _sound_column(_schema(path)) is not None
        except (pa.ArrowException, OSError):
            continue
    return False


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """Every row with its sound, which stays where it is: bytes of an Arrow file, or a row of a Parquet file.

    Columns are named as in a folder's table; a number in a column of classes becomes the class's name. Splits are those of the
    shards' names or folders; where nothing is held out they are dealt by a hash of the row's place.
    """
    import pyarrow as pa

    root = Path(os.path.abspath(root))
    paths = shards(root, *SUFFIXES)
    splits = {split_of(path) for path in paths}
    for path in paths:
        try:
            schema = _schema(path)
            column = _sound_column(schema)
            if column is None:
                yield Rejected(CORPUS, printable(str(path)), "", f"{DAMAGED}: no column of sounds; there are {', '.join(schema.names)}")
                continue
            names = _class_names(schema)
            rows = _parquet_rows(path, schema, column) if path.suffix == ".parquet" else _arrow_rows(path, column)
            for number, (row, sound) in enumerate(rows):
                named = {name: _named(value, names.get(name, [])) for name, value in row.items()}
                yield _recording(root, path, number, named, sound, splits)
        except (pa.ArrowException, OSError) as error:
            yield Rejected(CORPUS, printable(str(path)), "", f"{DAMAGED}: {error}; what follows is not read")


def _recording(root: Path, path: Path, number: int, row: Mapping[str, Any], sound: Sound, splits: set[str]) -> Record:
    recording_id = safe_id(f"{root.name}_{path.relative_to(root).with_suffix('').as_posix()}_{number}")
    address, file, problem = sound
    if file:
        beside = inside(root, file) or ""
        address, problem = (beside, "") if os.path.isfile(beside) else ("", f"{MISSING}: {printable(file)} is not in the folder")
    said = words(row)
    if said.split is None:
        problem = f"{MALFORMED}: unknown split in row {number}"
    if problem:
        return Rejected(CORPUS, printable(str(path)), f"{CORPUS}-{recording_id}", problem)
    return said.record(CORPUS, recording_id, address, dealt(recording_id, split_of(path), splits))


# ------------------------------------------------------------------------------------------------------------ shards


def _schema(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        return pq.read_schema(path)
    with pa.memory_map(str(path)) as source:
        return _batches(source)[0]


def _batches(source: Any) -> tuple[Any, Iterator[Any]]:
    """(schema, record batches) of an Arrow file in either of its formats; `save_to_disk` writes streams."""
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
    return stream.schema, iter(stream)


def _parquet_rows(path: Path, schema: Any, column: str) -> Iterator[tuple[dict[str, Any], Sound]]:
    """The rows without their sounds, which are not read unless a row group has some and lacks some."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    nested = pa.types.is_struct(schema.field(column).type)
    named = nested and schema.field(column).type.get_field_index("path") >= 0
    wanted = [name for name in schema.names if name != column] + ([f"{column}.path"] if named else [])
    number = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            there = _values_there(file, group, column, nested)
            rows = file.read_row_group(group, columns=wanted).to_pylist() if wanted else [{} for _ in there]
            for row, present in zip(rows, there, strict=True):
                name = (row.pop(column, None) or {}).get("path") or ""
                yield row, (row_of(str(path), column, number), "", "") if present else ("", name, _NOTHING)
                number += 1


def _values_there(file: Any, group: int, column: str, nested: bool) -> list[bool]:
    """Which rows of a row group of a Parquet file have a sound; its statistics say it when all have or none has."""
    leaf = f"{column}.bytes" if nested else column
    facts = file.metadata.row_group(group)
    statistics = next((facts.column(i).statistics for i in range(facts.num_columns) if facts.column(i).path_in_schema == leaf), None)
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, facts.num_rows):
        return [statistics.null_count == 0] * facts.num_rows
    cells = file.read_row_group(group, columns=[leaf])[column].combine_chunks()
    there: list[bool] = (_field(cells, "bytes") if nested else cells).is_valid().to_pylist()
    return there


_NOTHING = f"{MISSING}: the row holds no sound"


def _arrow_rows(path: Path, column: str) -> Iterator[tuple[dict[str, Any], Sound]]:
    """The rows without their sounds, whose place in the file is that of Arrow's buffers in the mapped memory."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        size = source.size()
        base = source.read_buffer(size).address
        source.seek(0)
        for batch in _batches(source)[1]:
            batch.validate(full=True)  # Arrow trusts offsets, and a damaged one leads anywhere in memory
            cells = batch.column(column)
            nested = pa.types.is_struct(cells.type)
            values = _field(cells, "bytes") if nested else cells
            named = nested and cells.type.get_field_index("path") >= 0
            names = _field(cells, "path").to_pylist() if named else [None] * len(cells)
            others = batch.select([name for name in batch.schema.names if name != column]).to_pylist()
            for row, name, span in zip(others or [{}] * len(cells), names, _spans(values, base, size), strict=True):
                if span is None:
                    yield row, ("", name or "", _NOTHING)
                elif span == (0, 0):
                    yield row, ("", "", f"{DAMAGED}: its record batches are compressed; write them without, or as Parquet")
                else:
                    yield row, (stretch_of(str(path), *span), "", "")


def _field(structs: Any, name: str) -> Any:
    """A field of an Arrow array of structs, missing where the struct is."""
    return structs.flatten()[structs.type.get_field_index(name)]


def _spans(values: Any, base: int, size: int) -> list[tuple[int, int] | None]:
    """Offset in the file and length of every value of an Arrow array of binaries, None of a missing one, (0, 0) outside the file."""
    import pyarrow as pa

    wide = pa.types.is_large_binary(values.type) or pa.types.is_large_string(values.type)
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[values.offset : values.offset + len(values) + 1]
    first = data.address - base if data is not None else 0
    outside = not 0 < first <= size
    spans: list[tuple[int, int] | None] = []
    for start, end, valid in zip(ends[:-1].tolist(), ends[1:].tolist(), values.is_valid().to_pylist(), strict=True):
        span = (0, 0) if outside else (first + start, end - start)
        spans.append(span if valid else None)
    return spans


# ----------------------------------------------------------------------------------------------------------- columns


def _features(schema: Any) -> dict[str, Any]:
    """The features that `datasets` notes in a schema, by column; {} where it did not write it."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _sound_column(schema: Any) -> str | None:
    """The column of sounds: the feature Audio, else a struct that has bytes, as `datasets` stores it."""
    import pyarrow as pa

    features = _features(schema)
    for name in schema.names:
        kind = schema.field(name).type
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        feature = features.get(name)
        if (nested and not feature) or ((nested or binary) and isinstance(feature, dict) and feature.get("_type") == "Audio"):
            return str(name)
    return None


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes of every column of class numbers, also of lists of them."""
    names: dict[str, list[str]] = {}
    for column, feature in _features(schema).items():
        while isinstance(feature, list) and feature or isinstance(feature, dict) and "feature" in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        if isinstance(feature, dict) and isinstance(feature.get("names"), list):
            names[column] = [str(name) for name in feature["names"]]
    return names


def _named(value: Any, names: list[str]) -> Any:
    """A class number, or a list of them, by name; anything else as it is."""
    if isinstance(value, list):
        return [_named(entry, names) for entry in value]
    if not names or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
