"""``python -m openmm_mlff`` is ``openmm-mlff``."""

from openmm_mlff.cli import main

raise SystemExit(main())
