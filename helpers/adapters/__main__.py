r"""Look at an adapter folder without loading it: is it whole, safe to open, and made for this base?

Nothing is fetched from a hub, unpickled or changed. MODEL is a model of the course (smollm2,
minilm, dinov2, whisper), a published one whose shapes are stored (llama-2-7b, gpt2, …), a
config.json, or the folder that holds one; its weights are not read.

python -m helpers.adapters my-adapter
python -m helpers.adapters my-adapter --base smollm2
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from helpers import assets, models

from .files import AdapterFileError, AdapterFolder, check_folder
from .fitting import Shapes

REFUSED = 2
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# An adapter may name no task; then one of these is the model that it was trained on.
_WITHOUT_TASK = (
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    *(name for name in _AUTO.values() if name != "AutoModel"),
)
_HEAD = re.compile(r"\.(classifier|score)(\.out_proj)?\.weight$")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: {message} (--help lists the options)\n")


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line; an error names what is possible."""
    parser = _Parser(
        prog="python -m helpers.adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="holds adapter_config.json")
    parser.add_argument("--base", metavar="MODEL", help="also check that it fits this base")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Print what the folder holds; 2 and one sentence on stderr when it is refused."""
    args = parse(words)
    logging.set_verbosity_error()  # a remark of some model would stand among the answers
    try:
        found = check_folder(args.folder)
        if args.base:
            found = check_fits(found, args.base)
    except (ValueError, OSError, assets.AssetError) as error:
        print(f"python -m helpers.adapters: {error}", file=sys.stderr)
        return REFUSED
    print(f"{found}; fits {args.base}" if args.base else found)
    return 0


def check_fits(found: AdapterFolder, base: str) -> AdapterFolder:
    """Check a folder against a base model's shapes, by the base's name or configuration.

    Raises:
        ValueError: no such model, or one that has no form for the adapter's task.
        AdapterFileError: the adapter does not fit.
    """
    refusals = []
    for model in bases(configuration(base), found.config, found.shapes):
        try:
            return check_folder(found.folder, model)
        except AdapterFileError as error:
            refusals.append(error)
    if not refusals:
        raise ValueError(f"{base} has no model for the task {found.config.task_type}.")
    raise refusals[0]


def configuration(base: str) -> PreTrainedConfig:
    """The configuration of a model of the course, a published one, or one in a folder.

    Raises: ValueError for a name that is none of them.
    """
    if base in models.CONVERTED:
        return AutoConfig.from_pretrained(models.path(base))
    if Path(base).exists():
        return AutoConfig.from_pretrained(base, local_files_only=True)
    try:
        return models.published_config(base)
    except ValueError as error:
        more = f"{error} Or {', '.join(models.CONVERTED)}; or a folder with a config.json."
        raise ValueError(more) from error


def bases(config: PreTrainedConfig, adapter: PeftConfig, shapes: Shapes) -> list[nn.Module]:
    """The models of that configuration that an adapter may be for, on the meta device."""
    heads = [shape[0] for name, shape in shapes.items() if _HEAD.search(name)]
    if heads:
        config.num_labels = heads[-1]  # how many classes there are, only the adapter knows
    names = (_AUTO[adapter.task_type],) if adapter.task_type in _AUTO else _WITHOUT_TASK
    autos = [getattr(transformers, name) for name in names]
    with torch.device("meta"):
        return [auto.from_config(config) for auto in autos if type(config) in auto._model_mapping]


if __name__ == "__main__":
    sys.exit(main())
