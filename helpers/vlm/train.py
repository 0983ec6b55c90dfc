"""Training of the connector and of LoRA on the decoder, from cached patches.

Source: this course's own.
Taught in: notebook 08, section 1.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from helpers import data
from helpers.experiments.study import processor

from .model import CONNECTOR, RANK, untrained, with_lora
from .questions import Questions, answer_logits, questions, right, subsets

BATCH, SEED = 32, 0
CONNECTOR_RATE, LORA_RATE = 3e-3, 1.5e-3


@dataclass(frozen=True)
class Cycle:
    """Steps of 32 questions, and which share of them asks yes or no; the rest is halved."""

    steps: int
    yes_no: float


# what is seen first, then whether it is what was asked for, then both
CYCLES = (Cycle(900, 0.5), Cycle(600, 0.9), Cycle(900, 0.7))


def train(
    cycle: Cycle, seed: int = SEED, check_every: int = 300, further: PeftModel | None = None
) -> tuple[PeftModel, dict]:
    """Train for one cycle; a bar shows the loss and the validation accuracy.

    The rates rise for a tenth of the steps and fall to nothing. New weights (the connector's) get
    twice the rate of LoRA's, which sit on pretrained ones.

    Args:
        cycle: one of `CYCLES`, or another.
        seed: draws the connector's start and the questions.
        further: a trained model to go on with, in place of the untrained parts.

    Returns:
        The model, and what is worth storing beside it.

    Taught in: notebook 08, section 1.
    """
    torch.manual_seed(seed)
    given, start = questions("train"), time.perf_counter()
    model = further or fresh(given)
    groups = parameter_groups(model)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, cycle.steps, pct_start=0.1)
    weights = [weight for group in groups for weight in group["params"]]
    model.train()
    with tqdm(total=cycle.steps, desc="connector and LoRA learn", mininterval=10) as bar:
        for step, which in enumerate(drawn(given, cycle, seed), start=1):
            rows = given.rows(which)
            with torch.autocast("cpu", torch.bfloat16):  # weights stay in fp32
                logits = answer_logits(model, rows)
            loss = functional.cross_entropy(logits.float(), rows.answer)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % check_every == 0 or step == cycle.steps:
                bar.set_postfix(loss=f"{loss.item():.3f}", **quick_scores(model))
                model.train()
    minutes = (time.perf_counter() - start) / 60
    about = asdict(cycle) | {"batch": BATCH, "seed": seed, "rank": RANK, "rates": rates}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return model.eval(), about | versions | {"minutes": round(minutes, 1), "on": processor()}


def fresh(given: Questions) -> PeftModel:
    """The untrained parts with LoRA, the connector standardising as these images ask."""
    whole = untrained()
    whole.model.multi_modal_projector.standardise(given.pooled)
    return with_lora(whole)


def parameter_groups(model: PeftModel) -> list[dict[str, object]]:
    """The connector's weights with their rate, and LoRA's with half of it."""
    named = {n: w for n, w in model.named_parameters() if w.requires_grad}
    new = [w for n, w in named.items() if CONNECTOR in n]
    lora = [w for n, w in named.items() if CONNECTOR not in n]
    return [{"params": new, "lr": CONNECTOR_RATE}, {"params": lora, "lr": LORA_RATE}]


def drawn(given: Questions, cycle: Cycle, seed: int) -> tuple[Tensor, ...]:
    """The rows of each step, in the cycle's shares.

    Of a yes/no text, yes and no are drawn equally often. Left as they are, most of these
    questions can be answered without the image, and a model learns to do that first.
    """
    pairs = given.text * len(data.ANSWERS) + given.answer
    _, which, sizes = pairs.unique(return_inverse=True, return_counts=True)
    weight = torch.empty(len(pairs), dtype=torch.double)
    rest = (1 - cycle.yes_no) / 2
    for name, share in (("yes/no", cycle.yes_no), ("shape", rest), ("colour", rest)):
        here = given.kind == data.QUESTION_TYPES.index(name)
        even = (1 / sizes[which])[here].double() if name == "yes/no" else torch.ones(here.sum())
        weight[here] = share * even.double() / even.sum()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(weight, cycle.steps * BATCH, replacement=True, generator=generator)
    return rows.split(BATCH)


def quick_scores(model: PeftModel, rows: int = 200) -> dict[str, str]:
    """Accuracy on the first rows of each set of the validation split."""
    sets = subsets(questions("validation"))
    return {
        name: f"{right(model, given.rows(torch.arange(rows))).float().mean():.3f}"
        for name, given in sets.items()
    }
