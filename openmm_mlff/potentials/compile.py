"""Energy and forces as one compiled graph, kept on disk.

The operations of one evaluation, differentiation included, are recorded (`make_fx`), compiled ahead of time for the CPU
(AOTInductor) and packed into one file, so that a second start neither records nor compiles. A graph belongs to one
model, one set of atoms, charges and multiplicities, one precision, one thread count, one torch version and one kind of
CPU; its key holds all of them and the source code of the model.
"""

from __future__ import annotations

import hashlib
import locale
import logging
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import openmm_mlff
from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Batch, NeighborMatrix, Pairs
from openmm_mlff.potentials import native
from openmm_mlff.potentials.potential import Evaluation, energy_forces

if TYPE_CHECKING:
    from openmm_mlff.potentials.potential import Potential

logger = logging.getLogger(__name__)

#: padding pairs are this many long-range cutoffs apart, where every term is zero
_FAR = 4.0
#: pair tables grow by this factor beyond what the first frame needs
_MARGIN = 1.25


@contextmanager
def utf8_locale() -> Iterator[None]:
    """Read files as UTF-8 meanwhile: torch's compiler opens its own in the locale, which some libraries reset to C."""
    before = locale.setlocale(locale.LC_CTYPE)
    for name in ("C.UTF-8", "en_US.UTF-8", "UTF-8"):
        if locale.getpreferredencoding(False).lower().replace("-", "") == "utf8":
            break
        try:
            locale.setlocale(locale.LC_CTYPE, name)
        except locale.Error:
            continue
    try:
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


class CompilationError(RuntimeError):
    """The graph could not be compiled (no C++ compiler, or an operation that the compiler refuses)."""


def compile_dir() -> Path:
    """Folder of the compiled graphs, beside the cached models."""
    folder = model_file.cache_dir().parent / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class GraphInputs:
    """Which tensors of a batch change from step to step, in which shapes, and how a batch is rebuilt from them.

    Positions always do; tables of neighbours and long-range pairs do unless the batch keeps them for ever; a cell and
    an external potential do if there are any.
    """

    def __init__(
        self, batch: Batch, fixed_pairs: bool, long_range_cutoff: float | None, reciprocal: bool = False
    ) -> None:
        self.batch, self.fixed_pairs, self.reach = batch, fixed_pairs, _FAR * (long_range_cutoff or 0.0)
        self.field = batch.external_potential is not None
        self._listed: tuple[Pairs, list[Tensor]] | None = None
        self.periodic = batch.cell is not None
        # a sum in reciprocal space has as many terms as the box that it was recorded for needs
        self.lengths = batch.box_lengths if reciprocal and self.periodic else None
        self.slots = 0 if fixed_pairs else _with_margin(batch.neighbors.index.shape[1], 4)
        # open systems without a long-range cutoff keep all pairs for ever
        listed = batch.long_range_pairs is not None and self.periodic
        self.n_long = _with_margin(len(batch.long_range_pairs), 64) if listed and batch.long_range_pairs else 0

    def fits(self, batch: Batch) -> bool:
        """Whether the tables of this batch fit the compiled shapes."""
        if self.fixed_pairs:
            return True
        if self.lengths is not None and any(
            new > old for new, old in zip(batch.box_lengths, self.lengths, strict=True)
        ):
            return False
        long_range = len(batch.long_range_pairs) if self.n_long and batch.long_range_pairs is not None else 0
        return batch.neighbors.index.shape[1] <= self.slots and long_range <= self.n_long

    def tensors(self, batch: Batch) -> list[Tensor]:
        """What the graph is called with."""
        values = [batch.positions.detach()]
        if self.periodic:
            assert batch.cell is not None
            values.append(batch.cell)
        if not self.fixed_pairs:
            values += self._tables(batch)
        if self.field:
            assert batch.external_potential is not None
            values.append(batch.external_potential)
        return values

    def _tables(self, batch: Batch) -> list[Tensor]:
        # every step has a batch of its own, but the pair list is the same object until it is rebuilt
        if self._listed is not None and self._listed[0] is batch.pairs:
            return self._listed[1]
        assert batch.pairs is not None
        table = NeighborMatrix.from_pairs(batch.pairs, batch.n_atoms, self.slots)
        values = [table.index, table.mask] + ([] if table.offsets is None else [table.offsets])
        if self.n_long:
            pairs = batch.long_range_pairs
            assert pairs is not None and pairs.offsets is not None
            missing = self.n_long - len(pairs)
            assert batch.cell is not None
            cells_away = math.ceil(self.reach / float(batch.cell[0, 0].norm())) + 1
            far = pairs.offsets.new_tensor([float(cells_away), 0.0, 0.0]).expand(missing, 3)
            nowhere = pairs.first.new_zeros(missing)
            values += [
                torch.cat([pairs.first, nowhere]),
                torch.cat([pairs.second, nowhere]),
                torch.cat([pairs.offsets, far]),
            ]
        self._listed = (batch.pairs, values)
        return values

    def rebuild(self, values: tuple[Tensor, ...]) -> Batch:
        """The batch that `tensors` came from, with the values that are being recorded."""
        feed = iter(values)
        positions = next(feed)
        moved = self.batch.at(positions, next(feed) if self.periodic else None)
        if not self.fixed_pairs:
            index, mask = next(feed), next(feed)
            offsets = next(feed) if self.periodic else None
            moved.__dict__["neighbors"] = NeighborMatrix(index, mask, offsets)
            if self.n_long:
                moved.long_range_pairs = Pairs(next(feed), next(feed), next(feed))
        if self.field:
            moved.external_potential = next(feed)
        return moved


def _with_margin(n: int, multiple: int) -> int:
    return math.ceil(_MARGIN * max(n, 1) / multiple) * multiple


class CompiledGraph:
    """``graph(batch) -> Evaluation`` for the atoms of one batch; compiled on first use, or read from the disk cache.

    Whether `batch` has an external potential must not change between calls.
    """

    def __init__(self, model: Potential, fixed: Any, outputs: tuple[str, ...], fixed_pairs: bool) -> None:
        self.model, self.fixed, self.outputs = model, fixed, outputs
        self._fixed_pairs = fixed_pairs
        self._inputs: GraphInputs | None = None
        self._run: Any = None

    def ready(self, batch: Batch) -> bool:
        """Whether the disk cache holds the graph of a run that starts with this batch."""
        return self._path(self._inputs_of(batch)).exists()

    def __call__(self, batch: Batch) -> Evaluation:
        """Evaluate; raises `CompilationError` if there is no graph yet and none can be compiled."""
        if self._inputs is None or not self._inputs.fits(batch):
            inputs = self._inputs_of(batch)
            self._run = self._load_or_compile(inputs)
            self._inputs = inputs
        with torch.no_grad():
            values = self._run(*self._inputs.tensors(batch))
        return Evaluation(**dict(zip(self._names(), values, strict=True)))

    def _inputs_of(self, batch: Batch) -> GraphInputs:
        model = self.model
        return GraphInputs(batch, self._fixed_pairs, model.long_range_cutoff, model.long_range_method != "shifted")

    def _names(self) -> list[str]:
        return [n for n in ("energy", "forces", "charges", "dipole", "spread") if n == "energy" or n in self.outputs]

    # -- key and file ------------------------------------------------------------------------------------------

    def _path(self, inputs: GraphInputs) -> Path:
        return compile_dir() / f"{self.key(inputs)}.pt2"

    def key(self, inputs: GraphInputs) -> str:
        """SHA-256 over everything that the compiled code depends on."""
        digest = hashlib.sha256()
        model, batch = self.model, inputs.batch
        about = [
            openmm_mlff.__version__,
            torch.__version__,
            platform.machine(),
            torch.backends.cpu.get_cpu_capability(),
            _cpu_model(),
            repr(model.config),
            repr(model.long_range_cutoff),
            repr((model.long_range_method, inputs.lengths)),
            repr((self._names(), inputs.slots, inputs.n_long, inputs.periodic, inputs.field, torch.get_num_threads())),
        ]
        digest.update("\n".join(about).encode())
        digest.update(_source_of(type(model)))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name in sorted(tensors):
            digest.update(name.encode() + str(tensors[name].dtype).encode())
            digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
        for fixed in (batch.numbers, batch.segment, batch.charge, batch.multiplicity):
            digest.update(fixed.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _load_or_compile(self, inputs: GraphInputs) -> Any:
        path = self._path(inputs)
        if path.exists():
            try:
                return _load(path)
            except RuntimeError as error:
                logger.warning("the compiled graph %s cannot be read (%s); compiling it again", path.name, error)
        self._compile(inputs, path)
        return _load(path)

    def _compile(self, inputs: GraphInputs, path: Path) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        example = tuple(x.clone() for x in inputs.tensors(inputs.batch))
        logger.info("compiling energy and forces for %d atoms (about a minute, once)", inputs.batch.n_atoms)
        try:
            with (
                _first_derivatives_only(self.model),
                compiler_for_torch(),
                utf8_locale(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                graph = make_fx(self._record(inputs))(example[0].requires_grad_(True), *example[1:])
                with torch.no_grad():
                    program = torch.export.export(graph, tuple(x.detach() for x in example), strict=False)
                    # packages are written under a temporary name: a killed compilation leaves no half file
                    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
                        package = torch._inductor.aoti_compile_and_package(
                            program, package_path=os.path.join(folder, "graph.pt2")
                        )
                        os.replace(package, path)
        except Exception as error:
            raise CompilationError(f"compile: energy and forces could not be compiled: {error}") from error

    def _record(self, inputs: GraphInputs) -> Any:
        model, names = self.model, self._names()

        def evaluate(*values: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                batch = inputs.rebuild(values)
                prediction = model.in_field(batch, model.predict(batch, self.fixed))
                forces = energy_forces(prediction.energy, batch.positions) if "forces" in names else None
            results = {**vars(prediction), "forces": forces}
            return tuple(results[name].detach() for name in names)

        return evaluate


@contextmanager
def _first_derivatives_only(model: Potential) -> Iterator[None]:
    before = model.first_derivatives_only
    model.first_derivatives_only = True
    try:
        yield
    finally:
        model.first_derivatives_only = before


def agree(compiled: Evaluation, eager: Evaluation, dtype: torch.dtype) -> bool:
    """Whether two evaluations of one frame in precision `dtype` differ by no more than rounding can explain."""
    eps = torch.finfo(dtype).eps
    close = bool(((compiled.energy - eager.energy).abs() <= 20 * eps * eager.energy.abs() + 100 * eps).all())
    if compiled.forces is not None and eager.forces is not None:
        scale = max(float(eager.forces.abs().max()), 1.0)
        # in single precision 1e-4 eV/angstrom: graphs that torch compiled wrongly were off by 3e-4
        limit = (1e3 if dtype == torch.float32 else 1e4) * eps * scale
        close = close and bool((compiled.forces - eager.forces).abs().max() <= limit)
    return close


def compiler_found() -> bool:
    """Whether there is a C++ compiler for AOTInductor to call."""
    return native.compiler() is not None


def compiler_for_torch() -> Any:
    """Let torch call the compiler that our own sources are compiled with; it takes no launcher and no options."""
    import torch._inductor.config as config

    return config.patch({"cpp.cxx": (None, native.compiler_program() or "g++")})


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._inductor.aoti_load_package(str(path))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "CPU part"))), "")


def _source_of(kind: type) -> bytes:
    """The Python source of the model's package and of this one: a changed line must not meet an old graph."""
    import inspect

    folders = {Path(inspect.getfile(cls)).parent for cls in kind.__mro__ if cls.__module__.startswith("openmm_")}
    folders |= {Path(__file__).parent, Path(inspect.getfile(kind)).parent}
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.digest()
