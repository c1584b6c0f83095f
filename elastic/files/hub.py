"""Keep networks where Hugging Face's tools look for them: a folder, or a repository, of three files.

`model.safetensors` is the network, `config.json` what is said of it, `README.md` its card.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME

from elastic.errors import ElasticError, FileError, cite
from elastic.files.cards import write_card
from elastic.files.zoo import WEIGHTS


class Savable(Protocol):
    """Save itself, and say what is to be said of it: a `Network`."""

    about: dict[str, Any]

    def save(self, path: Path) -> None: ...


class HubNetwork(ModelHubMixin):
    """Carry a network to Hugging Face and back, as its mixin asks for it."""

    def __init__(self, network: Savable) -> None:
        self.network = network

    def _save_pretrained(self, save_directory: Path) -> None:
        self.network.save(save_directory / WEIGHTS)
        about = json.dumps(self.network.about, indent=2, ensure_ascii=False)
        (save_directory / CONFIG_NAME).write_text(about + "\n")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        load: Callable[..., Savable],
        net: Any = None,
        example: Any = None,
        **options: Any,
    ) -> "HubNetwork":
        path = Path(hf_hub_download(model_id, WEIGHTS, **options))
        return cls(load(path, net, example))

    def generate_model_card(self, *_: Any, repo_id: str = "network", **__: Any) -> ModelCard:
        return ModelCard(write_card(repo_id, self.network.about, "elastic.Network.from_pretrained"))


def read_repository(repo_id: str, load: Callable[..., Savable], options: Mapping[str, Any]) -> Any:
    """Read a network from a repository.

    Args:
        load: reads it from its file, as `Network.load` does.

    Raises:
        FileError: there is none, or it cannot be reached.
    """
    with _explain(f"{repo_id} cannot be read", "name a folder, or a repository that can be reached"):
        return HubNetwork.from_pretrained(repo_id, load=load, **options).network


def write_folder(network: Savable, folder: Path, options: Mapping[str, Any]) -> None:
    """Write a folder.

    Raises:
        FileError: there can be none.
    """
    with _explain(f"{folder} cannot be written", "name another folder"):
        HubNetwork(network).save_pretrained(folder, model_card_kwargs={"repo_id": folder.name}, **options)


def write_repository(network: Savable, repo_id: str, options: Mapping[str, Any]) -> str:
    """Write a repository, and return the address of the commit.

    Raises:
        FileError: it cannot be reached, or this user may not.
    """
    with _explain(f"{repo_id} cannot be written", "log in with `hf auth login`, or give token=…"):
        return HubNetwork(network).push_to_hub(repo_id, model_card_kwargs={"repo_id": repo_id}, **options)


@contextmanager
def _explain(fault: str, remedy: str) -> Iterator[None]:
    """Say in one line what the library raises: of the network, of its service, of names and of files."""
    try:
        yield
    except ElasticError:
        raise
    except Exception as error:
        cause = cite(error)
        raise FileError(f"{fault} ({cause}): {remedy}") from error
