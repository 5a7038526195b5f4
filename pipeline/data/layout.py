"""Where features lie in the fused embedding table and in the model's input."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from pipeline.data.schema import Feature


@dataclass(frozen=True)
class Layout:
    """The features in the model's order: id features, each with its rows of the fused table, then numeric ones."""

    features: Sequence[Feature]

    @cached_property
    def id_features(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.kind != "numeric")

    @cached_property
    def numeric_features(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.kind == "numeric")

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First row of each id feature in the fused table."""
        ends = accumulate((feature.size for feature in self.id_features), initial=0)
        return {feature.name: first for feature, first in zip(self.id_features, ends, strict=False)}

    @property
    def table_rows(self) -> int:
        return sum(feature.size for feature in self.id_features)
