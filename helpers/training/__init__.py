"""One training loop, one route through transformers' Trainer, and evaluation."""

from helpers.training.batches import (
    Batch,
    Batches,
    Collate,
    TrainingError,
    batches,
    ordered_batches,
)
from helpers.training.evaluation import (
    accuracy,
    answer,
    answer_loss,
    mean_loss,
    span_accuracy,
    transcripts,
    word_error_rate,
)
from helpers.training.inspection import (
    check_batch,
    check_targets,
    max_positions,
    target_count,
    token_count,
)
from helpers.training.loop import gradients, train
from helpers.training.run import History
from helpers.training.team import Team
from helpers.training.trainer_route import trainer

__all__ = [
    "Batch",
    "Batches",
    "Collate",
    "History",
    "Team",
    "TrainingError",
    "accuracy",
    "answer",
    "answer_loss",
    "batches",
    "check_batch",
    "check_targets",
    "gradients",
    "max_positions",
    "mean_loss",
    "ordered_batches",
    "span_accuracy",
    "target_count",
    "token_count",
    "train",
    "trainer",
    "transcripts",
    "word_error_rate",
]
