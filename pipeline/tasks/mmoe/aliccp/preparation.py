"""`prepare_ctr` on the original Ali-CCP files: samples joined with the common features of their users.

First pass: every file is read once, to spills of codes beside the output, while ids are numbered and those of the
training split are counted. Second pass: the spills become the Parquet splits. Memory grows with distinct ids and
users alone. What is done is kept until all is done: an interrupted preparation goes on where it was.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.folders import published
from pipeline.tasks.mmoe import prepare
from pipeline.tasks.mmoe.aliccp import columns, kernels
from pipeline.tasks.mmoe.aliccp.config import RawSource
from pipeline.tasks.mmoe.aliccp.scan import KEEP_SECONDS, Input, Progress, Scan, rows_file
from pipeline.tasks.mmoe.aliccp.work import Kept, Work, work_in
from pipeline.tasks.mmoe.schema import (
    MISSING_TEXT,
    SPLITS,
    VOCABULARY_FILE,
    BaseRates,
    DataSchema,
    Feature,
    Split,
    sha256_of,
    sha256_of_parts,
)

WORK_FORMAT = 1  # of the work folder


def prepare_raw(
    data: Path,
    source: RawSource,
    schema_file: Path,
    output_dir: Path,
    *,
    progress: Progress | None = None,
    keep_seconds: float = KEEP_SECONDS,
) -> DataSchema:
    """Write splits, vocabulary and `schema.json` into `output_dir`: all of them, or nothing.

    `progress` is called with what is being done, the rows of it so far and the share that is done.

    Raises:
        UserError: anything is wrong with the files; names file and line, what was found and what is allowed.
    """
    inputs = [
        Input(file, common, group)
        for group, (skeleton, common_features) in enumerate(source.files(data))
        for file, common in ((common_features, True), (skeleton, False))
    ]
    progress = progress or (lambda *_: None)
    identity = _identity(source, inputs)
    with work_in(output_dir) as work:
        kept = work.load(identity)
        if not kept.facts or kept.facts["stage"] == "scan":
            scan = Scan(source, inputs)
            scan.run(work, identity, kept, progress, keep_seconds)
            scan.finish()
            kept = _vocabulary(scan, work, identity, data, schema_file)
            del scan
        _columns(work, kept, progress)
        schema = _described(kept.facts)
        schema.write(work.folder)
        with published(output_dir, prepare.FILES) as folder:
            for name in prepare.FILES:
                _link(work.folder / name, folder / name)
    return schema


def _identity(source: RawSource, inputs: list[Input]) -> str:
    """Another one for whatever would give another output."""
    files = [(str(item.file.resolve()), item.file.stat().st_size, item.file.stat().st_mtime_ns) for item in inputs]
    whole = [WORK_FORMAT, prepare.ROW_GROUP_ROWS, source.model_dump(mode="json"), files]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _vocabulary(scan: Scan, work: Work, identity: str, data: Path, schema_file: Path) -> Kept:
    """Count, write the vocabulary, and keep what the second pass needs."""
    rows = sum(int(scan.counters[number, kernels.ROWS]) for number in range(len(scan.inputs)))
    if not scan.spills.get(rows_file("train")):
        found = f"{rows} rows, none of them in the training split" if rows else "no rows"
        raise UserError(f"{data}: {found}, allowed: at least one training row")
    fields = columns.features_of(scan, schema_file)
    columns.count_common(scan, work.folder)
    target = np.full((int(scan.table.used[0]), 2), -1, dtype=np.int32)
    features: list[Feature] = []

    def tables() -> Any:
        for feature, table in columns.vocabularies(scan, fields, target):
            features.append(feature)
            yield feature.name, table

    prepare.write_vocabularies(tables(), work.folder / VOCABULARY_FILE)
    of_users = [feature.name for number, feature in fields.items() if scan.fields.facts[number, kernels.IN_COMMON]]
    groups = sorted({item.group for item in scan.inputs})
    facts = {
        "identity": identity, "stage": "columns", "spills": scan.spills, "source": _source(scan),
        "features": [feature.model_dump(mode="json") for feature in features], "of_users": of_users,
        "counts": _counts(scan), "group_rows": _group_rows(scan), "encoded": 0, "groups": len(groups), "splits": {},
        "vocabulary_sha256": sha256_of(work.folder / VOCABULARY_FILE),
    }  # fmt: skip
    arrays = {"target": target} | {f"words_{group}": scan.user_words(group) for group in groups}
    work.save(facts, arrays)
    return Kept(facts, arrays)


def _columns(work: Work, kept: Kept, progress: Progress) -> None:
    """Users to records, then every split to its Parquet file; each is kept once it is done."""
    facts, arrays = kept
    features = [Feature.model_validate(feature) for feature in facts["features"]]
    layout = columns.Layout.of(features, set(facts["of_users"]))
    target = arrays["target"]
    for group in range(facts["encoded"], facts["groups"]):
        words = arrays[f"words_{group}"]

        def users_done(users: int, total: int = len(words)) -> None:
            progress("users", users, users / total)

        arrays[f"records_{group}"] = columns.encode_users(work.folder, group, words, (target, layout), users_done)
        facts["encoded"] = group + 1
        facts["spills"][columns.records_file(group)] = 4 * int(arrays[f"records_{group}"].sum(dtype=np.int64))
        work.save(facts, arrays)
    for split in SPLITS:
        if split in facts["splits"]:
            continue
        group = facts["groups"] - 1 if split == "test" else 0
        rows = facts["counts"][f"rows/{split}"]

        def rows_done(done: int, split: str = split, total: int = max(1, rows)) -> None:
            progress(f"{split}.parquet", done, done / total)

        writer = columns.SplitRows(features, layout, target, facts["group_rows"])
        records = work.folder / columns.records_file(group)
        writer.write(work.folder, split, records, arrays[f"records_{group}"], rows_done)
        file = work.folder / f"{split}.parquet"
        clicks, conversions = writer.sums.values()
        described = Split(
            file=file.name, rows=writer.rows, clicks=clicks, conversions=conversions, sha256=sha256_of(file)
        )
        facts["splits"][split] = {
            "split": described.model_dump(mode="json"), "unknown": writer.unknown, "known": writer.known,
        }  # fmt: skip
        facts["spills"][file.name] = file.stat().st_size
        work.save(facts, arrays)


def _described(facts: dict[str, Any]) -> DataSchema:
    splits = {split: Split.model_validate(facts["splits"][split]["split"]) for split in SPLITS}

    def share(name: str, split: str) -> float:
        unknown, known = (facts["splits"][split][key][name] for key in ("unknown", "known"))
        return float(unknown / max(1, unknown + known))

    train = splits["train"]
    return DataSchema(
        features=tuple(
            Feature.model_validate(
                feature | {"out_of_vocabulary": {split: share(feature["name"], split) for split in SPLITS}}
            )
            for feature in facts["features"]
        ),
        splits=splits,
        base_rates=BaseRates(ctr=train.clicks / train.rows, cvr=train.conversions / max(1, train.clicks)),
        vocabulary_sha256=facts["vocabulary_sha256"],
        missing_values=MISSING_TEXT,
        strip=False,
        source=facts["source"],
        counts=facts["counts"],
    )


def _counts(scan: Scan) -> dict[str, int]:
    """What was met, over all files."""
    common = np.array([item.common for item in scan.inputs])
    of_common, of_skeleton = scan.counters[common].sum(axis=0), scan.counters[~common].sum(axis=0)
    malformed, cut = np.array(scan.malformed), np.array(scan.cut)
    counts = {f"rows/{split}": int(rows) for split, rows in zip(SPLITS, scan.split_rows, strict=True)}
    return counts | {
        "lines": int(of_skeleton[kernels.LINES]),
        "users": int(of_common[kernels.USERS]),
        "conversions_without_click": int(of_skeleton[kernels.ORPHANS]),
        "without_common_features": int(of_skeleton[kernels.WITHOUT_COMMON]),
        "cut_lines": int(cut.sum()),
        "malformed_lines": int(malformed.sum()),
        "repeated_common_features": int(of_common[kernels.DUPLICATE_COMMON]),
        "repeated_fields": int((of_common + of_skeleton)[kernels.DUPLICATE_FIELDS]),
        "other_feat_num": int((of_common + of_skeleton)[kernels.FEAT_NUM_DIFFERS]),
        "empty_ids": int((of_common + of_skeleton)[kernels.EMPTY_IDS]),
    }


def _group_rows(scan: Scan) -> int:
    """Rows of a row group: fewer where rows hold very many ids, so that memory stays bounded."""
    common = np.array([item.common for item in scan.inputs])
    of_common, of_skeleton = scan.counters[common].sum(axis=0), scan.counters[~common].sum(axis=0)
    ids = of_skeleton[kernels.IDS] / max(1, of_skeleton[kernels.ROWS])
    ids += of_common[kernels.IDS] / max(1, of_common[kernels.USERS])
    rows = prepare.ROW_GROUP_ROWS
    while rows > 64 and rows * ids > columns.CELLS:
        rows //= 2
    return rows


def _source(scan: Scan) -> str:
    names = ", ".join(item.file.name for item in scan.inputs)
    return f"{names}, SHA-256 {sha256_of_parts(scan.digests)}"


def _link(file: Path, to: Path) -> None:
    """Under another name, too: the work folder stays whole until all is published."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
