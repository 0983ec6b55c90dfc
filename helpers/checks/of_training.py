"""Checks of the exercises of lesson 06.

Source: transformers' TrainingArguments and EarlyStoppingCallback.
Taught in: notebook 06, exercises 1 and 2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .exercises import Broken, Passed, plain, running

LOSSES, TARGETS = (2.0, 4.0, 1.0), (6, 1, 3)  # weighted mean 1.9, plain mean 2.3333

# held-out losses, patience, the epoch (from 1) whose weights are kept, the rule that it shows
STOPS = (
    ((3.0, 2.0, 1.0, 0.5), 2, 4, "goes on while it improves"),
    ((3.0, 1.0, 2.0, 2.5, 0.5), 2, 2, "stops after `patience` epochs without a new best"),
    ((3.0, 1.0, 2.0, 0.5, 0.7, 0.9), 2, 4, "a new best sets the count back"),
    ((3.0, 1.0, 1.0, 1.0, 0.5), 2, 2, "an equal loss is no new best"),
    ((1.0, 2.0, 0.5), 1, 1, "patience 1 stops at the first epoch that is not better"),
)


def group_loss(answer: Callable[[Sequence[Tensor], Sequence[int]], Tensor]) -> Passed:
    """Checks `answer(losses, targets)`: the loss of several batches as if they were one.

    `losses` are the batches' mean losses, scalars in nats; `targets`, over how many targets each
    is a mean.

    Raises:
        Broken: weights, gradient, or one batch alone.

    Source: transformers, ``Trainer.get_batch_samples`` (``num_items_in_batch``).
    Taught in: notebook 06, exercise 1.
    """
    losses = [torch.tensor(loss, requires_grad=True) for loss in LOSSES]
    with running("weights", "the function, called with losses and targets,"):
        found = answer(losses, list(TARGETS))
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise Broken(
            "gradient", f"it returns a tensor to call backward on, of one number, not {found!r}"
        )
    _check_weights(float(found.detach()))
    if not found.requires_grad:
        raise Broken("gradient", "the result has no graph: use the losses, not their .item()")
    found.backward()
    if any(loss.grad is None for loss in losses):
        raise Broken("gradient", "it reaches no loss: use the losses, not their .item()")
    shares = [float(loss.grad) for loss in losses]
    wanted = [count / sum(TARGETS) for count in TARGETS]
    if not torch.allclose(torch.tensor(shares), torch.tensor(wanted)):
        raise Broken("gradient", f"the batches count {shares}, they should count {wanted}")
    with running("one batch", "the function, called with one batch,"):
        alone = float(answer([torch.tensor(2.0, requires_grad=True)], [7]).detach())
    if abs(alone - 2) > 1e-6:
        raise Broken("one batch", f"one batch of loss 2 gives {alone:.4g}; it is the whole group")
    return Passed("passed: each batch counts by its targets, in the loss and in the gradient")


def _check_weights(found: float) -> None:
    right = sum(loss * count for loss, count in zip(LOSSES, TARGETS, strict=True)) / sum(TARGETS)
    if abs(found - right) <= 1e-5:
        return
    slips = {
        sum(LOSSES) / len(LOSSES): "that is the plain mean, in which one target of a short batch "
        "counts more than one of a long batch",
        sum(LOSSES): "that is the sum; the mean over all targets is asked for",
        right * sum(TARGETS): "that is the sum over the targets; divide by their number",
    }
    why = next((text for value, text in slips.items() if abs(found - value) <= 1e-5), "")
    raise Broken(
        "weights",
        f"losses {LOSSES} over {TARGETS} targets give {found:.4g}, not {right:.4g}"
        + (f": {why}" if why else ""),
    )


def early_stopping(answer: Callable[[Sequence[float], int], int]) -> Passed:
    """Checks `answer(losses, patience)`: the epoch, from 1, whose weights are kept.

    Raises:
        Broken: names the rule and the losses that break it.

    Source: transformers, ``EarlyStoppingCallback``.
    Taught in: notebook 06, exercise 2.
    """
    for losses, patience, epoch, rule in STOPS:
        with running(rule, f"the function, called with {list(losses)} and {patience},"):
            found = plain(answer(list(losses), patience))
        if found != epoch:
            hint = "; count epochs from 1" if found == epoch - 1 else ""
            raise Broken(
                rule, f"losses {list(losses)}, patience {patience}: {found!r}, not {epoch}{hint}"
            )
    return Passed(f"passed: {len(STOPS)} curves stop where they should and keep their best epoch")
