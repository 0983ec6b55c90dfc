"""The stand-in for ARR-COC: a small vision-language model that buys detail where it looks.

Every cell of the image gives one coarse token and four fine ones. The decoder always gets all
coarse tokens; of the fine ones it gets those of the cells that the three modules chose, in raster
order and at their own positions, so that leaving a token out is the same as masking it.

Source: arr-coc-0-1, made small; transformers' Llama for the language part.
Taught in: notebook 09, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from . import world
from .modules import Attending, Balancing, Knowing, Look, gumbel, texture

FINE = 4  # tokens of a cell that is looked at closely
FLOOR = 1e-6
SELECTIONS = ("sparse", "weighted", "dense", "soft", "topk")


class ArrCocConfig(PretrainedConfig):
    """Sizes of the stand-in, and what its parts are kept from doing.

    Args:
        cells: K, how many cells are seen closely.
        selection: how the choice gets its gradient in training, one of `SELECTIONS`.
        blind: the modules that look get no question.
        weights: of the three maps, instead of learned ones.
        tensions: a fixed value for each of the three, or None where it is learned.
    """

    model_type = "arr-coc-stand-in"

    def __init__(
        self,
        hidden_size: int = 128,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        intermediate_size: int = 352,
        grid: int = world.GRID,
        cell: int = world.CELL,
        cells: int = 2,
        selection: str = "sparse",
        blind: bool = False,
        weights: list[float] | None = None,
        tensions: list[float | None] | None = None,
        **kwargs: object,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.grid, self.cell, self.cells = grid, cell, cells
        self.selection = selection
        self.blind, self.weights, self.tensions = blind, weights, tensions
        super().__init__(**kwargs)


@dataclass
class Answer(ModelOutput):
    """loss: (), nats per question; logits: (B, words) for the answer; look: what was chosen."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    look: Look | None = None


class Vision(nn.Module):
    """One coarse and four fine tokens for every cell."""

    def __init__(self, config: ArrCocConfig) -> None:
        super().__init__()
        width, part = config.hidden_size, config.cell // 2
        self.grid, self.cell, self.part = config.grid, config.cell, part
        self.coarse = nn.Linear(3 * 4 * 4, width)  # a cell of four by four averages
        self.fine = nn.Sequential(
            nn.Linear(3 * part * part, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.place = nn.Embedding(config.grid**2, width)
        self.corner = nn.Embedding(FINE, width)
        nn.init.normal_(self.place.weight, std=0.5)  # beside contents of size one
        nn.init.normal_(self.corner.weight, std=0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) to coarse tokens (B, N, D) and fine tokens (B, N, 4, D)."""
        small = functional.avg_pool2d(images, self.cell // 4)
        coarse = _sized(self.coarse(_cut(small, 4))) + self.place.weight
        parts = _cut(images, self.cell).unflatten(2, (3, 2, self.part, 2, self.part))
        parts = parts.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)  # B, N, 4, pixels
        fine = _sized(self.fine(parts)) + self.place.weight.unsqueeze(1) + self.corner.weight
        return coarse, fine


class ArrCoc(PreTrainedModel):
    """Vision, knowing, balancing, attending and a Llama decoder that answers with one word.

    Taught in: notebook 09, sections 3 to 6.
    """

    config_class = ArrCocConfig
    base_model_prefix = "arr_coc"
    main_input_name = "images"

    def __init__(self, config: ArrCocConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.vision = Vision(config)
        self.knowing = Knowing(width)
        self.balancing = Balancing(width, weights=config.weights, tensions=config.tensions)
        self.attending = Attending(width)
        self.language_model = LlamaForCausalLM(_decoder(config))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every module starts as it was made."""

    def look(self, images: Tensor, questions: Tensor, *, noise: Tensor | None = None) -> Look:
        """Where to look closely for this question; the answer is not among the arguments.

        Args:
            images: (B, 3, H, W), numbers from 0 to 1.
            questions: (B, words).
            noise: (B, N), added to the logits before the choice.
        """
        cells = texture(images, self.config.grid)
        asked = self.question(questions)
        if self.config.blind:
            asked = torch.zeros_like(asked)
        scores = self.knowing(cells, asked)
        relevance, breadth, weights, tensions = self.balancing(scores, asked)
        if noise is not None:  # exploit damps the curiosity
            noise = noise * (1 - tensions[:, 1:2])
        temperature, share, chosen = self.attending(relevance, breadth, self.config.cells, noise)
        return Look(scores, relevance, temperature, weights, tensions, share, chosen)

    def question(self, questions: Tensor) -> Tensor:
        """(B, words) to (B, D): the mean of the words' embeddings, without padding."""
        words = self.language_model.get_input_embeddings()(questions)
        real = (questions != world.PAD).unsqueeze(-1).to(words.dtype)
        return (words * real).sum(1) / real.sum(1).clamp(min=1)

    def read(
        self, images: Tensor, questions: Tensor, chosen: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """(B, words): the logits of the answer with the fine tokens of ``chosen`` cells only.

        Args:
            images: (B, 3, H, W), numbers from 0 to 1.
            questions: (B, words of the question).
            chosen: (B, N) bool, equally many True in each row.
            weight: (B, N), multiplied to the attention that a cell's fine tokens get. Multiplying
                the tokens themselves would do next to nothing: the decoder's first layer divides
                each token by its own size.

        Raises:
            ValueError: rows with different numbers of chosen cells, which cannot stand in one
                batch.
        """
        counts = sorted(set(chosen.sum(1).tolist()))
        if len(counts) > 1:
            raise ValueError(f"every row needs equally many chosen cells, not {counts}")
        tokens, positions, fine = self._tokens(images)
        kept = (chosen.unsqueeze(2) | ~fine).flatten(1)
        where = kept.nonzero()[:, 1].view(len(images), -1)  # in raster order
        picked = tokens.gather(1, where.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        bias = None
        if weight is not None:
            bias = _bias(weight, fine, 0.0).gather(1, where)
        return self._answer(picked, positions[where], questions, bias)

    def read_masked(
        self, images: Tensor, questions: Tensor, weight: Tensor, floor: float = 0.0
    ) -> Tensor:
        """(B, words): all tokens are there; attention to a cell's fine ones times ``weight``.

        Args:
            images, questions: as `read` takes them.
            weight: (B, N) from 0, which removes them, to 1.
            floor: added to the weight before its logarithm, so that a gradient gets through at 0.
                A reader that trains with one learns to read what it should not see.
        """
        tokens, positions, fine = self._tokens(images)
        bias = _bias(weight, fine, floor)
        return self._answer(tokens, positions.expand(len(images), -1), questions, bias)

    def forward(
        self,
        images: Tensor,
        questions: Tensor,
        answers: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Answer:
        """Look, then read.

        Args:
            images, questions: as `read` takes them.
            answers: (B,) words; with them there is a loss. They never reach the modules that look.
            chosen: (B, N) bool, to read other cells than the modules choose.

        Raises:
            ValueError: rows with different numbers of ``chosen`` cells, or a selection that is none
                of `SELECTIONS`.
        """
        look = None
        if chosen is not None:
            logits = self.read(images, questions, chosen)
        else:
            noise = None
            if self.training:
                noise = gumbel(images.new_empty(len(images), self.config.grid**2))
            look = self.look(images, questions, noise=noise)
            logits = self._selected(images, questions, look)
        loss = None if answers is None else functional.cross_entropy(logits, answers)
        return Answer(loss=loss, logits=logits, look=look)

    def _selected(self, images: Tensor, questions: Tensor, look: Look) -> Tensor:
        """Reading with a gradient to the choice, one of `SELECTIONS`; evaluation always gathers."""
        kind = self.config.selection if self.training else "topk"
        if kind == "topk":  # the original's: only the places leave, without a gradient
            return self.read(images, questions, look.chosen)
        if kind == "sparse":
            return self.read(images, questions, look.chosen, 1 + look.share - look.share.detach())
        if kind == "weighted":
            return self.read(images, questions, look.chosen, look.share)
        if kind == "dense":
            weight = look.chosen.float() + look.share - look.share.detach()
            return self.read_masked(images, questions, weight, FLOOR)
        if kind == "soft":
            return self.read_masked(images, questions, look.share, FLOOR)
        raise ValueError(f"no selection {kind!r}; there is {', '.join(SELECTIONS)}")

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All visual tokens (B, 5N, D), their positions (5N,) and which are fine (N, 5)."""
        coarse, fine = self.vision(images)
        coarse = coarse + self.attending.detail.weight[0]
        fine = fine + self.attending.detail.weight[1]
        tokens = torch.cat([coarse.unsqueeze(2), fine], 2)  # B, N, 5, D
        cells = tokens.shape[1]
        positions = torch.arange(cells * (1 + FINE), device=images.device)
        is_fine = torch.arange(1 + FINE, device=images.device).expand(cells, -1) > 0
        return tokens.flatten(1, 2), positions, is_fine

    def _answer(
        self, tokens: Tensor, positions: Tensor, questions: Tensor, bias: Tensor | None
    ) -> Tensor:
        words = self.language_model.get_input_embeddings()(questions)
        start = self.config.grid**2 * (1 + FINE)
        after = torch.arange(questions.shape[1], device=tokens.device) + start
        positions = torch.cat([positions, after.expand(len(tokens), -1)], 1)
        embeddings = torch.cat([tokens, words], 1)
        padded = torch.cat(
            [torch.zeros_like(positions[:, : tokens.shape[1]]).bool(), questions == world.PAD], 1
        )
        mask = _mask(padded, bias, embeddings.dtype)
        logits = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]


def _mask(padded: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), added to the attention's logits: causal, without padding, with the bias."""
    length = padded.shape[1]
    low = torch.finfo(dtype).min
    later = torch.ones(length, length, dtype=torch.bool, device=padded.device).triu(1)
    itself = torch.eye(length, dtype=torch.bool, device=padded.device)
    hidden = later | (padded.unsqueeze(1) & ~itself)  # a padded row must see something
    mask = torch.zeros(hidden.shape, dtype=dtype, device=padded.device).masked_fill(hidden, low)
    if bias is not None:
        seen = functional.pad(bias.to(dtype), (0, length - bias.shape[1])).unsqueeze(1)
        mask = mask + seen.masked_fill(hidden, 0)
    return mask.unsqueeze(1)


def _bias(weight: Tensor, fine: Tensor, floor: float) -> Tensor:
    """(B, 5N): each fine token's logarithm of its cell's weight, and 0 for the coarse ones."""
    return torch.where(fine, _log(weight, floor).unsqueeze(2), weight.new_zeros(())).flatten(1)


def _log(weight: Tensor, floor: float) -> Tensor:
    """log(weight + floor), with the lowest number in place of minus infinity."""
    if not floor:
        return weight.log().clamp(min=torch.finfo(weight.dtype).min)
    # share - share.detach() can be -0 or a rounding below it
    return (weight + floor).clamp(min=floor / 2).log()


def _sized(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, tokens.shape[-1:])


def _cut(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, N, C * size * size), cells in raster order."""
    return functional.unfold(images, size, stride=size).transpose(1, 2)


def _decoder(config: ArrCocConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(world.WORDS),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=128,
        initializer_range=0.08,  # the usual 0.02 is made for far wider layers
        pad_token_id=world.PAD,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
