"""Call a command by name: `elastic <command> …`, in a checkout also `python -m experiments.<command> …`.

Nothing is imported that a command does not need, so that help comes at once.
"""

import difflib
import sys
from importlib import import_module
from pathlib import Path

from elastic.errors import OptionError
from elastic.experiments.tools.options import HELP
from elastic.experiments.tools.signals import end_on_signals

# Kept here, since importing a command takes seconds.
COMMANDS = {
    "train": "train a network, or sweep over many: data × model × schedule",
    "plan": "train many runs side by side, in the order in which they start from each other",
    "evaluate": "measure a finished run again",
    "compare": "put many runs in one table, a figure, or a page",
    "training_time": "time the training of finished runs on one thread of this machine",
    "export": "write a finished run's network for other programs",
    "zoo": "list the networks that come with the package",
    "latency": "time a network with dynamic kernels beside its dense one",
    "runtimes": "time dynamic networks and levels beside ONNX Runtime and OpenVINO",
    "sensitivity": "show what dropping a part of each width costs and saves",
    "prune": "prune a finished run's network at once",
    "cascade": "show what levels save where the small ones answer what they are sure of",
    "serve": "serve a stream of images by an elastic network under load",
    "host": "answer requests over HTTP by an elastic network",
    "load_test": "send requests over HTTP to one, under load",
    "usage": "show how often dynamic kernels are on",
    "switching": "time the way from one sub-network to another, here and elsewhere",
    "bench": "time what elasticity costs and saves",
    "discovery": "time discovery and pruning beside Torch-Pruning",
    "networks": "list what is elastic in networks of torchvision and timm",
    "campaign": "try the library from outside, and write down what was lost",
    "dashboard": "make a W&B dashboard of runs",
}


def describe_commands() -> str:
    """Describe what there is to call."""
    lines = [f"  {name:<13} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: elastic <command> [key=value …]",
            "",
            *lines,
            "",
            "elastic <command> --help tells its options.",
        ]
    )


def run_command() -> None:
    """Run the command that the command line names.

    Raises:
        OptionError: there is none such.
    """
    name, *words = sys.argv[1:] or HELP[:1]
    if name in HELP:
        print(describe_commands())
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        remedy = f"did you mean {close[0]}?" if close else f"choose {', '.join(COMMANDS)}"
        raise OptionError(f"there is no command '{name}': {remedy}")
    if name == "train" and set(words) & set(HELP):  # for which nobody needs torch
        from elastic.experiments.tools.training_help import describe_training

        print(describe_training())
        return
    if not {"", str(Path.cwd())} & set(sys.path):  # as `python -m` has it: a user's own modules are found
        sys.path.insert(0, str(Path.cwd()))
    command = import_module(f"elastic.experiments.{name}")
    sys.argv = [str(command.__file__), *words]  # as `python -m` has it: runs of several processes start so
    command.main()


def main() -> None:
    end_on_signals()  # while it imports what takes seconds
    from elastic.experiments.tools.errors import run

    run(run_command)


if __name__ == "__main__":
    main()
