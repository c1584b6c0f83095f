"""Find the way past a check of the data: `assert x.isfinite().all()`, or an `if` that raises an error."""

import dis
import re
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

JUMP = re.compile(r"POP_JUMP_(?:FORWARD_)?IF_(TRUE|FALSE)")
ALWAYS = re.compile(r"JUMP_(?:FORWARD|BACKWARD|BACKWARD_NO_INTERRUPT|ABSOLUTE)")
# More than to raise an error; what is kept in a function's own names ends with it.
LEAVES = re.compile(r"STORE_(?!FAST).*|RETURN_.*|YIELD_.*")

HANDLER = "__torch_function__"


def find_passing_answer(code: CodeType, offset: int) -> bool | None:
    """Tell which answer to a question that code asks goes on, where the other one raises an error.

    Args:
        offset: where the code asks, as a frame's `f_lasti` has it.

    Returns:
        None where neither does, or both do, or the question does not decide where the code goes.
    """
    instructions = list(dis.get_instructions(code))
    places = {instruction.offset: i for i, instruction in enumerate(instructions)}
    place = places[offset]
    place += instructions[place].opname == "TO_BOOL"  # before the jump, from Python 3.13 on
    jump = JUMP.fullmatch(instructions[place].opname)
    if jump is None:
        return None
    raises_there = _raises(instructions, places, places[instructions[place].argval])
    if raises_there == _raises(instructions, places, place + 1):
        return None
    return (jump[1] == "TRUE") != raises_there


class PassingChecks(TorchFunctionMode):
    """Answer a forward's checks, as a trace does that has no data to answer them from."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__bool__:
            caller: FrameType | None = sys._getframe(1)
            while caller is not None and caller.f_code.co_name == HANDLER:  # of another mode
                caller = caller.f_back
            answer = None if caller is None else find_passing_answer(caller.f_code, caller.f_lasti)
            if answer is not None:
                return answer
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
        if LEAVES.fullmatch(name):
            return False
        if code in dis.hasjrel or code in dis.hasjabs:
            pending.append(places[instructions[place].argval])
        if not ALWAYS.fullmatch(name):
            pending.append(place + 1)
    return True
