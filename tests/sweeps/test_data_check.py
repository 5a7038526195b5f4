"""The check of a sweep's data and metrics before any run."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from test_sweep import sweep_file

from pipeline.config.strict_config import load
from pipeline.data.schema import DataSchema
from pipeline.errors import UserError
from pipeline.sweeps.data_check import check_data
from pipeline.sweeps.jobs import Job
from pipeline.sweeps.requests import DataDigest, DigestData
from pipeline.sweeps.sweep_config import SweepConfig
from pipeline.sweeps.sweep_plan import Plan, resolve
from pipeline.sweeps.worker import Work
from pipeline.tasks.mmoe.config import MmoeConfig


class InlineWorkers:
    """Workers that do jobs in this process."""

    def __init__(self) -> None:
        self.worker = Work(None, print, threading.Event())  # type: ignore[arg-type]

    def work(self, jobs: list[Job]) -> None:
        for job in jobs:
            assert job.needs is None or job.needs.reply
            job.reply = self.worker.do(job.request)


def checked_plan(file: Path) -> Plan:
    plan, _ = check_data(resolve(load(SweepConfig, file), file, MmoeConfig, [file.parent]), InlineWorkers())  # type: ignore[arg-type]
    return plan


SEARCH = {"trials": 2, "space": {"lambda": {"low": 0.01, "high": 0.5}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "test/auc_ctcvrr"}, "metric: found test/auc_ctcvrr, .* did you mean test/auc_ctcvr?"),
        (
            {"arms": None, "search": SEARCH | {"metric": "valid/logloss"}},
            "search.metric: found .* did you mean valid/log",
        ),
        ({"settings": {"evaluation.metric": "valid/auc_ctrr"}}, "evaluation.metric: found valid/auc_ctrr, .*auc_ctr?"),
        ({"arms": [{"evaluation.metric": "valid/auc_ctrr"}]}, "evaluation.metric: found valid/auc_ctrr, .*auc_ctr?"),
    ],
)
def test_a_misspelt_metric_is_refused_before_any_run(
    tmp_path: Path, impressions: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        checked_plan(sweep_file(tmp_path, impressions, **changes))


def test_an_undefined_metric_is_refused_or_replaced_before_any_run(
    tmp_path: Path, impressions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema, changed = DataSchema.read(impressions), tmp_path / "data"
    shutil.copytree(impressions, changed)

    def plan(lacking: dict[str, str], **changes: Any) -> Plan:
        """The checked plan on data whose splits lack conversions (or clicks)."""
        splits = {name: split.model_copy(update={lacking[name]: 0} if name in lacking else {})
                  for name, split in schema.splits.items()}  # fmt: skip
        schema.model_copy(update={"splits": splits}).write(changed)
        return checked_plan(sweep_file(tmp_path, changed, **changes))

    none = {"validation": "conversions", "test": "conversions"}
    rows = schema.splits["validation"].rows
    lacks = f"needs both classes: validation has 0 conversions of {rows} rows"
    with pytest.raises(UserError, match=f"^search.metric: valid/auc_ctcvr {lacks}; allowed: "):
        plan(none, arms=None, search=SEARCH)
    with pytest.raises(
        UserError, match=r"^metric: test/auc_ctcvr needs both classes: test has 0 conversions of \d+ rows"
    ):
        plan(none)
    with pytest.raises(UserError, match=f"^evaluation.metric: valid/auc_ctcvr {lacks}"):
        plan(none, metric="test/logloss_ctr", settings={"evaluation.patience": 2})
    capsys.readouterr()
    assert plan(none, metric="test/logloss_ctr").metric == "test/logloss_ctr"
    assert capsys.readouterr().err.startswith(
        f"warning: evaluation.metric: valid/auc_ctcvr {lacks}; the weights of the"
    )
    assert plan({"test": "conversions"}).metric == "valid/auc_ctcvr"
    stderr = capsys.readouterr().err
    assert stderr.endswith(f"test has 0 conversions of {rows} rows; the verdict is about valid/auc_ctcvr\n")
    with pytest.raises(UserError, match=r"^metric: test/auc_ctcvr needs both classes: "):
        plan({"test": "conversions"}, metric="test/auc_ctcvr")


def test_a_sweep_on_clicks_is_judged_by_them(tmp_path: Path, impressions: Path) -> None:
    """Data without conversion labels give every arm that chose no metric another default."""
    clicks = tmp_path / "clicks"
    shutil.copytree(impressions, clicks)
    DataSchema.read(clicks).model_copy(update={"click_only": True}).write(clicks)
    arms = [{"optim.dense.lr": 0.01}, {"evaluation.metric": "valid/logloss_ctr", "evaluation.mode": "min"}]
    changes = {"settings": {"aux_focal": False}, "baseline": {}, "arms": arms, "controls": "off"}
    plan = checked_plan(sweep_file(tmp_path, clicks, **changes))
    assert plan.metric == "test/auc_ctr"
    assert [arm.config.evaluation.metric for arm in plan.arms] == [
        "valid/auc_ctr",
        "valid/auc_ctr",
        "valid/logloss_ctr",
    ]
    with pytest.raises(UserError, match=r"^metric: test/auc_ctcvr needs conversion labels"):
        checked_plan(sweep_file(tmp_path, clicks, **changes, metric="test/auc_ctcvr"))


def test_a_worker_serves_one_task_after_the_other(tmp_path: Path, impressions: Path) -> None:
    (tmp_path / "reviews.csv").write_text("data,A\n" + "".join(f"text {n},Positive\n" for n in range(40)))
    configs = {
        "train_mmoe": f"data: {{path: {impressions}}}",
        "train_visobert": f"""
            data: {{train: {tmp_path}/reviews.csv, cache: {tmp_path}}}
            model: {{name: embedded}}
            multi_label: {{focal_alpha: null}}
        """,
    }

    def digest(worker: Work, entry: str) -> str:
        reply = worker.do(DigestData(entry, configs[entry]))
        assert isinstance(reply, DataDigest), reply
        return reply.digest

    fresh = {entry: digest(Work(None, print, threading.Event()), entry) for entry in configs}  # type: ignore[arg-type]
    worker = Work(None, print, threading.Event())  # type: ignore[arg-type]
    for entry in [*configs, *configs]:
        assert digest(worker, entry) == fresh[entry]
