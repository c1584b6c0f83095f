"""List what is elastic in a hundred networks of torchvision and timm, as a page of the documentation.

    python -m experiments.networks page=docs/networks.md

Each network is built untrained and discovered for small images (extra `timm`). What is found is tried on the
network itself, where that takes seconds: widths are permuted, grown and pruned, and outputs compared.
"""

import platform
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from elastic.errors import ElasticError
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.files.atomic import check_place, write_atomically
from elastic.measure.counts import count_macs
from elastic.models import from_timm
from elastic.surgery.checking import MACS_PER_PARAMETER, fix_wrong_widths
from elastic.widths.discovery import find_widths
from elastic.widths.width import Widths

TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50
    resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2"""
TIMM = """
    bat_resnext26ts botnet26t_256 caformer_s18 coatnet_nano_rw_224 convformer_s18 convmixer_768_32
    convnext_atto convnextv2_atto cs3darknet_focus_s cs3darknet_s cs3sedarknet_l cspdarknet53 cspnext_s
    cspresnet50 cspresnext50 csatv2 darknet53 densenet121 dla34 dla46x_c dla60_res2net dm_nfnet_f0 dpn48b
    dpn68 eca_nfnet_l0 eca_resnext26ts eca_vovnet39b ecaresnet26t edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 efficientnet_b0 efficientnet_es efficientvim_m1 efficientvit_b0 efficientvit_m0
    ese_vovnet19b_slim fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b focalnet_tiny_srf gcresnext26ts gernet_s
    ghostnet_050 ghostnetv2_100 ghostnetv3_050 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0
    hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lambda_resnet26t lcnet_035 lcnetv2_base legacy_seresnet18 legacy_seresnext26_32x4d legacy_xception
    lowformer_b0 mambaout_femto mixnet_s mnasnet_small mobilenetv2_050 mobilenetv3_small_050
    mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0 mobilevit_xxs mobilevitv2_050 nasnetalarge
    nextvit_small nf_regnet_b0 nf_resnet50 nfnet_l0 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0
    rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9
    res2net50_14w_8s res2next50 resnest14d resnet18 resnet26t resnet32ts resnet50d resnet51q resnetaa50
    resnetblur50 resnetrs50 resnetv2_18 resnetv2_50 resnetv2_50d_gn resnetv2_50x1_bit resnext26ts rexnet_100
    selecsls42 semnasnet_075 seresnext26d_32x4d seresnext26ts shvit_s1 skresnet18 skresnext50_32x4d
    spnasnet_100 starnet_s1 swiftformer_xs test_byobnet test_convnext test_efficientnet_gn
    test_efficientnet_ln test_nfnet tf_efficientnet_b0 tf_mixnet_s tinynet_e tresnet_m vgg11_bn
    visformer_tiny xception41 xception41p"""
NAMES = (*(f"torchvision/{name}" for name in TORCHVISION.split()), *(f"timm/{name}" for name in TIMM.split()))
PIXELS = (64, 96, 128, 224, 256, 299)  # the smallest images that a network takes count
TRIED_MACS = 2e9  # of those that are tried


@dataclass
class Finding:
    """Hold what was found in a network."""

    pixels: int
    widths: Widths
    fixed: dict[str, str]  # but for what is the output
    wrong: set[str]
    is_tried: bool


def list_networks(page: Path = Path("docs/networks.md"), names: str = "") -> None:
    """Write a page on the networks.

    Args:
        page: the file to write.
        names: of some of the networks, separated by commas; all by default.

    Raises:
        FileError: there can be no such file.
    """
    check_place(page)
    torch.set_num_threads(1)
    rows = [describe_network(name) for name in (names.split(",") if names else NAMES)]
    write_atomically(
        page, lambda part: part.write_text(HEAD.format(**describe_machine()) + "\n".join(rows) + "\n")
    )


def describe_network(name: str) -> str:
    """Describe a network in a row of the table."""
    try:
        finding = examine_network(name)
    except ElasticError as error:
        return f"| {name} | | | | {shorten(str(error))} |"
    reasons = Counter(shorten(reason) for reason in finding.fixed.values())
    text = "; ".join(f"{n} × {reason}" for reason, n in reasons.most_common(3))
    result = (
        "not tried"
        if not finding.is_tried
        else "wrong: " + ", ".join(finding.wrong)
        if finding.wrong
        else "right"
    )
    print(f"{name}: {len(finding.widths)} free, {len(finding.fixed)} fixed, {result}", flush=True)
    return f"| {name} | {finding.pixels} | {len(finding.widths)} | {len(finding.fixed)} | {result} | {text} |"


def shorten(reason: str) -> str:
    """Shorten a reason to the operation and what it does: neither where, nor with what numbers."""
    reason = re.sub(r"^[\w.]+ \((\w+)\)", r"\1", reason)
    reason = re.sub(r"\(.*\) in (the model's forward|[\w.]+)", "", reason, count=1)
    return reason.replace("|", "\\|")


def examine_network(name: str) -> Finding:
    """Discover a network, and try what is found.

    Raises:
        ElasticError: it cannot be discovered, at any size of images.
    """
    net = build_network(name)
    example_BCHW, widths = discover_smallest(net)
    output = "it is the model's output"
    fixed = {width: reason for width, reason in widths.fixed.items() if reason != output}
    free = set(widths)
    cost = count_macs(net, example_BCHW) + MACS_PER_PARAMETER * sum(p.numel() for p in net.parameters())
    is_tried = cost <= TRIED_MACS
    if is_tried:
        fix_wrong_widths(net, widths)
    return Finding(example_BCHW.shape[-1], widths, fixed, free - set(widths), is_tried)


def build_network(name: str) -> nn.Module:
    """Build a network by the package and its name there, untrained."""
    torch.manual_seed(0)
    package, _, own = name.partition("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own
        if package == "timm":
            return from_timm(own).eval()
        return get_model(own, weights=None).eval()


def discover_smallest(net: nn.Module) -> tuple[Tensor, Widths]:
    """Discover a network for the smallest images that it takes; give an example of them, and the widths.

    Raises:
        ElasticError: it takes none.
    """
    *smaller, largest = iterate_examples(net)
    for example_BCHW in smaller:
        with suppress(ElasticError):
            return example_BCHW, find_widths(net, example_BCHW)
    return largest, find_widths(net, largest)


def iterate_examples(net: nn.Module) -> Iterator[Tensor]:
    """Iterate over examples of growing size; a network that says that its size is fixed gets that alone."""
    settings = getattr(net, "default_cfg", {})
    own = settings.get("input_size", (3, PIXELS[-1]))[-1]
    for pixels in (own,) if settings.get("fixed_input_size") else sorted({*PIXELS, own}):
        yield torch.zeros(2, 3, pixels, pixels)


def describe_machine() -> dict[str, str]:
    """Say where and with what the page was made."""
    import timm
    import torchvision

    return {
        "machine": f"{platform.machine()}, one thread",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "count": str(len(NAMES)),
    }


HEAD = """# Networks

What is elastic in {count} networks as torchvision and timm build them. The page is made by
`elastic networks page=docs/networks.md` (extra `timm`; {machine}; torch {torch}, torchvision {torchvision},
timm {timm}).

*Pixels* is the size of the images: the smallest that the network takes. *Free* widths can grow and shrink;
*fixed* ones keep their size, the layer that gives the output not counted. *Tried*: in a copy of the network
all free widths were permuted, grown by channels that nothing reads, and rid of those that nothing reads, and
the outputs stayed as they were (in double precision); networks of more than two billion multiply-accumulates
were not tried.

| network | pixels | free | fixed | tried | why |
|---|---|---|---|---|---|
"""


def main() -> None:
    call(list_networks)


if __name__ == "__main__":
    run(main)
