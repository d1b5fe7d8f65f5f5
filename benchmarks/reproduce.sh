#!/usr/bin/env bash
# From nothing to the bundled model spookynet-ala2-gfn2 and its tables: labels by GFN2-xTB, training, evaluation.
# Takes hours; started again, it goes on where it stopped.
#
#   benchmarks/reproduce.sh [FOLDER]     default .work/reproduce; PROCESSES sets the number of labelling processes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-.work/reproduce}
processes=${PROCESSES:-2}
recipes=examples/recipes
mkdir -p "$folder"

openmm-mlff dataset sample $recipes/ala2_gfn2.toml --output "$folder/data" --processes "$processes"
openmm-mlff dataset info "$folder/data" --verify

if [ -e "$folder/training/config.json" ]; then
    openmm-mlff train --data "$folder/data" --output "$folder/training" --resume
else
    openmm-mlff train --data "$folder/data" --output "$folder/training" \
        --config $recipes/spookynet_ala2_gfn2.toml --name spookynet-ala2-gfn2
fi

openmm-mlff evaluate --model "$folder/training/model.safetensors" --data "$folder/data" --split test --output "$folder"
