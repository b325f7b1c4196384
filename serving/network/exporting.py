"""A trained model as a program of torch.export, and as compiled code of this machine (AOTInductor).

    export_network(model, config, folder, compiled=True)

writes `network.pt2`, which runs wherever this version of torch does, and `network-<machine>.pt2` (`compiled_name`). The
model is the trainer's own module: none of its mathematics is written a second time. Takes about ten seconds, plus half
a minute of one core for compiled code, which needs a C++ compiler.

A model concatenates the user's part with each candidate's and multiplies both by one weight. `split_shared_linear`
rewrites the program so that the user's part is multiplied once for all candidates. This only changes the order of a
sum, and saves a third of the operations of the paper's model.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from serving.network.served import PORTABLE, SLOTS, SLOTS_JSON, Slots, compiled_name
from trainer.config import ModelConfig
from trainer.exchange.vectors import EvenLengths, FieldVectors, Lengths
from trainer.models.ctr import CtrModel
from trainer.schema.fields import Field

# Example sizes, all different, as torch.export takes equal ones for the same dimension.
_CANDIDATES = 13
_SIZES = tuple(range(14, 10_000))


class OneUser(nn.Module):
    """The module that is exported: takes the tensors of `slots` in order, returns the logits (B,)."""

    def __init__(self, model: CtrModel, slots: Slots) -> None:
        super().__init__()
        self.model, self.slots = model, slots

    def forward(self, candidates_B: Tensor, counts: Tensor, *tensors: Tensor) -> Tensor:
        """Return the logits, (B,)."""
        named = zip(self.slots.slots, tensors, strict=True)
        given: dict[tuple[str, str], Tensor] = {(slot.field, slot.part): tensor for slot, tensor in named}
        num_candidates = candidates_B.shape[0]
        ones_B = torch.ones(num_candidates, dtype=torch.int64)
        even_B = EvenLengths(num_candidates, 1, ones_B)
        dense, vectors = {}, {}
        for field in self.model.fields:
            if field.kind == "dense":
                dense[field.name] = given[field.name, "dense"]
            else:
                rows_NV = given[field.name, "rows_NV"]
                lengths_M = self._lengths(field, given, counts, even_B)
                weights_N = given.get((field.name, "weights_N"))
                vectors[field.name] = FieldVectors(rows_NV, torch.arange(rows_NV.shape[0]), lengths_M, weights_N)
        vectors = self.model.with_pictures_of_ads(vectors)
        logits_B: Tensor = self.model(vectors, dense, torch.zeros(num_candidates, dtype=torch.int64))
        return logits_B

    def _lengths(self, field: Field, given: dict[tuple[str, str], Tensor], counts: Tensor, even_B: Lengths) -> Lengths:
        if field.side == "ad":
            return given.get((field.name, "lengths_M"), even_B)
        if field.name not in self.slots.lists:
            return EvenLengths(1, 1, torch.ones(1, dtype=torch.int64))
        place = self.slots.lists.index(field.name)
        return EvenLengths(1, given[field.name, "rows_NV"].shape[0], counts[place : place + 1])


def export_network(model: CtrModel, config: ModelConfig, folder: Path, *, compiled: bool = False) -> list[Path]:
    """Write the network of a trained model, on a CPU, into an existing folder; return the files.

    It takes any number of candidates and of values of each list. `compiled`: write compiled code of this machine as
    well.
    """
    from torch._dynamo import config as tracing  # a second's import, of those who export alone

    slots = Slots.of(model, config)
    network = OneUser(model, slots).eval()
    examples, dynamic = _examples(slots)
    # With dynamic sizes its cache of shapes has almost no hits, and takes a fifth of the time.
    with torch.no_grad(), tracing.patch(fake_tensor_cache_enabled=False):
        program = torch.export.export(network, examples, dynamic_shapes=dynamic, strict=False)
        split_shared_linear(program)
    portable, written = folder / PORTABLE, SLOTS_JSON.dump_json(slots).decode()
    torch.export.save(program, portable, extra_files={SLOTS: written})
    if not compiled:
        return [portable]
    from torch._inductor import aoti_compile_and_package  # a second's import, of those who compile alone

    warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)  # Torch's own code
    settings, path = {"aot_inductor.metadata": {SLOTS: written}, "cpp.threads": 1}, folder / compiled_name()
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    return [portable, path]


def _examples(slots: Slots) -> tuple[tuple[Tensor, ...], Any]:
    """Return example inputs for the export, and which of their dimensions are dynamic."""
    sizes = dict(zip(slots.lists, _SIZES, strict=False))
    sizes |= dict.fromkeys(slots.equal_lists, sizes[slots.equal_lists[0]] if slots.equal_lists else 0)
    others = iter(_SIZES[len(slots.lists) :])
    tensors = [torch.zeros(_CANDIDATES, dtype=torch.int64), torch.tensor([sizes[name] for name in slots.lists])]
    dynamic: list[dict[int, Any]] = [{0: Dim.AUTO}, {}]
    for slot in slots.slots:
        fixed = {"one": 1, "candidates": _CANDIDATES}.get(slot.size)
        size = fixed or sizes.get(slot.field) or sizes.setdefault(slot.field, next(others))
        shape = (size, slot.width) if slot.width else (size,)
        tensors.append(torch.zeros(shape, dtype=torch.float32 if slot.is_real else torch.int64))
        dynamic.append({} if size == 1 else {0: Dim.AUTO})
    return tuple(tensors), (*dynamic[:2], tuple(dynamic[2:]))


_aten = torch.ops.aten


def split_shared_linear(program: ExportedProgram) -> None:
    """Rewrite the program in place."""
    for node in list(program.graph.nodes):
        if node.target is _aten.linear.default:
            _split_linear(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _split_linear(node: Any) -> None:
    """Rewrite linear([user's row for all, x], W, b) = linear(x, W_x, b) + linear(user's row, W_user)."""
    joined, weight, *bias = node.args
    if joined.target is not _aten.cat.default or joined.args[1:] != (1,):
        return
    first, *others = joined.args[0]
    if not others or first.target is not _aten.index_select.default:
        return
    row_1W, _, places = first.args
    if row_1W.meta["val"].shape[0] != 1 or places.target is not _aten.zeros.default:
        return  # it is not one row for all
    width = row_1W.meta["val"].shape[1]
    with node.graph.inserting_before(node):
        of_row = _call(node, _aten.slice.Tensor, weight, 1, 0, width)
        of_others = _call(node, _aten.slice.Tensor, weight, 1, width, weight.meta["val"].shape[1])
        others_BW = _call(node, _aten.cat.default, others, 1)
        once = _call(node, _aten.linear.default, row_1W, of_row, *bias)
        result = _call(node, _aten.add.Tensor, _call(node, _aten.linear.default, others_BW, of_others), once)
    node.replace_all_uses_with(result)


def _call(like: Node, target: Callable[..., Any], *args: Any) -> Node:
    """Insert a call with the shape of its result, which torch.export stores."""
    new = like.graph.call_function(target, args)
    with like.meta["val"].fake_mode:
        new.meta["val"] = target(*torch.fx.node.map_arg(args, lambda each: each.meta["val"]))
    return new
