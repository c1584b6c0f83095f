"""A hundred networks of torchvision and timm: what is free, that it is right, and Torch-Pruning beside it.

All of it takes an hour on one core; `-k` chooses.
"""

import copy
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from elastic.dynamic import attach_modules, make_skipping
from elastic.errors import StructureError
from elastic.experiments.networks import NAMES, build_network, discover_smallest
from elastic.files.exporting import export
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.measure.counts import count_macs
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates, iterate_gates, set_score
from elastic.surgery.checking import fix_wrong_widths
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import find_widths
from elastic.widths.width import Widths
from tests.elastic.zoo import randomised

pytest.importorskip("timm")
tp = pytest.importorskip("torch_pruning")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore"),  # the networks' own
]
# Of which Torch-Pruning frees more: ECA, shuffles that tie all channels.
FEWER = {"timm/eca_resnext26ts", "timm/edgenext_xx_small", "timm/efficientvit_b0"}
# Torch-Pruning takes minutes to list their groups.
LONG = """
    torchvision/maxvit_t torchvision/swin_t torchvision/swin_v2_t timm/coatnet_nano_rw_224
    timm/gcresnext26ts timm/botnet26t_256 timm/halonet26t timm/efficientvim_m1
    timm/lambda_resnet26t timm/eca_nfnet_l0 timm/eca_vovnet39b timm/ecaresnet26t
    timm/efficientformerv2_s0 timm/efficientvit_m0 timm/focalnet_tiny_srf
    timm/mobilenetv4_hybrid_medium timm/inception_resnet_v2 timm/mobilevitv2_050 timm/resnest14d
    timm/rexnet_100 timm/visformer_tiny timm/iformer_t""".split()
# Small ones of different families, of which everything is tried.
FAMILIES = """
    torchvision/densenet121 torchvision/efficientnet_b0 torchvision/mobilenet_v2
    torchvision/mobilenet_v3_small torchvision/regnet_x_400mf torchvision/resnet18
    torchvision/shufflenet_v2_x0_5 torchvision/squeezenet1_1 torchvision/mnasnet0_5
    torchvision/googlenet torchvision/convnext_tiny torchvision/resnet50 timm/convnext_atto
    timm/convnextv2_atto timm/cs3darknet_s timm/cspnext_s timm/dla34 timm/dla46x_c
    timm/edgenext_xx_small timm/efficientvit_b0 timm/ese_vovnet19b_slim timm/fasternet_t0
    timm/ghostnet_050 timm/hgnetv2_b0 timm/hrnet_w18_small timm/inception_next_atto timm/lcnet_035
    timm/legacy_seresnet18 timm/mixnet_s timm/mnasnet_small timm/mobilenetv2_050
    timm/mobilenetv3_small_050 timm/mobilenetv4_conv_small timm/poolformer_s12 timm/pvt_v2_b0
    timm/regnetx_002 timm/regnety_002 timm/repghostnet_050 timm/repvit_m0_9 timm/resnest14d
    timm/resnetv2_18 timm/selecsls42 timm/skresnet18 timm/starnet_s1 timm/test_byobnet
    timm/test_efficientnet_gn timm/test_nfnet timm/tf_efficientnet_b0 timm/tinynet_e
    timm/visformer_tiny""".split()


def make_network(name: str) -> tuple[nn.Module, Tensor, Widths]:
    net = randomised(build_network(name))
    example, widths = discover_smallest(net)
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    return net, x, widths


def first(outputs: object) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]  # type: ignore[index]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LONG])
def test_what_torch_pruning_can_prune_is_free(name: str) -> None:
    net, x, widths = make_network(name)
    written = {slot.module for width in widths.values() for slot in width.slots_with("out")}
    output = {width for width, reason in widths.fixed.items() if reason == "it is the model's output"}
    groups = [group for group in list_groups(net, x) if not output & set(group)]
    free = [group for group in groups if written & set(group)]
    assert len(free) >= 0.9 * len(groups) or name in FEWER


def list_groups(net: nn.Module, x: Tensor) -> list[list[str]]:
    """The layers that write the channels of each group of Torch-Pruning; none, where it fails."""
    names = {module: name for name, module in net.named_modules()}
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    try:
        graph = tp.DependencyGraph().build_dependency(net.requires_grad_(), x[:1])
        groups = list(graph.get_all_groups(root_module_types=[*layers]))
    except Exception:  # its own
        return []
    return [
        [
            names[dependency.target.module]
            for dependency, _ in group
            if graph.is_out_channel_pruning_fn(dependency.handler)
            and isinstance(dependency.target.module, layers)
        ]
        for group in groups
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_followed_is_right(name: str) -> None:
    """Permuted, grown by what nothing reads, rid of what nothing reads, it is the same function."""
    net, x, widths = make_network(name)
    if count_macs(net, x) > 3e9:
        pytest.skip("takes minutes")
    free = set(widths)
    fix_wrong_widths(net, widths)
    assert set(widths) == free, widths.fixed


@pytest.mark.parametrize("name", FAMILIES)
def test_the_optimizer_follows(name: str) -> None:
    net, x, widths = make_network(name)
    optimizer = torch.optim.Adam(net.parameters())
    first(net(x)).square().sum().backward()
    optimizer.step()
    reindex(net, widths, {n: [*range(1, w.size), -1] for n, w in widths.items()}, optimizers=[optimizer])
    first(net(x)).square().sum().backward()
    optimizer.step()
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_compaction_keeps_the_outputs_and_takes_two_seconds(name: str) -> None:
    net, x, widths = make_network(name)
    attach_gates(net, widths, "channel")
    generator = torch.Generator().manual_seed(0)
    for _, _, gate in iterate_gates(net):
        set_score(gate, torch.where(torch.rand(gate.score.shape, generator=generator) < 0.5, 1.0, -1.0))
    expected = first(net(x))
    start = time.process_time()
    plain = compact(net, x)
    assert time.process_time() - start < 2
    tolerance = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(first(plain(x)), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_level_is_a_network_cut_to_its_first_channels(name: str) -> None:
    net, x, widths = make_network(name)
    (sizes,) = level_sizes(net, widths, x[:1], [0.5])
    level = Levels(net, widths, [sizes])[0]
    cut = copy.deepcopy(net)
    reindex(cut, find_widths(cut, x), {n: range(sizes[n]) for n in sizes})
    expected = first(cut(x))
    torch.testing.assert_close(first(level(x)), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_skips_computes_what_masks(name: str) -> None:
    net, x, widths = make_network(name)
    try:
        dynamic = attach_modules(net, widths).eval()
        expected = first(dynamic(x))
    except StructureError as refusal:
        pytest.skip(str(refusal))
    torch.testing.assert_close(
        first(make_skipping(dynamic)(x)), expected, rtol=0, atol=1e-3 * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_exported(name: str, tmp_path: Path) -> None:
    """The file is compared with the network where it is written."""
    net, x, _ = make_network(name)
    export(net, x[:1], tmp_path / "net.onnx")
