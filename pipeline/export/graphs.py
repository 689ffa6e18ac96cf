"""Each tower as a graph: ONNX for onnxruntime, or torch.export's for torch alone."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim

from pipeline.export.plain import ImageGraph, PaddedGRUTower, TextGraph, forth
from pipeline.export.writing import (
    Loaded,
    Pictures,
    Sides,
    batched,
    payloads,
    telling,
    write_json,
    write_preprocessor,
    write_words,
)
from pipeline.models import TwoTower
from pipeline.models.tuning import merged
from pipeline.training.saved_model import SavedModel

OPSET = 20
INPUTS = {"image": ["images"], "text": ["words", "lengths"]}


@torch.library.custom_op("halftone::gru", mutates_args=())
def _gru(
    x: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor, b_ih: torch.Tensor, b_hh: torch.Tensor
) -> torch.Tensor:
    """`forth` as one operation: torch's tracing would unroll it, of one length."""
    return forth(x, w_ih, w_hh, b_ih, b_hh)


@_gru.register_fake
def _(x, w_ih, w_hh, b_ih, b_hh):
    return x.new_empty(x.shape[0], x.shape[1], w_hh.shape[1])


class Graphs:
    """A file for each tower, of any batch: what both kinds of graphs share."""

    needs: tuple[str, ...] = ()
    gru: Any = None  # what runs a GRU in the graph; None: it is unrolled

    def refusal(self, model: SavedModel, sides: Sides) -> str | None:
        return None

    def write(self, model: SavedModel, folder: Path, sides: Sides) -> None:
        about: dict[str, Any] = {}
        towers = merged(model.towers)
        for side in sides:
            graph, given, sizes = _traced(model, towers, side, self.gru)
            tower = type(getattr(model.towers, side)).__name__
            with telling(f"no graph of the {side} tower ({tower}) can be made"):
                self.made(folder, side, graph, given, sizes)
            shapes = zip(INPUTS[side], given, sizes, strict=True)
            about[side] = {
                n: {"shape": _shape(x, s), "dtype": str(x.dtype)[6:]} for n, x, s in shapes
            }
        if "image" in sides and model.features is None:
            write_preprocessor(model, folder)
        if "text" in sides:
            write_words(model, folder)
            about["text"] |= {"pad": model.vocabulary.fill, "longest": _longest(model)}
        write_json(folder / "towers.json", about)

    def made(self, folder: Path, side: str, graph: nn.Module, given: tuple, sizes: tuple) -> None:
        """Write a graph's file."""
        raise NotImplementedError

    def runner(self, folder: Path, side: str) -> Callable[..., torch.Tensor]:
        """A tower as the file's library runs it."""
        raise NotImplementedError

    def read(self, folder: Path, model: SavedModel, sides: Sides) -> Loaded:
        run = {side: self.runner(folder, side) for side in sides}
        about = json.loads((folder / "towers.json").read_text())

        def texts(some: Sequence[str]) -> torch.Tensor:
            words, lengths = model.vocabulary.encode(list(some), model.recipe.model.max_words)
            length = about["text"]["words"]["shape"][1]
            more = length - words.shape[1] if isinstance(length, int) else 0
            words = nn.functional.pad(words, (0, more), value=model.vocabulary.fill)
            return run["text"](words, lengths)

        def images(some: Pictures) -> torch.Tensor:
            return run["image"](torch.from_numpy(np.stack(payloads(model, some))))

        of_side: dict[str, Callable] = {"text": texts, "image": images}
        found = {side: functools.partial(batched, of_side[side]) for side in sides}
        return Loaded(found.get("text"), found.get("image"))


class Onnx(Graphs):
    """`image.onnx` and `text.onnx`, of any batch and any length."""

    needs: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    gru = staticmethod(_gru)

    def made(self, folder: Path, side: str, graph: nn.Module, given: tuple, sizes: tuple) -> None:
        program = torch.onnx.export(
            graph,
            given,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=INPUTS[side],
            output_names=["vectors"],
            dynamic_shapes=sizes,
            custom_translation_table={torch.ops.halftone.gru.default: _onnx_gru()},
        )
        program.save(folder / f"{side}.onnx")

    def runner(self, folder: Path, side: str) -> Callable[..., torch.Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / f"{side}.onnx")

        def run(*given: torch.Tensor) -> torch.Tensor:
            inputs = {n: x.numpy() for n, x in zip(INPUTS[side], given, strict=True)}
            return torch.from_numpy(session.run(["vectors"], inputs)[0])

        return run


class Torch(Graphs):
    """`image.pt2` and `text.pt2`, programs of torch.export, which load with torch alone."""

    def made(self, folder: Path, side: str, graph: nn.Module, given: tuple, sizes: tuple) -> None:
        program = torch.export.export(graph, given, dynamic_shapes=sizes)
        torch.export.save(program, folder / f"{side}.pt2")

    def runner(self, folder: Path, side: str) -> Callable[..., torch.Tensor]:
        return torch.export.load(folder / f"{side}.pt2").module()


def _longest(model: SavedModel) -> int:
    return model.vocabulary.longest(model.recipe.model.max_words)


def _traced(model: SavedModel, towers: TwoTower, side: str, gru) -> tuple[nn.Module, tuple, tuple]:
    """A tower's graph to be made, inputs to trace it with, and which of their sizes vary."""
    batch, both = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    if side == "image":
        graph = ImageGraph(towers).cpu().eval()
        if model.features is not None:
            regions = torch.linspace(0.1, 1, 10 * model.features).reshape(2, 5, model.features)
            return graph, (regions,), (both,)
        pixels = torch.zeros(2, 3, *model.preprocessing.shape, dtype=torch.uint8)
        return graph, (pixels,), (batch,)
    text = TextGraph(towers, gru).cpu().eval()
    unrolled = isinstance(text.tower, PaddedGRUTower) and gru is None
    state = model.vocabulary.state
    fixed = unrolled or (isinstance(state, dict) and state["padded"])
    length = _longest(model) if fixed else max(2, _longest(model) - 1)
    words, lengths = torch.ones(2, length, dtype=torch.long), torch.tensor([length, length - 1])
    return text, (words, lengths), (batch if fixed else both, batch)


def _shape(given: torch.Tensor, varies: dict[int, Any]) -> list[int | str]:
    """A shape as towers.json writes it: numbers, and `any`."""
    return ["any" if place in varies else size for place, size in enumerate(given.shape)]


def _onnx_gru():
    """ONNX's GRU, whose gates stand in another order."""
    import onnxscript

    op: Any = onnxscript.opset20

    def gru(x, w_ih, w_hh, b_ih, b_hh):
        hidden = int(w_hh.shape[1])
        zero = op.Constant(value_ints=[0])
        places = [op.Constant(value_ints=[hidden * gate]) for gate in range(4)]

        def turned(weights):
            reset, update, new = (
                op.Slice(weights, *places[gate : gate + 2], zero) for gate in range(3)
            )
            return op.Concat(update, reset, new, axis=0)

        bias = op.Concat(turned(b_ih), turned(b_hh), axis=0)
        states_L1BH, _ = op.GRU(
            op.Transpose(x, perm=[1, 0, 2]),
            op.Unsqueeze(turned(w_ih), zero),
            op.Unsqueeze(turned(w_hh), zero),
            op.Unsqueeze(bias, zero),
            hidden_size=hidden,
            linear_before_reset=1,
        )
        return op.Transpose(op.Squeeze(states_L1BH, op.Constant(value_ints=[1])), perm=[1, 0, 2])

    return gru
