"""``openmm-mlff models``: which models there are, whether their files are sound, and how to get them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmm_mlff.potentials.family import PublishedModel


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``models``."""
    parser = subparsers.add_parser(
        "models",
        help="list, verify, fetch and join models",
        description="List the models that are shipped or known, with licence and domain; verify checksums; fetch "
        "published models into the cache (OPENMM_MLFF_CACHE, else ~/.cache/openmm-mlff); join models as an ensemble.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="table of all models (the default)")
    verify = actions.add_parser("verify", help="check the files of all models, of one model, or of a file")
    verify.add_argument("names", nargs="*", metavar="NAME|FILE", help="all that are here if not given")
    fetch = actions.add_parser("fetch", help="download a published model into the cache")
    fetch.add_argument("name", metavar="NAME")
    fetch.add_argument("--url", help="another place that has the same file; the checksum must be right all the same")
    joining = actions.add_parser("ensemble", help="join models of one kind, which then know where they are unsure")
    joining.add_argument("files", nargs="+", metavar="FILE", help="model files of one family and one config")
    joining.add_argument("--output", "-o", required=True, metavar="FILE", help="the ensemble's model file")
    joining.add_argument("--name", help="of the ensemble, for its card")
    joining.add_argument("--energy-factor", type=float, metavar="X", help="uncertainty = X times the spread (1)")
    joining.add_argument("--force-factor", type=float, metavar="X", help="the same for forces (1)")
    joining.add_argument("--force-limit", type=float, metavar="EV/ANGSTROM", help="uncertainty of a force beyond which "
                         "the model has left its domain")  # fmt: skip
    joining.set_defaults(func=join_models)
    parser.set_defaults(func=list_models)
    listing.set_defaults(func=list_models)
    verify.set_defaults(func=verify_models)
    fetch.set_defaults(func=fetch_model)


def list_models(args: argparse.Namespace) -> int:
    """Print name, family, licence, domain and place of every model."""
    from rich.console import Console
    from rich.table import Table

    from openmm_mlff.data import model_file
    from openmm_mlff.potentials.family import families

    table = Table(show_lines=True)
    for heading in ("model", "licence", "domain", "where"):
        table.add_column(heading, overflow="fold")
    for family in families():
        for model in family.bundled:
            here = model.path.is_file()
            licence = str(model_file.load_card(model.path).get("licence", "not stated")) if here else ""
            size = f"shipped, {model.path.stat().st_size / 1e6:.1f} MB" if here else "missing from this installation"
            table.add_row(model.name, licence, model.domain, size)
        for known in family.published:
            table.add_row(known.name, known.licence, known.domain, _place(known))
    console = Console()
    # a pipe has no width of its own, and 80 columns would break every word
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    names = ", ".join(repr(f.name) for f in families())
    console.print(f"a file of your own: MLPotential(FAMILY, modelPath=...) with FAMILY among {names}", highlight=False)
    return 0


def _place(known: PublishedModel) -> str:
    from openmm_mlff.data import model_file
    from openmm_mlff.potentials.family import find_published

    found = find_published(known)
    if found is not None:
        return f"in the cache ({found.name[:12]}...)" if found.parent == model_file.cache_dir() else str(found)
    package = f"pip install 'openmm-mlff[{known.extra}]', or " if known.extra is not None else ""
    return f"{package}openmm-mlff models fetch {known.name}"


def verify_models(args: argparse.Namespace) -> int:
    """Check files against their checksums, and that they can be read; status 1 if one is not sound."""
    from openmm_mlff.data import model_file
    from openmm_mlff.potentials.family import families, find_published, load_potential

    files: dict[str, tuple[Path | None, str | None, str | None]] = {}
    for family in families():
        for model in family.bundled:
            files[model.name] = (model.path if model.path.is_file() else None, None, family.name)
        for known in family.published:
            files[known.name] = (find_published(known), None if known.is_it else known.sha256, family.name)
    published = {m.name: m for f in families() for m in f.published}
    chosen = list(args.names)
    for name in chosen:
        if name not in files:
            if not Path(name).is_file():
                raise ValueError(f"name: expected a file or a model among {', '.join(sorted(files))}, got {name!r}")
            files[name] = (Path(name), None, None)
    sound = True
    for name in chosen or files:
        path, sha256, family_name = files[name]
        if path is None:
            # a published model that nobody fetched is nothing wrong, unless it was asked for
            verdict, good = "not here", name not in chosen and name in published
        else:
            try:
                potential = load_potential(path, family_name, sha256)
                if name in published and (is_it := published[name].is_it) is not None and not is_it(potential):
                    raise ValueError(f"{path} holds another model")
                what = f"{potential.family}, {len(potential.elements)} elements"
                verdict, good = f"sound, {what}, sha256 {model_file.sha256_of(path)}", True
            except ValueError as error:
                verdict, good = f"NOT SOUND: {error}", False
        sound &= good
        print(f"{name}: {verdict}")
    return 0 if sound else 1


def join_models(args: argparse.Namespace) -> int:
    """Write several models as one ensemble."""
    from openmm_mlff.data import model_file
    from openmm_mlff.potentials.ensemble import save_ensemble
    from openmm_mlff.training.evaluation import find_model

    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"output: expected a file ending in .safetensors, got {output.name!r}")
    if output.exists():
        raise ValueError(f"output: {output} exists already; choose another name")
    files = [find_model(name) for name in args.files]
    seen: dict[str, Path] = {}
    for file in files:
        same = seen.setdefault(model_file.sha256_of(file), file)
        if same is not file:
            raise ValueError(
                f"file: expected members that differ, got {same} and {file} with the same content; "
                "models that are alike never disagree"
            )
    named = {name: getattr(args, name) for name in ("energy_factor", "force_factor", "force_limit")}
    calibration = {name: value for name, value in named.items() if value is not None}
    save_ensemble(files, output, calibration, **({"name": args.name} if args.name else {}))
    print(f"{output}: {len(files)} members; use it as MLPotential('ensemble', modelPath=...)")
    return 0


def fetch_model(args: argparse.Namespace) -> int:
    """Download one published model; what was broken off goes on where it stopped."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from openmm_mlff._plugins import near
    from openmm_mlff.data import downloads
    from openmm_mlff.potentials.family import families

    published = {m.name: m for f in families() for m in f.published}
    if args.name not in published:
        shipped = [m.name for f in families() for m in f.bundled]
        if args.name in shipped:
            print(f"{args.name} is shipped with this package; there is nothing to fetch")
            return 0
        raise ValueError(f"name: no published model is called {args.name!r}; {near(args.name, published)}")
    model = published[args.name]
    print(f"{model.name}: licence {model.licence}; please cite {model.citation}")
    suffix = Path(model.url).suffix
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(model.name, total=None)
        try:
            path = downloads.fetch(
                args.url or model.url,
                model.sha256,
                suffix=suffix,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except downloads.DownloadError as error:
            raise downloads.DownloadError(f"{error}\n{_other_ways(model)}") from error
    print(f"{path} (checksum verified); use it as MLPotential({model.name!r})")
    return 0


def _other_ways(model: PublishedModel) -> str:
    """How to come by a model that cannot be fetched from where it should be."""
    ways = ["--url ADDRESS fetches the same file from elsewhere (http, https or file)"]
    if model.extra is not None:
        ways.insert(0, f"pip install 'openmm-mlff[{model.extra}]' installs a package that carries it")
    name = model.family if model.is_it is None else model.name
    ways.append(f"MLPotential({name!r}, modelPath=...) reads a file that is already here")
    return "\n".join([f"other ways to get {model.name}:", *(f"  {way}" for way in ways)])
