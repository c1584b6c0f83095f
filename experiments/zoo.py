"""List the networks that come with the package: `elastic zoo [name=…]`.

A name shows the card of that network: what it is, how it was made and what it does. `elastic.load("<name>")`
loads it.
"""

from rich.console import Console
from rich.table import Table

from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.files.packing import read_about
from elastic.files.zoo import find_file, list_zoo, read_card


def show_zoo(name: str | None = None) -> None:
    """List the networks that come with the package, or show the card of one.

    Args:
        name: of the network whose card is shown.

    Raises:
        FileError: there is none of that name.
    """
    if name is not None:
        print(read_card(name), end="")
        return
    table = Table("name", "data", "test accuracy (%)", "params", "MACs", "levels", "sets")
    for entry in list_zoo():
        about = read_about(find_file(entry))
        measured, rows = about["measured"], about["measured"].get("levels") or [about["measured"]]
        accuracies = " … ".join(dict.fromkeys(f"{100 * rows[k]['test/acc']:.2f}" for k in (0, -1)))
        macs = measured.get("macs_dynamic", measured["macs"])
        counts = (len(rows), len(measured.get("sets", [])))
        table.add_row(
            entry,
            about["made"]["data"],
            accuracies,
            f"{measured['params']:,}",
            f"{macs:,}",
            *map(str, counts),
        )
    Console(width=120).print(table)
    print('Load one by elastic.load("<name>"); see its card by elastic zoo name=<name>.')


def main() -> None:
    call(show_zoo)


if __name__ == "__main__":
    run(main)
