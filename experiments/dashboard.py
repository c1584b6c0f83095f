"""Make a W&B dashboard of this project's runs in a project of your own.

    python -m experiments.dashboard entity=<yours> project=elastic-cnn
    python -m experiments.dashboard print=true

The first needs an account and the extra `dashboards`; the second prints the same as JSON. The panels show
what `logger=wandb` logs; a test reads it back from a run that was logged offline.
"""

from typing import Any

from elastic.errors import OptionError, TrainingError
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call

# By section: the title of each panel, and the keys that it shows.
LINES: dict[str, dict[str, list[str]]] = {
    "Accuracy": {"Accuracy": ["val/acc", "train/acc"], "Loss": ["val/loss", "train/loss"]},
    "Structure": {
        "Parameters": ["size/params", "size/params_dense"],
        "MACs": ["size/macs"],
        "Active": ["dynamic/kernels", "dynamic/macs"],
    },
}
MEDIA = {"Structure": ["widths over time"], "Images": ["samples"]}
HISTOGRAMS = ["gates/score", "dynamic/usage"]
TABLES = ["timeline", "levels", "sets"]
FRONT = ("params", "test/acc")  # of the summary: size against accuracy, a point a run


def make_workspace(entity: str, project: str) -> Any:
    """Make the dashboard as `wandb_workspaces` has it; nothing is sent."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    lines = {
        section: [panels.LinePlot(title=title, x="epoch", y=list(keys)) for title, keys in plots.items()]
        for section, plots in LINES.items()
    }
    x, y = (panels.SummaryMetric(name) for name in FRONT)
    sections: dict[str, list[Any]] = {
        "Accuracy": [
            *lines["Accuracy"],
            panels.ScatterPlot(title="Accuracy against size", x=x, y=y, log_x=True),
        ],
        "Structure": [
            *lines["Structure"],
            *(panels.MediaBrowser(media_keys=[key]) for key in MEDIA["Structure"]),
            *(panels.WeavePanelSummaryTable(table_name=name) for name in TABLES),
        ],
        "Gates and kernels": [panels.MediaBrowser(title=key, media_keys=[key]) for key in HISTOGRAMS],
        "Images": [panels.MediaBrowser(media_keys=MEDIA["Images"])],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Elastic CNNs",
        sections=[
            workspaces.Section(name=name, panels=shown, is_open=True) for name, shown in sections.items()
        ],
    )


def make_dashboard(entity: str = "", project: str = "elastic-cnn", print: bool = False) -> str:
    """Make the dashboard in a project on W&B, and return its address; or return it as JSON, and send nothing.

    Args:
        entity: whose project it is; needed where it is sent.
        project: its name.
        print: return JSON instead.

    Raises:
        OptionError: neither is named.
        TrainingError: a package is missing.
    """
    if not (entity or print):
        raise OptionError("the dashboard has no place: name entity=<yours>, or print=true to see it as JSON")
    try:
        workspace = make_workspace(entity or "you", project)
    except ImportError as error:
        raise TrainingError(
            "wandb-workspaces is not installed: pip install 'elastic-cnn[dashboards]'"
        ) from error
    if print:
        return str(workspace._to_model().model_dump_json(by_alias=True))
    return str(workspace.save().url)


def main() -> None:
    silence()
    print(call(make_dashboard))


if __name__ == "__main__":
    run(main)
