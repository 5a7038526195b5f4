"""The model against a naive one: Python loops over rows, features, experts and tasks, in double precision."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.layout import Layout
from pipeline.data.schema import BaseRates, Feature
from pipeline.tasks.mmoe.config import (
    ExpertsConfig,
    GateConfig,
    HeadConfig,
    HeadsConfig,
    ModelConfig,
    TowersConfig,
)
from pipeline.tasks.mmoe.impressions.embedding import grouped
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions
from pipeline.tasks.mmoe.model import FeatureEmbedding, GroupedLayers, Mmoe

torch.set_num_threads(1)

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]  # categorical: id; multi: list of (id, weight); numeric: a number

COLOUR = Feature(name="colour", kind="categorical", size=4)
PRICE = Feature(name="price", kind="numeric", edges=(0.0, 1.0, 3.0))
TAGS = Feature(name="tags", kind="multi", size=6, weighted=True, weight_separator=":")
SLOT = Feature(name="slot", kind="categorical", size=3)
TOPICS = Feature(name="topics", kind="multi", size=5)
AGE = Feature(name="age", kind="numeric", edges=(-2.0, -1.5, 0.0, 4.0, 10.0))
ALL = (COLOUR, PRICE, TAGS, SLOT, TOPICS, AGE)
RATES = BaseRates(ctr=0.04, cvr=0.25)

HEADS = [HeadConfig(wide=wide, fm=fm, deep=deep) for wide, fm, deep in itertools.product([False, True], repeat=3)
         if wide or fm or deep]  # fmt: skip


def layout_of(features: Sequence[Feature]) -> Layout:
    return Layout(tuple(features))


def random_rows(features: Sequence[Feature], count: int, seed: int) -> list[Row]:
    """Empty bags, repeated ids, and numbers on, between and outside of the edges."""
    random = np.random.Generator(np.random.PCG64(seed))
    rows: list[Row] = []
    for _ in range(count):
        row: Row = {}
        for feature in features:
            if feature.kind == "categorical":
                row[feature.name] = int(random.integers(feature.size))
            elif feature.kind == "multi":
                size = int(random.integers(0, 5))
                ids = random.integers(feature.size, size=size).tolist()
                weights = random.normal(size=size).tolist() if feature.weighted else [1 / max(1, size)] * size
                row[feature.name] = list(zip(ids, weights, strict=True))
            else:
                low, high = feature.edges[0] - 2, feature.edges[-1] + 2
                row[feature.name] = float(random.choice([random.uniform(low, high), random.choice(feature.edges)]))
        rows.append(row)
    return rows


def batch_of(rows: Sequence[Row], features: Sequence[Feature]) -> Impressions:
    layout = layout_of(features)
    ids, weights, bags, starts = [], [], [], [0]
    for row in rows:
        for feature, offset in zip(layout.id_features, first_rows(layout), strict=True):
            bag = row[feature.name] if feature.kind == "multi" else [(row[feature.name], 1.0)]
            ids += [offset + one for one, _ in bag]
            weights += [weight for _, weight in bag]
            bags += [len(starts) - 1] * len(bag)
            starts.append(len(ids))
    flat = np.array(ids, np.int32), np.array(bags, np.int32), np.array(weights, np.float32)
    size = len(rows)
    return Impressions(
        click=torch.zeros(size),
        conversion=torch.zeros(size),
        numeric=torch.tensor([[row[one.name] for one in layout.numeric_features] for row in rows]).float(),
        ids=torch.from_numpy(flat[0]),
        weights=torch.from_numpy(flat[2]),
        starts=torch.tensor(starts, dtype=torch.int32),
        groups=grouped(*flat),
    )


def first_rows(layout: Layout) -> list[int]:
    return [sum(feature.size for feature in layout.id_features[:index]) for index in range(len(layout.id_features))]


def model_of(features: Sequence[Feature], seed: int = 0, sparse: bool = False, **settings_: Any) -> Mmoe:
    """A model with every weight random: what starts at 0 or 1 would hide mistakes."""
    sizes = {
        "embedding_dim": 3,
        "experts": ExpertsConfig(count=4, hidden=(5, 6)),
        "towers": TowersConfig(hidden=(7, 2)),
    }
    model = Mmoe(ModelConfig(**(sizes | settings_)), layout_of(features), RATES, sparse)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5, generator=generator)
    return model.eval()


def encode(value: float, edges: Sequence[float]) -> list[float]:
    """One number a bin: 0 below it, 1 above it, the share passed within it."""
    code = []
    for low, high in itertools.pairwise(edges):
        code.append(0.0 if value < low else 1.0 if value >= high else (value - low) / (high - low))
    return code


def naive_embedding(weights: dict[str, Floats], layout: Layout, row: Row) -> list[Floats]:
    """A vector of D + W numbers for each feature."""
    table, vectors = weights["embedding.table"], []
    for feature, offset in zip(layout.id_features, first_rows(layout), strict=True):
        bag = row[feature.name] if feature.kind == "multi" else [(row[feature.name], 1.0)]
        total = np.zeros(table.shape[1])
        for one, weight in bag:
            total = total + np.float64(np.float32(weight)) * table[offset + one]
        vectors.append(total)
    for number, feature in enumerate(layout.numeric_features):
        total = weights["embedding.numeric_bias"][number]
        for bin_, share in enumerate(encode(np.float32(row[feature.name]), feature.edges)):
            total = total + share * weights["embedding.numeric_weight"][number, bin_]
        vectors.append(total)
    return vectors


def naive_layers(weights: dict[str, Floats], name: str, group: int, hidden: Floats) -> Floats:
    layer = 0
    while f"{name}.weights.{layer}" in weights:
        matrix, bias = weights[f"{name}.weights.{layer}"][group], weights[f"{name}.biases.{layer}"][group, 0]
        hidden = np.array([
            max(0.0, sum(hidden[i] * matrix[i, j] for i in range(len(hidden))) + bias[j]) for j in range(len(bias))
        ])  # fmt: skip
        layer += 1
    return hidden


def naive_row(model: Mmoe, layout: Layout, row: Row) -> tuple[list[float], list[list[float]] | None]:
    """Logits [T] and gates [T, E] of one row."""
    weights = {name: weight.detach().double().numpy() for name, weight in model.state_dict().items()}
    config, width = model.config, model.config.embedding_dim
    vectors = naive_embedding(weights, layout, row)
    visible = np.concatenate([vector[:width] for vector in vectors])
    heads = [config.heads.ctr, config.heads.cvr]
    deep = [task for task in range(2) if heads[task].deep]
    wide = [task for task in range(2) if heads[task].wide]
    gates: list[list[float]] = []
    logits = []
    for task in range(2):
        logit = weights["bias"][task]
        if heads[task].deep:
            position = deep.index(task)
            if config.kind == "mmoe":
                scores = [
                    float(np.dot(weights["gate.weight"][position * config.experts.count + expert], visible))
                    / config.gate.temperature
                    for expert in range(config.experts.count)
                ]
                exponentials = [math.exp(score - max(scores)) for score in scores]
                gate = [one / sum(exponentials) for one in exponentials]
                gates.append(gate)
            else:
                gate = [1.0]
            mixed = sum(share * naive_layers(weights, "experts", expert, visible) for expert, share in enumerate(gate))
            logit += float(np.dot(naive_layers(weights, "towers", position, mixed), weights["last"][position]))
        if heads[task].fm:
            for one, other in itertools.combinations(vectors, 2):
                logit += float(np.dot(one[:width], other[:width]))
        if heads[task].wide:
            logit += sum(float(vector[width + wide.index(task)]) for vector in vectors)
        logits.append(logit)
    return logits, gates or None


def assert_is_naive(model: Mmoe, features: Sequence[Feature], rows: Sequence[Row]) -> None:
    expected = [naive_row(model, layout_of(features), row) for row in rows]
    with torch.no_grad():
        output = model(batch_of(rows, features))
    assert output.logits.shape == (len(rows), 2)
    assert output.logits.dtype == torch.float32
    # some 60 terms of fp32 a logit, which may cancel: 60 roundings of 6e-8, on terms of size 10
    np.testing.assert_allclose(output.logits.numpy(), [logits for logits, _ in expected], rtol=1e-4, atol=1e-4)
    gates = [gates for _, gates in expected]
    if gates[0] is None:
        assert output.gates is None
    else:
        assert output.gates is not None
        # an error of a gate's score is a relative one of the share: 18 roundings, on scores up to 30
        np.testing.assert_allclose(output.gates.numpy(), gates, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["mmoe", "shared_bottom"])
@pytest.mark.parametrize("ctr", HEADS, ids=str)
def test_forward_with_any_parts_of_any_head(kind: str, ctr: HeadConfig) -> None:
    for cvr in HEADS:
        model = model_of(ALL, kind=kind, heads=HeadsConfig(ctr=ctr, cvr=cvr))
        assert_is_naive(model, ALL, random_rows(ALL, 2, seed=1))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([one.name for one in ALL]), min_size=1, max_size=6, unique=True),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["mmoe", "shared_bottom"]),
            "embedding_dim": st.integers(1, 4),
            "experts": st.fixed_dictionaries(
                {"count": st.integers(1, 4), "hidden": st.lists(st.integers(1, 4), min_size=1, max_size=2)}
            ),
            "towers": st.fixed_dictionaries({"hidden": st.lists(st.integers(1, 4), max_size=2)}),
            "gate": st.fixed_dictionaries({"temperature": st.sampled_from([0.3, 1.0, 2.5])}),
            "heads": st.fixed_dictionaries({"ctr": st.sampled_from(HEADS), "cvr": st.sampled_from(HEADS)}),
        }
    ),
    st.integers(0, 1000),
)
def test_forward_of_any_shape(names: list[str], config: dict[str, Any], seed: int) -> None:
    """Towers without layers, one expert, one feature, no numeric feature or no other, one row."""
    features = [feature for feature in ALL if feature.name in names]
    assert_is_naive(model_of(features, seed, **config), features, random_rows(features, seed % 4 + 1, seed))


def test_factorisation_machine_by_hand() -> None:
    """Three features with vectors (1, 2), (3, -1) and 0.5 * (2, 4) + 2 * (0, 1) = (1, 4):
    products 3 - 2, 1 + 8 and 3 - 4 sum to 9."""
    features = (SLOT, COLOUR, TAGS)
    head = HeadConfig(fm=True, deep=False)
    model = model_of(features, embedding_dim=2, heads=HeadsConfig(ctr=head, cvr=head))
    with torch.no_grad():
        model.embedding.table.zero_()
        for row, vector in ((1, (1, 2)), (3 + 2, (3, -1)), (7 + 0, (2, 4)), (7 + 5, (0, 1))):
            model.embedding.table[row] = torch.tensor(vector).float()
        model.bias.copy_(torch.tensor([0.0, 100.0]))
        logits = model(batch_of([{"slot": 1, "colour": 2, "tags": [(0, 0.5), (5, 2.0)]}], features)).logits
    assert logits.tolist() == [[9.0, 109.0]]


def test_heads_without_deep_have_no_experts() -> None:
    head = HeadConfig(wide=True, fm=False, deep=False)
    model = model_of(ALL, heads=HeadsConfig(ctr=head, cvr=head))
    assert model.experts is None
    assert model.gate is None
    assert model.towers is None
    assert sum(1 for name, _ in model.named_parameters() if not name.startswith("embedding")) == 1  # the bias


@pytest.mark.parametrize("kind", ["mmoe", "shared_bottom"])
@pytest.mark.parametrize(("ctr", "cvr"), [(0.04, 0.03), (0.5, 0.9)])
def test_first_logits_are_the_base_rates(kind: str, ctr: float, cvr: float) -> None:
    """Biases start at the log odds; wide weights start at 0; the rest starts near 0 and does not move the mean much."""
    heads = HeadsConfig(ctr=HeadConfig(wide=True, fm=True), cvr=HeadConfig(wide=True))
    torch.manual_seed(0)
    model = Mmoe(ModelConfig(kind=kind, heads=heads), layout_of(ALL), BaseRates(ctr=ctr, cvr=cvr))
    batch = batch_of(random_rows(ALL, 50, seed=5), ALL)
    odds = torch.tensor([math.log(ctr / (1 - ctr)), math.log(cvr / (1 - cvr))])
    with torch.no_grad():
        near = model(batch).logits
        torch.testing.assert_close(near.mean(0), odds, rtol=0, atol=0.3)
        assert near.std(0).min() > 0  # not all the same
        model.embedding.table[:, :8] = 0
        model.embedding.numeric_weight[..., :8] = 0
        torch.testing.assert_close(model(batch).logits, odds.expand(50, 2), rtol=1e-5, atol=0)


def test_base_rates_of_zero_and_one_are_bounded() -> None:
    """A millionth, and one minus it."""
    model = Mmoe(ModelConfig(), layout_of(ALL), BaseRates(ctr=1.0, cvr=0.0))
    assert model.bias.tolist() == pytest.approx([math.log(999_999), -math.log(999_999)], rel=1e-6)


def test_experts_start_with_equal_shares() -> None:
    model = Mmoe(ModelConfig(), layout_of(ALL), RATES)
    with torch.no_grad():
        gates = model(batch_of(random_rows(ALL, 3, seed=6), ALL)).gates
    torch.testing.assert_close(gates, torch.full((3, 2, 4), 0.25))


def test_noise_acts_in_training_only() -> None:
    """On the gate's logits, before the temperature: with equal logits, log shares are noise / temperature about their
    mean, whose variance over E experts is (E - 1) / E of that."""
    noise, temperature, experts, rows = 0.8, 2.0, 4, 3000
    model = model_of(ALL, gate=GateConfig(noise=noise, temperature=temperature))
    quiet = model_of(ALL, gate=GateConfig(temperature=temperature))
    batch = batch_of(random_rows(ALL, 1, seed=7) * rows, ALL)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(model(batch).gates, quiet(batch).gates)
        model.gate.weight.zero_()
        one, other = model.train()(batch).gates, model(batch).gates
        still = quiet.train()(batch)
        assert torch.equal(still.logits, quiet.eval()(batch).logits)
    assert not torch.equal(one, other)
    logs = one.log()
    centred = logs - logs.mean(-1, keepdim=True)
    expected = noise / temperature * math.sqrt((experts - 1) / experts)
    assert centred.std().item() == pytest.approx(expected, rel=0.05)  # 24,000 draws: 5% is some ten standard errors
    assert abs(torch.corrcoef(centred[:, :, 0].T)[0, 1].item()) < 0.1  # of its own for each task


@pytest.mark.parametrize(
    "dropout",
    [
        {"embedding_dropout": 0.5},
        {"experts": ExpertsConfig(count=4, hidden=(5, 6), dropout=0.5)},
        {"towers": TowersConfig(hidden=(7, 2), dropout=0.5)},
    ],
    ids=["embedding", "experts", "towers"],
)
def test_dropout_acts_in_training_only(dropout: dict[str, Any]) -> None:
    rows = random_rows(ALL, 12, seed=8)
    model, plain = model_of(ALL, **dropout), model_of(ALL)
    batch = batch_of(rows, ALL)
    torch.manual_seed(2)
    with torch.no_grad():
        assert torch.equal(model(batch).logits, plain(batch).logits)
        model.train()
        assert not torch.equal(model(batch).logits, model(batch).logits)
        assert torch.equal(plain.train()(batch).logits, plain.eval()(batch).logits)


def loss_of(model: Mmoe, batch: Impressions) -> torch.Tensor:
    logits = model(batch).logits
    return (logits * torch.tensor([1.0, -2.0]) + logits.square()).sum()


def test_sparse_and_dense_tables_have_the_same_gradient() -> None:
    """Values, and every other gradient too; rows that no bag names have none."""
    heads = HeadsConfig(ctr=HeadConfig(wide=True, fm=True), cvr=HeadConfig(wide=True))
    dense, sparse = (model_of(ALL, sparse=kind, heads=heads) for kind in (False, True))
    rows = random_rows(ALL, 5, seed=9)
    batch = batch_of(rows, ALL)
    losses = [loss_of(model, batch) for model in (dense, sparse)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for (name, one), (_, other) in zip(dense.named_parameters(), sparse.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert other.grad.is_sparse == (name == "embedding.table")
        torch.testing.assert_close(one.grad, other.grad.to_dense(), rtol=1e-4, atol=1e-4)  # sums in another order
    named = {
        offset + one
        for row in rows
        for feature, offset in zip(layout_of(ALL).id_features, first_rows(layout_of(ALL)), strict=True)
        for one in ([row[feature.name]] if feature.kind == "categorical" else [one for one, _ in row[feature.name]])
    }
    assert 0 < len(named) < 18
    touched = {row for row in range(18) if dense.embedding.table.grad[row].any()}
    assert touched == named
    assert set(sparse.embedding.table.grad.coalesce().indices()[0].tolist()) == named


@pytest.mark.parametrize("kind", ["mmoe", "shared_bottom"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    """From the start on, when gates are even and wide weights are 0."""
    heads = HeadsConfig(ctr=HeadConfig(wide=True, fm=True), cvr=HeadConfig(wide=True))
    torch.manual_seed(3)
    model = Mmoe(ModelConfig(kind=kind, heads=heads), layout_of(ALL), RATES)
    loss_of(model, batch_of(random_rows(ALL, 400, seed=10), ALL)).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        if name == "embedding.numeric_weight":  # price has two bins; the rest of its room is not used
            assert weight.grad[0, :2].abs().amin() > 0
            assert not weight.grad[0, 2:].any()
            assert weight.grad[1].abs().amin() > 0
        elif name.startswith(("experts", "towers", "last")):  # a unit that never fires has none
            assert (weight.grad.flatten(1).abs().amax(1) > 0).all(), name  # but each expert and tower has some
        else:
            assert weight.grad.abs().amin() > 0, name


# Edges 0, 1, 3 make two bins, (0, 1) and (1, 3); -2 to 10 make four.
@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (-3e38, [0, 0]),
        (-5.0, [0, 0]),
        (0.0, [0, 0]),
        (0.25, [0.25, 0]),
        (1.0, [1, 0]),
        (1.5, [1, 0.25]),
        (3.0, [1, 1]),
        (99.0, [1, 1]),
        (3e38, [1, 1]),
    ],
)
def test_piecewise_linear_encoding_by_hand(price: float, expected: list[float]) -> None:
    """Numeric weights that are the identity show the code; the bins that price has not are 0."""
    embedding = FeatureEmbedding(layout_of((PRICE, AGE)), width=4, wide_width=0, sparse=False)
    with torch.no_grad():
        embedding.numeric_weight.copy_(torch.eye(4).expand(2, 4, 4))
        vectors = embedding(batch_of([{"price": price, "age": -1.0}], (PRICE, AGE)))
    assert vectors.shape == (1, 2, 4)
    assert vectors[0, 0].tolist() == pytest.approx([*expected, 0, 0])
    assert vectors[0, 1].tolist() == pytest.approx([1, 1 / 3, 0, 0])


def test_weights_depend_on_the_seed_alone() -> None:
    models = []
    for seed, sparse in ((0, False), (0, True), (1, False)):
        torch.manual_seed(seed)
        models.append(Mmoe(ModelConfig(), layout_of(ALL), RATES, sparse).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["embedding.table"], models[2]["embedding.table"])


def test_layers_start_at_the_scale_of_he() -> None:
    """Variance 2 / inputs (He et al. 2015): 64,000 weights, so 2% is some seven standard errors."""
    torch.manual_seed(5)
    layers = GroupedLayers(4, [40, 400], dropout=0.0)
    assert layers.weights[0].std().item() == pytest.approx(math.sqrt(2 / 40), rel=0.02)
    assert not layers.biases[0].any()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "heads",
    [HeadsConfig(), HeadsConfig(ctr=HeadConfig(wide=True, fm=True), cvr=HeadConfig(wide=True))],
    ids=["deep", "all parts"],
)
def test_autocast(kind: torch.dtype, heads: HeadsConfig) -> None:
    """Logits and gates leave in single precision, near what they are without."""
    model, batch = model_of(ALL, heads=heads), batch_of(random_rows(ALL, 30, seed=12), ALL)
    with torch.autocast("cpu", dtype=kind):
        output = model(batch)
        output.logits.sum().backward()
    exact = model(batch)
    assert output.logits.dtype == output.gates.dtype == torch.float32
    # bf16 rounds by 2^-8: the vectors, two layers of experts, their mix, two of towers, the last
    size = float(exact.logits.detach().abs().max())
    torch.testing.assert_close(output.logits, exact.logits, rtol=0, atol=7 * 2**-8 * size)
    torch.testing.assert_close(output.gates, exact.gates, rtol=0.1, atol=0.02)
    torch.testing.assert_close(output.gates.sum(-1), torch.ones(30, 2))
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
