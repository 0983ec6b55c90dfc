r"""How much memory a training run takes on a GPU: predicted here, without it and without weights.

MODEL is a published model (--list names them), or a config.json or the folder that holds one.
The first of these runs fits its card, as its verdict says.

python -m helpers.memory llama-2-7b --method qlora --rank 16 --targets all-linear \
    --batch 2 --seq 2048 --checkpointing --optimizer paged_adamw_8bit --dtype fp16 --gpu t4
python -m helpers.memory llama-65b --method qlora --checkpointing --gpu a6000 --fast
python -m helpers.memory gpt2 --method prefix --virtual-tokens 20 --picture step.png
python -m helpers.memory my-model/config.json --targets q_proj v_proj --largest-batch --json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import matplotlib.pyplot as plt

from helpers import adapters, memory, models, plots
from helpers.atomic import whole_file
from helpers.memory.check import check
from helpers.memory.predict import ATTENTIONS, DTYPES, make_plan, predict_plan
from helpers.memory.simulate import Plan
from helpers.quantization import QUANT_TYPES

BAD_INPUT, STOPPED = 2, 130
_PATTERN = re.compile(r"[*?|()\[\]^$\\+{}]")  # a module's name has none of them


class _List(argparse.Action):
    """Prints what can be asked for, as --help prints the options."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        cards = ", ".join(f"{card.name} ({card.memory / memory.GIB:.0f} GiB)" for card in _cards())
        print(f"models      {', '.join(models.CONFIGS)}; or a config.json")
        print(f"methods     {', '.join(memory.METHODS)}")
        print(f"GPUs        {cards}")
        print(f"optimisers  {', '.join(memory.OPTIMIZERS)}")
        print(f"dtypes      {', '.join(DTYPES)}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (--help lists the options)\n")


def _cards() -> list[memory.Gpu]:
    return sorted(memory.GPUS.values(), key=lambda card: card.memory)


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line; an error names what is possible."""
    parser = _Parser(
        prog="python -m helpers.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="name, config.json or its folder")
    parser.add_argument("--list", action=_List, nargs=0, help="models, methods, GPUs, optimisers")

    run = parser.add_argument_group("the run")
    run.add_argument("--method", default="lora", help="default: lora")
    run.add_argument("--rank", type=int, help=f"default: {adapters.DEFAULT_RANK}")
    run.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="names of modules, a pattern, or all-linear; default: peft's choice",
    )
    run.add_argument(
        "--virtual-tokens",
        type=int,
        metavar="N",
        help=f"of the prompt methods; default: {adapters.DEFAULT_VIRTUAL_TOKENS}",
    )
    run.add_argument("--batch", type=int, default=1, help="rows of a batch; default: 1")
    run.add_argument("--seq", type=int, default=512, help="tokens of a row; default: 512")
    run.add_argument(
        "--dtype",
        default="bf16",
        help=f"{', '.join(DTYPES)} (weights in 32 bits, products in bf16); default: bf16",
    )
    run.add_argument("--quant-type", help=f"of qlora: {' or '.join(QUANT_TYPES)}; default: nf4")
    run.add_argument(
        "--no-double-quant", action="store_true", help="qlora without double quantisation"
    )
    run.add_argument(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help=f"{', '.join(memory.OPTIMIZERS)}; default: adamw",
    )
    run.add_argument(
        "--attention", default="sdpa", help=f"{' or '.join(ATTENTIONS)}; default: sdpa"
    )
    run.add_argument("--checkpointing", action="store_true", help="compute layers twice")
    run.add_argument(
        "--padded",
        action="store_true",
        help="rows of several lengths, filled up to --seq, so that attention gets a mask",
    )
    run.add_argument("--gpu", default="a100-80gb", help="default: a100-80gb")

    answer = parser.add_argument_group("the answer")
    answer.add_argument(
        "--fast",
        action="store_true",
        help="extrapolate from shallow models: what is allocated within about 1 %%, what is "
        "reserved is rough",
    )
    answer.add_argument("--largest-batch", action="store_true", help="search it, too")
    answer.add_argument("--json", action="store_true", help="bytes, for programs")
    answer.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the step")
    args = parser.parse_args(words)
    problem = _problem(args)
    if problem:
        parser.error(problem)
    return args


def _problem(args: argparse.Namespace) -> str | None:
    """What is wrong with options that cannot go together, or with the picture's file."""
    if args.method != "qlora" and (args.quant_type or args.no_double_quant):
        return f"--quant-type and --no-double-quant are for --method qlora, not {args.method}"
    adapter = (args.rank, args.targets, args.virtual_tokens)
    if args.method == "full" and any(given is not None for given in adapter):
        return "--method full has no adapter, so no --rank, --targets or --virtual-tokens"
    if args.picture is None:
        return None
    if args.fast:
        return "--picture draws every layer, which --fast leaves out; give one of them"
    if args.picture.suffix.lower() != ".png":
        return f"--picture writes PNG files; {args.picture.name} does not end in .png"
    if not args.picture.absolute().parent.is_dir():
        return f"the folder {args.picture.parent} of --picture does not exist"
    return None


def targets(names: list[str] | None) -> list[str] | str | None:
    """Names as a list; a lone pattern or "all-linear" as the string that peft takes for one."""
    if names is None:
        return None
    if len(names) == 1 and (names[0] == "all-linear" or _PATTERN.search(names[0])):
        return names[0]
    return [name for word in names for name in word.split(",") if name]


def plan_of(args: argparse.Namespace) -> Plan:
    """The checked plan that the options describe.

    Raises:
        ValueError: the run makes no sense.
    """
    plan = make_plan(
        args.model,
        args.method,
        batch=args.batch,
        seq=args.seq,
        rank=args.rank,
        targets=targets(args.targets),
        virtual_tokens=args.virtual_tokens,
        dtype=args.dtype,
        quant_type=args.quant_type or "nf4",
        double_quant=not args.no_double_quant,
        optimizer=args.optimizer,
        attention=args.attention,
        checkpointing=args.checkpointing,
        padded=args.padded,
        gpu=args.gpu,
    )
    check(plan)
    return plan


def predicted(args: argparse.Namespace) -> memory.Prediction:
    """The prediction that was asked for.

    Raises:
        ValueError: the run makes no sense or cannot be simulated.
    """
    try:
        return predict_plan(plan_of(args), exact=not args.fast)
    except ValueError as error:
        if "specify `target_modules`" not in str(error):  # peft's own sentence
            raise
        raise ValueError(
            f"peft has no default targets of {args.method} for {args.model}; give --targets, "
            "for instance --targets all-linear."
        ) from error
    except Exception as error:  # of any kind: the libraries' own code ran on tensors without data
        raise ValueError(
            f"{args.method} on {args.model} cannot be simulated "
            f"({type(error).__name__}: {_one_line(error)})."
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else text[:600] + "…"


def draw(prediction: memory.Prediction, file: Path) -> None:
    """The picture of the step; written beside, then put in place."""
    with whole_file(file) as part, plt.rc_context():
        plots.use_style()
        memory.picture(prediction).savefig(part, format="png", dpi=plots.DPI)


def answer(args: argparse.Namespace) -> str:
    """What to print.

    Raises:
        ValueError: the run makes no sense or cannot be simulated.
    """
    prediction = predicted(args)
    largest = (
        memory.largest_batch(prediction.plan, exact=not args.fast) if args.largest_batch else None
    )
    if args.picture:
        draw(prediction, args.picture)
    if args.json:
        found = {"model": args.model, **memory.as_dict(prediction)}
        return json.dumps(found | ({"largest_batch": largest} if args.largest_batch else {}))
    parts = [memory.summary(prediction), table_in_words(prediction)]
    if args.largest_batch:
        card = prediction.plan.gpu.name
        found = f"largest batch that fits {card}: {largest}"
        parts.append(found if largest else f"not even one row fits {card}")
    if args.picture:
        parts.append(f"picture: {args.picture}\n{memory.alt(prediction)}")
    return "\n\n".join(parts)


def table_in_words(prediction: memory.Prediction) -> str:
    """The table for a terminal."""
    return memory.table(prediction).to_string(
        formatters={"GiB": "{:.3f}".format, "share": "{:.1%}".format}
    )


def main(words: list[str] | None = None) -> int:
    """Predict and print; 2 for bad input, 130 when stopped."""
    try:
        try:
            return _predict_and_print(parse(words))
        finally:
            sys.stdout.flush()  # here, so that a reader who has gone is noticed here
    except BrokenPipeError:  # such as `| head`; what is still unwritten must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _predict_and_print(args: argparse.Namespace) -> int:
    try:
        with memory.quiet():
            print(answer(args))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"python -m helpers.memory: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
