"""Hyperparameters of SO3krates."""

from __future__ import annotations

from dataclasses import dataclass

Z_MAX = 118
DISPERSION_Z_MAX = 102  # of the free-atom tables
CHOICES = {
    "initial_euclidean": ("zeros", "neighbors"),
    "radial_basis": ("bernstein", "physnet"),
    "cutoff_function": ("polynomial", "cosine"),
    "message_normalization": ("avg_num_neighbors", "sqrt_num_features", "none"),
    "normalization": ("layer", "rms"),
}


@dataclass(frozen=True)
class SO3kratesConfig:
    """Hyperparameters; the defaults are those of SO3LR (Kabylda et al. 2025).

    The papers before it (Frank et al. 2022 and 2024) used ``initial_euclidean='neighbors'``, degrees (1, 2, 3), a
    cutoff of 5 angstrom and no embedding or term beyond the atomic energies.

    Attributes:
        num_features: length F of the feature vectors; divisible by `num_heads` and by the number of degrees.
        num_layers, num_heads: layers, and heads of the attention that updates the features.
        degrees: l of the Euclidean variables, each 0 to 4, ascending; () makes a model of distances alone.
        initial_euclidean: 'zeros', or 'neighbors': spherical harmonics averaged over neighbours.
        cutoff: angstrom, of messages and short-range repulsion.
        radial_basis: 'bernstein' (polynomials in exp(-gamma r)) or 'physnet' (Gaussians in exp(-r)).
        num_basis_functions: radial functions K. bernstein_gamma: 1/angstrom; the default is 0.5/bohr in single
            precision, as SO3LR's program holds it.
        cutoff_function: 'polynomial' (1 - 10x^3 + 15x^4 - 6x^5) or 'cosine'.
        message_normalization: what sums over neighbours are divided by: 'avg_num_neighbors' (the next field),
            'sqrt_num_features' (of a head) or 'none'. avg_num_neighbors: of the training data.
        layer_normalization_1, layer_normalization_2: normalise features after the attention, and after the exchange.
        normalization: 'layer' (mean and variance) or 'rms' (root mean square only).
        residual_mlp_1, residual_mlp_2: two-layer network on the features after either normalisation.
        qk_normalization: queries and keys have unit root mean square per head. residual_scalars: every update of the
            features is multiplied by a trained number. Both are options of later models of the family.
        use_charge_embed, use_spin_embed: total charge and unpaired electrons enter the initial features.
        use_zbl_repulsion, use_electrostatics, use_dispersion: analytic terms.
        predict_charges, predict_hirshfeld: heads, which electrostatics and dispersion need.
        hirshfeld_features: length of the vectors in the head of the Hirshfeld ratios.
        electrostatic_sigma: angstrom; charges interact by erf(r/sigma)/r.
        dispersion_scale: of the damping radius. dispersion_damping: angstrom; dispersion is switched off over this
            length before `long_range_cutoff`.
        long_range_cutoff: angstrom, of electrostatics and dispersion; None takes all pairs of open systems.
        elements: atomic numbers that the model was made for.
        charges, multiplicities: total charges (e) and 2S+1 that it was trained on; others are refused. None: any.
    """

    num_features: int = 128
    num_layers: int = 3
    num_heads: int = 4
    degrees: tuple[int, ...] = (1, 2, 3, 4)
    initial_euclidean: str = "zeros"
    cutoff: float = 4.5
    radial_basis: str = "bernstein"
    num_basis_functions: int = 32
    bernstein_gamma: float = 0.9448630809783936
    cutoff_function: str = "polynomial"
    message_normalization: str = "avg_num_neighbors"
    avg_num_neighbors: float = 13.168995780096482
    layer_normalization_1: bool = True
    layer_normalization_2: bool = True
    normalization: str = "layer"
    residual_mlp_1: bool = True
    residual_mlp_2: bool = False
    qk_normalization: bool = False
    residual_scalars: bool = False
    use_charge_embed: bool = True
    use_spin_embed: bool = True
    use_zbl_repulsion: bool = True
    use_electrostatics: bool = True
    use_dispersion: bool = True
    predict_charges: bool = True
    predict_hirshfeld: bool = True
    hirshfeld_features: int = 64
    electrostatic_sigma: float = 4.0
    dispersion_scale: float = 1.2
    dispersion_damping: float = 2.0
    long_range_cutoff: float | None = None
    elements: tuple[int, ...] = (1, 6, 7, 8, 9, 15, 16, 17)
    charges: tuple[int, ...] | None = None
    multiplicities: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("degrees", "elements", "charges", "multiplicities"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(x) for x in value))
        self._check_numbers()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if list(self.degrees) != sorted(set(self.degrees)) or not set(self.degrees) <= set(range(5)):
            raise ValueError(f"degrees: expected ascending numbers from 0 to 4, got {self.degrees}")
        for name, parts in (("num_heads", self.num_heads), ("degrees", len(self.degrees) or 1)):
            if self.num_features % parts:
                raise ValueError(f"{name}: expected {parts} to divide num_features, got {self.num_features} / {parts}")
        for term, head in (("use_electrostatics", "predict_charges"), ("use_dispersion", "predict_hirshfeld")):
            if getattr(self, term) and not getattr(self, head):
                raise ValueError(f"{head}: expected True, because {term} needs it, got False")
        largest = DISPERSION_Z_MAX if self.use_dispersion else Z_MAX
        if not self.elements or min(self.elements) < 1 or max(self.elements) > largest:
            raise ValueError(f"elements: expected atomic numbers 1 to {largest}, got {self.elements}")

    def _check_numbers(self) -> None:
        whole = ("num_features", "num_layers", "num_heads", "num_basis_functions", "hirshfeld_features")
        positive = ("cutoff", "bernstein_gamma", "avg_num_neighbors", "electrostatic_sigma", "dispersion_scale")
        for name in (*whole, *positive):
            value = getattr(self, name)
            if not value > 0 or (name in whole and int(value) != value):
                kind = "a whole number >= 1" if name in whole else "a positive number"
                raise ValueError(f"{name}: expected {kind}, got {value!r}")
        if self.num_features < 4 or self.num_basis_functions < 2:
            raise ValueError(
                "num_features, num_basis_functions: expected at least 4 and 2, "
                f"got {self.num_features} and {self.num_basis_functions}"
            )
        if not self.dispersion_damping >= 0:
            raise ValueError(f"dispersion_damping: expected a length >= 0, got {self.dispersion_damping!r}")
        if self.long_range_cutoff is not None and not self.long_range_cutoff > 0:
            raise ValueError(
                f"long_range_cutoff: expected a positive length (angstrom), got {self.long_range_cutoff!r}"
            )
