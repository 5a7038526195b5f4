"""Lower bound for an MMoE step: forward and backward pass of its dense part, in fp32, on one batch of embeddings.

Independent of `pipeline`, so that the bound does not change with the measured code.
B = rows, I = F * D inputs, E = experts, H = width of experts and towers, T = 2 tasks.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from bench.figures import Timed

TASKS = 2


class Dense(nn.Module):
    """Experts with one layer, a linear gate per task, towers with one layer: embeddings [B, I] -> logits [T, B]."""

    def __init__(self, inputs: int, experts: int, width: int) -> None:
        super().__init__()
        self.shape = (-1, experts, width)
        self.first = nn.Linear(inputs, experts * width)  # one matrix product for all experts
        self.gates = nn.Linear(inputs, TASKS * experts, bias=False)
        self.second = nn.Parameter(torch.randn(TASKS, width, width) * (2 / width) ** 0.5)
        self.second_bias = nn.Parameter(torch.zeros(TASKS, 1, width))
        self.last = nn.Parameter(torch.randn(TASKS, width, 1) * width**-0.5)
        self.last_bias = nn.Parameter(torch.zeros(TASKS, 1))

    def forward(self, embedded: Tensor) -> Tensor:
        hidden = self.first(embedded).relu_().view(self.shape)  # [B, E, H]
        gates = self.gates(embedded).view(-1, TASKS, self.shape[1]).softmax(-1)  # [B, T, E]
        mixed = torch.bmm(gates, hidden).transpose(0, 1)  # [T, B, H]
        towers = torch.baddbmm(self.second_bias, mixed, self.second).relu_()
        return torch.bmm(towers, self.last).squeeze(-1) + self.last_bias


def loss(logits: Tensor, click: Tensor, conversion: Tensor) -> Tensor:
    """Total loss of the MMoE task with the weights of reference.yaml and the gate open.

    It consists of losses for clicks, for conversions over all rows with a focal term, and for conversions of clicked
    rows. logits: [T, B]; click, conversion: [B].
    """
    z_ctr, z_cvr = logits
    loss_ctr = binary_cross_entropy_with_logits(z_ctr, click, pos_weight=torch.tensor(24.7))
    log_ctr, log_cvr = logsigmoid(logits)
    log_p = log_ctr + log_cvr
    log_1mp = torch.log1p(-torch.exp(log_p.clamp_max(-1e-6)))
    loss_ctcvr = -(300 * conversion * log_p + (1 - conversion) * log_1mp).mean()
    with torch.no_grad():
        factor = torch.where(conversion > 0.5, log_1mp, log_p).exp()
    focal = -(factor * torch.where(conversion > 0.5, log_p, log_1mp)).mean()
    clicked = (click * (softplus(z_cvr) - conversion * z_cvr)).sum() / click.sum().clamp_min(1)
    return loss_ctr + loss_ctcvr + 0.1 * focal + 0.1 * clicked


def timed(step: Callable[[], None], steps: int, batch_size: int) -> Timed:
    """CPU seconds of this process for `steps` steps."""

    def seconds() -> float:
        started = time.process_time()
        for _ in range(steps):
            step()
        return time.process_time() - started

    return Timed(seconds, steps * batch_size)
