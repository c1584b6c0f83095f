"""Find the way past a check of the data: `assert x.isfinite().all()`, or an `if` that raises an error."""

import dis
import re
from types import CodeType

JUMP = re.compile(r"POP_JUMP_(?:FORWARD_)?IF_(TRUE|FALSE)")
ALWAYS = re.compile(r"JUMP_(?:FORWARD|BACKWARD|BACKWARD_NO_INTERRUPT|ABSOLUTE)")
# More than to raise an error; what is kept in a function's own names ends with it.
LEAVES = re.compile(r"STORE_(?!FAST).*|RETURN_.*|YIELD_.*")


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
