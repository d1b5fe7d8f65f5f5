"""The only conversion factors between this package's units and OpenMM's.

Inside the package: angstrom, electronvolt (eV), elementary charge (e), atomic mass unit.
OpenMM: nanometre, kJ/mol, elementary charge, atomic mass unit, picosecond.

The factors follow from the SI constants that are exact by definition since 2019 (BIPM, SI brochure,
9th edition); only the bohr and the hartree are measured (CODATA 2018).
"""

import math

ELEMENTARY_CHARGE = 1.602176634e-19  # C, exact
AVOGADRO = 6.02214076e23  # 1/mol, exact
BOLTZMANN = 1.380649e-23  # J/K, exact
PLANCK = 6.62607015e-34  # J s, exact

#: kJ/mol in one eV.
KJ_PER_MOL_PER_EV = ELEMENTARY_CHARGE * AVOGADRO / 1000.0
#: nanometres in one angstrom.
NM_PER_ANGSTROM = 0.1
#: angstroms in one nanometre.
ANGSTROM_PER_NM = 10.0
#: (kJ/mol/nm) in one (eV/angstrom).
KJ_PER_MOL_NM_PER_EV_ANGSTROM = KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM
#: Boltzmann constant in eV/K.
BOLTZMANN_EV = BOLTZMANN / ELEMENTARY_CHARGE
#: Boltzmann constant times Avogadro constant in kJ/mol/K.
BOLTZMANN_KJ_PER_MOL = BOLTZMANN * AVOGADRO / 1000.0
#: reduced Planck constant times Avogadro constant in kJ/mol ps.
HBAR_KJ_PER_MOL_PS = PLANCK / (2.0 * math.pi) * AVOGADRO / 1000.0 * 1e12
#: eV in one kcal/mol (thermochemical calorie).
EV_PER_KCAL_PER_MOL = 4.184 / KJ_PER_MOL_PER_EV

#: angstroms in one bohr, CODATA 2018.
ANGSTROM_PER_BOHR = 0.529177210903
#: eV in one hartree, CODATA 2018.
EV_PER_HARTREE = 27.211386245988
#: e^2/(4 pi eps0) in eV angstrom, CODATA 2018.
COULOMB_EV_ANGSTROM = EV_PER_HARTREE * ANGSTROM_PER_BOHR
