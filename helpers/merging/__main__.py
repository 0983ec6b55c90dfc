"""``python -m helpers.merging ADAPTER --base FOLDER --out FOLDER``: merge, compare, write.

The folder that is written loads with transformers alone, and holds tokenizer and generation
settings. An adapter that was trained on a base in four bits needs --four-bit, since its folder does
not say so: the base is then dequantised first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from helpers import models
from helpers.adapters import AdapterFileError

from .deploy import MergeRefused, merge_for_deployment
from .routes import FourBits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m helpers.merging",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("adapter", type=Path, help="folder with adapter_config.json")
    made.add_argument(
        "--base",
        help=f"folder of the base, or one of {', '.join(models.CONVERTED)} (default: the folder "
        "that the adapter names)",
    )
    made.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights")
    made.add_argument(
        "--four-bit", choices=("nf4", "fp4"), help="the base was in these four bits in training"
    )
    made.add_argument(
        "--single-quant",
        action="store_true",
        help="with --four-bit: the scales of the blocks were not quantised themselves",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Merges and writes; 0 if the folder is there, 2 with one sentence if not."""
    options = parser()
    args = options.parse_args(arguments)
    if args.single_quant and not args.four_bit:
        options.error("--single-quant says how --four-bit was made; give that too")
    bits = FourBits(args.four_bit, not args.single_quant) if args.four_bit else None
    base = models.path(args.base) if args.base in models.CONVERTED else args.base
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        done = merge_for_deployment(
            args.adapter, args.out, base=base, bits=bits, dtype=DTYPES[args.dtype]
        )
    except (MergeRefused, AdapterFileError, OSError) as error:
        print(str(error).split("\n")[0], file=sys.stderr)
        return 2
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
