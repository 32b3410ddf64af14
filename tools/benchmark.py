"""Measurements to repeat on your own machine, side by side with what you would use instead.

python tools/benchmark.py rollout [--arch llama]     sampling, against `generate` of transformers
python tools/benchmark.py interleave --pipeline 2 4  one pipeline schedule for PPO and pretraining, against two
python tools/benchmark.py layouts                    every figure of every stage at many layouts, against one rank
"""

import argparse
import importlib

COMMANDS = {
    "rollout": "sampling, against transformers' generate",
    "interleave": "one pipeline schedule for both kinds of microbatches, against two",
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
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
