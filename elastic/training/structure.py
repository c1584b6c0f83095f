"""Hold what has happened to a network in a run; every change of it goes through here.

Callbacks talk to a `Structure`, not to attributes of the user's module. It is a child of that module, so that
what elastic methods add (norms of levels, kernel activation modules) is trained, moved and saved with it, and
what has happened is in the module's `state_dict`: any way of loading one rebuilds the network first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor, fx, nn

from elastic.dynamic.attaching import MODULES, attach_modules
from elastic.dynamic.modules import describe_modules, select_set
from elastic.errors import StructureError, TrainingError
from elastic.growth.resolution import change_images
from elastic.levels.keeping import forget, keep_in
from elastic.levels.nested import Levels
from elastic.pruning.gates import find_grain, iterate_gates
from elastic.pruning.hiding import HiddenGates
from elastic.surgery.checking import discover_checked, has_widths
from elastic.surgery.depth import count_blocks, deepen, find_templates, get_blocks, get_template_name
from elastic.surgery.fresh import Fresh, zero_out
from elastic.surgery.graphs import release_graphs
from elastic.surgery.layout import lay_out_weights
from elastic.surgery.reindexing import Index, reindex
from elastic.training.groups import adopt_parameters
from elastic.training.imitation import OutputKind
from elastic.training.layout import choose_memory_format
from elastic.training.locating import find_called, have_same_shapes, is_called_compiled
from elastic.training.own_parameters import OwnOptimizers, OwnParameter, scale_module_rate
from elastic.training.processes import find_differing_processes, unwrap
from elastic.training.routing import LossTerm, Router
from elastic.training.steps import compute_loss_scale, is_trained_now
from elastic.training.tasks import compute_class_loss
from elastic.widths.discovery import discover
from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import Example, describe_inputs, list_inputs
from elastic.widths.parameters import get_weight
from elastic.widths.tracing import preserve_attributes, sync_traced
from elastic.widths.width import fix_widths

T = TypeVar("T")


class Structure(nn.Module):
    """Follow one network through a run: its widths, levels, kernel activation modules, and their history.

    Args:
        net: a child of the user's module, at any depth.
        example: an input of it, batch first, or several; only their shapes and types matter.
        seed: of all randomness in changes of structure.
        channels_last: keep the network in that memory format, as far as its kernels can be trusted with it;
            else tensors keep the format that they have.
        path: of the network in the module.

    Attributes:
        widths: of the network as it is now.
        trainer: of the run, once there is one.
        own: the optimizers of what elastic methods have added.
        start_sizes, start_depth: channels of each width and blocks of each stage that it began with; a block
            that has been added counts as its template.
        timeline: one row a structural event: epoch, step, why, width or stage, before, after.
        copies: networks of the same structure (averaged weights), which follow each change; `copy_paths` are
            the paths of those in the module, `alike` of others that are like the network, but stay.
        levels: nested sub-networks, where there are any; `level` is the one that is trained and evaluated,
            `extra_levels` are validated beside it.
        dynamic_nets: the network, or each of its levels, with kernel activation modules.
        outputs: what the network says, for levels and others that learn from it.
        compute_loss: what channels are judged by, where gradients decide: outputs, targets -> loss.
        schedule_fraction: the part of the run that an optimizer and its schedule last.
        resize: what images that the network is given become in a training step, where they do not stay.
        step_own: steps what elastic methods have added, after one of the user's optimizers.
        hidden_gates: the gates that are hidden from the program now.

    Raises:
        StructureError: nothing of the network can change.
    """

    holds_run = True  # copies and files of a network that is the whole module do without

    def __init__(
        self, net: nn.Module, example: Example, seed: int = 0, channels_last: bool = False, path: str = "net"
    ) -> None:
        super().__init__()
        self._net = (net,)  # not a child: the user's module has it
        self.example = example
        self.seed, self.channels_last, self.path = seed, channels_last, path
        self._is_channels_last = False  # torch.save cannot hold a memory format
        self.widths = discover_checked(net, *list_inputs(example))
        self.start_sizes, self.start_depth = self.widths.sizes(), count_blocks(net)
        self.timeline: list[dict[str, Any]] = []
        self.copies: list[nn.Module] = []
        self.copy_paths: tuple[str, ...] = ()
        self.alike: Sequence[str] = ()
        self.levels: Levels | None = None
        self.level, self.extra_levels = 0, range(0)
        self.dynamic_nets: list[fx.GraphModule] = []
        self.module_rate = 1.0
        self.schedule_fraction = 1.0
        self.resize: Callable[[Tensor], Tensor] | None = None
        self.outputs: OutputKind = "classes"
        self.compute_loss: Callable[[Any, Tensor], Tensor] = compute_class_loss
        self.own: OwnOptimizers = OwnOptimizers((), ())
        self.step_own: Callable[[torch.optim.Optimizer], None] | None = None
        self.trainer: L.Trainer | None = None
        self._router: Router | None = None
        self.hidden_gates = HiddenGates()

    @property
    def net(self) -> nn.Module:
        return self._net[0]

    @property
    def nets(self) -> list[nn.Module]:
        """Return the levels, the smallest first, or the network alone."""
        return [self.net] if self.levels is None else list(self.levels)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self._is_channels_last else torch.contiguous_format

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the run, not to the network, where a module is copied or sent."""
        initial: dict[str, Any] = {
            "copies": [],
            "trainer": None,
            "own": OwnOptimizers((), ()),
            "step_own": None,
            "_router": None,
            "resize": None,
            "hidden_gates": HiddenGates(),
        }
        return {**super().__getstate__(), **initial}  # type: ignore[misc]

    # Change.

    def restructure(
        self, changes: Mapping[str, Index], why: str, fresh: Fresh = zero_out, stages: Iterable[str] = ()
    ) -> None:
        """Re-index widths of the network and of all that follows it, deepen stages, and note it.

        Call it as a training epoch begins; in several processes in each, with the same arguments (`agree`).

        Raises:
            StructureError: the change cannot be followed; nothing has changed then.
            TrainingError: the processes of the run no longer agree.
        """
        before = self.widths.sizes()
        with self.changing():
            reindex(
                self.net,
                self.widths,
                changes,
                optimizers=self._list_optimizers(),
                copies=self.copies,
                fresh=fresh,
                generator=self.make_generator(),
            )
            for name in changes:
                self.record(why, width=name, before=before[name], after=self.widths[name].size)
            for stage in stages:
                count = self._deepen(stage)
                self.record(why, stage=stage, before=count, after=count + 1)

    def follow_copies(self, module: nn.Module, paths: Sequence[str]) -> None:
        """Let networks that a program keeps in step with this one follow each change of it.

        Raises:
            StructureError: one is no copy.
        """
        for path in paths:
            net = module.get_submodule(path)
            if not have_same_shapes(net, self.net):
                raise StructureError(f"'{path}' is no copy of '{self.path}': its parameters are others")
            if all(net is not copy for copy in self.copies):
                self.copies.append(net)
        self.copy_paths = tuple(paths)

    def record(self, why: str, **event: Any) -> None:
        """Note a structural event in the timeline."""
        trainer = self.trainer
        epoch, step = (trainer.current_epoch, trainer.global_step) if trainer else (0, 0)
        self.timeline.append({"epoch": epoch, "step": step, "why": why, **event})

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Surround a change of structure, or of what is trained: whoever knows the network looks again.

        Raises:
            TrainingError: the processes of the run no longer agree.
        """
        with unwrap(self.trainer) if self.trainer else nullcontext():
            release_graphs(self.net.parameters())  # of an epoch that is over, which a metric may hold
            yield
            self.lay_out()
        if self._get_called()._compiled_call_impl is not None or self._get_called() is not self.net:
            torch.compiler.reset()  # or it would fall back to eager, silently, after eight shapes
        if self.trainer and (ranks := find_differing_processes(self.trainer, self.net, self.own.optimizers)):
            raise TrainingError(
                f"processes {ranks} no longer hold the network of process 0: all of them must run the same "
                "code on the same data; continue from the last checkpoint"
            )

    def agree(self, decision: T) -> T:
        """Return the decision of the first process, in all of them; to be called in each."""
        return decision if self.trainer is None else self.trainer.strategy.broadcast(decision)

    def lay_out(self) -> None:
        """Bring all tensors into one memory format: a resumed run must not differ from one that went on."""
        if self.channels_last:
            memory_format = choose_memory_format(self.nets, self.trainer)
            self._is_channels_last = memory_format == torch.channels_last
            for net in (self.net, *self.copies):
                lay_out_weights(net, self.memory_format)
        if self.levels is not None:
            self.levels.refresh()

    def make_generator(self) -> torch.Generator:
        """Make randomness for the next structural event: of its own, or a resumed run would differ."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return torch.Generator().manual_seed(self.make_seed(epoch, 1 + len(self.timeline)))

    def make_seed(self, *key: int) -> int:
        """Make a seed for each (run seed, key); neighbouring run seeds must not repeat each other's."""
        return int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0])

    def _deepen(self, stage: str) -> int:
        """Append a block to a stage; return how many it had."""
        count = len(get_blocks(self.net, stage))
        deepen(self.net, self.widths, stage, copies=self.copies, generator=self.make_generator())
        for name in self.widths.keys() - self.start_sizes.keys():  # as far from its ceiling as its template
            self.start_sizes[name] = self.start_sizes[get_template_name(self.net, stage, name)]
        templates, order = find_templates(self.net, stage), list(self.net.parameters())
        adopt_parameters(self._list_optimizers(), templates, order)
        return count

    def _list_optimizers(self) -> list[torch.optim.Optimizer]:
        return [] if self.trainer is None else [*self.trainer.optimizers, *self.own.optimizers]

    # Gates.

    def hide_gates(self) -> None:
        """Leave weights under their own names, as a program's setup and its optimizers look for them."""
        self.hidden_gates.hide(self.net, *self.copies)

    def show_gates(self) -> None:
        """Put gates back where they were hidden."""
        self.hidden_gates.show()

    @contextmanager
    def showing_gates(self) -> Iterator[None]:
        """Surround what has to see the gates while they are hidden from the program."""
        is_hiding = self.hidden_gates.is_hiding
        self.show_gates()
        yield
        if is_hiding:
            self.hide_gates()

    # Levels and kernel activation modules.

    def nest(self, levels: Levels) -> None:
        """Give the network levels; what it had trained stays the largest."""
        self.levels, self.level, self.level_norms = levels, len(levels) - 1, levels.norms
        levels.refresh()  # the network may have been laid out since they were made

    def attach_dynamic(self, rate: float = 1.0, **options: Any) -> None:
        """Let each level run with kernel activation modules of its own.

        Args:
            rate: of their learning, times the network's.
            options: of `elastic.dynamic.attach_modules`: sets, activation, kind, branches.
        """
        dynamic_nets = []
        for net in self.nets:
            widths = discover(net, *list_inputs(self.example))
            fix_widths(widths, {n: reason for n, reason in self.widths.fixed.items() if n in widths})
            dynamic_nets.append(attach_modules(net, widths, **options))
        self.dynamic_nets, self.module_rate = dynamic_nets, rate
        self.kernel_modules = nn.ModuleList(net.get_submodule(MODULES) for net in self.dynamic_nets)

    def select_first(self) -> None:
        """Select the largest level and the first set of its kernel activation modules."""
        self.level = len(self.nets) - 1
        if self.dynamic_nets:
            select_set(self.kernel_modules, 0)

    def run(self, level: int, *args: Any, **kwargs: Any) -> Any:
        """Execute a level, the network itself where there are none; with its modules, if it has any."""
        if self.resize is not None and is_trained_now(self.trainer):
            args, kwargs = change_images(self.resize, args, kwargs)
        dynamic = self.dynamic_nets[level] if self.dynamic_nets else None
        with self._being_quiet(level, dynamic):
            if self.levels is not None and level < len(self.levels) - 1:
                return self.levels.run(level, *args, traced=dynamic, **kwargs)
            if dynamic is not None:
                sync_traced(dynamic, self.net, self.net.training)
            plain = self.net if self._router is None else self._router.inner_call
            return (dynamic or plain)(*args, **kwargs)

    @contextmanager
    def _being_quiet(self, level: int, dynamic: nn.Module | None) -> Iterator[None]:
        """Let hooks, and what the forward keeps in the network's modules, know of the active level alone."""
        net = self.nets[level]
        if level == self.level:
            with nullcontext() if net is self.net else keep_in(self.net, net):
                yield
            return
        hooked = self.net if dynamic is None else dynamic
        with quiet_hooks(hooked), preserve_attributes(self.net), forget(net):
            yield

    def run_active(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the active level."""
        return self.run(self.level, *args, **kwargs)

    # Training.

    def list_own_parameters(self) -> list[OwnParameter]:
        """List the parameters that elastic methods have added: scores, norms of levels, modules."""
        weights = list(self.net.parameters())
        scores = [
            OwnParameter(gate.score, like=[get_weight(layer), *weights], decays=False)
            for _, layer, gate in iterate_gates(self.net)
        ]
        norms = [
            OwnParameter(p, like=weights) for p in (self.level_norms.parameters() if self.levels else ())
        ]
        modules = [
            OwnParameter(p, like=weights, rate=scale_module_rate(p, self.module_rate))
            for p in (self.kernel_modules.parameters() if self.dynamic_nets else ())
        ]
        return [*scores, *norms, *modules]

    def take_own_parameters(self) -> None:
        """Take what elastic methods have added out of the user's optimizers, which must exist by now.

        From here on `step_own` is called after each of their steps.
        """
        assert self.trainer is not None
        self.own.release()
        self.own = OwnOptimizers(self.trainer.optimizers, self.list_own_parameters())
        self.own.follow(self.trainer.strategy._lightning_optimizers, self.step_own or self.own.step)

    def route(self, terms: Sequence[LossTerm]) -> None:
        """Let calls of the network run the active level and its modules, and add terms to the loss.

        Raises:
            TrainingError: what calls the network is compiled, which leaves no call of it.
        """
        is_trained = self._router is not None and self._router.is_trained
        self.unroute()
        if terms or self.levels is not None or self.dynamic_nets or self.resize is not None:
            called = self._get_called()
            if self.trainer is not None and is_called_compiled(self.trainer.lightning_module, called):
                raise TrainingError(
                    f"what calls '{self.path}' is compiled, so that its calls cannot be told: compile that "
                    "network alone, by its own compile()"
                )
            self._router = Router(called, self, terms)
            self._router.is_trained = is_trained
            self._router.install()

    def unroute(self) -> None:
        """Let calls of the network run the network again."""
        if self._router is not None:
            self._router.remove()
        self._router = None

    def release(self) -> None:
        """Leave the network, its calls and the optimizers to the program, as a run ends."""
        self.unroute()
        self.own.release()
        self.resize = None

    def check_called(self) -> None:
        """Refuse a training step that trains the network without calling it, so that nothing is routed.

        Raises:
            TrainingError: it is one, of the first.
        """
        router = self._router
        if router is None or router.is_trained:
            return
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        if not any(gradient.any() for gradient in gradients):  # zeros are from what stands in for a loss
            return
        raise TrainingError(
            f"a training step runs '{self.path}' without calling it: its forward, parts of it, or what "
            "torch.compile has made of its caller; call it, and compile it alone, by its own compile()"
        )

    def is_current(self, module: nn.Module) -> bool:
        """Tell whether a module still has the network, and that its widths."""
        return any(submodule is self.net for submodule in module.modules()) and has_widths(
            self.net, self.widths
        )

    def _get_called(self) -> nn.Module:
        return self.net if self.trainer is None else find_called(self.trainer.lightning_module, self.net)

    def compute_loss_scale(self) -> float | None:
        """Return what the run multiplies its loss with, or None where nothing is trained now."""
        return compute_loss_scale(self.trainer)

    # Checkpoints.

    def get_extra_state(self) -> dict[str, Any]:
        """Return what has happened, for the module's `state_dict`: plain containers alone."""
        return {
            "seed": self.seed,
            "start_sizes": dict(self.start_sizes),
            "sizes": self.widths.sizes(),
            "timeline": list(self.timeline),
            "levels": None if self.levels is None else self.levels.sizes[:-1],
            "example": describe_inputs(self.example),
            "network": self.path,
            "copies": list(self.copy_paths),
            "grain": find_grain(self.net),
            "modules": self.describe_modules(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up nothing more: `elastic.training.history` has done so before the network was loaded."""

    def describe_modules(self) -> dict[str, Any] | None:
        """Return what `attach_modules` has to be told to make the kernel activation modules again."""
        return describe_modules(self.kernel_modules) if self.dynamic_nets else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Structure":
        """Look again where tensors are moved or converted, which the network shares or holds buffers of."""
        super()._apply(fn, recurse)
        # A network in 64 or 16 bits takes no other input; where it is does not matter.
        inputs = tuple(x.to(fn(x.new_empty(0)).dtype) for x in list_inputs(self.example))
        self.example = inputs[0] if isinstance(self.example, Tensor) else inputs
        if self.levels is not None:
            self.levels.refresh()
        for net, level in zip(self.dynamic_nets, self.nets, strict=False):
            sync_traced(net, level, self.net.training)
        return self
