"""The ``geofm`` command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geofm import __version__
from geofm.errors import AuxiliaryError, DataNotFoundError, DownloadError, GeofmError, ModelError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; None for the process's own.

    Returns:
        Exit status: 0, 2 after an error that was explained, or 130 after an interruption.
    """
    parser = _parser()
    options = _parsed(parser, arguments)
    _say_what_happens(options.verbose)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except GeofmError as error:
        print(f"geofm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"geofm: interrupted{_what_continues(options)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; without this Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _what_continues(options: argparse.Namespace) -> str:
    """What is left of an interrupted run, if the command can go on from it."""
    if options.run not in (_embed, _predict):
        return ""
    partial = options.output.with_name(options.output.name + ".partial")
    if not partial.exists():
        return ""
    same = "the same command without --no-resume" if options.no_resume else "the same command"
    return f"; {same} continues from {partial}"


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    words = _joined(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser.parse_known_args(words)
    if rest and (not hasattr(options, "overrides") or any(w.startswith("-") for w in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        # argparse takes a command's words only up to the first option: pretrain A --quick b=1.
        words = [*([options.recipe] if options.recipe else []), *options.overrides, *rest]
        options.recipe, options.overrides = words[0], words[1:]
    return options


def _joined(words: Sequence[str]) -> list[str]:
    """Each option and its negative value as one word.

    argparse takes ``-3.1,40.2`` and ``-3.4e38`` for options; no option of geofm begins like that.
    """
    joined: list[str] = []
    for word in words:
        before = joined[-1] if joined else ""
        if re.match(r"-\.?\d", word) and re.match(r"--[a-z][^=]*$", before):
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def _say_what_happens(verbose: bool) -> None:
    # Only geofm's own messages: GDAL, for one, logs much that no user can act on.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("geofm: %(message)s"))
    logger = logging.getLogger("geofm")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"geofm: warning: {message}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="geofm", description="A model zoo for ecology from space."
    )
    parser.add_argument("--version", action="version", version=f"geofm {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="list models, or checkpoints with --pretrained")
    listing.add_argument("filter", nargs="?", default="*", help="wildcard, for example 'mpmae_*'")
    listing.add_argument("--pretrained", action="store_true", help="list checkpoints as name.tag")
    listing.add_argument("--markdown", action="store_true", help="print the README's table")
    listing.set_defaults(run=_list)

    info = commands.add_parser("info", help="show a checkpoint's card")
    info.add_argument("name", help="model or model.tag")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    download = commands.add_parser("download", help="fetch, verify and convert checkpoints")
    download.add_argument("names", nargs="+", metavar="NAME", help="model or model.tag")
    download.add_argument(
        "--accept-new-hash",
        action="store_true",
        help="trust the file as it is now, where no hash is published",
    )
    download.set_defaults(run=_download)

    cache = commands.add_parser("cache", help="look after the downloaded files")
    cache.add_argument("action", choices=("list", "verify", "clean"))
    cache.add_argument("names", nargs="*", metavar="NAME", help="only these checkpoints (clean)")
    cache.set_defaults(run=_cache)

    sample = commands.add_parser("sample", help="write generated samples, for trying things out")
    kinds = ("scene", "eurosat", "globalgeotree", "mmearth", "ssl4eco")
    sample.add_argument("kind", choices=kinds)
    sample.add_argument("output", type=Path, help="GeoTIFF (scene) or folder (the others)")
    sample.add_argument("--size", type=_positive, default=None, help="side in px")
    sample.add_argument(
        "--n",
        type=_positive,
        default=None,
        help="tiles per class (eurosat: 6), observations (globalgeotree: 6), tiles (mmearth: 64) "
        "or places (ssl4eco: 16)",
    )
    sample.add_argument("--dates", type=int, default=4, help="of a place (ssl4eco)")
    sample.add_argument("--level", choices=("L1C", "L2A"), default="L2A", help="of the scene")
    sample.add_argument("--day", type=int, default=180, help="day of the year (scene)")
    sample.add_argument("--seed", type=_seed, default=0)
    sample.set_defaults(run=_sample)

    _add_embed(commands)
    _add_zero_shot(commands)
    _add_pretrain(commands)
    _add_maps(commands)
    return parser


def _add_embed(commands: Any) -> None:
    embed = commands.add_parser("embed", help="a grid of embeddings of a multispectral raster")
    embed.add_argument("--model", default="mpmae_atto", help="model or model.tag (%(default)s)")
    weights = embed.add_mutually_exclusive_group()
    weights.add_argument("--weights", help="tag or path, instead of the default checkpoint")
    weights.add_argument(
        "--no-pretrained", action="store_true", help="random weights; the output says so"
    )
    embed.add_argument("--picture", type=Path, help="PNG; default: beside the output")
    embed.add_argument("--stride", type=_positive, help="px a cell; default: of the last stage")
    embed.add_argument("--pooled", action="store_true", help="one vector a window")
    embed.add_argument("--pca", type=_positive, help="keep this many principal components")
    embed.set_defaults(run=_embed)

    predict = commands.add_parser("predict", help="classes or probabilities of a raster")
    predict.add_argument("--model", default="mpmae_unet_atto", help="architecture (%(default)s)")
    predict.add_argument("--weights", required=True, help="file or folder of the trained model")
    predict.add_argument(
        "--kind", choices=("probabilities", "logits", "classes"), default="classes"
    )
    predict.add_argument(
        "--classes", help="names in order, or their number; default: as many as the file's head has"
    )
    predict.set_defaults(run=_predict)

    for command in (embed, predict):
        _add_raster_options(command)


def _add_raster_options(command: argparse.ArgumentParser) -> None:
    """What both commands that go over a raster take."""
    command.add_argument(
        "input", help="GeoTIFF, SAFE folder, folder or pattern of bands, STAC item, or an address"
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="GeoTIFF to write")
    command.add_argument("--bands", help="names in order, B1,B2,...; default: the file's own")
    command.add_argument("--sensor", help="whose names they are, for example landsat_oli")
    # Needed where neither names nor metadata say it.
    command.add_argument("--level", choices=("L1C", "L2A"), help="default: what the input says")
    command.add_argument(
        "--units", choices=("dn", "reflectance", "uint8"), help="default: what the input says"
    )
    command.add_argument(
        "--offset", type=float, help="added to DN, for example -1000; default: what the input says"
    )
    command.add_argument("--baseline", help="processing baseline, from which the offset follows")
    command.add_argument("--date", help="day of sensing, as 2024-05-12; default: as the input says")
    command.add_argument(
        "--align",
        choices=("georeference", "corner"),
        help="how bands lie whose grids do not nest; SSL4EO-S12: corner",
    )
    command.add_argument(
        "--no-strict",
        action="store_true",
        help="level, units, offset and date are right where the input says otherwise",
    )
    command.add_argument("--nodata", type=float, action="append", help="may be repeated")
    command.add_argument("--fill", help="for missing bands: mean, zero, or B10=B9,B1=mean")
    command.add_argument("--tolerance", type=float, help="nm by which a band may stand in")
    command.add_argument("--window", type=_window, help="px, 'tile' or 'image'")
    command.add_argument("--overlap", type=int, help="px that windows share")
    command.add_argument("--blend", choices=("smooth", "centre"), default="smooth")
    command.add_argument("--min-valid", type=float, default=0.5, help="share of pixels with data")
    command.add_argument(
        "--mask-classes", type=_class_numbers, help="of the scene classification: 3,8,9,10"
    )
    command.add_argument(
        "--resampling", choices=("nearest", "bilinear", "cubic"), default="bilinear"
    )
    command.add_argument("--dtype", choices=("float32", "float16", "int8"))
    command.add_argument("--compress", default="deflate", help="as GDAL names it (%(default)s)")
    command.add_argument("--batch-size", type=_positive, help="windows at a time")
    command.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    command.add_argument("--no-resume", action="store_true", help="start over")


def _class_numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of class numbers, like 3,8,9,10 (shadow and clouds of the SCL)"
        )
    return [int(word) for word in words]


def _window(text: str) -> int | str:
    return text if text in ("tile", "image") else _positive(text)


def _add_zero_shot(commands: Any) -> None:
    command = commands.add_parser("zero-shot", help="species of trees from a year of observations")
    command.add_argument(
        "observations",
        type=Path,
        help="GlobalGeoTree shards, a TreeSatAI series (.h5), or monthly GeoTIFFs (folder, CSV)",
    )
    command.add_argument("--species", required=True, help="CSV of species, or names: A a,B b")
    command.add_argument("--taxonomy", type=Path, help="CSV that completes bare names")
    command.add_argument("--model", default="geotreeclip", help="model or model.tag (%(default)s)")
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--weights", help="tag or path, instead of the default checkpoint")
    weights.add_argument(
        "--no-pretrained", action="store_true", help="random weights; the output says so"
    )
    command.add_argument("--top", type=int, default=5, help="species to name (%(default)s)")
    command.add_argument("--batch", type=int, default=64, help="observations at a time")
    command.add_argument("-o", "--output", type=Path, help="CSV to write")
    command.add_argument("--picture", type=Path, help="PNG of the first observation's answer")
    command.add_argument("--auxiliary", type=Path, help="JSON of the environment (for a series)")
    command.add_argument("--longitude", type=float, help="of a series")
    command.add_argument("--latitude", type=float, help="of a series")
    command.add_argument("--georeference", type=Path, help="a raster of the series' place")
    command.add_argument("--skip", action="store_true", help="leave out and count broken samples")
    command.set_defaults(run=_zero_shot)


def _add_maps(commands: Any) -> None:
    similar = commands.add_parser("similar", help="places alike, in what `geofm embed` wrote")
    similar.add_argument("embeddings", type=Path, help="GeoTIFF, .parquet or .zarr of embeddings")
    similar.add_argument("--at", required=True, metavar="LON,LAT", help="degrees, as -3.1,40.2")
    similar.add_argument("--top", type=_positive, default=20, help="places to list (%(default)s)")

    segment = commands.add_parser("segment", help="group cells into classes by k-means")
    segment.add_argument("embeddings", type=Path, help="GeoTIFF, .parquet or .zarr of embeddings")
    segment.add_argument("--classes", type=_positive, default=8)
    segment.add_argument("--seed", type=_seed, default=0)

    picture = commands.add_parser("picture", help="an embedding or a map as PNG or HTML page")
    picture.add_argument("input", type=Path, help="GeoTIFF, .parquet or .zarr")
    picture.add_argument("--title")

    export = commands.add_parser("export", help="embeddings as GeoParquet or zarr")
    export.add_argument("embeddings", type=Path, help="GeoTIFF of embeddings")
    export.add_argument("--geometry", choices=("point", "polygon"), default="point")
    export.add_argument("--date", help="of the scene, as 2024-05-12")
    export.add_argument("--dtype", choices=("float32", "float16"), default="float32")

    for command in (similar, segment, picture, export):
        drawn = command is not export
        kinds = ".tif, .png or .html" if command in (similar, segment) else ".png or .html"
        command.add_argument(
            "-o",
            "--output",
            type=Path,
            required=command in (picture, export),
            help=kinds if drawn else ".parquet or .zarr",
        )
        if drawn:
            command.add_argument("--image", help="what was embedded, beside the map")
            command.add_argument("--bands", help="of the image: names in order, B1,B2,...")
            command.add_argument("--sensor", help="whose names they are (sentinel2)")
            command.add_argument("--attribution", help="whose data it is")
        command.set_defaults(run=_maps, what=command.prog.split()[-1])


def _maps(options: argparse.Namespace) -> int:
    from geofm.maps import commands

    print(getattr(commands, f"run_{options.what}")(options))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def _add_pretrain(commands: Any) -> None:
    command = commands.add_parser(
        "pretrain", help="pretrain by a recipe", description="Without a recipe: list them."
    )
    command.add_argument("recipe", nargs="?", help="name of a recipe, or a .yaml file")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="for example data.path=/data train.batch=64",
    )
    command.add_argument("-o", "--output", type=Path, help="folder of the run (runs/<recipe>)")
    command.add_argument("--quick", action="store_true", help="a trial on generated samples")
    command.add_argument("--dry-run", action="store_true", help="say what would be run")
    command.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH", help="where to go on (%(default)s)"
    )
    command.add_argument(
        "--export-only", action="store_true", help="write weights and card of the run's checkpoint"
    )
    command.add_argument(
        "--checkpoint", choices=("last", "best"), default="last", help="with --export-only"
    )
    command.set_defaults(run=_pretrain)

    push = commands.add_parser("push", help="upload a run's weights to the Hugging Face hub")
    push.add_argument("folder", type=Path, metavar="RUN_DIR")
    push.add_argument("repo", metavar="OWNER/NAME")
    push.add_argument("--private", action="store_true", help="make a private repository")
    push.set_defaults(run=_push)


def _list(options: argparse.Namespace) -> int:
    from geofm import registry
    from geofm.tables import checkpoint_table

    if options.markdown:
        print(checkpoint_table(options.filter))
        return 0
    names = registry.list_models(options.filter, pretrained=options.pretrained)
    for name in names:
        print(name)
    if not names:
        print(f"nothing matches {options.filter!r}", file=sys.stderr)
        return 1
    return 0


def _info(options: argparse.Namespace) -> int:
    from geofm import hub, registry
    from geofm.tables import card_text

    card = registry.model_card(options.name)
    known = hub.file_sha256(card)
    if options.json:
        print(json.dumps({**asdict(card), "file_sha256": known}, indent=2, default=str))
    else:
        print(card_text(card, known))
        print(f"cached:    {'yes' if hub.is_cached(card) else 'no'}")
    return 0


def _download(options: argparse.Namespace) -> int:
    from geofm import hub, registry

    for name in options.names:
        card = registry.model_card(name)
        path = hub.fetch(card, accept_new_hash=options.accept_new_hash)
        hub.load_card_weights(card)
        print(f"{card.name}: {path}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    from geofm import hub, registry
    from geofm.cards import published_cards

    cards = list(published_cards().values())
    if options.action == "clean":
        names = [registry.model_card(name).name for name in options.names] or None
        print(f"freed {hub.clean_cache(cards, names) / 1e6:,.1f} MB in {hub.cache_dir()}")
        return 0
    if options.action == "verify":
        checked = hub.verify_cache(cards)
        for entry, sound in checked:
            print(f"{'ok     ' if sound else 'DAMAGED'} {entry.path}")
        return 0 if all(sound for _, sound in checked) else 1
    for entry in hub.cache_entries(cards):
        print(f"{entry.size / 1e6:>9,.1f} MB  {entry.kind:<9}  {entry.card or '?'}  {entry.path}")
    print(f"cache: {hub.cache_dir()}")
    return 0


def _sample(options: argparse.Namespace) -> int:
    from geofm.datasets import samples

    if options.kind == "scene":
        side = options.size or 256
        scene = samples.landscape(
            (side, side), seed=options.seed, day_of_year=options.day, level=options.level
        )
        samples.write_scene(options.output, scene)
    elif options.kind == "globalgeotree":
        from geofm.datasets import write_shards

        write_shards(options.output, options.n or 6, seed=options.seed)
    elif options.kind == "mmearth":
        from geofm.datasets.mmearth_samples import write_mmearth

        write_mmearth(options.output, n=options.n or 64, size=options.size or 64, seed=options.seed)
    elif options.kind == "ssl4eco":
        from geofm.datasets.ssl4eco_samples import write_ssl4eco

        write_ssl4eco(
            options.output,
            n=options.n or 16,
            dates=options.dates,
            size=options.size or 64,
            seed=options.seed,
        )
    else:
        samples.write_eurosat(
            options.output, n_per_class=options.n or 6, seed=options.seed, size=options.size or 64
        )
    print(f"wrote {options.output} (generated, not an observation)")
    return 0


def _embed(options: argparse.Namespace) -> int:
    from geofm import registry
    from geofm.raster import embed_raster
    from geofm.scenes.files import check_exists

    # Before weights are fetched.
    check_exists(options.input)
    architecture: dict[str, Any] = {}
    base, _ = registry.split_name(options.model)
    if registry.architecture(base).aligned is not None:
        # So that cells tile the image; the weights are the same.
        architecture |= dict(registry.architecture(base).aligned or {})
    model = _model(options, **architecture)
    picture = options.picture or options.output.with_suffix(".png")
    embedding = embed_raster(
        model,
        options.input,
        options.output,
        picture=picture,
        stride=options.stride,
        pooled=options.pooled,
        pca=options.pca,
        **_raster_options(options),
    )
    channels, rows, columns = embedding.shape
    print(
        f"wrote {options.output}: {rows} x {columns} cells of {embedding.stride} px, {channels} "
        f"channels, weights: {embedding.tags['GEOFM_WEIGHTS']}"
    )
    print(f"wrote {picture}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from geofm.raster import predict_raster
    from geofm.scenes.files import check_exists

    check_exists(options.input)
    words = [word.strip() for word in options.classes.split(",")] if options.classes else []
    number_alone = len(words) == 1 and words[0].isdecimal()
    # The file's own head: a new one would be untrained.
    model = _model(options, num_classes=None)
    count = int(model.num_classes)
    asked = int(words[0]) if number_alone else len(words) or count
    if asked != count:
        raise ModelError(
            f"{options.weights} has a head for {count} classes, {asked} are named; name all of "
            f"them in the order of training, or leave --classes out"
        )
    predict_raster(
        model,
        options.input,
        options.output,
        kind=options.kind,
        classes=None if number_alone else words or None,
        **_raster_options(options),
    )
    print(f"wrote {options.output}: {options.kind} of {count} classes")
    return 0


def _raster_options(options: argparse.Namespace) -> dict[str, Any]:
    chosen = {
        "bands": [name.strip() for name in options.bands.split(",")] if options.bands else None,
        "units": options.units,
        "level": options.level,
        "nodata": options.nodata,
        "sensor": options.sensor,
        "offset": options.offset,
        "baseline": options.baseline,
        "date": options.date,
        "align": options.align,
        "strict": not options.no_strict,
        "fill": _fill(options.fill),
        "tolerance": options.tolerance,
        "window": options.window,
        "overlap": options.overlap,
        "blend": options.blend,
        "min_valid": options.min_valid,
        "resampling": options.resampling,
        "mask_classes": options.mask_classes,
        "dtype": options.dtype,
        "compress": options.compress,
        "batch_size": options.batch_size,
        "device": options.device,
        "resume": not options.no_resume,
    }
    # What is not said is left to the function's own default.
    return {name: value for name, value in chosen.items() if value is not None}


def _model(options: argparse.Namespace, **architecture: Any) -> Any:
    """The model that a command's --model, --weights and, if it has it, --no-pretrained ask for."""
    import torch

    from geofm.factory import create_model

    untrained = getattr(options, "no_pretrained", False)
    if untrained:
        torch.manual_seed(0)
    pretrained = False if untrained else options.weights or True
    try:
        return create_model(options.model, pretrained=pretrained, **architecture)
    except DownloadError as error:
        if "no_pretrained" not in options:
            raise
        raise DownloadError(
            f"{error}. To try the command without weights: --no-pretrained"
        ) from error


def _zero_shot(options: argparse.Namespace) -> int:
    from geofm.species import name_species

    listed = Path(options.species)
    names = listed if listed.suffix.lower() == ".csv" else options.species.split(",")
    for target in (options.output, options.picture):
        if target and not target.absolute().parent.is_dir():
            raise DataNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    auxiliary = _environment(options.auxiliary) if options.auxiliary else None
    answer = name_species(
        _model(options),
        options.observations,
        names if isinstance(names, Path) else [name.strip() for name in names],
        top_k=options.top,
        taxonomy=options.taxonomy,
        batch_size=options.batch,
        skip_broken=options.skip,
        auxiliary=auxiliary,
        longitude=options.longitude,
        latitude=options.latitude,
        georeference=options.georeference,
    )
    if answer.weights.startswith("untrained"):
        print("UNTRAINED WEIGHTS: these are no answers", file=sys.stderr)
    for row in answer.rows:
        print(
            f"{row['sample']}\t{row['rank']}\t{row['species']}\t{row['family']}\t"
            f"{row['probability']:.4f}"
        )
    if options.output:
        answer.to_csv(options.output)
        print(f"wrote {options.output}", file=sys.stderr)
    if options.picture:
        answer.plot(options.picture)
        print(f"wrote {options.picture}", file=sys.stderr)
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    from geofm.pretrain.recipe import load_recipe, recipe_names

    if options.recipe is None:
        print("\n".join(recipe_names()))
        return 0
    recipe = load_recipe(options.recipe, options.overrides, quick=options.quick)
    folder = options.output or Path("runs") / recipe.name
    if options.dry_run:
        from geofm.pretrain.dry_run import describe

        print(describe(recipe, world=int(os.environ.get("WORLD_SIZE", "1"))))
        return 0
    if options.export_only:
        from geofm.pretrain.export import export_run

        card = export_run(folder, options.checkpoint, half=recipe.output.half)
        print(f"wrote {card.path}: {card.training['steps']} steps")
        return 0
    from geofm.pretrain.loop import pretrain

    words = [options.recipe, *options.overrides, *(["--quick"] if options.quick else [])]
    run = pretrain(recipe, folder, options.resume, f"geofm pretrain {shlex.join(words)}")
    if run.fabric.is_global_zero and run.progress.step == run.steps:
        card_path = next(folder.glob(f"*.{recipe.card.tag}.toml"))
        model = card_path.name.partition(".")[0]
        print(
            f"wrote {card_path}; load it: geofm.create_model({model!r}, pretrained={str(folder)!r})"
        )
    return 0


def _push(options: argparse.Namespace) -> int:
    from geofm.pretrain.push import push_run

    pushed = push_run(options.folder, options.repo, options.private)
    print(f"uploaded to {pushed.repo}, revision {pushed.revision}. In a card of your own:\n")
    print(pushed.source)
    return 0


def _environment(path: Path) -> dict[str, Any]:
    """Variables by name from a JSON file."""
    if not path.is_file():
        raise DataNotFoundError(f"there is no {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AuxiliaryError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise AuxiliaryError(f'{path} must hold an object of variables, like {{"bio01": 95}}')
    return content


def _fill(text: str | None) -> str | dict[str, str] | None:
    if text is None or "=" not in text:
        return text
    pairs = (pair.partition("=") for pair in text.split(","))
    return {missing: how for missing, _, how in pairs}


if __name__ == "__main__":
    sys.exit(main())
