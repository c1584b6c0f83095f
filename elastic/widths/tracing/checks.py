"""Find the way past a check of data: `assert x.isfinite().all()`, an `if` that raises an error or warns."""

import dis
import re
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

JUMP = re.compile(r"POP_JUMP_(?:FORWARD_)?IF_(TRUE|FALSE)")
ALWAYS = re.compile(r"JUMP_(?:FORWARD|BACKWARD|BACKWARD_NO_INTERRUPT|ABSOLUTE)")
ENDS = re.compile(r"(?:RETURN|YIELD)_.*")
STORES = re.compile(r"(?:STORE|DELETE)_.*")  # those in a function's own names end with an error
REPORTERS = ("print", "warnings", "warn", "logging", "logger", "log", "LOGGER", "_logger", "rank_zero_warn")
HANDLER = "__torch_function__"
WITH_DATA = (Tensor, nn.Parameter)  # what torch.export has in their place are others


class Passing(NamedTuple):
    """Say how code goes on that asks about the data.

    Attributes:
        answer: with which it does; with the other one it raises an error, or only reports something.
        raises: whether it raises an error.
    """

    answer: bool
    raises: bool


def find_passing(code: CodeType, offset: int) -> Passing | None:
    """Find how code goes on that asks a question; None where it does something by either answer.

    Args:
        offset: where the code asks, as a frame's `f_lasti` has it.
    """
    instructions = list(dis.get_instructions(code))
    places = {instruction.offset: i for i, instruction in enumerate(instructions)}
    place = places[offset]
    place += instructions[place].opname == "TO_BOOL"  # before the jump, from Python 3.13 on
    jump = JUMP.fullmatch(instructions[place].opname)
    if jump is None:
        return None
    here, there, jumps_if = place + 1, places[instructions[place].argval], jump[1] == "TRUE"
    raises_here, raises_there = (_raises(instructions, places, start) for start in (here, there))
    if raises_here != raises_there:
        return Passing(jumps_if == raises_here, raises=True)
    if _reports(instructions, here, there):
        return Passing(jumps_if, raises=False)
    return Passing(not jumps_if, raises=False) if _reports(instructions, there, here) else None


class PassingChecks(TorchFunctionMode):
    """Answer a forward's checks of what has no data; a tensor that has some answers for itself."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__bool__ and (type(args[0]) not in WITH_DATA or args[0].is_meta):
            caller: FrameType | None = sys._getframe(1)
            while caller is not None and caller.f_code.co_name == HANDLER:  # of another mode
                caller = caller.f_back
            passing = None if caller is None else find_passing(caller.f_code, caller.f_lasti)
            if passing is not None:
                return passing.answer
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function that asks for nothing."""
        return func(*args, **kwargs)


def _raises(instructions: list[dis.Instruction], places: dict[int, int], start: int) -> bool:
    """Tell whether code raises an error, whichever way it goes, and does nothing else."""
    visited, pending = set[int](), [start]
    while pending:
        place = pending.pop()
        name, code = instructions[place].opname, instructions[place].opcode
        if place in visited or name == "RAISE_VARARGS":
            continue
        visited.add(place)
        if ENDS.fullmatch(name) or (STORES.fullmatch(name) and name != "STORE_FAST"):
            return False
        if code in dis.hasjrel or code in dis.hasjabs:
            pending.append(places[instructions[place].argval])
        if not ALWAYS.fullmatch(name):
            pending.append(place + 1)
    return True


def _reports(instructions: list[dis.Instruction], start: int, other: int) -> bool:
    """Tell whether code prints, warns or logs, in statements of their own, and goes on as other code does."""
    named = ""
    for place in range(start, len(instructions)):
        name, code = instructions[place].opname, instructions[place].opcode
        if code in dis.hasjrel or code in dis.hasjabs or ENDS.fullmatch(name) or STORES.fullmatch(name):
            return False
        if name == "POP_TOP":
            if named not in REPORTERS or _goes_on_alike(instructions, place + 1, other):
                return named in REPORTERS
            named = ""
        elif name.startswith("LOAD_"):  # first of a statement, what it calls
            named = named or str(instructions[place].argval)
    return False


def _goes_on_alike(instructions: list[dis.Instruction], start: int, other: int) -> bool:
    """Tell whether code is the same at two places until it ends or jumps back."""
    for ours, theirs in zip(instructions[start:], instructions[other:], strict=False):
        if (ours.opname, ours.argval) != (theirs.opname, theirs.argval):
            return False
        if start == other or ENDS.fullmatch(ours.opname) or ALWAYS.fullmatch(ours.opname):
            return True
    return False
