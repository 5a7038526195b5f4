"""Figures by name. docs/performance.md explains them."""

from collections.abc import Callable

from bench import growth, mmoe, peers, prepare, recording, sequential_seeds, start, visobert
from bench.workshop import Workshop

FIGURES: dict[str, Callable[[Workshop], None]] = {  # in the order of measurement; some functions print several figures
    "help_s": start.help_text,
    "first_step_s": start.first_step,
    "first_step_fresh_s": start.first_step,
    "cost_of_answer": sequential_seeds.cost_of_answer,
    "cost_of_answer_prefixes": sequential_seeds.cost_of_answer,
    "cost_of_answer_stopping": sequential_seeds.cost_of_answer,
    "power_of_answer": sequential_seeds.cost_of_answer,
    "mmoe_b1024": mmoe.mmoe_b1024,
    "mmoe_b4096": mmoe.mmoe_b4096,
    "mmoe_deepfm_b1024": mmoe.mmoe_deepfm_b1024,
    "mmoe_vs_deepctr_b1024": peers.deepctr_b1024,
    "mmoe_vs_plain_deepctr_b1024": peers.plain_deepctr_b1024,
    "mmoe_vs_rechub_b1024": peers.rechub_b1024,
    "mmoe_vs_deepctr_b4096": peers.deepctr_b4096,
    "mmoe_vs_rechub_b4096": peers.rechub_b4096,
    "logging_cpu": recording.logging,
    "logging_wall": recording.logging,
    "logging_wall_stalled": recording.logging,
    "logging_writer_cpu": recording.logging,
    "threads_2": growth.threads_2,
    "rows_time_ratio": growth.rows,
    "memory_bytes_per_row": growth.rows,
    "memory_42m_rows_gb": growth.rows,
    "prepare_ctr": prepare.prepare_ctr,
    "prepare_ctr_rss_mb": prepare.prepare_ctr,
    "prepare_ctr_start_s": prepare.prepare_ctr,
    "padding_efficiency": visobert.naive_bf16,
    "visobert_vs_naive_bf16": visobert.naive_bf16,
    "visobert_vs_naive_fp32": visobert.naive_fp32,
    "visobert_vs_trainer": visobert.trainer,
}
