"""Results as JSON and CSV, and results of several runs joined into one table.

Every row has the key of its protocol.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v2flow_cli.bench.evaluate import Row
from v2flow_cli.bench.metrics import METRICS, Estimate, Metric
from v2flow_cli.bench.protocol import NETWORKS, NOT_IN_KEY
from v2flow_cli.bench.published import PUBLISHED, SOURCE
from v2flow_cli.bench.run import Bench
from v2flow_cli.errors import DataError

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one protocol, as records."""

    protocol: Record
    rows: tuple[Record, ...]

    @property
    def size(self) -> int:
        return self.protocol["image_size"]


def tables(benches: Sequence[Bench]) -> list[Table]:
    """One table for each bench."""
    return [
        Table(bench.result.protocol.record(), tuple(_row(row, bench) for row in bench.result.rows)) for bench in benches
    ]


def as_record(tables: Sequence[Table], notes: Sequence[str] = ()) -> Record:
    """Tables as one object with stable, unit-bearing keys; ``measured`` lists the rows of all of them."""
    return {
        "protocols": [table.protocol for table in tables],
        "measured": [row for table in tables for row in table.rows],
        "published": {
            "source": SOURCE,
            "rows": [
                {"image_size_px": table.size, **dataclasses.asdict(row)}
                for table in tables
                for row in PUBLISHED.get(table.size, ())
            ],
        },
        "notes": list(dict.fromkeys(notes)),
    }


def _row(row: Row, bench: Bench) -> Record:
    protocol = bench.result.protocol
    figures: Record = {}
    for metric in METRICS:
        value = row.values[metric.key]
        if metric.of_images:  # NaN: not measured; infinity: the PSNR of equal pictures
            mean, ci95 = (value.mean, value.ci95) if isinstance(value, Estimate) else (math.nan, math.nan)
            figures[metric.key] = mean if math.isfinite(mean) else None
            figures[f"{metric.key}_ci95"] = ci95 if math.isfinite(ci95) else None
        else:
            figures[metric.key] = value
    return {
        "protocol": protocol.key,
        "image_size_px": protocol.image_size,
        "system": row.system,
        "kind": row.kind,
        "family": row.family,
        "settings": dict(row.settings),
        "weights_digest": row.weights_digest,
        **figures,
        "codebook": row.codebook and dataclasses.asdict(row.codebook),
        "speed": row.speed and dataclasses.asdict(row.speed),
    }


def shown(metric: Metric, row: Record) -> str:
    """The text of a metric in a row of a table."""
    value, ci95 = row.get(metric.key), row.get(f"{metric.key}_ci95")
    return metric.show(value, ci95)


def columns(table: Table) -> list[Metric]:
    """The metrics of a table: those that a row has, and those whose absence a note explains."""
    return [
        metric
        for metric in METRICS
        if metric.heading and (metric.always or any(row.get(metric.key) is not None for row in table.rows))
    ]


def codes_text(row: Record) -> str:
    """The codes that a tokenizer's row used, and their bits."""
    codebook = row["codebook"]
    return (
        f"{codebook['distinct']:,} of {codebook['codebook_size']:,} codes used ({codebook['usage']:.1%}) by "
        f"{codebook['tokens']:,} tokens; perplexity {codebook['perplexity']:,.0f}; {codebook['entropy_bits']:.2f} bits "
        f"a token by their entropy, {codebook['adaptive_bits']:.2f} by an adaptive code"
    )


def speed_text(row: Record) -> str:
    """The speed of a row, its conditions, and the memory."""
    speed = row["speed"]
    return (
        f"speed: encode {speed['encode_images_per_s']:.2f}, decode {speed['decode_images_per_s']:.2f} images/s "
        f"(batch {speed['batch_size']}, {speed['dtype']}, {speed['device']}, threads {speed['threads']}; median of "
        f"{speed['repeats']}); peak memory {speed['peak_memory_bytes'] / 2**30:.2f} GiB {speed['peak_memory_kind']}"
    )


def help_text(seconds: Mapping[str, float]) -> str:
    """The seconds of ``v2flow --help``, and of the slowest command."""
    slowest = max(seconds, key=lambda command: seconds[command])
    return f"{seconds['']:.2f} s; the slowest command, {slowest or 'v2flow'}: {seconds[slowest]:.2f} s"


def length_curves(table: Table) -> dict[str, list[Record]]:
    """The rows of each family with several lengths, shortest first, by the family's name.

    A family with two rows at one length, as after two sweeps, has no curve.
    """
    curves: dict[str, list[Record]] = {}
    for row in table.rows:
        if row["tokens_per_image"]:
            curves.setdefault(row["family"], []).append(row)
    return {
        family: sorted(rows, key=lambda row: row["tokens_per_image"])
        for family, rows in curves.items()
        if len({row["tokens_per_image"] for row in rows}) == len(rows) > 1
    }


def as_csv(tables: Sequence[Table]) -> str:
    """One line per system, under a heading; an empty field was not measured."""
    rows = [_flat(row) for table in tables for row in table.rows]
    return _csv(list(rows[0]), [list(row.values()) for row in rows])


def _flat(row: Record) -> Record:
    """A row without nested values."""
    codebook = row["codebook"] or {}
    flat = {key: value for key, value in row.items() if key not in ("codebook", "speed")}
    names = {"codebook_size": "codebook_size", "codebook_usage": "usage", "perplexity": "perplexity"}
    return {
        **flat,
        "settings": json.dumps(row["settings"]),
        **{name: codebook.get(key) for name, key in names.items()},
    }


def images_csv(benches: Sequence[Bench]) -> str:
    """One line per image and system, under a heading; an empty field was not measured."""
    keys = [metric.key for metric in METRICS if metric.of_images]
    return _csv(
        ["protocol", "image_size_px", "image", "system", "bytes", *keys],
        [
            [
                bench.result.protocol.key,
                bench.result.protocol.image_size,
                figures.image,
                figures.system,
                figures.bytes,
                *(figures.values[key] for key in keys),
            ]
            for bench in benches
            for figures in bench.result.images
        ],
    )


def _csv(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in line] for line in lines)
    return text.getvalue()


def join(files: Sequence[Path]) -> tuple[list[Table], list[str]]:
    """The tables of ``bench --json`` results in ``files``, and notes; one table per image size.

    Raises:  DataError for a file that is no such result, and for results whose protocols differ.
    """
    joined: dict[int, Table] = {}
    origin: dict[int, Path] = {}
    notes: list[str] = []
    for file in files:
        for table in _read(file):
            size = table.size
            if size not in joined:
                joined[size], origin[size] = table, file
                continue
            notes += _compare(joined[size].protocol, origin[size], table.protocol, file)
            systems = {row["system"] for row in joined[size].rows}
            rows = [
                {**row, "system": f"{row['system']} ({file.stem})"} if row["system"] in systems else row
                for row in table.rows
                if row not in joined[size].rows  # equal rows of a codec are one row
            ]
            protocol = {**joined[size].protocol}
            protocol |= {key: protocol.get(key) or table.protocol.get(key) for key in NETWORKS}
            joined[size] = Table(protocol, (*joined[size].rows, *rows))
    return list(joined.values()), list(dict.fromkeys(notes))


def _read(file: Path) -> list[Table]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        protocols, rows = record["protocols"], record["measured"]
        tables = [Table(p, tuple(row for row in rows if row["protocol"] == p["key"])) for p in protocols]
        if sum(len(table.rows) for table in tables) == len(rows) and all(table.size for table in tables):
            return tables
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        pass  # the error below
    raise DataError(f"{file}: not a result of `v2flow bench --json`. Print one with `v2flow bench ... --json > FILE`.")


def _compare(first: Record, first_file: Path, other: Record, file: Path) -> list[str]:
    """Notes on differences that are allowed.  Raises: DataError for others."""
    must = [key for key in {*first, *other} - {"key", *NOT_IN_KEY} if first.get(key) != other.get(key)]
    must += [key for key in NETWORKS if first.get(key) and other.get(key) and first[key] != other[key]]
    if must:
        differences = "; ".join(f"{key}: {other.get(key)} against {first.get(key)}" for key in sorted(must))
        raise DataError(
            f"{file} and {first_file} cannot share a table: their protocols differ ({differences}). "
            "Measure both on the same photos, at the same size, with the same version."
        )
    differ = [key for key in ("seed", "versions") if first[key] != other[key]]
    return [f"{file} and {first_file} differ in {key}: {other[key]} against {first[key]}." for key in differ]
