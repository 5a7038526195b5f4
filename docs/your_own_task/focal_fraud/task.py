"""The fraud task, as used by the training loop."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pipeline.compute import distributed
from pipeline.compute.device import AMP, precision
from pipeline.config.run_config import ScheduleConfig
from pipeline.data.shuffle import Shuffle
from pipeline.maths.arrays import Floats
from pipeline.maths.losses import binary_cross_entropy, binary_focal, log_probability
from pipeline.maths.metrics import binary_metrics
from pipeline.tasks.base import TOTAL, Dataset, ModelExport, Rows, Task, save_model, write_test_rows

from .config import FraudConfig
from .data import CATEGORICAL, NUMERIC, FraudData, Transactions
from .model import FraudModel
from .predict import ENCODER_FILE


class FraudTask(Task[FraudConfig]):
    def __init__(self, config: FraudConfig) -> None:
        self.config, self.data, self.focal = config, FraudData(config.data), config.loss.focal

    @property
    def dataset(self) -> Dataset:
        return Dataset(self.data.name, self.data.digest, self.data.name, self.data.counts)

    @property
    def splits(self) -> Collection[str]:
        return list(self.data.splits)

    @property
    def files(self) -> Sequence[Path]:
        return [Path(self.config.data.path)] if self.config.data.path else []

    def warnings(self, total_steps: int) -> Sequence[str]:
        return self.focal.run_warnings("loss.focal", total_steps, self.config.training.amp)

    def model(self) -> FraudModel:
        train = self.data.counts["train"]
        rate = (train["frauds"] + 1) / (train["rows"] + 2)  # neither 0 nor 1
        return FraudModel(self.config.model, self.data.encoder.sizes, rate)

    @property
    def schedule(self) -> ScheduleConfig:
        return self.config.optim.schedule

    def optimizers(self, model: nn.Module) -> Mapping[str, Optimizer]:
        config = self.config.optim
        return {"adam": AdamW(model.parameters(), config.lr, config.betas, config.eps, config.weight_decay)}

    def plan(self, epoch: int) -> Sequence[Rows]:
        return Shuffle(len(self.data.splits["train"]), self.config.training.batch_size, self.config.seed, epoch)

    def batch(self, rows: Rows) -> Transactions:
        return self.data.splits["train"][rows]

    def counts(self, batch: Transactions) -> Mapping[str, Tensor]:
        return {"rows": torch.full((), float(len(batch)), device=batch.label.device)}

    def losses(
        self, output: Tensor, batch: Transactions, counts: Mapping[str, Tensor], step: int
    ) -> Mapping[str, Tensor]:
        weight, focal, label, rows = self.config.loss.pos_weight.at(step), self.focal, batch.label, counts["rows"]
        total = binary_cross_entropy(log_probability(output), label, weight).sum() / rows
        losses = {"loss_bce": total}
        if focal.is_on(step):
            reduced = None if focal.compute_fp32 else AMP.get(precision(self.config.training.amp, label.device.type))
            fraud = log_probability(output.to(reduced or torch.float32))
            values = binary_focal(fraud, label, focal.gamma, focal.class_weight, focal.detach_p_for_weight)
            losses["loss_focal"] = values.float().sum() / rows
            total = total + focal.lambda_ * losses["loss_focal"]
        return losses | {TOTAL: total}

    def scheduled_values(self, step: int) -> Mapping[str, float | bool]:
        return {"focal_on": self.focal.is_on(step), "pos_weight_fraud": self.config.loss.pos_weight.at(step)}

    def logged_losses(self, names: Sequence[str]) -> Sequence[str]:
        return names if self.focal.log_components else [TOTAL]

    def predict(self, model: nn.Module, split: str, device: str) -> tuple[Floats, Floats, Floats]:
        """Labels of a split, and the predicted log probabilities of fraud and of no fraud."""
        data, size = self.data.splits[split], self.config.evaluation.batch_size

        def logits(first: int, last: int) -> list[Tensor]:
            starts = range(first, last, size)
            return [torch.cat([model(data[start : min(start + size, last)].to(device)) for start in starts])]

        (z,) = distributed.split_evenly(len(data), logits)
        log_p, log_1mp = log_probability(z.double().cpu())
        return data.label.double().numpy(), log_p.numpy(), log_1mp.numpy()

    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        metrics = binary_metrics(*self.predict(model, split, device))
        return {f"{split}/{name}_fraud": value for name, value in metrics.items()}

    def known_metrics(self, split: str) -> Mapping[str, str]:
        rows, frauds = (self.data.counts[split][name] for name in ("rows", "frauds"))
        both = "" if 0 < frauds < rows else f"needs both classes: {split} has {frauds} frauds of {rows} rows"
        some = "" if frauds else f"needs frauds: {split} has none"
        known = {"auc": both, "pr_auc": both, "logloss": "", "ece": "", "calibration": some}
        return {f"{split}/{name}_fraud": reason for name, reason in known.items()}

    def report(self, model: nn.Module, folder: Path, device: str) -> None:
        if self.config.tracking.log_rows:
            label, log_p, _ = self.predict(model, "test", device)
            write_test_rows(folder, {"label/auc_fraud": label.astype(np.uint8), "score/auc_fraud": log_p})

    def export(self, model: nn.Module, folder: Path) -> ModelExport:
        save_model(folder, model, self.config, calibration={})
        self.data.encoder.save(folder / ENCODER_FILE)
        example = self.data.frames["valid"][[*NUMERIC, *CATEGORICAL]].head(5).to_dict("list")
        return ModelExport(folder=folder, inputs=list(example), outputs={"p_fraud": "double"}, example=example)
