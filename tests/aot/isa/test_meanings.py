"""The table of mnemonics is the interpreter's."""

import pytest

from epfuse.aot.isa.errors import UnknownInstruction
from epfuse.aot.isa.meanings import DIFFERS, mnemonics, rows
from epfuse.aot.isa.run import decode
from tests.aot.isa.assembly import program


def test_each_mnemonic_once_with_two_sources() -> None:
    names = [each.mnemonic for each in rows()]
    assert len(names) == len(set(names))
    assert all(each.source and each.second_source and each.source != each.second_source for each in rows())
    assert set(DIFFERS) <= set(names)


@pytest.mark.parametrize("name", [each.mnemonic for each in rows()])
def test_the_interpreter_knows_the_mnemonic(name: str) -> None:
    """Without operands each is refused for them, not for its name."""
    for line in (name, f"{name}_e64"):
        try:
            decode(program(line))
        except UnknownInstruction as error:
            message = str(error)
        else:
            return
        if "the opcode" not in message and "is not known: " not in message.replace("operands where", ""):
            return
    assert "operands" in message


def test_mnemonics_of_a_program() -> None:
    assert mnemonics([program("v_mov_b32_e32 v0, v1\nv_mov_b32_dpp v0, v1 row_shr:1 row_mask:0xf bank_mask:0xf")]) == {
        "v_mov_b32",
        "s_endpgm",
    }
