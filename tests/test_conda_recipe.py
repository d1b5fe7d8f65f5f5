"""The conda recipe is valid, renders offline, and says the same as pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import openmm_mlff

rattler_build = pytest.importorskip("rattler_build", reason="py-rattler-build is not installed")

#: where conda-forge's name differs from PyPI's.
CONDA_NAMES = {
    "dask": "dask",
    "matplotlib": "matplotlib-base",
    "openmmml": "openmm-ml",
    "tblite": "tblite-python",
    "torch": "pytorch",
    "vesin": "python-vesin",
}
#: extras without a conda package; conda-recipe/README.md says so.
PIP_ONLY = {"so3krates-torch"}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def recipe(repository: Path) -> dict[str, Any]:
    stage0 = rattler_build.Stage0Recipe.from_yaml((repository / "conda-recipe/recipe.yaml").read_text(encoding="utf-8"))
    (variant,) = stage0.render(rattler_build.VariantConfig({"python_min": ["3.11"]}))
    return variant.recipe.to_dict()


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """PyPI requirements as conda name -> lower bound; other kinds of bounds are not used in this project."""
    bounds = {}
    for text in requirements:
        requirement = Requirement(text)
        assert all(s.operator == ">=" for s in requirement.specifier), f"{text}: the recipe knows lower bounds only"
        names = [requirement.name, *requirement.extras]
        for name in names:
            bounds[CONDA_NAMES.get(name, name)] = str(requirement.specifier)
    return bounds


def conda_bounds(specs: list[str]) -> dict[str, str]:
    return {name: bound for name, _, bound in (spec.partition(" ") for spec in specs)}


def test_run_requirements_are_those_of_the_wheel(recipe: dict[str, Any], project: dict[str, Any]) -> None:
    expected = lower_bounds(project["dependencies"]) | {"python": project["requires-python"]}
    assert conda_bounds(recipe["requirements"]["run"]) == expected


def test_extras_are_constraints_and_not_installed(recipe: dict[str, Any], project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    users = [r for name, requirements in extras.items() if name not in ("all", "dev") for r in requirements]
    expected = lower_bounds([r for r in users if Requirement(r).name not in PIP_ONLY])
    for name in lower_bounds(project["dependencies"]):
        expected.pop(name, None)
    assert conda_bounds(recipe["requirements"]["run_constraints"]) == expected


def test_host_requirements_are_the_build_backend(recipe: dict[str, Any], repository: Path) -> None:
    build_system = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    host = conda_bounds(recipe["requirements"]["host"])
    assert host == {"python": "3.11.*", "pip": ""} | lower_bounds(build_system["requires"])


def test_entry_points_version_and_kind(recipe: dict[str, Any], project: dict[str, Any]) -> None:
    assert recipe["build"]["noarch"] == "python"
    assert recipe["build"]["python"]["entry_points"] == [f"{k} = {v}" for k, v in project["scripts"].items()]
    assert recipe["package"] == {"name": project["name"], "version": openmm_mlff.__version__}
    assert recipe["about"]["license"] == project["license"]
    assert recipe["source"] == [{"path": ".."}]


def test_tests_import_every_package_of_the_wheel(recipe: dict[str, Any], repository: Path) -> None:
    (imports,) = (t["python"]["imports"] for t in recipe["tests"] if "python" in t)
    packages = {
        str(init.parent.relative_to(root)).replace("/", ".")
        for root in (repository, repository / "plugins")
        for top in root.glob("openmm_*")
        for init in top.rglob("__init__.py")
    }
    assert set(imports) == packages | {"openmmml"}


def test_a_misspelt_field_would_be_caught(repository: Path) -> None:
    text = (
        (repository / "conda-recipe/recipe.yaml")
        .read_text(encoding="utf-8")
        .replace("requirements:", "requirement:", 1)
    )
    with pytest.raises(Exception, match="requirement"):
        rattler_build.Stage0Recipe.from_yaml(text)
