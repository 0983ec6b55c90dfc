"""The model's parts, how they are joined, and what was trained of them.

Source: LLaVA-1.5 (Liu et al. 2023): a two-layer connector between a vision and a language model.
Taught in: notebook 08, section 1.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from helpers import models
from helpers.assets import DATA, AssetError
from helpers.atomic import whole_file
from helpers.given import whole

SIDE, PATCH, POOL = 84, 14, 2
IMAGE_TOKENS = (SIDE // PATCH // POOL) ** 2
IMAGE_TOKEN = "<file_sep>"  # a token of SmolLM2's that no text uses, so no embedding is added
LAYERS, RANK = 8, 16
FILE = DATA / "vlm" / "trained.safetensors"
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
CONNECTOR = "multi_modal_projector"


class Connector(nn.Module):
    """Patches to word-like vectors: standardise, pool, two linear layers, the words' size.

    Without the last step the outputs are many times as long as a word's embedding and drown the
    text. Taught in: notebook 08, section 1.
    """

    def __init__(self, vision: int, text: int, words_rms: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(vision))
        self.register_buffer("spread", torch.ones(vision))
        self.register_buffer("size", torch.tensor(words_rms))
        self.linear_1, self.linear_2 = nn.Linear(vision, text), nn.Linear(text, text)

    def forward(self, patches: Tensor) -> Tensor:
        """(images, patches, vision width) to (images, patches / 4, text width)."""
        return self.project(pool((patches - self.mean) / self.spread))

    def project(self, pooled: Tensor) -> Tensor:
        """The trained part of it, on patches that are standardised and pooled already.

        (images, patches / 4, vision width) to (images, patches / 4, text width).
        """
        out = self.linear_2(functional.gelu(self.linear_1(pooled)))
        return functional.layer_norm(out, out.shape[-1:]) * self.size

    def standardise(self, pooled: Tensor) -> None:
        """Take mean and spread from the training images' (images, patches / 4, vision width)."""
        rows = pooled.flatten(0, 1)
        self.mean.copy_(rows.mean(0))
        self.spread.copy_(rows.std(0) + 1e-4)


def pool(patches: Tensor) -> Tensor:
    """(images, patches, width) to (images, patches / 4, width): the mean of each 2 by 2."""
    side = int(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    return functional.avg_pool2d(grid, POOL).flatten(2).transpose(1, 2)


def untrained(layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """DINOv2-small and the first layers of SmolLM2, joined by a connector that knows nothing.

    Nothing asks for a gradient. The connector's start is drawn: seed it with `torch.manual_seed`.

    Raises:
        ValueError: a number of layers that SmolLM2 does not have.

    Taught in: notebook 08, section 1.
    """
    tower = AutoModel.from_pretrained(models.path("dinov2"))
    smol = AutoModelForCausalLM.from_pretrained(models.path("smollm2"))
    text = AutoConfig.from_pretrained(models.path("smollm2"))
    text.num_hidden_layers = whole("The number of layers", layers, 1, text.num_hidden_layers)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    smol.model.layers = smol.model.layers[:layers]
    words = smol.get_input_embeddings().weight
    model.model.vision_tower = tower
    model.model.language_model = smol.model
    model.model.multi_modal_projector = Connector(
        tower.config.hidden_size, text.hidden_size, words.square().mean().sqrt().item()
    )
    model.lm_head = smol.lm_head
    return model.requires_grad_(False).eval()


def with_lora(model: LlavaForConditionalGeneration, rank: int = RANK) -> PeftModel:
    """LoRA on every linear layer of the decoder, and the connector in full.

    This is the note's moderate strategy.

    Raises:
        ValueError: a rank that is no whole number from 1.

    Taught in: notebook 08, sections 1 and 2.
    """
    whole("The rank", rank)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=TARGETS, modules_to_save=[CONNECTOR]
    )
    return get_peft_model(model, config)


def trained(file: Path = FILE) -> PeftModel:
    """The model as `python -m helpers.vlm` trained it: the pretrained parts and the stored file.

    Raises:
        AssetError: the file is missing or was made for other parts.

    Taught in: notebook 08, section 1.
    """
    model = with_lora(untrained())
    weights = {name: tensor.float() for name, tensor in _read(file, load_file).items()}
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise AssetError(f"{file.name} was not made for this model: train it again")
    set_peft_model_state_dict(model, weights)
    return model.eval()


def store(model: PeftModel, about: dict[str, object], file: Path = FILE) -> None:
    """Write LoRA and connector in 16 bits, with what is known about them, whole or not at all."""
    weights = {n: w.half().contiguous() for n, w in get_peft_model_state_dict(model).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        save_file(weights, part, metadata={"about": json.dumps(about)})


def about(file: Path = FILE) -> dict[str, object]:
    """What was stored beside the weights.

    ``cycles``: steps, rates, seed, minutes and versions of each; ``test``: `scores` on the test
    questions, by type.

    Raises:
        AssetError: the file is missing or damaged.
    """
    return _read(file, _about)


def _about(file: Path) -> dict[str, object]:
    with safe_open(file, "pt") as stream:
        return json.loads((stream.metadata() or {})["about"])


def _read(file: Path, read: Callable[[Path], dict]) -> dict:
    try:
        return read(file)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise AssetError(
            f"{file.name} is missing or damaged: `python -m helpers.vlm` trains it again"
        ) from error


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's; pads on the left, so that the answer follows the question in every row."""
    return AutoTokenizer.from_pretrained(models.path("smollm2"), padding_side="left")


@functools.cache
def image_processor() -> BaseImageProcessor:
    """DINOv2's, for images of 84 by 84 pixels: 36 patches."""
    size = {"height": SIDE, "width": SIDE}
    return AutoImageProcessor.from_pretrained(
        models.path("dinov2"), size=size, crop_size=size, do_center_crop=False
    )
