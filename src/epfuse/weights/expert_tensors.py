"""Which tensors of a checkpoint are a layer's experts: found by name, and all of them checked before a byte is read.

Names come in two kinds. A tensor a matrix, with a scale beside it: ``experts.7.w1.weight`` (w1 gate, w3 up, w2 down) or
``experts.7.gate_proj.weight``. Or stacks of all experts: ``experts.gate_up_proj``, as transformers holds and saves
them, and gpt-oss' ``experts.gate_up_proj_blocks``.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from epfuse.arguments import checks_enums
from epfuse.errors import CheckpointError, DtypeError, ShapeError
from epfuse.numerics.mxfp8 import BLOCK as GROUP
from epfuse.weights.block_fp8 import BLOCK
from epfuse.weights.checkpoint_format import Checkpoint
from epfuse.weights.config_families import FAMILIES
from epfuse.weights.config_modules import HEADS
from epfuse.weights.layouts import GateUpRows, MatrixOrder, WeightLayout
from epfuse.weights.model_config import ExpertModel
from epfuse.weights.tensor_file import StoredTensor
from epfuse.weights.tensor_folder import TensorFolder
from epfuse.weights.weight_names import SECOND_SCALE

SAVED_MODULE = "mlp.experts"
"""Where experts are in what transformers saves without the family's own names."""


class Naming(enum.Enum):
    """How a checkpoint divides a layer's experts into tensors."""

    MATRICES = "matrices"
    """A tensor a matrix of one expert."""
    STACKS = "stacks"
    """Two tensors with the matrices of all experts, gate and up rows together."""


class Matrix(enum.Enum):
    """One of an expert's matrices."""

    GATE = "gate"
    UP = "up"
    GATE_UP = "gate and up"
    DOWN = "down"


class Part(enum.Enum):
    """What a tensor is of its matrix."""

    WEIGHT = "weight"
    SCALE = "scale"
    BIAS = "bias"


MATRICES = {
    "w1": Matrix.GATE, "w3": Matrix.UP, "w2": Matrix.DOWN,
    "gate_proj": Matrix.GATE, "up_proj": Matrix.UP, "down_proj": Matrix.DOWN,
}  # fmt: skip
STACKS = {
    "gate_up_proj": Matrix.GATE_UP, "up_proj": Matrix.UP, "down_proj": Matrix.DOWN,
    "fc1": Matrix.GATE_UP, "fc2": Matrix.DOWN,
}  # fmt: skip
"""Names of all experts' matrices; fc1 and fc2 are Aria's."""
PARTS = {
    "": Part.WEIGHT, "weight": Part.WEIGHT, "blocks": Part.WEIGHT, "weight_scale": Part.SCALE,
    "weight_scale_inv": Part.SCALE, "scale": Part.SCALE, "scale_inv": Part.SCALE, "scales": Part.SCALE,
    "bias": Part.BIAS,
}  # fmt: skip
"""The end of a name; what is not here is refused."""
_SCALE_BYTES = ("U8", "F8_E8M0")
DTYPES = {
    (Checkpoint.BF16, Part.WEIGHT): ("BF16", "F16", "F32"),
    (Checkpoint.MXFP8, Part.WEIGHT): ("F8_E4M3",),
    (Checkpoint.MXFP8, Part.SCALE): _SCALE_BYTES,
    (Checkpoint.MXFP4, Part.WEIGHT): ("U8",),
    (Checkpoint.MXFP4, Part.SCALE): _SCALE_BYTES,
    (Checkpoint.BLOCK_FP8, Part.WEIGHT): ("F8_E4M3",),
    (Checkpoint.BLOCK_FP8, Part.SCALE): ("F32", "BF16", "F8_E8M0"),
}
"""The numbers that each format's tensors may have. E4M3 in raw bytes is not among them: they don't tell which E4M3."""
BIASES = ("BF16", "F16", "F32")


@checks_enums
@dataclass(frozen=True)
class LayerTensors:
    """Where the experts of one layer are.

    Attributes:
        naming: how they are divided into tensors.
        form: their numbers.
        module: the experts' name in the checkpoint.
        layout: in which order rows and columns lie.
        tensors: (expert, or None for all; matrix; part) -> the tensor.
    """

    naming: Naming
    form: Checkpoint
    module: str
    layout: WeightLayout
    tensors: Mapping[tuple[int | None, Matrix, Part], StoredTensor]

    @checks_enums
    def at(self, expert: int, matrix: Matrix, part: Part) -> tuple[StoredTensor, int | None]:
        """The tensor that has a part of one expert's matrix, and the row of it in which it is; None for all of it."""
        if self.naming is Naming.STACKS:
            return self.tensors[None, matrix, part], expert
        return self.tensors[expert, matrix, part], None

    @checks_enums
    def dtypes(self, part: Part) -> tuple[str, ...]:
        """The numbers of a part, as safetensors names them."""
        return tuple(sorted({tensor.kind for (_, _, found), tensor in self.tensors.items() if found is part}))

    def of(self, experts: Collection[int]) -> list[StoredTensor]:
        """The tensors in which some experts are."""
        held = {None, *experts}
        return [tensor for (expert, _, _), tensor in self.tensors.items() if expert in held]

    @property
    def expert_bytes(self) -> int:
        """Bytes that one expert takes in the files."""
        if self.naming is Naming.STACKS:
            return sum(tensor.row_bytes for tensor in self.tensors.values())
        return sum(tensor.nbytes for (expert, _, _), tensor in self.tensors.items() if expert == 0)


def find_layers(folder: TensorFolder, groups: Sequence[ExpertModel]) -> list[dict[int, LayerTensors]]:
    """The experts of every layer that has some, all names, shapes and dtypes checked against the config.

    Args:
        folder: the checkpoint's files.
        groups: what its config.json says of each group of experts that a layer has. The experts of the first have the
            numbers 0..E-1, those of the next follow.

    Returns:
        The layers of each group, by their index; experts are numbered from 0 in each.

    Raises:
        CheckpointError: tensors are missing, stand twice, or are of a kind that is not read.
        ShapeError, DtypeError: a tensor has not the size or the numbers that the config says.
    """
    model = groups[0]
    modules = "|".join(re.escape(module) for module in dict.fromkeys((FAMILIES[model.name].module, SAVED_MODULE)))
    heads = "|".join(re.escape(head) for head in HEADS)
    pattern = re.compile(rf"((?:{heads})layers\.(0|[1-9][0-9]{{0,5}})\.(?:{modules}))\.(.+)", re.DOTALL)
    for name, file in folder.strays.items():
        if pattern.fullmatch(name):
            raise CheckpointError(f"{name!r:.120} stands in {file.path.name}, and the index does not put it there")
    found: dict[int, dict[str, dict[str, StoredTensor]]] = {}
    for name, tensor in folder.tensors.items():
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(int(match[2]), {}).setdefault(match[1], {})[match[3]] = tensor
    stray = min((layer for layer in found if layer < model.layers and layer not in model.moe_layers), default=None)
    if stray is not None:  # layers past the last one are for multi-token prediction
        raise CheckpointError(
            f"{folder.folder} has {min(found[stray])}, and its config says that layer {stray} has no experts"
        )
    layers: list[dict[int, LayerTensors]] = [{} for _ in groups]
    for layer in model.moe_layers:
        modules_of = found.get(layer, {})
        if len(modules_of) != 1:
            have = " and ".join(sorted(modules_of)[:2]) or "no tensor of them"
            raise CheckpointError(
                f"{folder.folder} must have the experts of layer {layer} once, as {FAMILIES[model.name].module} or"
                f" {SAVED_MODULE}; it has {have}"
            )
        ((module, tensors),) = modules_of.items()
        parts = _parts(module, tensors)
        for number, group in enumerate(groups):
            where = module if len(groups) == 1 else f"{module}, group {number},"
            own = _of_group(parts, number, len(groups), model.experts)
            layers[number][layer] = _layer(group, module, where, own)
    return layers


def _parts(module: str, tensors: Mapping[str, StoredTensor]) -> dict[tuple[int | None, Matrix, Part], StoredTensor]:
    """What each of a layer's tensors is."""
    parts: dict[tuple[int | None, Matrix, Part], StoredTensor] = {}
    for rest, tensor in tensors.items():
        key = _key(rest)
        if key is None:
            end = rest.rpartition(".")[2]
            why = "which no format that is read has" if SECOND_SCALE.fullmatch(end) else "which is not read"
            raise CheckpointError(f"{module} has {rest!r:.80}, {why}; without it the result would be another one")
        if key in parts:
            raise CheckpointError(f"{tensor.name} and {parts[key].name} are the same part of one matrix; one must go")
        parts[key] = tensor
    stacked = [key for key in parts if key[0] is None]
    if stacked and len(stacked) != len(parts):
        raise CheckpointError(f"{module} has stacks of all experts and tensors of single ones; one must go")
    return parts


def _of_group(
    parts: Mapping[tuple[int | None, Matrix, Part], StoredTensor], number: int, groups: int, experts: int
) -> dict[tuple[int | None, Matrix, Part], StoredTensor]:
    """One group's tensors, its experts counted from 0; experts beyond those of all groups are left to the last one."""
    found: dict[tuple[int | None, Matrix, Part], StoredTensor] = {}
    for (expert, matrix, part), tensor in parts.items():
        if min((expert or 0) // experts, groups - 1) == number:
            found[None if expert is None else expert - number * experts, matrix, part] = tensor
    return found


def _layer(
    model: ExpertModel, module: str, where: str, parts: Mapping[tuple[int | None, Matrix, Part], StoredTensor]
) -> LayerTensors:
    """One group of a layer; ``where`` is what errors call it."""
    naming = Naming.STACKS if any(expert is None for expert, _, _ in parts) else Naming.MATRICES
    _check_complete(model, where, naming, parts)
    transposed = model.checkpoint is Checkpoint.BF16 and naming is Naming.STACKS and _are_transposed(model, parts)
    layout = WeightLayout(
        FAMILIES[model.name].gate_up if naming is Naming.STACKS else GateUpRows.HALVES,
        MatrixOrder.COLUMNS if transposed else MatrixOrder.ROWS,
    )
    if layout.gate_up is GateUpRows.ALTERNATING and model.checkpoint is Checkpoint.BLOCK_FP8:
        raise CheckpointError(
            f"{module} has rows of gate and up in turn and a scale for each block of 128x128: gate and up rows share"
            " it, and in another order of rows they would need other scales"
        )
    found = LayerTensors(naming, model.checkpoint, module, layout, parts)
    _check_sizes(model, found)
    _check_dtypes(found)
    return found


def _key(rest: str) -> tuple[int | None, Matrix, Part] | None:
    """What a tensor of the experts' module is; None for what is not known."""
    match = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.(\w+)\.(\w+)", rest)
    if match and match[2] in MATRICES and match[3] in PARTS:
        return int(match[1]), MATRICES[match[2]], PARTS[match[3]]
    match = re.fullmatch(rf"({'|'.join(STACKS)})(?:[._](\w+))?", rest)
    if match and (match[2] or "") in PARTS:
        return None, STACKS[match[1]], PARTS[match[2] or ""]
    return None


def _check_complete(
    model: ExpertModel, module: str, naming: Naming, parts: Mapping[tuple[int | None, Matrix, Part], StoredTensor]
) -> None:
    matrices = needed_matrices(model, naming)
    kinds = [Part.WEIGHT]
    if model.checkpoint is not Checkpoint.BF16:
        kinds.append(Part.SCALE)
    if model.has_bias:
        kinds.append(Part.BIAS)
    experts = (None,) if naming is Naming.STACKS else range(model.experts)
    each = sorted(product(matrices, kinds), key=lambda pair: (pair[0].value, pair[1].value))
    needed = ((expert, *pair) for expert in experts for pair in each)
    # found before it is counted: a config may say any number of experts
    missing = next((key for key in needed if key not in parts), None)
    known = {key for key in parts if key[0] in experts and key[1:] in each}
    if missing is not None:
        raise CheckpointError(
            f"{module} lacks {_words(missing)}; E={model.experts} experts in {model.checkpoint.value} need it"
            f" ({len(experts) * len(each) - len(known)} such tensors)"
        )
    more = sorted(parts.keys() - known, key=_order)
    if more:
        raise CheckpointError(
            f"{parts[more[0]].name} is {_words(more[0])}, which E={model.experts} experts in {model.checkpoint.value}"
            f" don't have: the config and the tensors contradict each other"
        )


def _order(key: tuple[int | None, Matrix, Part]) -> tuple[int, str, str]:
    return -1 if key[0] is None else key[0], key[1].value, key[2].value


def _words(key: tuple[int | None, Matrix, Part]) -> str:
    expert, matrix, part = key
    whose = "all experts'" if expert is None else f"expert {expert}'s"
    return f"the {part.value} of {whose} {matrix.value}"


@checks_enums
def needed_matrices(model: ExpertModel, naming: Naming) -> tuple[Matrix, ...]:
    """The matrices of an expert that a checkpoint must have: w13's in the order of its rows, then down."""
    if model.activation.inputs == 1:
        return Matrix.UP, Matrix.DOWN
    return (Matrix.GATE_UP, Matrix.DOWN) if naming is Naming.STACKS else (Matrix.GATE, Matrix.UP, Matrix.DOWN)


@checks_enums
def matrix_size(model: ExpertModel, matrix: Matrix) -> tuple[int, int]:
    """Rows and columns of a matrix, ``[N, K]``; GATE_UP is w13, without gate rows where there is no gate."""
    if matrix is Matrix.DOWN:
        return model.hidden, model.intermediate
    return (model.activation.inputs if matrix is Matrix.GATE_UP else 1) * model.intermediate, model.hidden


def _are_transposed(model: ExpertModel, parts: Mapping[tuple[int | None, Matrix, Part], StoredTensor]) -> bool:
    """Whether all stacks have the size of ``[K, N]``; 2I = H and I = H don't both hold, so that one size tells."""
    sizes = {matrix: parts[None, matrix, Part.WEIGHT].shape[1:] for matrix in needed_matrices(model, Naming.STACKS)}
    straight = all(size == matrix_size(model, matrix) for matrix, size in sizes.items())
    return not straight and all(size == matrix_size(model, matrix)[::-1] for matrix, size in sizes.items())


def _check_sizes(model: ExpertModel, layer: LayerTensors) -> None:
    form = layer.form
    if form is Checkpoint.BLOCK_FP8 and model.intermediate % BLOCK:
        raise ShapeError(f"I is {model.intermediate}; the blocks of gate and up lie apart only at multiples of {BLOCK}")
    if form in (Checkpoint.MXFP8, Checkpoint.MXFP4):
        for letter, width in (("H", model.hidden), ("I", model.intermediate)):
            if width % GROUP:
                raise ShapeError(f"{letter} is {width}; {form.value} needs a multiple of {GROUP}")
    size: tuple[int, ...]
    for (expert, matrix, part), tensor in layer.tensors.items():
        rows, columns = matrix_size(model, matrix)
        size = (columns, rows) if layer.layout.matrices is MatrixOrder.COLUMNS else (rows, columns)
        if part is Part.BIAS:
            size = (rows,)
        elif part is Part.SCALE:
            size = (
                (-(-rows // BLOCK), -(-columns // BLOCK)) if form is Checkpoint.BLOCK_FP8 else (rows, columns // GROUP)
            )
        elif form is Checkpoint.MXFP4:
            size = (rows, columns // GROUP, GROUP // 2)
        needed = size if expert is not None else (model.experts, *size)
        if tensor.shape != needed:
            raise ShapeError(
                f"{tensor.name} has shape {tensor.shape}; {form.value} experts with H={model.hidden},"
                f" I={model.intermediate}, E={model.experts} need {needed}"
            )


def _check_dtypes(layer: LayerTensors) -> None:
    first: dict[Part, StoredTensor] = {}
    for (_, _, part), tensor in layer.tensors.items():
        allowed = BIASES if part is Part.BIAS else DTYPES[layer.form, part]
        if tensor.kind not in allowed:
            raise DtypeError(
                f"{tensor.name} is in {tensor.kind}; the {part.value} of {layer.form.value} experts is in"
                f" {' or '.join(allowed)}, and a load casts nothing"
            )
        other = first.setdefault(part, tensor)
        if other.kind != tensor.kind:
            raise DtypeError(
                f"{tensor.name} is in {tensor.kind}, and {other.name} in {other.kind}; both must be in one"
            )
