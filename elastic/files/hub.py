"""Keep networks where Hugging Face's tools look for them: a folder, or a repository, of three files.

`model.safetensors` is the network, `config.json` what is said of it, `README.md` its card.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME

from elastic.files.cards import write_card
from elastic.files.network import Network
from elastic.files.zoo import WEIGHTS


class HubNetwork(ModelHubMixin):
    """Carry a network to Hugging Face and back, as its mixin asks for it."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def _save_pretrained(self, save_directory: Path) -> None:
        self.network.save(save_directory / WEIGHTS)
        about = json.dumps(self.network.about, indent=2, ensure_ascii=False)
        (save_directory / CONFIG_NAME).write_text(about + "\n")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, net: Any = None, example: Any = None, **options: Any
    ) -> "HubNetwork":
        folder = Path(model_id)
        path = folder / WEIGHTS if folder.is_dir() else Path(hf_hub_download(model_id, WEIGHTS, **options))
        return cls(Network.load(net, path, example))

    def generate_model_card(self, *_: Any, repo_id: str = "network", **__: Any) -> ModelCard:
        return ModelCard(write_card(repo_id, self.network.about, "elastic.Network.from_pretrained"))
