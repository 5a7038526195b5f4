"""Named losses of the MMoE task, and the influence of each on the shared layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.compute import distributed
from pipeline.compute.device import AMP, precision
from pipeline.config.loss_config import never_starts
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
from pipeline.tasks.base import TOTAL
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions
from pipeline.tasks.mmoe.model import Mmoe, Output

COMPONENTS = ("loss_ctr", "loss_ctcvr_bce", "loss_ctcvr_focal", "loss_cvr_aux")
CTR_TOWER = "influence/focal_grad_ctr_tower"


def weighted_sum(values: Tensor, batch: Impressions) -> Tensor:
    """Sum of a value per row [B], multiplied by the rows' weights if they have any."""
    return values.sum() if batch.sample_weight is None else (values * batch.sample_weight).sum()


class Objective:
    """The methods of `Task` that compute the loss terms from the model's output."""

    def __init__(self, config: MmoeConfig, click_only: bool = False) -> None:
        """click_only: the data have no conversion labels, so that `loss_ctr` is the only loss."""
        self.config, self.focal, self.click_only = config, config.loss.aux_focal, click_only

    def counts(self, batch: Impressions) -> Mapping[str, Tensor]:
        """Numbers of rows, clicks and conversions, or the sums of their weights."""
        weight = batch.sample_weight
        rows = torch.full((), float(len(batch)), device=batch.click.device) if weight is None else weight.sum()
        clicks, conversions = weighted_sum(batch.click, batch), weighted_sum(batch.conversion, batch)
        return {"rows": rows, "clicks": clicks, "conversions": conversions}

    def losses(
        self, output: Output, batch: Impressions, counts: Mapping[str, Tensor], step: int
    ) -> Mapping[str, Tensor]:
        esmm = self.config.esmm
        if self.click_only:
            terms = {"loss_ctr": self._click_loss(log_probability(output.logits[:, 0]), batch, counts)}
            total = esmm.lambda_ctr * terms["loss_ctr"]
        else:
            terms = self._funnel_terms(output, batch, counts, step)
            total = (
                esmm.lambda_ctr * terms["loss_ctr"]
                + esmm.lambda_ctcvr * terms["loss_ctcvr"]
                + esmm.lambda_cvr_aux * terms["loss_cvr_aux"]
            )
        for name, value in self._regularisers(output, batch, counts["rows"]).items():
            terms[name] = value
            total = total + value
        return terms | {TOTAL: total}

    def _click_loss(self, ctr: LogProbability, batch: Impressions, counts: Mapping[str, Tensor]) -> Tensor:
        values = binary_cross_entropy(ctr, batch.click, self.config.loss.pos_weight("ctr"))
        return weighted_sum(values, batch) / counts["rows"]

    def _funnel_terms(
        self, output: Output, batch: Impressions, counts: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """Losses of click and conversion (ESMM, Ma et al. 2018, equation 3), and the focal loss from the gate on."""
        loss = self.config.loss
        z_ctr, z_cvr = output.logits.unbind(1)
        click, conversion, rows = batch.click, batch.conversion, counts["rows"]
        ctr, cvr = log_probability(z_ctr), log_probability(z_cvr)
        ctcvr = product(ctr, cvr)
        bce = weighted_sum(binary_cross_entropy(ctcvr, conversion, loss.ctcvr_pos_weight(step)), batch) / rows
        clicks = torch.where(counts["clicks"] > 0, counts["clicks"], 1.0)
        terms = {
            "loss_ctr": self._click_loss(ctr, batch, counts),
            "loss_ctcvr_bce": bce,
            "loss_cvr_aux": weighted_sum(clicked_cross_entropy(cvr, click, conversion), batch) / clicks,
        }
        ctcvr_loss = bce
        if self.focal.is_on(step):
            reduced = AMP.get(precision(self.config.training.amp, click.device.type))
            if not self.focal.compute_fp32 and reduced is not None:
                ctcvr = product_log_probability(z_ctr.to(reduced), z_cvr.to(reduced))
            terms |= self._focal_terms(ctcvr, batch, counts, step)
            ctcvr_loss = bce + self.focal.lambda_ * terms["loss_ctcvr_focal"]
        return terms | {"loss_ctcvr": ctcvr_loss}

    def _focal_terms(
        self, ctcvr: LogProbability, batch: Impressions, counts: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        focal, conversion = self.focal, batch.conversion
        values = binary_focal(ctcvr, conversion, focal.gamma, focal.class_weight, focal.detach_p_for_weight)
        terms = {"loss_ctcvr_focal": weighted_sum(values.float(), batch) / counts["rows"]}
        if self.config.tracking.probes(step):
            factor = binary_focal_factor(ctcvr, conversion, focal.gamma).detach().float()
            positives = counts["conversions"]  # without positives: 0/0, which is not logged
            terms["influence/focal_factor_positive"] = weighted_sum(factor * conversion, batch) / positives
            negative = weighted_sum(factor * (1 - conversion), batch)
            terms["influence/focal_factor_negative"] = negative / (counts["rows"] - positives)
        return terms

    def _regularisers(self, output: Output, batch: Impressions, rows: Tensor) -> dict[str, Tensor]:
        """Regularisers with their weights, which are means over rows. rows: count of the whole optimizer step."""
        gate, gates, terms = self.config.model.gate, output.gates, dict[str, Tensor]()
        if gates is None or not (gate.entropy_weight or gate.balance_weight):
            return terms
        share, relative = len(batch) / rows, None
        if batch.sample_weight is not None:  # divided by the micro-batch's mean weight, they make weighted means
            mean = distributed.all_reduce_mean(batch.sample_weight)
            share, relative = share * mean, batch.sample_weight / mean
        if gate.entropy_weight:
            deficit = gate_entropy_deficit(gates)
            deficit = deficit if relative is None else deficit * relative
            terms["loss_gate_entropy"] = gate.entropy_weight * deficit.mean() * share
        if gate.balance_weight:
            gates = gates if relative is None else gates * relative[:, None, None]
            imbalance = gate_imbalance(distributed.all_reduce_mean(gates)[None])
            terms["loss_gate_balance"] = gate.balance_weight * imbalance * share
        return terms

    def scheduled_values(self, step: int) -> Mapping[str, float | bool]:
        if self.click_only:
            return {}
        return {
            "pos_weight_ctcvr": self.config.loss.ctcvr_pos_weight(step),
            "aux_focal_on": self.focal.is_on(step),
            "aux_focal_lambda": self.focal.lambda_ if self.focal.enabled else 0.0,
            "aux_focal_gamma": self.focal.gamma,
        }

    def logged_losses(self, names: Sequence[str]) -> Sequence[str]:
        return names if self.focal.log_components else [TOTAL]

    def probe(self, model: Mmoe, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients of the loss terms at the experts, and of the focal loss at the CTR tower; empty without experts."""
        if model.experts is None or model.towers is None or not self.focal.log_components:
            return {}
        shared = list(model.experts.parameters())
        probed = {name: flat(gradients(losses[name], shared)) for name in COMPONENTS if name in losses}
        if "loss_ctcvr_focal" in losses and 0 in model.deep_heads:  # 0: the CTR head
            towers = [*model.towers.parameters(), model.last]  # axis 0: the deep heads, in the order of `deep_heads`
            row = model.deep_heads.index(0)
            probed[CTR_TOWER] = flat(part[row] for part in gradients(losses["loss_ctcvr_focal"], towers))
        return probed

    def influence(self, probed: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.focal.log_components:
            return {}
        values = {f"influence/grad_norm/{name}": norm(probed[name]) for name in COMPONENTS if name in probed}
        if "loss_ctcvr_focal" in losses:
            ratio = self.focal.lambda_ * losses["loss_ctcvr_focal"] / losses["loss_ctcvr_bce"]
            values["influence/focal_over_bce"] = ratio
        if "loss_ctcvr_focal" in probed:
            values["influence/cosine_bce_focal"] = cosine(probed["loss_ctcvr_bce"], probed["loss_ctcvr_focal"])
        if CTR_TOWER in probed:
            values[CTR_TOWER] = norm(probed[CTR_TOWER])
        return values | {name: value for name, value in losses.items() if name.startswith(PREFIX)}

    def warnings(self, total_steps: int) -> Sequence[str]:
        late, amp = self.config.loss.late_pos_weight, self.config.training.amp
        warnings = self.focal.run_warnings("loss.aux_focal", total_steps, amp)
        if late.ctcvr:
            effect = "the weight of conversions will never rise"
            warnings += never_starts("loss.late_pos_weight.warmup_steps", late.warmup_steps, total_steps, effect)
        return warnings
