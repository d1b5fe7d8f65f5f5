"""Hyperparameters of SpookyNet."""

from __future__ import annotations

from dataclasses import dataclass

BOHR = 0.5291772105638411  # angstrom; the constant that the published model was trained with


@dataclass(frozen=True)
class SpookyNetConfig:
    """Hyperparameters; the defaults are those of the published checkpoint.

    Attributes:
        num_features: length F of the atomic feature vectors.
        num_basis_functions: radial functions K.
        num_modules: interaction modules T.
        cutoff: angstrom, of the local interaction and the short-range repulsion.
        long_range_cutoff: angstrom, of electrostatics and dispersion; None takes all pairs of open systems.
        num_random_features: random features m of the linear-scaling attention (FAVOR+).
        activation: 'swish' or 'ssp' (shifted softplus), both with learnable scale and slope per feature.
        exp_weighting: multiply the radial functions by exp(-alpha r).
        use_irreps: d functions as spherical harmonics; otherwise the six Cartesian products.
        use_nonlinear_embedding: the older electronic embedding.
        use_zbl_repulsion, use_electrostatics, use_d4_dispersion: analytic terms. D4 needs the tables that a published
            checkpoint carries.
        module_keep_prob: probability to keep the contributions of the last module in training.
        num_residual_*: residual blocks of each part.
        elements: atomic numbers that the model was made for.
        charges, multiplicities: total charges (e) and 2S+1 that it was trained on; others are refused. None: any.
    """

    num_features: int = 64
    num_basis_functions: int = 16
    num_modules: int = 3
    cutoff: float = 10 * BOHR
    long_range_cutoff: float | None = None
    num_random_features: int = 64
    activation: str = "swish"
    exp_weighting: bool = True
    use_irreps: bool = True
    use_nonlinear_embedding: bool = False
    use_zbl_repulsion: bool = True
    use_electrostatics: bool = True
    use_d4_dispersion: bool = False
    module_keep_prob: float = 1.0
    num_residual_electron: int = 1
    num_residual_pre: int = 1
    num_residual_local_x: int = 1
    num_residual_local_s: int = 1
    num_residual_local_p: int = 1
    num_residual_local_d: int = 1
    num_residual_local: int = 1
    num_residual_nonlocal_q: int = 1
    num_residual_nonlocal_k: int = 1
    num_residual_nonlocal_v: int = 1
    num_residual_post: int = 1
    num_residual_output: int = 1
    elements: tuple[int, ...] = tuple(range(1, 87))
    charges: tuple[int, ...] | None = None
    multiplicities: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("elements", "charges", "multiplicities"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(x) for x in value))
        positive = ("num_features", "num_basis_functions", "num_modules", "num_random_features", "cutoff")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if self.activation not in ("swish", "ssp"):
            raise ValueError(f"activation: expected 'swish' or 'ssp', got {self.activation!r}")
        if not self.elements or min(self.elements) < 1 or max(self.elements) > 86:
            raise ValueError(f"elements: expected atomic numbers 1 to 86, got {self.elements}")
        if not 0 < self.module_keep_prob <= 1:
            raise ValueError(f"module_keep_prob: expected a probability in (0, 1], got {self.module_keep_prob!r}")
        if self.long_range_cutoff is not None and not self.long_range_cutoff > 0:
            raise ValueError(
                f"long_range_cutoff: expected a positive length (angstrom), got {self.long_range_cutoff!r}"
            )
