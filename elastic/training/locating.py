"""Say where a network is in the module of a program, and what the program calls for it."""

from torch import nn

WRAPPED = "_orig_mod"  # the child that `torch.compile` gives what it makes of a network


def find_path(module: nn.Module, child: nn.Module) -> str:
    """Return the dotted path of a module in another."""
    return next(path for path, candidate in module.named_modules() if candidate is child)


def make_prefix(path: str) -> str:
    """Return what the names of a network's tensors begin with in its module, which may be the network."""
    return f"{path}." if path else ""


def have_same_shapes(net: nn.Module, other: nn.Module) -> bool:
    """Tell whether two networks have parameters of the same names and shapes, as copies have."""
    parameters, others = net.named_parameters(), other.named_parameters()
    return {name: p.shape for name, p in parameters} == {name: p.shape for name, p in others}


def find_called(module: nn.Module, net: nn.Module) -> nn.Module:
    """Find what a module calls for its network: itself, or what `torch.compile` has wrapped it in."""
    return next(
        (submodule for submodule in module.modules() if getattr(submodule, WRAPPED, None) is net), net
    )


def is_called_compiled(module: nn.Module, net: nn.Module) -> bool:
    """Tell whether something in a module that calls a network is compiled, the network itself not counted."""
    parents = find_path(module, net).split(".")[:-1]
    callers = [module.get_submodule(".".join(parents[: i + 1])) for i in range(len(parents))]
    compiled = (caller._compiled_call_impl is not None or hasattr(caller, WRAPPED) for caller in callers)
    return getattr(module, "_compiler_ctx", None) is not None or any(compiled)
