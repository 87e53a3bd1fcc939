"""Cards as text: the README's table and what ``geofm info`` shows."""

from __future__ import annotations

from geofm import registry
from geofm.cards import WeightCard, published_cards

__all__ = ["card_text", "checkpoint_table"]


def checkpoint_table(filter: str = "*") -> str:
    """The table of checkpoints, in Markdown.

    Args:
        filter: Wildcard.

    Returns:
        One row a card.
    """
    rows = [
        "| `create_model` name | trained on | input | bands | licence of the weights |",
        "|---|---|---|---|---|",
    ]
    encoders = {a.name for a in registry.architectures().values() if a.name == a.weights_of}
    for name in registry.list_models(filter, pretrained=True):
        model, tag = registry.split_name(name)
        if model not in encoders or tag is None:
            continue
        card = published_cards()[name]
        mark = " (default)" if card.default else ""
        rows.append(
            f"| `{name}`{mark} | {card.training.get('data', '')} | "
            f"{card.input.size} px, {' or '.join(card.input.levels)} | "
            f"{' '.join(card.input.bands)} | {card.licence.weights} |"
        )
    return "\n".join(rows)


def card_text(card: WeightCard, file_sha256: str | None = None) -> str:
    """What a card says, for reading.

    Args:
        card: The card.
        file_sha256: Whole hash of its file, where that is known; None for what the card states.

    Returns:
        Several lines.
    """
    spec = card.input
    arguments = ", ".join(f"{k}={v}" for k, v in card.arguments.items())
    normalization = {
        "zscore": f"(DN - mean) / std, statistics of {', '.join(spec.statistics)}",
        "divide": f"DN / {spec.divisor or 1:g}",
        "range": "DN to -1..1 by a range per band, inside the model",
    }[spec.normalization]
    published = card.source.sha256 or "not published; recorded at the first download"
    lines = [
        f"{card.name}: {card.title}",
        f"arguments: {arguments}",
        f"bands:     {' '.join(spec.bands)} ({spec.sensor})",
        f"input:     {normalization}; tiles of {spec.size} px; "
        f"no data: {', '.join(f'{v:g}' for v in spec.nodata) or 'none'}",
    ]
    for name, rule in spec.derived.items():
        lines.append(
            f"           {name} from {rule.bands[0]} and {rule.bands[1]} where it is missing"
        )
    if card.auxiliary:
        names = ", ".join(f"{v.name} ({v.unit})" for v in card.auxiliary)
        lines.append(f"variables: {names}")
    lines += [
        f"source:    {card.source}",
        f"sha256:    {file_sha256 or published}",
        f"card hash: {card.sha256}",
        f"licence:   weights: {card.licence.weights}; code: {card.licence.code}; "
        f"data: {card.licence.data}",
    ]
    if card.licence.note:
        lines.append(f"           {card.licence.note}")
    lines += [f"{key + ':':<10} {value}" for key, value in card.training.items()]
    for score in card.scores:
        lines.append(
            f"score:     {score.task}, {score.protocol}: {score.metric} {score.value:g} "
            f"({score.source})"
        )
    lines += ["cite:", card.citation]
    return "\n".join(lines)
