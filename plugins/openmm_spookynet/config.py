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
        attention: 'all' atoms of a structure attend to one another (as published), or 'none' do. Attention has no
            distance in it, so that with 'all' the energy of a molecule depends on what is far away.
        charge_conservation: how charges get the total Q. 'uniform' (as published) spreads what is missing over all
            atoms, also between fragments that are far apart. 'shared' spreads it in shares that the network learns, so
            that ions can take what is missing and molecules that are neutral of themselves nothing. 'local' lets
            neighbours exchange charge, so that each of separated fragments keeps a sum of zero, and adds Q in learned
            shares; a system with Q = 0 then falls into neutral fragments only, not into ions.
        embed_after: modules before the embedding of charge and spin enters; 0 as published. The embedding is dealt out
            to the atoms by what they know: nothing but their element with 0, their surroundings too with 1 or more
            (and then by a softmax, so that an ion can have all of it and waters around none).
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
    attention: str = "all"
    charge_conservation: str = "uniform"
    embed_after: int = 0
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
        choices = {
            "activation": ("swish", "ssp"),
            "attention": ("all", "none"),
            "charge_conservation": ("uniform", "shared", "local"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if not 0 <= self.embed_after < self.num_modules:
            raise ValueError(
                f"embed_after: expected 0 to num_modules - 1 = {self.num_modules - 1}, got {self.embed_after!r}"
            )
        if not self.elements or min(self.elements) < 1 or max(self.elements) > 86:
            raise ValueError(f"elements: expected atomic numbers 1 to 86, got {self.elements}")
        if not 0 < self.module_keep_prob <= 1:
            raise ValueError(f"module_keep_prob: expected a probability in (0, 1], got {self.module_keep_prob!r}")
        if self.long_range_cutoff is not None and not self.long_range_cutoff > 0:
            raise ValueError(
                f"long_range_cutoff: expected a positive length (angstrom), got {self.long_range_cutoff!r}"
            )
