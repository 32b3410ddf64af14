"""Sample, rank, train the reward model again, PPO again, for some rounds: `python examples/iterate.py --help`."""

from megatron_rlhf.commands.iterate import main

if __name__ == "__main__":
    main()
