"""The MMoE task: its data, model, named losses and evaluation, for the loop in `pipeline.training.loop`."""

import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from pipeline.compute import distributed as ranks
from pipeline.compute.optimizers import RowAdagrad, SparseAdam
from pipeline.config.run_config import ScheduleConfig
from pipeline.config.strict_config import to_yaml
from pipeline.data.layout import Layout
from pipeline.data.schema import SCHEMA_FILE, VOCABULARY_FILE, DataSchema
from pipeline.data.shuffle import Shuffle
from pipeline.data.split_files import check_files
from pipeline.errors import UserError
from pipeline.maths.calibration import Fitted, fit_funnel, rescaled
from pipeline.maths.gradients import PREFIX, cosine, flat, gradients, norm
from pipeline.maths.losses import (
    LogProbability,
    binary_cross_entropy,
    binary_focal,
    binary_focal_factor,
    clicked_cross_entropy,
    gate_entropy_deficit,
    gate_imbalance,
    log_probability,
    product,
    product_log_probability,
)
from pipeline.maths.metrics import Array, binary_metrics, calibration_bins
from pipeline.maths.schedules import gate_is_open
from pipeline.names import CALIBRATED
from pipeline.runtime.console import say
from pipeline.runtime.importing import uncollected
from pipeline.storage.calibration_file import write_calibration
from pipeline.storage.checkpoints import save_weights
from pipeline.tasks.base import AMP, TOTAL, Dataset, ModelExport, Rows, Task, precision, write_test_rows
from pipeline.tasks.mmoe.config import TASKS, MmoeConfig
from pipeline.tasks.mmoe.evaluation import (
    DEPEND_ON_CALIBRATION,
    EVALUATED_GAMMAS,
    EVENTS,
    REQUIRED,
    SPLIT_FILES,
    known_metrics,
)
from pipeline.tasks.mmoe.impressions.embedded_impressions import embedded_data
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions
from pipeline.tasks.mmoe.impressions.impression_table import ImpressionTable, read_split
from pipeline.tasks.mmoe.model import Mmoe, Output
from pipeline.tracking import plots

COMPONENTS = ("loss_ctr", "loss_ctcvr_bce", "loss_ctcvr_focal", "loss_cvr_aux")
CTR_TOWER = "influence/focal_grad_ctr_tower"
GATE_METRIC = re.compile(r"gate/(?P<task>\w+)/(expert_)?(?P<expert>\d+)")  # runs of earlier versions lack `expert_`


class MmoeTask(Task[MmoeConfig]):
    def __init__(self, config: MmoeConfig, like: "MmoeTask | None" = None) -> None:
        """Reads the data, or shares that of another task with the same `data` block.

        Raises:
            UserError: the prepared folder is missing or damaged, or a split that is needed is empty.
        """
        self.config = config
        focal = config.loss.aux_focal
        self.focal_alpha = focal.alpha if focal.use_alpha else None
        self.calibration: Fitted = {}  # of `calibrate`
        self.folder: Path
        self.schema: DataSchema
        self.layout: Layout
        self.train: ImpressionTable
        self.held_out: Callable[[str], ImpressionTable]
        self.bayes: Callable[[str], dict[str, float]]
        if like is not None and like.config.data == config.data:
            self.folder, self.schema, self.layout = like.folder, like.schema, like.layout
            self.train, self.held_out, self.bayes = like.train, like.held_out, like.bayes
            return
        self.folder = Path(config.data.path) if config.data.path else embedded_data(config.data.embedded)
        self.schema = DataSchema.read(self.folder)
        check_files(self.folder, self.schema)
        for split in ("train", "validation"):
            if split not in self.schema.splits or not self.schema.splits[split].rows:
                raise UserError(f"{self.folder}: the {split} split is empty; allowed: at least one row")
        self.layout = Layout(self.schema.features)
        self.train = read_split(self.folder, self.schema, "train")
        self.held_out = cache(lambda split: read_split(self.folder, self.schema, SPLIT_FILES[split]))
        self.held_out("valid")
        self.bayes = cache(self._bayes)

    def with_config(self, config: MmoeConfig) -> "MmoeTask":
        return MmoeTask(config, like=self)

    @property
    def dataset(self) -> Dataset:
        splits = {
            name: {"rows": split.rows, "clicks": split.clicks, "conversions": split.conversions}
            for name, split in self.schema.splits.items()
        }
        name = self.folder.name if self.config.data.path else "embedded"
        return Dataset(name, self.schema.digest, self.schema.source, splits)

    @property
    def splits(self) -> Collection[str]:
        return ["train", *(name for name in SPLIT_FILES if len(self.held_out(name)))]

    @property
    def files(self) -> Sequence[Path]:
        return [self.folder / SCHEMA_FILE, *(self.folder / split.file for split in self.schema.splits.values())]

    def summary(self) -> Mapping[str, str]:
        with uncollected(), torch.device("meta"):  # shapes without values; imports torch's compiler, as optimizers do
            parameters = sum(weight.numel() for weight in self.model().parameters())
        return {"parameters": str(parameters)} | {
            f"rows_{name}": str(split.rows) for name, split in self.schema.splits.items()
        }

    def warnings(self, total_steps: int) -> Sequence[str]:
        focal = self.config.loss.aux_focal
        found = []
        if focal.enabled and focal.warmup_steps >= total_steps:
            found.append(
                f"loss.aux_focal.warmup_steps is {focal.warmup_steps}, the last of {total_steps} steps is "
                f"{total_steps - 1}: the focal term will never switch on"
            )
        late = self.config.loss.late_pos_weight
        if late.ctcvr and late.warmup_steps >= total_steps:
            found.append(
                f"loss.late_pos_weight.warmup_steps is {late.warmup_steps}, the last of {total_steps} steps is "
                f"{total_steps - 1}: the weight of conversions will never rise"
            )
        if not focal.compute_fp32 and self.config.training.amp == "no":
            found.append("loss.aux_focal.compute_fp32: false has no effect with training.amp: no")
        return found

    def model(self) -> Mmoe:
        sparse = self.config.optim.embedding.name != "adam"
        return Mmoe(self.config.model, self.layout, self.schema.base_rates, sparse)

    @property
    def schedule(self) -> ScheduleConfig:
        return self.config.optim.schedule

    def optimizers(self, model: nn.Module) -> Mapping[str, Optimizer]:
        assert isinstance(model, Mmoe)
        table = model.embedding.table
        dense = self.config.optim.dense
        rest = [parameter for parameter in model.parameters() if parameter is not table]
        return {
            "dense": AdamW(
                rest, lr=dense.lr, betas=dense.betas, eps=dense.eps, weight_decay=dense.weight_decay, fused=True
            ),
            "embedding": self._embedding_optimizer(table),
        }

    def _embedding_optimizer(self, table: Tensor) -> Optimizer:
        config = self.config.optim.embedding
        if config.name == "row_adagrad":
            return RowAdagrad(table, lr=config.lr, eps=config.eps)
        if config.name == "adam":
            return Adam([table], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        return SparseAdam(table, lr=config.lr, betas=config.betas, eps=config.eps)

    def plan(self, epoch: int) -> Sequence[Rows]:
        return Shuffle(len(self.train), self.config.training.batch_size, self.config.seed, epoch)

    def batch(self, rows: Rows) -> Impressions:
        return self.train.batch(rows, training=True)

    def counts(self, batch: Impressions) -> Mapping[str, Tensor]:
        rows = torch.full((), float(len(batch)), device=batch.click.device)
        return {"rows": rows, "clicks": batch.click.sum(), "conversions": batch.conversion.sum()}

    def losses(
        self, output: Output, batch: Impressions, counts: Mapping[str, Tensor], step: int
    ) -> Mapping[str, Tensor]:
        esmm, loss, gate = self.config.esmm, self.config.loss, self.config.model.gate
        focal = loss.aux_focal
        z_ctr, z_cvr = output.logits.unbind(1)
        click, conversion, rows = batch.click, batch.conversion, counts["rows"]
        ctr, cvr = log_probability(z_ctr), log_probability(z_cvr)
        ctcvr = product(ctr, cvr)
        found = {
            "loss_ctr": binary_cross_entropy(ctr, click, loss.pos_weight("ctr")).sum() / rows,
            "loss_ctcvr_bce": binary_cross_entropy(ctcvr, conversion, loss.ctcvr_pos_weight(step)).sum() / rows,
            "loss_cvr_aux": clicked_cross_entropy(cvr, click, conversion).sum() / counts["clicks"].clamp_min(1),
        }
        found["loss_ctcvr"] = found["loss_ctcvr_bce"]
        if self._focal_is_on(step):
            low = AMP.get(precision(self.config.training.amp, click.device.type))
            if not focal.compute_fp32 and low is not None:
                ctcvr = product_log_probability(z_ctr.to(low), z_cvr.to(low))
            values = binary_focal(ctcvr, conversion, focal.gamma, self.focal_alpha, focal.detach_p_for_weight)
            found["loss_ctcvr_focal"] = values.float().sum() / rows
            found["loss_ctcvr"] = found["loss_ctcvr_bce"] + focal.lambda_ * found["loss_ctcvr_focal"]
            if self.config.tracking.probes(step):
                factor = binary_focal_factor(ctcvr, conversion, focal.gamma).detach().float()
                positives = counts["conversions"]  # none of them: 0/0, not logged
                found["influence/focal_factor_positive"] = (factor * conversion).sum() / positives
                found["influence/focal_factor_negative"] = (factor * (1 - conversion)).sum() / (rows - positives)
        total = (
            esmm.lambda_ctr * found["loss_ctr"]
            + esmm.lambda_ctcvr * found["loss_ctcvr"]
            + esmm.lambda_cvr_aux * found["loss_cvr_aux"]
        )
        share = len(batch) / rows  # a regulariser is a mean over rows too
        if output.gates is not None and gate.entropy_weight:
            found["loss_gate_entropy"] = gate.entropy_weight * gate_entropy_deficit(output.gates).mean() * share
            total = total + found["loss_gate_entropy"]
        if output.gates is not None and gate.balance_weight:
            found["loss_gate_balance"] = gate.balance_weight * gate_imbalance(ranks.mean(output.gates)[None]) * share
            total = total + found["loss_gate_balance"]
        return found | {TOTAL: total}

    def probe(self, model: nn.Module, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients of the parts at the experts, and of the focal loss at the CTR tower. Empty without experts."""
        assert isinstance(model, Mmoe)
        if model.experts is None or model.towers is None or not self.config.loss.aux_focal.log_components:
            return {}
        shared = list(model.experts.parameters())
        found = {name: flat(gradients(losses[name], shared)) for name in COMPONENTS if name in losses}
        if "loss_ctcvr_focal" in losses and 0 in model.deep_heads:
            towers = [*model.towers.parameters(), model.last]  # a leading axis of tasks each
            row = model.deep_heads.index(0)
            found[CTR_TOWER] = flat(part[row] for part in gradients(losses["loss_ctcvr_focal"], towers))
        return found

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        focal = self.config.loss.aux_focal
        if not focal.log_components:
            return {}
        found = {f"influence/grad_norm/{name}": norm(probed[name]) for name in COMPONENTS if name in probed}
        if "loss_ctcvr_focal" in losses:
            found["influence/focal_over_bce"] = focal.lambda_ * losses["loss_ctcvr_focal"] / losses["loss_ctcvr_bce"]
        if "loss_ctcvr_focal" in probed:
            found["influence/cosine_bce_focal"] = cosine(probed["loss_ctcvr_bce"], probed["loss_ctcvr_focal"])
        if CTR_TOWER in probed:
            found[CTR_TOWER] = norm(probed[CTR_TOWER])
        return found | {name: value for name, value in losses.items() if name.startswith(PREFIX)}

    def settings(self, step: int) -> Mapping[str, float | bool]:
        focal = self.config.loss.aux_focal
        return {
            "pos_weight_ctcvr": self.config.loss.ctcvr_pos_weight(step),
            "aux_focal_on": self._focal_is_on(step),
            "aux_focal_lambda": focal.lambda_ if focal.enabled else 0.0,
            "aux_focal_gamma": focal.gamma,
        }

    def logged_losses(self, names: Sequence[str]) -> Sequence[str]:
        return names if self.config.loss.aux_focal.log_components else [TOTAL]

    def _focal_is_on(self, step: int) -> bool:
        focal = self.config.loss.aux_focal
        return focal.enabled and gate_is_open(step, focal.warmup_steps)

    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        table = self.held_out(split)
        logits, gate_means, gate_entropy = self._predict(model, table, device)
        found: dict[str, float] = {}
        events = _events(table, logits)
        for event, (label, probability) in events.items():
            values = binary_metrics(label, *(part.double().numpy() for part in probability))
            found |= {f"{split}/{name}_{event}": value for name, value in values.items()}
        found |= {f"{split}/{name}": value for name, value in self._common_losses(events).items()}
        if split == "test" and self.calibration:
            found |= {f"test/{name}{CALIBRATED}": value for name, value in self._calibrated(table, logits).items()}
        found |= self.bayes(split)
        if gate_means is not None and gate_entropy is not None and split == "valid":
            names = [task for task in TASKS if getattr(self.config.model.heads, task).deep]
            for task, shares, entropy in zip(names, gate_means.tolist(), gate_entropy.tolist(), strict=True):
                found |= {f"gate/{task}/expert_{expert}": share for expert, share in enumerate(shares)}
                found[f"gate/{task}/entropy"] = entropy
        return found

    def known_metrics(self, split: str) -> Mapping[str, str]:
        return known_metrics(self.schema, split, calibrated=self.config.model.calibrate)

    def _calibrated(self, table: ImpressionTable, logits: Tensor) -> dict[str, float]:
        """Metrics that depend on calibration: not the ranking by one logit, only that by a product."""
        found: dict[str, float] = {}
        for event, (label, probability) in _events(table, rescaled(logits, self.calibration, TASKS)).items():
            names = ("auc", *DEPEND_ON_CALIBRATION) if event == "ctcvr" else DEPEND_ON_CALIBRATION
            values = binary_metrics(label, *(part.numpy() for part in probability))
            found |= {f"{name}_{event}": values[name] for name in names if name in values}
        return found

    def _common_losses(self, events: Mapping[str, tuple[Array, LogProbability]]) -> dict[str, float]:
        """Losses that depend on neither gate nor lambda, gamma or a late weight: the same scale for every arm."""
        loss = self.config.loss
        found = {event: (LogProbability(*(part.double() for part in probability)), torch.from_numpy(label))
                 for event, (label, probability) in events.items()}  # fmt: skip
        values = {
            "loss_ctr": binary_cross_entropy(*found["ctr"], loss.pos_weight("ctr")),
            "loss_ctcvr_bce": binary_cross_entropy(*found["ctcvr"], loss.pos_weight("ctcvr")),
            "loss_cvr_aux": binary_cross_entropy(*found["cvr"]),
        }
        for gamma in EVALUATED_GAMMAS:
            values[f"loss_ctcvr_focal_g{gamma}"] = binary_focal(*found["ctcvr"], gamma)
        return {name: value.mean().item() for name, value in values.items() if len(value)}  # no click: no loss of them

    def _bayes(self, split: str) -> dict[str, float]:
        """AUCs of the true probabilities, where they are known: what no model can beat on these rows."""
        table = self.held_out(split)
        if table.truth is None:
            return {}
        logits = np.stack([np.log(p) - np.log1p(-p) for p in (table.truth["p_ctr"], table.truth["p_cvr"])], 1)
        found = {}
        for event, (label, probability) in _events(table, torch.from_numpy(logits)).items():
            values = binary_metrics(label, *(part.numpy() for part in probability))
            if "auc" in values:
                found[f"{split}/auc_{event}_bayes"] = values["auc"]
        return found

    def _predict(
        self, model: nn.Module, table: ImpressionTable, device: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits [N, T], mean gates [T, E] and mean gate entropy [T] (nats), on the CPU."""

        def predict(first: int, last: int) -> list[Tensor]:
            logits, shares, entropies = [], [], []
            for rows in table.batches(self.config.evaluation.batch_size, first, last):
                output: Output = model(table.batch(rows).to(device))
                logits.append(output.logits)
                if output.gates is not None:
                    shares.append(output.gates.double().sum(0))
                    entropies.append(torch.special.entr(output.gates.double()).sum((0, 2)))
            return [torch.cat(logits), *(torch.stack(part) for part in (shares, entropies) if part)]

        logits, *sums = (part.cpu() for part in ranks.each_its_part(len(table), predict))
        if not sums:
            return logits, None, None
        shares, entropies = (part.sum(0) / len(table) for part in sums)
        return logits, shares, entropies

    def calibrate(self, model: nn.Module, device: str) -> Fitted:
        self.calibration = {}
        if not self.config.model.calibrate:
            return {}
        table = self.held_out("valid")
        logits = self._predict(model, table, device)[0]
        click, conversion = (torch.from_numpy(label.astype(np.float64)) for label in table.labels)
        fitted = fit_funnel(logits[:, 0], logits[:, 1], click, conversion)
        if fitted is None:
            clicks, conversions = int(click.sum()), int(conversion.sum())
            say(f"probabilities are not calibrated: found {len(table)} validation rows, {clicks} clicks and "
                f"{conversions} conversions; needed: {REQUIRED}")  # fmt: skip
            return {}
        self.calibration = {head: affine._asdict() for head, affine in zip(TASKS, fitted, strict=True)}
        return self.calibration

    def findings(self, metrics: Mapping[str, float]) -> Sequence[str]:
        found = []
        for name, share in metrics.items():
            gate = GATE_METRIC.fullmatch(name)
            if gate and not 0.01 <= share <= 0.8:
                found.append(f"expert {gate['expert']} has {share:.1%} of the {gate['task']} gate; usual: 1%-80%")
        return found

    def report(self, model: nn.Module, folder: Path, device: str) -> None:
        if self.config.tracking.log_rows and len(self.held_out("test")):
            self._write_rows(model, folder, device)
        if self.config.tracking.log_report:
            self._draw_calibration(model, folder, device)

    def _draw_calibration(self, model: nn.Module, folder: Path, device: str) -> None:
        table = self.held_out("valid")
        logits = self._predict(model, table, device)[0]
        curves = {
            event: calibration_bins(label, np.exp(probability.log_p.double().numpy()))
            for event, (label, probability) in _events(table, logits).items()
            if len(label)
        }
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        plots.calibration(curves, folder / "plots" / "calibration.png")

    def _write_rows(self, model: nn.Module, folder: Path, device: str) -> None:
        """Label and score of every test row, for the AUCs that are over all rows."""
        table = self.held_out("test")
        events = _events(table, self._predict(model, table, device)[0])
        columns: dict[str, npt.NDArray[Any]] = {}
        for event in ("ctr", "ctcvr"):
            label, probability = events[event]
            columns[f"label/auc_{event}"] = label.astype(np.uint8)
            columns[f"score/auc_{event}"] = probability.log_p.float().numpy()
        write_test_rows(folder, columns)

    def export(self, model: nn.Module, folder: Path) -> ModelExport:
        from pipeline.tasks.mmoe.predict import raw_example  # imports pandas

        save_weights(model.state_dict(), folder / "model.safetensors")
        (folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        write_calibration(folder, self.calibration)
        for name in (SCHEMA_FILE, VOCABULARY_FILE):
            shutil.copyfile(self.folder / name, folder / name)
        return ModelExport(
            folder=folder,
            task="mmoe",
            inputs=self.schema.raw_columns,
            outputs={f"p_{event}": "double" for event in EVENTS},
            example=raw_example(self.folder, rows=5),
        )


def _events(table: ImpressionTable, logits: Tensor) -> dict[str, tuple[Array, LogProbability]]:
    """Labels and log probabilities of each event; conversions given a click are judged on clicked rows alone."""
    click, conversion = (label.astype(np.float64) for label in table.labels)
    z_ctr, z_cvr = logits[:, 0], logits[:, 1]
    clicked = click == 1
    return {
        "ctr": (click, log_probability(z_ctr)),
        "cvr": (conversion[clicked], log_probability(z_cvr[torch.from_numpy(clicked)])),
        "ctcvr": (conversion, product_log_probability(z_ctr, z_cvr)),
    }
