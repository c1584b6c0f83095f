"""Write a network's card from what its file says of it: Markdown, with a head as Hugging Face reads it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from elastic.errors import OptionError, cite

ROW = ("test/acc", "params", "params_dense", "macs", "macs_dynamic", "latency_ms")
HEADS = {
    "test/acc": "test accuracy (%)",
    "params": "params",
    "params_dense": "params_dense",
    "macs": "MACs",
    "macs_dynamic": "MACs, mean",
    "latency_ms": "latency (ms)",
}
WORDS = """`params` are the parameters that are not zero, `params_dense` those in memory, MACs
multiply-accumulates for one image. Images are scaled to 0 … 1, then the mean is subtracted and the result is
divided by the sd."""
PROTOCOL = "The test split was looked at once, after the last epoch."


def write_card(name: str, about: Mapping[str, Any], load: str = "elastic.load") -> str:
    """Write the card of a network.

    Args:
        name: what it is called, and loaded by.
        about: what is said of it, see `docs/files.md`; what is missing there is missing in the card.
        load: what loads it by that name.

    Raises:
        OptionError: what is said of it cannot be.
    """
    try:
        return _write_parts(name, about, load)
    except (TypeError, ValueError, LookupError, AttributeError, yaml.YAMLError) as error:
        cause = f"{name} has no card, since `about` says what cannot be ({cite(error)})"
        raise OptionError(f"{cause}: say it as docs/files.md has it") from error


def _write_parts(name: str, about: Mapping[str, Any], load: str) -> str:
    origin, measured = about.get("made", {}), about.get("measured", {})
    parts = [
        _write_head(name, about),
        f"# {name}",
        about.get("summary", ""),
        _write_facts(about),
        _write_results(measured) if measured else "",
        "\n".join(filter(None, [about.get("protocol", PROTOCOL), about.get("latency"), WORDS]))
        if measured
        else "",
        _write_use(f"{load}({json.dumps(name, ensure_ascii=False)})", measured),
        f"## How it was made\n\n```bash\n{origin['command']}\n```" if "command" in origin else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write_head(name: str, about: Mapping[str, Any]) -> str:
    """Write what Hugging Face shows and searches: licence, task, data set, results."""
    data, measured = about.get("made", {}).get("data"), about.get("measured", {})
    head: dict[str, Any] = {"library_name": "elastic-cnn", "tags": ["elastic-cnn", "pruning"]}
    if about.get("licence"):
        head["license"] = about["licence"].lower()
    if data is not None and "test/acc" in measured:
        accuracy = {"type": "accuracy", "value": round(measured["test/acc"], 4)}
        task = {"type": "image-classification", "name": "Image classification"}
        result = {"task": task, "dataset": {"type": data, "name": data}, "metrics": [accuracy]}
        head |= {"pipeline_tag": "image-classification", "datasets": [data]}
        head["model-index"] = [{"name": name, "results": [result]}]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _write_facts(about: Mapping[str, Any]) -> str:
    origin = about.get("made", {})
    model = about.get("model", {})
    versions = ", ".join(f"{key} {origin[key]}" for key in ("git", "torch") if origin.get(key))
    facts = {
        "Data": origin.get("data"),
        "Network as first built": _write_call(model) if model else None,
        "Methods": origin.get("schedule"),
        "Started from": origin.get("init"),
        "Learned from": origin.get("teacher"),
        "Epochs": origin.get("epochs"),
        "Seed": origin.get("seed"),
        "Input": _write_input(about["input"]) if "input" in about else None,
        "Mean, sd": f"{_list(about['mean'])}; {_list(about['std'])}"
        if {"mean", "std"} <= about.keys()
        else None,
        "Classes": ", ".join(map(str, about["classes"])) if "classes" in about else None,
        "Trained on": origin.get("device"),
        "Code": versions or None,
        "Licence": about.get("licence"),
    }
    rows = [f"| {key} | {_escape(str(value))} |" for key, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""


def _write_input(sizes: Sequence[Any]) -> str:
    """Write the sizes of an input, or the type and the sizes of each where there are several."""
    if any(isinstance(size, list) for size in sizes):
        return "; ".join(map(_write_input, sizes))
    return " × ".join(map(str, sizes))


def _write_call(model: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in model["options"].items())
    return f"`{model['builder']}({options})`"


def _escape(text: str) -> str:
    """Write what stands in a cell of a table: names of classes may be of whatever signs."""
    return " ".join(text.replace("<", "&lt;").replace("|", r"\|").split())


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _write_results(measured: Mapping[str, Any]) -> str:
    """Write a row for the network, or for each of its levels and each of their sets of modules."""
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for level in measured.get("levels") or [measured]:
        name = f"level {level['level']}" if "level" in level else "the network"
        sets = level.get("sets") or [{}]
        for row in sets:
            part = f"{name}, set {row['set']}" if len(sets) > 1 else name
            rows.append((part, {**level, **row}))
    keys = [key for key in ROW if any(key in row for _, row in rows)]
    if all(row.get("macs_dynamic", row.get("macs")) == row.get("macs") for _, row in rows):
        keys = [key for key in keys if key != "macs_dynamic"]
    head = ["", *(HEADS[key] for key in keys)]
    lines = [[name, *(_write_cell(key, row.get(key)) for key in keys)] for name, row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _write_cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key == "test/acc":
        return f"{100 * value:.2f}"
    return f"{value:.3f}" if key == "latency_ms" else f"{value:,}"


def _write_use(call: str, measured: Mapping[str, Any]) -> str:
    lines = ["import elastic", "", f"network = {call}"]
    if measured.get("levels"):
        lines.append("net = network.plain(0)  # the smallest level, a plain nn.Module")
    elif measured.get("sets"):
        lines.append("net = elastic.make_skipping(network.dynamic(), [images])  # skips what is off")
    else:
        lines.append("net = network.plain()  # a plain nn.Module")
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
