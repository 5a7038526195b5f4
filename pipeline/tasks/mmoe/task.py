"""The MMoE task, as used by the training loop."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from pipeline.compute.optimizers import RowAdagrad, SparseAdam
from pipeline.config.run_config import ScheduleConfig
from pipeline.data.schema import SCHEMA_FILE, VOCABULARY_FILE
from pipeline.data.shuffle import Shuffle
from pipeline.maths.calibration import Fitted
from pipeline.tasks.base import Dataset, ModelExport, Rows, Task, count_parameters, save_model
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.evaluation import Evaluation, events_of
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions
from pipeline.tasks.mmoe.impressions.impression_data import ImpressionData
from pipeline.tasks.mmoe.model import Mmoe, Output
from pipeline.tasks.mmoe.objective import Objective


class MmoeTask(Task[MmoeConfig]):
    def __init__(self, config: MmoeConfig, data: ImpressionData | None = None) -> None:
        """data: the data of the config's `data` block, if they are already loaded.

        Raises:
            UserError: see `ImpressionData` and `MmoeConfig.for_clicks`.
        """
        self.data = data or ImpressionData(config.data)
        click_only = self.data.schema.click_only
        self.config = config = config.for_clicks(self.data.name) if click_only else config
        self.objective, self.evaluation = Objective(config, click_only), Evaluation(config, self.data)
        self.on_cpu = config.device == "cpu" or not torch.cuda.is_available()

    # --- data --------------------------------------------------------------------------------------------------------

    @property
    def dataset(self) -> Dataset:
        schema = self.data.schema
        labels = ("rows", "clicks") if schema.click_only else ("rows", "clicks", "conversions")
        splits = {name: {label: getattr(split, label) for label in labels} for name, split in schema.splits.items()}
        return Dataset(self.data.name, schema.digest, schema.source, splits)

    @property
    def splits(self) -> Collection[str]:
        return ["train", "valid", *(["test"] if len(self.data.test) else [])]

    @property
    def files(self) -> Sequence[Path]:
        return self.data.files

    def with_config(self, config: MmoeConfig) -> "MmoeTask":
        return MmoeTask(config, self.data if config.data == self.config.data else None)

    def summary(self) -> Mapping[str, str]:
        schema = self.data.schema
        rows = {f"rows_{name}": str(split.rows) for name, split in schema.splits.items()}
        weights = {"sample_weight": "in training losses alone; metrics are unweighted"} if schema.sample_weight else {}
        return {"parameters": str(count_parameters(self.model))} | rows | weights

    def warnings(self, total_steps: int) -> Sequence[str]:
        return [*self.data.schema.warnings(), *self.objective.warnings(total_steps)]

    # --- training ----------------------------------------------------------------------------------------------------

    def model(self) -> Mmoe:
        sparse = self.config.optim.embedding.name != "adam"
        return Mmoe(self.config.model, self.data.layout, self.data.schema.base_rates, sparse)

    def dense_methods(self, model: nn.Module) -> Sequence[tuple[nn.Module, str]]:
        return [(model, "dense")]

    @property
    def schedule(self) -> ScheduleConfig:
        return self.config.optim.schedule

    def optimizers(self, model: nn.Module) -> Mapping[str, Optimizer]:
        assert isinstance(model, Mmoe)
        table, config, dense = model.embedding.table, self.config.optim.embedding, self.config.optim.dense
        rest = [parameter for parameter in model.parameters() if parameter is not table]
        embedding: Optimizer
        if config.name == "row_adagrad":
            embedding = RowAdagrad(table, lr=config.lr, eps=config.eps)
        elif config.name == "adam":
            embedding = Adam([table], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        else:
            embedding = SparseAdam(table, lr=config.lr, betas=config.betas, eps=config.eps)
        return {
            "dense": AdamW(
                rest, lr=dense.lr, betas=dense.betas, eps=dense.eps, weight_decay=dense.weight_decay, fused=True
            ),
            "embedding": embedding,
        }

    def plan(self, epoch: int) -> Sequence[Rows]:
        return Shuffle(len(self.data.train), self.config.training.batch_size, self.config.seed, epoch)

    def batch(self, rows: Rows) -> Impressions:
        return self.data.train.batch(rows, groups=self.on_cpu)

    def counts(self, batch: Impressions) -> Mapping[str, Tensor]:
        return self.objective.counts(batch)

    def losses(
        self, output: Output, batch: Impressions, counts: Mapping[str, Tensor], step: int
    ) -> Mapping[str, Tensor]:
        return self.objective.losses(output, batch, counts, step)

    def scheduled_values(self, step: int) -> Mapping[str, float | bool]:
        return self.objective.scheduled_values(step)

    def logged_losses(self, names: Sequence[str]) -> Sequence[str]:
        return self.objective.logged_losses(names)

    def probe(self, model: nn.Module, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert isinstance(model, Mmoe)
        return self.objective.probe(model, losses)

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.objective.influence(probed, losses)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        return self.evaluation.evaluate(model, split, device)

    def known_metrics(self, split: str) -> Mapping[str, str]:
        return self.evaluation.known_metrics(split)

    def calibrate(self, model: nn.Module, device: str) -> Fitted:
        return self.evaluation.calibrate(model, device)

    def findings(self, metrics: Mapping[str, float]) -> Sequence[str]:
        return self.evaluation.findings(metrics)

    def report(self, model: nn.Module, folder: Path, device: str) -> None:
        self.evaluation.report(model, folder, device)

    def export(self, model: nn.Module, folder: Path) -> ModelExport:
        from pipeline.tasks.mmoe.predict import raw_example  # imports pandas

        save_model(folder, model, self.config, self.evaluation.calibration)
        for name in (SCHEMA_FILE, VOCABULARY_FILE):
            shutil.copyfile(self.data.folder / name, folder / name)
        return ModelExport(
            folder=folder,
            inputs=self.data.schema.raw_columns,
            outputs={f"p_{event}": "double" for event in events_of(self.data.schema)},
            example=raw_example(self.data.folder, rows=5),
        )
