"""Measurements to repeat on your own machine, side by side with what you would use instead.

python tools/benchmark.py rollout [--arch llama]     sampling, against `generate` of transformers
python tools/benchmark.py interleave --pipeline 2 4  one pipeline schedule for PPO and pretraining, against two
python tools/benchmark.py scoring                    judging a rollout, against padding to its longest row
python tools/benchmark.py reward [--data FILE]       rankings, against pairs and against one copy of the prompt per response
python tools/benchmark.py ppo --peer-python PYTHON   whole PPO iterations, against TRL's PPOTrainer
python tools/benchmark.py overhead                   share of a PPO iteration that is neither model nor optimizer
python tools/benchmark.py train                      an update, against bare matrix products and transformers
python tools/benchmark.py cost                       how time and memory grow with length, width, batch, vocabulary, K, ranks
python tools/benchmark.py layouts                    every figure of every stage at many layouts, against one rank

With --json the last line is one object: ratio, both sides' figures, machine, versions.
"""

import argparse
import contextlib
import importlib
import json
import sys

COMMANDS = {
    "rollout": "sampling, against transformers' generate",
    "interleave": "one pipeline schedule for both kinds of microbatches, against two",
    "scoring": "judging a rollout of texts of many lengths, against padding all to the longest",
    "reward": "rankings of K responses, against pairs and against K copies of the prompt",
    "ppo": "whole PPO iterations, against TRL's PPOTrainer in an environment of its own",
    "overhead": "share of a PPO iteration that is neither model nor optimizer",
    "train": "share of the rate of bare matrix products, and transformers' beside it",
    "cost": "how time and memory grow with length, width, batch, vocabulary, K and ranks",
    "layouts": "largest differences of figures and weights between layouts",
}


def main() -> None:
    """Parse the command and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"benchmarks.{name}")
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.arguments(command)
        command.add_argument("--json", action="store_true", help="print one object at the end")
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        figures = options.run(options)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
