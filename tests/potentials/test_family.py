"""Finding families and reading their models by name and by file."""

from __future__ import annotations

import dataclasses
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from openmm_mlff import _plugins
from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials import family as families
from openmm_mlff.potentials.family import Family, find_family, from_card, load_potential, make_card, save_potential
from openmm_spookynet import SpookyNet, SpookyNetConfig

TINY = SpookyNetConfig(num_features=4, num_modules=1, num_basis_functions=4, num_random_features=4, elements=(1, 8))


@pytest.fixture
def tiny() -> SpookyNet:
    torch.manual_seed(0)
    return SpookyNet(TINY)


def register(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Add entry points to those that are installed."""
    real = _plugins.entry_points

    def entry_points(*, group: str) -> list[EntryPoint]:
        extra = [EntryPoint(name, value, group) for name, value in values.items()]
        return [*real(group=group), *(extra if group == _plugins.POTENTIALS else [])]

    monkeypatch.setattr(_plugins, "entry_points", entry_points)


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spookynet", "spookynet-ala2-gfn2", "spookynet-published"])
def test_names_lead_to_the_family(name: str) -> None:
    family = find_family(name)
    assert family.name == "spookynet" and family.model is SpookyNet and family.config is SpookyNetConfig


@pytest.mark.parametrize("name", ["spokynet", "SpookyNet", "spooky_net"])
def test_near_misses_are_told(name: str) -> None:
    with pytest.raises(ValueError, match=rf"name: no potential is called '{name}'; did you mean 'spookynet'"):
        find_family(name)


def test_names_like_no_other_get_the_list() -> None:
    with pytest.raises(ValueError, match=r"no potential is called 'xyz'.*spookynet"):
        find_family("xyz")


def test_every_name_of_the_family_is_registered() -> None:
    """What the family says it ships or knows can be typed, and every family is listed once."""
    registered = _plugins.registered(_plugins.POTENTIALS)
    for family in families.families():
        names = {family.name, *family.aliases, *(m.name for m in (*family.bundled, *family.published))}
        assert names <= set(registered), f"{names - set(registered)} have no entry point"
    listed = [f.name for f in families.families()]
    assert "spookynet" in listed and len(set(listed)) == len(listed)


def test_published_models_say_where_and_whose() -> None:
    for family in families.families():
        for model in family.published:
            assert model.family == family.name and model.url.startswith("https://")
            assert len(model.sha256) == 64 and int(model.sha256, 16) >= 0
            assert model.licence and model.citation and model.domain


# -- plugins that are broken ----------------------------------------------------------------------------------------


def test_a_broken_plugin_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: SpookyNet) -> None:
    register(monkeypatch, broken="no_such_module_anywhere:family")
    with pytest.raises(ImportError, match=r"'broken'.*no_such_module_anywhere"):
        find_family("broken")
    assert find_family("spookynet").name == "spookynet"
    assert [f.name for f in families.families()].count("spookynet") == 1
    # a file that no intact family claims does not trip over it
    (tmp_path / "model.xyz").write_text("what", encoding="utf-8")
    with pytest.raises(ValueError, match=r"modelPath: model.xyz is neither"):
        load_potential(tmp_path / "model.xyz")


def test_a_plugin_that_fails_when_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "exploding_plugin_module.py").write_text(
        "raise RuntimeError('the library it needs is too old')", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    register(monkeypatch, exploding="exploding_plugin_module:family")
    with pytest.raises(ImportError, match=r"RuntimeError: the library it needs is too old"):
        find_family("exploding")


def test_a_plugin_that_names_another_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("odd_plugin_module")
    module.family = {"name": "odd"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_plugin_module", module)
    register(monkeypatch, odd="odd_plugin_module:family")
    with pytest.raises(ImportError, match=r"'odd' registers a dict, expected a Family"):
        find_family("odd")


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_comes_back_as_it_was(tmp_path: Path, tiny: SpookyNet, dtype: torch.dtype) -> None:
    path = save_potential(tiny.to(dtype), tmp_path / "tiny.safetensors", name="tiny", licence="MIT")
    loaded = load_potential(path)
    assert isinstance(loaded, SpookyNet) and loaded.config == TINY and loaded.dtype == dtype
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for (name, ours), (other, theirs) in zip(tiny.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_the_card_says_what_the_model_can_do(tiny: SpookyNet) -> None:
    card = make_card(tiny, licence="MIT")
    assert card["family"] == "spookynet" and card["elements"] == [1, 8] and card["licence"] == "MIT"
    assert card["supports"] == {"charge": True, "multiplicity": True, "periodic": True, "charges": True}
    assert card["cutoff"] == TINY.cutoff and card["units"]["energy"] == "eV"


def test_the_family_can_be_asked_for(tmp_path: Path, tiny: SpookyNet, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_potential(tiny, tmp_path / "tiny.safetensors")
    assert load_potential(path, family="spookynet-published").family == "spookynet"
    module = types.ModuleType("other_plugin_module")
    module.family = Family("other", SpookyNet, SpookyNetConfig)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other_plugin_module", module)
    register(monkeypatch, other="other_plugin_module:family")
    with pytest.raises(ValueError, match=r"modelPath: tiny.safetensors is a 'spookynet' model, expected 'other'"):
        load_potential(path, family="other")


def test_no_file_and_no_reader(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="modelPath: no file at"):
        load_potential(tmp_path / "none.safetensors")
    (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"weights.bin is neither an openmm-mlff model file nor"):
        load_potential(tmp_path / "weights.bin", family="spookynet")


def test_storing_twice_gives_one_file(tiny: SpookyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path))
    digests = {families.store_potential(tiny) for _ in range(8)}
    assert len(digests) == 1 and len(list((tmp_path / "models").iterdir())) == 1
    assert load_potential(model_file.find(digests.pop())).family == "spookynet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "the card's config has 'num_heads', which this version of spookynet does not know"),
        ({"num_features": "eight"}, "the card's config does not describe a spookynet model"),
        ({"num_features": -1}, "num_features: expected a positive number"),
        ({"activation": "relu"}, "activation: expected 'swish' or 'ssp'"),
        ({"elements": None}, "the card's config does not describe a spookynet model"),
        ({"num_features": 8}, "the tensors do not fit the card"),
        ({"num_modules": 2}, "the tensors do not fit the card"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit(tiny: SpookyNet, change: dict[str, Any], message: str) -> None:
    card = make_card(tiny)
    card["config"] = card["config"] | change
    with pytest.raises(ValueError, match=message):
        from_card(card, tiny.state_dict())


def test_other_kinds_and_missing_tensors(tiny: SpookyNet) -> None:
    card, state = make_card(tiny), tiny.state_dict()
    with pytest.raises(ValueError, match="expected a model of kind 'potential' or 'composite', got 'propagator'"):
        from_card(card | {"kind": "propagator"}, state)
    with pytest.raises(ValueError, match="no potential is called 'unknown'"):
        from_card(card | {"family": "unknown"}, state)
    for broken in ({k: v for k, v in state.items() if k != "output.weight"}, state | {"extra": torch.ones(1)}):
        with pytest.raises(ValueError, match="the tensors do not fit the card"):
            from_card(card, broken)


def test_cards_hold_plain_values_only(tiny: SpookyNet, tmp_path: Path) -> None:
    card = model_file.load_card(save_potential(tiny, tmp_path / "tiny.safetensors"))
    assert dataclasses.asdict(SpookyNetConfig(**card["config"])) == dataclasses.asdict(TINY)


def test_charges_that_the_model_never_saw_are_refused() -> None:
    config = SpookyNetConfig(num_features=8, num_modules=1, num_random_features=8, charges=(0, -1), multiplicities=(1,))
    model = SpookyNet(config)
    water = Structure([8, 1, 1], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    model.check(water)
    model.check(water.replace(charge=-1))
    with pytest.raises(ValueError, match="charge: this model was trained for charge 0, -1 only, got 1"):
        model.check(water.replace(charge=1))
    with pytest.raises(ValueError, match="multiplicity: this model was trained for multiplicity 1 only, got 3"):
        model.check(water.replace(multiplicity=3))
