"""List the operations that discovery follows; what any other one reads keeps its size, by name."""

from collections.abc import Iterable

from torch import nn

from elastic.widths.operations.comparing import compare
from elastic.widths.operations.cutting import (
    chunk,
    gate_linearly,
    gather,
    get_item,
    narrow,
    pick,
    select,
    set_item,
    split,
    unbind,
)
from elastic.widths.operations.functional import (
    convolve_transposed_with,
    convolve_with,
    deform_with,
    normalize_channels_with,
    normalize_groups_with,
    normalize_layer_with,
    project_with,
    rectify_with,
)
from elastic.widths.operations.interface import LAYER, Axes, NotFollowed, Role, Rule, Tracked, Tracker
from elastic.widths.operations.joining import (
    broadcast,
    broadcast_each,
    concatenate,
    convert,
    hold,
    pass_on,
    scale,
    stack,
)
from elastic.widths.operations.layers import (
    convolve,
    convolve_transposed,
    embed,
    normalize_channels,
    normalize_groups,
    normalize_layer,
    project,
    rectify,
)
from elastic.widths.operations.making import (
    copy_tensor,
    decide,
    expand,
    fill,
    fill_like,
    hold_values,
    make_grid,
    repeat,
    repeat_entries,
)
from elastic.widths.operations.products import (
    add_product,
    attend,
    contract,
    measure_distances,
    multiply_matrices,
)
from elastic.widths.operations.ranking import find_extreme, find_place, rank
from elastic.widths.operations.registry import TABLE, register_op
from elastic.widths.operations.reshaping import flatten, reshape, reshape_as, unflatten
from elastic.widths.operations.shapes import (
    accumulate,
    bound_norms,
    cut_triangle,
    join_complex,
    measure_norm,
    mix_dimension,
    move_dimensions,
    normalize,
    normalize_neighbours,
    permute,
    read_attribute,
    reduce,
    reduce_twice,
    reorder,
    split_complex,
    squeeze,
    transpose,
    transpose_last,
    unsqueeze,
)
from elastic.widths.operations.spatial import (
    fold,
    pad,
    pool,
    resize,
    shuffle_channels,
    shuffle_pixels,
    transform,
    unfold,
    unpool,
    unshuffle_pixels,
)
from elastic.widths.operations.weights import assign_data

__all__ = [
    "LAYER",
    "NEEDS_NO_TENSOR",
    "READS_COUNTS",
    "TABLE",
    "Axes",
    "NotFollowed",
    "Role",
    "Rule",
    "Tracked",
    "Tracker",
    "register_op",
]

LAYERS: dict[Rule, Iterable[type[nn.Module]]] = {
    convolve: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    convolve_transposed: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    project: (nn.Linear,),
    embed: (nn.Embedding,),
    normalize_channels: (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
    normalize_groups: (nn.GroupNorm,),
    normalize_layer: (nn.LayerNorm, nn.RMSNorm),
    rectify: (nn.PReLU,),
    flatten: (nn.Flatten,),
    unflatten: (nn.Unflatten,),
    mix_dimension: (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin),
    normalize_neighbours: (nn.LocalResponseNorm, nn.CrossMapLRN2d),
    pool: (
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        *(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    ),
    unpool: (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
    pad: (
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
        *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    ),
    unfold: (nn.Unfold,),
    fold: (nn.Fold,),
    resize: (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    gate_linearly: (nn.GLU,),
    pass_on: (nn.Identity,),
    compare: (
        *(nn.CosineSimilarity, nn.PairwiseDistance, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
        *(nn.KLDivLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.SoftMarginLoss, nn.PoissonNLLLoss),
    ),
    shuffle_pixels: (nn.PixelShuffle,),
    unshuffle_pixels: (nn.PixelUnshuffle,),
    shuffle_channels: (nn.ChannelShuffle,),
    broadcast: (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid),
        *(nn.Hardshrink, nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Threshold, nn.RReLU),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    ),
}

# Functions and methods, without underscores at their ends.
FUNCTIONS: dict[Rule, str] = {
    broadcast: """
        add sub iadd isub rsub neg pow sqrt rsqrt exp log abs square
        maximum minimum relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish
        hardsigmoid softplus clamp clip dropout dropout1d dropout2d dropout3d feature_dropout contiguous
        clone copy detach float half bfloat16 double expand_as stochastic_depth where lerp
        addcmul addcdiv bernoulli masked_fill erf sin cos tan sign reciprocal floor ceil round log1p expm1
        log2 exp2 sigmoid nan_to_num hardshrink softshrink softsign tanhshrink threshold logsigmoid rrelu
        clamp_min clamp_max alpha_dropout feature_alpha_dropout cpu cuda long int bool byte char short
        eq ne gt lt ge le isnan isinf isfinite drop_block2d
        logical_not logical_and logical_or logical_xor bitwise_not bitwise_and bitwise_or bitwise_xor
        invert and or xor pos positive atan arctan asin arcsin acos arccos sinh cosh asinh acosh
        atanh erfc log10 logit sinc trunc fix frac sgn mod fmod remainder floordiv floor_divide float_power
        subtract negative absolute greater greater_equal less less_equal not_equal
        real imag angle conj complex polar
        arcsinh arccosh arctanh atan2 arctan2 hypot copysign heaviside logaddexp fmin fmax requires_grad
        xlogy isclose deg2rad rad2deg signbit isposinf isneginf isreal ldexp logaddexp2 nextafter
        log_sigmoid expit entr erfcx erfinv ndtr log_ndtr ndtri xlog1py i0 i0e i1 i1e igamma igammac gammainc
        gammaincc lgamma gammaln digamma psi zeta item is_nonzero numpy""",
    scale: "mul imul multiply div truediv itruediv divide true_divide",
    convert: "to type type_as",
    fill: "ones zeros empty full rand randn new new_ones new_zeros new_empty new_full",
    fill_like: """
        ones_like zeros_like empty_like full_like rand_like randn_like fill zero
        uniform normal exponential""",
    copy_tensor: "as_tensor asarray",
    hold_values: "new_tensor",
    make_grid: "affine_grid",
    expand: "expand broadcast_to",
    repeat: "repeat tile",
    repeat_entries: "repeat_interleave",
    stack: "stack",
    broadcast_each: "broadcast_tensors",
    hold: "dataclass",  # named tuples, and dictionaries of classes of their own
    select: "index_select",
    gather: "gather",
    pick: "select",
    narrow: "narrow",
    set_item: "setitem",
    reduce_twice: "var_mean std_mean",
    reorder: "flip roll",
    cut_triangle: "tril triu",
    decide: "expect_same expect_held expect_passed expect_default assert",
    unbind: "unbind",
    gate_linearly: "glu",
    shuffle_pixels: "pixel_shuffle",
    unshuffle_pixels: "pixel_unshuffle",
    shuffle_channels: "channel_shuffle native_channel_shuffle",
    measure_norm: "norm vector_norm linalg_vector_norm linalg_norm",
    normalize: "normalize",
    bound_norms: "renorm",
    find_extreme: "max min",
    find_place: "argmax argmin",
    rank: "sort argsort median nanmedian mode topk kthvalue",
    normalize_neighbours: "local_response_norm",
    move_dimensions: "movedim moveaxis",
    multiply_matrices: "matmul bmm mm linalg_matmul",
    add_product: "addmm baddbmm",
    contract: "einsum",
    measure_distances: "cdist",
    compare: """
        cosine_similarity pairwise_distance mse_loss l1_loss smooth_l1_loss huber_loss kl_div
        binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss poisson_nll_loss dist
        allclose equal""",
    attend: "scaled_dot_product_attention",
    reshape_as: "reshape_as view_as",
    unpool: "max_unpool1d max_unpool2d max_unpool3d",
    pool: """
        max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices fractional_max_pool2d
        fractional_max_pool2d_with_indices max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
        adaptive_max_pool3d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices
        lp_pool1d lp_pool2d lp_pool3d""",
    pad: "pad",
    transform: """
        fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
        fft_rfftn fft_irfftn""",
    split_complex: "view_as_real",
    join_complex: "view_as_complex",
    resize: "interpolate grid_sample",
    unfold: "unfold",
    fold: "fold",
    convolve_with: "conv1d conv2d conv3d",
    convolve_transposed_with: "conv_transpose1d conv_transpose2d conv_transpose3d",
    deform_with: "deform_conv2d",
    project_with: "linear",
    normalize_channels_with: "batch_norm instance_norm",
    normalize_groups_with: "group_norm",
    normalize_layer_with: "layer_norm rms_norm",
    rectify_with: "prelu",
    flatten: "flatten ravel",
    unflatten: "unflatten",
    reshape: "view reshape",
    reduce: "mean sum amax amin var std prod logsumexp nansum nanmean any all count_nonzero",
    mix_dimension: "softmax log_softmax softmin",
    concatenate: "cat concat concatenate hstack vstack dstack",
    split: "split split_with_sizes unsafe_split",
    chunk: "chunk tensor_split unsafe_chunk",
    get_item: "getitem",
    transpose: "transpose swapaxes swapdims",
    transpose_last: "t adjoint",
    accumulate: "cumsum cumprod logcumsumexp",
    permute: "permute",
    squeeze: "squeeze",
    unsqueeze: "unsqueeze",
}

# These understand numbers computed from sizes; with any other rule such a number fixes what it counts.
READS_COUNTS: tuple[Rule, ...] = (
    *(reshape, unflatten, split, get_item),
    *(decide, set_item, convolve_with, convolve_transposed_with, deform_with, normalize_layer_with),
    *(fill, expand, repeat, make_grid, scale),
)
# These are asked even where no tensor with channels is read.
NEEDS_NO_TENSOR: tuple[Rule, ...] = (fill, decide)

TABLE.functions |= {getattr: read_attribute, setattr: assign_data}
TABLE.layers.update((kind, rule) for rule, kinds in LAYERS.items() for kind in kinds)
TABLE.names.update((name, rule) for rule, names in FUNCTIONS.items() for name in names.split())
