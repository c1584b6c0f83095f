"""Entry points, and one folder a question with its recorded results."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m experiments.<command>`, which is about to import what takes seconds
    from elastic.experiments.tools.signals import end_on_signals

    end_on_signals()
