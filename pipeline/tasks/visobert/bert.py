"""The forward pass of BERT's kind of encoder on the CPU, over the modules of transformers, in fewer passes over memory.

The same function of the same weights. What differs: query, key and value are one product; bias, dropout, residual and
normalisation are one pass, softmax and its dropout another; activations are rounded to bfloat16 where they are made and
not by every product that reads them; dropout's random bits come from a counter, many at a time.

T = B * L tokens, H = width; B = reviews, L = tokens of the longest, N = B * heads, D = width of a head.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, gelu, layer_norm

from pipeline.compiled import array_of
from pipeline.parallel import over
from pipeline.tasks.visobert import kernels
from pipeline.tasks.visobert.kernels import DROPS

KINDS = ("bert", "roberta", "xlm-roberta")
MOST = 2**63 - 1


def is_bert(model: nn.Module) -> bool:
    """It is one of transformers' encoders that `encode` knows, with nothing unusual asked of it."""
    config = cast(Any, model).config
    usual = getattr(config, "hidden_act", "") == "gelu" and not getattr(config, "is_decoder", False)
    return usual and config.model_type in KINDS and getattr(config, "position_embedding_type", "absolute") == "absolute"


def product_type(model: nn.Module, ids: Tensor) -> torch.dtype | None:
    """What `encode` would calculate products in: as autocast says where it is called; None = it cannot."""
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    fits = ids.is_cpu and kind in (torch.float32, torch.bfloat16) and cast(Any, model).dtype == torch.float32
    return kind if fits else None


def encode(model: nn.Module, ids: Tensor, mask: Tensor, kind: torch.dtype) -> Tensor:
    """The last layer's hidden states [B, L, H] in fp32. ids [B, L]; mask [B, L], true where there is a token."""
    mask = mask.contiguous()
    with torch.autocast("cpu", enabled=False):
        parts = cast(Any, model)
        hidden = _embedded(parts.embeddings, ids).flatten(0, 1)
        low = hidden.to(kind)
        for layer in parts.encoder.layer:
            hidden, low = _layer(layer, hidden, low, mask)
        return hidden.view(*ids.shape, -1)


def _embedded(module: Any, ids: Tensor) -> Tensor:
    """[B, L, H], positions as the model's kind counts them."""
    if hasattr(module, "create_position_ids_from_input_ids"):
        positions = module.create_position_ids_from_input_ids(ids, module.padding_idx)
    else:
        positions = torch.arange(ids.shape[1])
    found = module.word_embeddings(ids) + module.token_type_embeddings.weight[0]
    table = module.position_embeddings
    found = found + embedding(positions, table.weight, table.padding_idx)
    norm = module.LayerNorm
    return dropout(layer_norm(found, norm.normalized_shape, norm.weight, norm.bias, norm.eps), module.dropout)


def _layer(layer: Any, hidden: Tensor, low: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [T, H]; low: the same in the products' precision."""
    attention = layer.attention.self
    mixed = _product(low, attention.query, attention.key, attention.value)
    mixed = _apply(_Attention, mixed, mask, attention.num_attention_heads, *_dropping(attention.dropout))
    hidden, low = _added(layer.attention.output, _product(mixed, layer.attention.output.dense), hidden)
    return _added(layer.output, _product(gelu(_product(low, layer.intermediate.dense)), layer.output.dense), hidden)


def _product(x: Tensor, *modules: nn.Linear) -> Tensor:
    """What linear layers make of the same x, side by side: [T, sum of widths]"""
    weights, biases = [module.weight for module in modules], [module.bias for module in modules]
    return cast(Tensor, _apply(_Product, x, len(modules), *weights, *biases))


def _added(module: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised residual + dropout(x), in fp32 and in x's precision."""
    norm = module.LayerNorm
    found = _apply(_Normed, x, residual, norm.weight, norm.bias, norm.eps, *_dropping(module.dropout))
    return found if isinstance(found, tuple) else (found, found)


def _dropping(module: nn.Module) -> tuple[int, int]:
    """Of a dropout module: of 65,536 values how many it drops now, and a key of their random bits."""
    assert isinstance(module, nn.Dropout)
    count = round(module.p * DROPS) if module.training else 0
    return count, int(torch.randint(MOST, ())) if 0 < count < DROPS else 0


def dropout(x: Tensor, module: nn.Module) -> Tensor:
    """x through a dropout module. On the CPU its share is rounded to 1/65,536, and kept values are scaled to that."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return cast(Tensor, module(x))
    count, key = _dropping(module)
    return cast(Tensor, _apply(_Dropped, x, count, key)) if count else x


class Dropout(nn.Dropout):
    """nn.Dropout with random bits that are made many at a time, on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return super().forward(x)
        return dropout(x, self)


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, key: int) -> Tensor:
        ctx.dropping = count, key
        return _drop(x, count, key)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _drop(gradient, *ctx.dropping), None, None


def _drop(x: Tensor, count: int, key: int) -> Tensor:
    rows = x.contiguous().view(-1, x.shape[-1])
    out = torch.empty_like(rows)
    given = array_of(rows), array_of(out), np.uint64(key), count, _scale(count)
    over(len(rows), rows.numel(), lambda first, last: kernels.dropped(*given, first, last))
    return out.view_as(x)


class _Product(torch.autograd.Function):
    """x [T, I] with weights [O, I] and biases [O] each: x W^T + b, calculated in x's precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Tensor) -> Tensor:
        weight, bias = (_joined(parameters[start : start + count], x.dtype) for start in (0, count))
        ctx.save_for_backward(x, weight)
        ctx.widths = [len(part) for part in parameters[:count]]
        return torch.addmm(bias, x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        wanted = ctx.needs_input_grad
        of_x = gradient @ weight if wanted[0] else None
        of_parameters: list[Tensor | None] = [None] * (len(wanted) - 2)
        if any(wanted[2:]):
            count = len(ctx.widths)
            of_parameters[:count] = torch.split((_transposed(gradient) @ x).float(), ctx.widths)
            of_parameters[count:] = torch.split(gradient.sum(0).float(), ctx.widths)
        return of_x, None, *of_parameters


def _joined(parts: Sequence[Tensor], kind: torch.dtype) -> Tensor:
    """One below the other, in another precision."""
    if len(parts) == 1:
        return parts[0].detach().to(kind)
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=kind)
    for own, part in zip(torch.split(whole, [len(part) for part in parts]), parts, strict=True):
        own.copy_(part.detach())
    return whole


def _transposed(matrix: Tensor) -> Tensor:
    """[W, T] of a matrix [T, W]; in bfloat16 laid out anew: a product of columns takes twice as long."""
    if matrix.dtype != torch.bfloat16:
        return matrix.T
    out = matrix.new_empty(matrix.shape[::-1])
    given = array_of(matrix), array_of(out)
    over(len(out), out.numel(), lambda first, last: kernels.transposed(*given, first, last))
    return out


class _Attention(torch.autograd.Function):
    """mixed [T, 3 H]: query, key and value, heads side by side; mask [B, L]. Returns [T, H]."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, mask: Tensor, heads: int, *dropping: int) -> Tensor:
        count, key = dropping
        query, keys, values = _split(mixed, mask, heads, 3)
        scores = query @ keys.mT
        shares = torch.empty_like(scores)
        thinned = torch.empty_like(scores) if count else shares
        ctx.scaling = np.float32(query.shape[-1] ** -0.5)
        given = (array_of(scores), mask.numpy(), ctx.scaling, np.uint64(key), count, _scale(count), array_of(shares),
                 array_of(thinned))  # fmt: skip
        over(len(scores), scores.numel(), lambda first, last: kernels.attended(*given, first, last))
        ctx.save_for_backward(query, keys, values, shares, thinned, mask)
        ctx.heads, ctx.count = heads, count
        return _merge((thinned @ values).unsqueeze(0), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, keys, values, shares, thinned, mask = ctx.saved_tensors
        (own,) = _split(gradient.contiguous(), mask, ctx.heads, 1)
        of_scores = own @ values.mT
        given = array_of(of_scores), array_of(shares), array_of(thinned), ctx.scaling, _scale(ctx.count)
        over(len(shares), shares.numel(), lambda first, last: kernels.attended_backward(*given, first, last))
        found = torch.stack([of_scores @ keys, of_scores.mT @ query, thinned.mT @ own])
        return _merge(found, mask), None, None, None, None


def _split(rows: Tensor, mask: Tensor, heads: int, parts: int) -> Tensor:
    """[T, parts * H] -> [parts, N, L, D]"""
    length = mask.shape[1]
    out = rows.new_empty(parts, len(mask) * heads, length, rows.shape[1] // (parts * heads))
    given = array_of(rows), array_of(out), length
    over(len(rows), rows.numel(), lambda first, last: kernels.split(*given, first, last))
    return out


def _merge(divided: Tensor, mask: Tensor) -> Tensor:
    """[parts, N, L, D] -> [T, parts * H]"""
    rows = divided.new_empty(mask.numel(), divided.numel() // mask.numel())
    given = array_of(divided), array_of(rows), mask.shape[1]
    over(len(rows), rows.numel(), lambda first, last: kernels.merge(*given, first, last))
    return rows


class _Normed(torch.autograd.Function):
    """x, residual [T, H]; weight, shift [H]. Of the normalised residual + dropout(x): in fp32, and in x's precision if
    that is another.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, *numbers: Any) -> Any:
        eps, count, key = numbers
        added, out, statistics = torch.empty_like(residual), torch.empty_like(residual), residual.new_empty(len(x), 2)
        low = torch.empty_like(x if x.dtype != out.dtype else x[:0])
        ctx.dropping = np.uint64(key), count, _scale(count)
        given = (*map(array_of, (x, residual, weight, shift)), np.float32(eps), *ctx.dropping,
                 *map(array_of, (added, statistics, out, low)))  # fmt: skip
        over(len(x), x.numel(), lambda first, last: kernels.normed(*given, first, last))
        ctx.save_for_backward(added, statistics, weight)
        ctx.kind = x.dtype
        ctx.set_materialize_grads(False)
        return (out, low) if len(low) else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, low_gradient: Tensor | None = None) -> Any:
        added, statistics, weight = ctx.saved_tensors
        gradient = torch.zeros_like(added) if gradient is None else gradient.contiguous()
        of_residual, of_x = torch.empty_like(added), torch.empty_like(added, dtype=ctx.kind)
        low = of_x[:0] if low_gradient is None else low_gradient.contiguous()
        sums: dict[int, Tensor] = {}
        given = (*map(array_of, (gradient, low, added, statistics, weight)), *ctx.dropping,
                 *map(array_of, (of_x, of_residual)))  # fmt: skip

        def part(first: int, last: int) -> None:
            sums[first] = added.new_zeros(2, added.shape[1])
            kernels.normed_backward(*given, array_of(sums[first]), first, last)

        over(len(added), added.numel(), part)
        of_weight, of_shift = torch.stack([sums[first] for first in sorted(sums)]).sum(0)
        return of_x, of_residual, of_weight, of_shift, None, None, None


def _scale(count: int) -> Any:
    """What kept values are multiplied by where of 65,536 so many are dropped."""
    return np.float32(DROPS / (DROPS - count) if count < DROPS else 0)
