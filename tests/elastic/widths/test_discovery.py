"""Discovery against widths found by hand, and against itself after any change."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision import models
from torchvision.ops.misc import FrozenBatchNorm2d

from elastic.errors import OptionError, StructureError
from elastic.measure import census
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.elastic.zoo import CASES, OUTPUT, Case, Net, changes, conv, differences, groupings, head, states

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
IMAGE = (2, 3, 6, 6)


def refusal(match: str, model: nn.Module, *example: Tensor) -> None:
    """Discovery says no, in one line."""
    with pytest.raises(StructureError, match=match) as refused:
        discover(model, *example)
    assert "\n" not in str(refused.value)


# --- what a person finds ---------------------------------------------------------------------------


@every_case
def test_sizes_and_groupings_are_those_found_by_hand(case: Case) -> None:
    widths = discover(case.model(), case.example())
    assert widths.sizes() == case.sizes
    assert groupings(widths) == {name: set(slots.split()) for name, slots in case.slots.items()}
    assert {name for name, width in widths.items() if width.mixed} == set(case.mixed)


@every_case
def test_what_cannot_change_is_listed_with_its_reason(case: Case) -> None:
    widths = discover(case.model(), case.example())
    assert {name.split(":")[0] for name in widths.fixed} == set(case.fixed)
    for name, reason in widths.fixed.items():
        assert case.fixed[name.split(":")[0]] in reason
        with pytest.raises(StructureError) as refused:
            widths[name]
        assert name in str(refused.value) and reason in str(refused.value)
        assert "\n" not in str(refused.value)


def test_an_unknown_width_is_refused_with_the_names_there_are() -> None:
    widths = discover(CASES["residual"].model(), CASES["residual"].example())
    with pytest.raises(StructureError, match=r"'two'.*stem, one"):
        widths["two"]
    assert list(widths) == ["stem", "one"] and len(widths) == 2


def test_widths_are_a_mapping() -> None:
    widths = discover(CASES["residual"].model(), CASES["residual"].example())
    assert "stem" in widths and "head.2" not in widths and "two" not in widths
    assert widths.get("two") is None


def test_roles_tell_writers_from_readers_from_the_rest() -> None:
    width = discover(CASES["residual"].model(), CASES["residual"].example())["stem"]
    norm = {("bn", tensor) for tensor in ("weight", "bias", "running_mean", "running_var")}
    assert {(s.module, s.tensor) for s in width.slots_with("out")} == {("stem", "weight"), ("two", "weight")}
    assert {(s.module, s.tensor) for s in width.slots_with("in")} == {("one", "weight"), ("head.2", "weight")}
    assert {(s.module, s.tensor) for s in width.slots_with("per_channel")} == {("stem", "bias"), *norm}


@pytest.mark.parametrize(
    ("case", "width", "module", "positions"),
    [
        ("flatten", "0", "3", [list(range(9 * channel, 9 * channel + 9)) for channel in range(4)]),
        ("flatten", "0", "0", [[0], [1], [2], [3]]),
        ("flatten_of_a_join", "one", "out", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("flatten_of_a_join", "two", "out", [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]),
        ("joined_with_the_input", "one", "two", [[3], [4], [5], [6]]),
        ("chunk", "conv", "conv", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("channel_shuffle_alone", "conv", "last", [[0, 1], [2, 3], [4, 5]]),
        ("depthwise_multiplied", "0", "1", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("dense", "two", "head.2", [[7], [8]]),
    ],
)
def test_positions_of_channels_in_a_weight(
    case: str, width: str, module: str, positions: list[list[int]]
) -> None:
    widths = discover(CASES[case].model(), CASES[case].example())
    (slot,) = [s for s in widths[width].slots if (s.module, s.tensor) == (module, "weight")]
    assert widths.positions(slot, width).tolist() == positions


@every_case
def test_the_segments_of_a_slot_fill_its_dimension(case: Case) -> None:
    model = case.model()
    widths = discover(model, case.example())
    for width in widths.values():
        for slot in width.slots:
            held = getattr(model.get_submodule(slot.module), slot.tensor)
            assert sum(widths.extents(slot)) == held.shape[slot.dim]


# --- what is refused -------------------------------------------------------------------------------


def test_control_flow_on_data_is_refused() -> None:
    model = Net(lambda m, x: m.conv(x) if x.sum() > 0 else x, conv=conv(3, 4))
    refusal(r"Net cannot be traced by torch\.fx", model, torch.randn(IMAGE))


def even(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 2 else x


def chosen(x: Tensor) -> Tensor:
    return torch.where(x.mean((1, 2, 3), keepdim=True) > 0, -x, x)


torch.fx.wrap("even")


@pytest.mark.parametrize(("choice", "free"), [(lambda x: even(x), {"last"}), (chosen, {"conv", "last"})])
def test_what_the_refusal_advises_is_followed(choice: Callable[[Tensor], Tensor], free: set[str]) -> None:
    net = Net(lambda m, x: m.head(m.last(choice(m.conv(x)))), conv=conv(3, 4), last=conv(4, 5), head=head(5))
    widths = discover(net, torch.randn(IMAGE))
    assert set(widths) == free and (widths.get("conv") is None or widths["conv"].mixed)


def test_an_example_of_the_wrong_shape_is_refused() -> None:
    refusal(
        r"does not run on an example.*\(2, 4, 6, 6\).*0",
        nn.Sequential(conv(3, 4), head(4)),
        torch.randn(2, 4, 6, 6),
    )


def test_a_model_with_nothing_to_change_is_refused() -> None:
    refusal("no layer with channels", nn.Sequential(nn.ReLU()), torch.randn(IMAGE))
    refusal(f"0: {OUTPUT}", nn.Sequential(conv(3, 4)), torch.randn(IMAGE))


class Named(NamedTuple):
    maps: Tensor
    logits: Tensor


@dataclass
class Held:
    maps: Tensor
    logits: Tensor


@pytest.mark.parametrize("kind", [Named, Held, lambda maps, logits: {"maps": maps, "logits": [logits]}])
def test_every_output_is_fixed(kind: Callable[[Tensor, Tensor], Any]) -> None:
    model = Net(lambda m, x: kind(m.one(x), m.head(m.two(x))), one=conv(3, 4), two=conv(3, 4), head=head(4))
    widths = discover(model, torch.randn(IMAGE), check=True)
    assert widths.sizes() == {"two": 4}
    assert widths.fixed == {"one": OUTPUT, "head.2": OUTPUT}


def test_what_is_compiled_is_refused() -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU(), head(4))
    wrapper = nn.ModuleDict({"_orig_mod": model})  # as torch.compile makes one, which takes two seconds
    refusal("0 is what torch.compile made .* in place", nn.Sequential(wrapper), torch.randn(IMAGE))
    with warnings.catch_warnings():  # of TorchScript, which goes
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model[0] = torch.jit.trace(model[0], torch.randn(IMAGE))
    refusal("0 is a TorchScript module", model, torch.randn(IMAGE))


# --- awkward ways to write a model: followed or refused in one line, never guessed -------------------


def stem_then(forward: Callable[[Any, Tensor], Tensor], **layers: Any) -> Net:
    """`forward` between a first convolution of four channels and a last one, which reads `read` channels."""
    read = layers.pop("read", 4)
    return Net(
        lambda m, x: m.head(F.relu(m.last(forward(m, m.stem(x))))),
        stem=conv(3, 4),
        **layers,
        last=conv(read, 5),
        head=head(5),
    )


def with_shared_weight() -> nn.Module:
    model = stem_then(lambda m, x: m.two(F.relu(m.one(x))), one=conv(4, 4), two=conv(4, 4))
    model.two.weight = model.one.weight
    return model


def with_buffer(shape: Sequence[int], forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    model = stem_then(forward)
    model.register_buffer("scale", torch.linspace(1, 2, 4).view(shape))
    return model


def cbam(m: Any, x: Tensor) -> Tensor:
    """arXiv 1807.06521, section 3: the spatial attention of the mean and the maximum over channels."""
    highest, _ = torch.max(x, 1, keepdim=True)
    return x * torch.sigmoid(m.map(torch.cat([x.mean(1, keepdim=True), highest], 1)))


def ones(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


AWKWARD: dict[str, Callable[[], nn.Module]] = {
    "list of channels": lambda: stem_then(lambda m, x: x[:, [0, 2]], read=2),
    "single channel": lambda: stem_then(lambda m, x: x[:, 1][:, None], read=1),
    "maximum over channels": lambda: stem_then(lambda m, x: x.max(1, keepdim=True)[0], read=1),
    "cbam": lambda: stem_then(cbam, map=conv(2, 1, 3)),
    "norm over channels": lambda: stem_then(lambda m, x: x / x.norm(2, 1, keepdim=True)),
    "normalize": lambda: stem_then(lambda m, x: F.normalize(x, dim=1)),
    "view of its own size": lambda: stem_then(lambda m, x: x.view(x.size())),
    "view of another's size": lambda: stem_then(lambda m, x: F.relu(x).reshape(x.shape)),
    "reshape by keyword": lambda: stem_then(lambda m, x: x.reshape(shape=(-1, 4, 6, 6))),
    "permute by keyword": lambda: stem_then(lambda m, x: x.permute(dims=(0, 1, 3, 2))),
    "flatten by keyword": lambda: stem_then(lambda m, x: torch.flatten(input=x, start_dim=2)[..., None]),
    "layer by keyword": lambda: stem_then(lambda m, x: m.one(input=x), one=conv(4, 4)),
    "cat by keyword": lambda: stem_then(lambda m, x: torch.cat(tensors=[x, x], dim=1), read=8),
    "cat along an axis": lambda: stem_then(lambda m, x: torch.cat([x, x], axis=1), read=8),
    "cat from the end": lambda: stem_then(lambda m, x: torch.cat([x, x], -3), read=8),
    "split by keyword": lambda: stem_then(
        lambda m, x: torch.split(x, split_size_or_sections=2, dim=1)[0], read=2
    ),
    "empty slice": lambda: stem_then(lambda m, x: torch.cat([x, x[:, x.shape[1] :]], 1)),
    "rest of a slice": lambda: stem_then(
        lambda m, x: torch.cat([x[:, : x.shape[1] // 4], F.relu(x[:, x.shape[1] // 4 :])], 1)
    ),
    "shared weight": with_shared_weight,
    "buffer a channel": lambda: with_buffer((1, 4, 1, 1), lambda m, x: x * m.scale),
    "buffer reshaped": lambda: with_buffer((4,), lambda m, x: x * m.scale.view(1, -1, 1, 1)),
    "parameter reshaped": lambda: stem_then(lambda m, x: x * m.scale.view(1, -1, 1, 1), scale=ones(4)),
    "parameter of literal shape": lambda: stem_then(lambda m, x: x * m.scale.view(1, 4, 1, 1), scale=ones(4)),
    "frozen batch norm": lambda: stem_then(lambda m, x: m.norm(x), norm=FrozenBatchNorm2d(4)),
    "tensor that is no buffer": lambda: stem_then(lambda m, x: x - m.mean, mean=torch.ones(1, 4, 1, 1)),
    "tensor of its own": lambda: stem_then(lambda m, x: x + torch.ones(4, 1, 1)),
    "new tensor": lambda: stem_then(lambda m, x: x + torch.ones(4, 1, 1, device=x.device)),
    "functional layer norm": lambda: stem_then(
        lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)
    ),
    "functional convolution": lambda: stem_then(lambda m, x: F.conv2d(x, m.kernel), kernel=ones(4, 4, 1, 1)),
    "stack": lambda: stem_then(lambda m, x: torch.stack([x, F.relu(x)]).sum(0)),
    "pixel shuffle": lambda: stem_then(lambda m, x: F.pixel_shuffle(x, 2), read=1),
    "matrix product": lambda: stem_then(
        lambda m, x: (x.permute(0, 2, 3, 1) @ m.square).permute(0, 3, 1, 2), square=ones(4, 4)
    ),
    "softmax over channels": lambda: stem_then(lambda m, x: F.softmax(x, dim=1) * x),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(conv(3, 4)), conv(4, 5), head(5)),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 1), conv(4, 5), head(5)),
    "local response norm": lambda: stem_then(lambda m, x: m.norm(x), norm=nn.LocalResponseNorm(3)),
    "batch folded in": lambda: stem_then(lambda m, x: x.view(-1, 2, 6, 6), read=2),
    "mean by axis": lambda: Net(
        lambda m, x: m.out(m.conv(x).mean(axis=(2, 3))), conv=conv(3, 4), out=nn.Linear(4, 5)
    ),
    "norm over space": lambda: stem_then(
        lambda m, x: m.up(m.one(x).norm(2, (2, 3)))[..., None, None], one=conv(4, 3), up=nn.Linear(3, 4)
    ),
    "joined with what follows a tuple": lambda: stem_then(
        lambda m, x: m.one(x) + m.two(x.sort(1)[0]), one=conv(4, 4), two=conv(4, 4)
    ),
    "batch norm of nothing": lambda: stem_then(
        lambda m, x: m.norm(x), norm=nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    ),
    "instance norm of nothing": lambda: stem_then(lambda m, x: m.norm(x), norm=nn.InstanceNorm2d(4)),
    "group norm of nothing": lambda: stem_then(lambda m, x: m.norm(x), norm=nn.GroupNorm(4, 4, affine=False)),
    "layer norm of nothing": lambda: stem_then(
        lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        norm=nn.LayerNorm(4, elementwise_affine=False),
    ),
    "layer norm of whole maps": lambda: stem_then(lambda m, x: m.norm(x), norm=nn.LayerNorm([4, 6, 6])),
    "squeezed": lambda: Net(
        lambda m, x: m.out(m.conv(x).mean((2, 3), keepdim=True).squeeze()),
        conv=conv(3, 4),
        out=nn.Linear(4, 5),
    ),
}


@pytest.mark.parametrize("build", AWKWARD.values(), ids=AWKWARD)
def test_an_awkward_model_is_followed_or_refused(build: Callable[[], nn.Module]) -> None:
    """Whatever is offered as a width can grow and shrink; the rest is refused in one line, unchanged."""
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(IMAGE)
    try:
        widths = discover(model, x)
    except StructureError as refused:
        assert "\n" not in str(refused)
        return
    model.requires_grad_(False)
    shape = model(x).shape
    for name, width in widths.items():
        before, expected = states(model), model(x)
        try:
            reindex(model, widths, {name: grow_index(width.size, 2)})
        except StructureError as refused:
            assert "\n" not in str(refused) and not differences(before, states(model))
            continue
        y = model(x)
        assert width.mixed or torch.allclose(y, expected, rtol=1e-5, atol=1e-5), name
    for name in widths:
        reindex(model, widths, {name: [0, 1]})
        assert model(x).shape == shape, name


def test_a_forward_that_may_drop_the_last_channel_is_refused() -> None:
    """`squeeze()` without a dimension would drop a width's last channel: such a width is refused."""
    with pytest.raises(StructureError, match=r"conv: squeeze\(\) in the model's forward drops a dimension"):
        discover(AWKWARD["squeezed"](), torch.randn(IMAGE))


# --- discovery looks and does not touch ------------------------------------------------------------


@every_case
def test_discovery_leaves_the_model_and_the_random_state_alone(case: Case) -> None:
    model = case.model()
    model(case.example()).sum().backward()
    next(model.children()).eval()  # neither all in training nor all in evaluation
    modes = [module.training for module in model.modules()]
    before, random = states(model), torch.get_rng_state()
    discover(model, case.example())
    assert not differences(before, states(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(random, torch.get_rng_state())


def test_random_layers_draw_nothing_during_discovery() -> None:
    model = nn.Sequential(conv(3, 4), nn.Dropout2d(), conv(4, 5), nn.Dropout(), head(5))
    random = torch.get_rng_state()
    assert discover(model, torch.randn(IMAGE, generator=torch.Generator())).sizes() == {"0": 4, "2": 5}
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.sampled(10)
@every_case
def test_mode_batch_and_type_make_no_difference(case: Case) -> None:
    model, x = case.model(), case.example()
    widths = discover(model, x)
    assert discover(model.eval(), x) == widths
    assert discover(model, x[:1]) == widths
    assert discover(model, x.repeat(3, *[1] * (x.dim() - 1))) == widths
    assert discover(copy.deepcopy(model).double(), x.double()) == widths


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = conv(3, 4), conv(1, 4), head(4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.one(x) + self.two(y))

    assert discover(Two(), torch.randn(IMAGE), torch.randn(2, 1, 6, 6)).sizes() == {"one": 4}


def test_what_only_training_runs_is_found() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.side, self.side_head, self.head = conv(3, 4), conv(4, 6), head(6), head(4)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return (self.head(x), self.side_head(self.side(x))) if self.training else self.head(x)

    widths = discover(Auxiliary().eval(), torch.randn(IMAGE))
    assert widths.sizes() == {"stem": 4, "side": 6}
    assert "side.weight.1" in groupings(widths)["stem"]


# --- any change keeps what was discovered ------------------------------------------------------------


def check_structure(model: nn.Module, widths: Widths, x: Tensor) -> None:
    """The model trains, and a second look finds the same widths, slots and layouts."""
    model.train()
    out = model(x)
    (out.sum() if isinstance(out, Tensor) else sum(part.sum() for part in out)).backward()
    del out  # a later change would refuse a graph still alive
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.shape == parameter.shape and parameter.grad.isfinite().all(), name
    again = discover(model, x)
    assert again.sizes() == widths.sizes()
    assert groupings(again) == groupings(widths)
    assert again == widths


@pytest.mark.sampled(10)
@every_case
@given(data=st.data())
@settings(max_examples=3)
def test_any_change_keeps_the_structure(case: Case, data: st.DataObject) -> None:
    model, x = case.model(), case.example()
    widths = discover(model, x)
    for _ in range(2):
        wanted = data.draw(changes(widths, case.smallest))
        reindex(model, widths, wanted)
        for name, index in wanted.items():
            assert widths[name].size == len(index)
        check_structure(model, widths, x)


@pytest.mark.sampled(20)
@every_case
@pytest.mark.parametrize("together", [False, True])
def test_down_to_one_channel_and_up_again(case: Case, together: bool) -> None:
    """The smallest size is no special case: what the layers say of themselves comes back."""
    model, x = case.model(), case.example()
    widths = discover(model, x)
    for names in [list(case.sizes)] if together else [[name] for name in case.sizes]:
        reindex(model, widths, {name: [case.sizes[name] - 1] for name in names})
        model(x).sum().backward()
        for name in reversed(names):
            reindex(model, widths, {name: grow_index(1, case.sizes[name] - 1)})
    check_structure(model, widths, x)
    assert repr(model) == repr(case.model())


# --- models of others --------------------------------------------------------------------------------

# How many widths a person counts in the tables of the papers; see the numbers' sums.
TORCHVISION = {
    "resnet18": (64, 8 + 4),  # one inside each block, one a stage
    "squeezenet1_1": (64, 1 + 8 * 3),  # the stem; squeeze and two expansions in each fire module
    "regnet_y_400mf": (64, 1 + 4 + 16 * 3),  # the stem, one a stage; two and squeeze-excite in each block
    "mobilenet_v3_small": (64, 1 + 5 + 10 + 9 + 2),  # stem, stages, expansions, squeeze-excites, two last
    "efficientnet_b0": (64, 1 + 7 + 15 + 16 + 1),  # stem, stages, expansions, squeeze-excites, last
    "mobilenet_v2": (64, 1 + 7 + 16 + 1),  # stem, stages, expansions, last
    "densenet121": (64, 1 + 58 * 2 + 3),  # stem, two in each dense layer, transitions
    "googlenet": (224, 3 + 9 * 6 + 2 * 2),  # stem, inception modules, auxiliary classifiers
    # stem, inside each unit, the two stages that shuffling leaves more than one channel in, last
    "shufflenet_v2_x0_5": (64, 1 + 16 + 2 + 1),
    "vgg11_bn": (64, 8 + 2),
    "alexnet": (64, 5 + 2),
}
FAST = {"resnet18", "squeezenet1_1"}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in TORCHVISION]
)
def test_torchvision_is_as_elastic_as_our_own(name: str) -> None:
    pixels, expected = TORCHVISION[name]
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(num_classes=10, **options).eval()
    x = torch.randn(2, 3, pixels, pixels)
    widths = discover(model, x)
    assert len(widths) == expected

    with torch.no_grad():
        before = model(x)
        reindex(model, widths, {n: grow_index(w.size, 2) for n, w in widths.items()})
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)

    random = torch.Generator().manual_seed(0)
    half = {n: torch.randperm(w.size, generator=random)[: -(-w.size // 2)] for n, w in widths.items()}
    reindex(model, widths, half)
    check_structure(model, widths, x)


class Timed(nn.Module):
    """Scales what it reads by a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x_BCHW: Tensor, scale: Tensor) -> Tensor:
        return self.last(self.first(x_BCHW) * scale)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_a_number_may_stand_beside_a_batch(shape: tuple[int, ...], batch: int) -> None:
    net, x_BCHW, scale = Timed(), torch.randn(batch, 3, 8, 8), torch.randn(shape)
    if batch == 1 and shape == (1,):  # a number a sample, which does not go with images
        return
    widths = discover(net, x_BCHW, scale, check=True)
    assert widths.sizes() == {"first": 8}
    net(x_BCHW, scale)
    assert census(net, widths, x_BCHW, scale).widths == {"first": 8}


def test_an_example_that_is_no_tensor_is_named() -> None:
    x_BCHW = torch.randn(1, 3, 8, 8)
    with pytest.raises(
        OptionError, match="an example input is a tuple: give the network's inputs as tensors"
    ):
        discover(Timed(), (x_BCHW, x_BCHW))  # type: ignore[arg-type]
