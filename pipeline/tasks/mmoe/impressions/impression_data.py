"""The data of a run: a prepared folder, its schema and its splits."""

from functools import cached_property
from pathlib import Path

from pipeline.data.layout import Layout
from pipeline.data.schema import SCHEMA_FILE, DataSchema
from pipeline.data.split_files import check_files
from pipeline.errors import UserError
from pipeline.tasks.mmoe.config import DataConfig
from pipeline.tasks.mmoe.impressions.embedded_impressions import embedded_data
from pipeline.tasks.mmoe.impressions.impression_table import ImpressionTable, read_split


class ImpressionData:
    """The data of a run: the prepared folder `data.path`, or generated data if that is null.

    Raises:
        UserError: the folder is missing or damaged, or its training or validation split is empty.
    """

    def __init__(self, config: DataConfig) -> None:
        self.name = Path(config.path).name if config.path else "embedded"
        self.folder = Path(config.path) if config.path else embedded_data(config.embedded)
        self.schema = DataSchema.read(self.folder)
        check_files(self.folder, self.schema)
        for split in ("train", "validation"):
            if split not in self.schema.splits or not self.schema.splits[split].rows:
                raise UserError(f"{self.folder}: the {split} split is empty; allowed: at least one row")
        self.layout = Layout(self.schema.features)
        self.train = read_split(self.folder, self.schema, "train")
        self.valid = read_split(self.folder, self.schema, "validation")
        self.bayes_aucs = dict[str, dict[str, float]]()  # split -> metric -> AUC, filled by evaluations

    @cached_property
    def test(self) -> ImpressionTable:
        return read_split(self.folder, self.schema, "test")

    def held_out(self, split: str) -> ImpressionTable:
        """Return the split `valid` or `test`."""
        return self.valid if split == "valid" else self.test

    @property
    def files(self) -> list[Path]:
        return [self.folder / SCHEMA_FILE, *(self.folder / split.file for split in self.schema.splits.values())]
