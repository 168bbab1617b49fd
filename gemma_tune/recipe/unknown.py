"""What the user most likely meant by a key that does not exist."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from gemma_tune.console import quoted
from gemma_tune.recipe.json_schema import Schema, recipe_schema, resolve_schema
from gemma_tune.recipe.names import ELSEWHERE, NOT_IN_A_RECIPE, SECRETS, did_you_mean, distance, nearest


@functools.cache
def known_keys() -> dict[str, tuple[str, ...]]:
    """Every key of the schema -> the dotted paths where it stands; `data.sources.0` stands for any source."""
    found: dict[str, list[str]] = {}

    def walk(schema: Schema, prefix: str) -> None:
        for option in resolve_schema(schema):
            for key, child in option.get("properties", {}).items():
                found.setdefault(key, []).append(f"{prefix}{key}")
                walk(child, f"{prefix}{key}.")
            if "items" in option:
                walk(option["items"], f"{prefix}0.")

    walk(recipe_schema(), "")
    return {key: tuple(paths) for key, paths in found.items()}


def resembles_a_key(name: str) -> bool:
    """Whether `explain_unknown` could tell what the key `name` means."""
    known = {*known_keys(), *ELSEWHERE, *NOT_IN_A_RECIPE, *SECRETS}
    return name.lower().replace("-", "_") in known or bool(nearest(name, known))


def explain_unknown(path: tuple[str, ...], siblings: Sequence[str], *, is_section: bool) -> tuple[str, str]:
    """(what, fix) for the unknown key at the end of `path`, whose section knows `siblings`."""
    key = path[-1]
    section = ".".join(path[:-1])
    lowered = key.lower().replace("-", "_")
    if lowered in siblings:
        return f"unknown key; did you mean {lowered!r}?", f"write {lowered}"
    places = known_keys().get(lowered, ())
    if places:
        homes = " or ".join(place.rpartition(".")[0] or "the top level" for place in places)
        if one_off := [name for name in siblings if distance(lowered, name) == 1]:  # `beta` in optim
            meant = f"{did_you_mean(one_off)} {lowered} itself belongs under {homes}"
            return f"unknown key here; {meant}", f"write {' or '.join([*one_off, *places])}"
        return f"unknown key here; it belongs under {homes}", f"write it as {' or '.join(places)}"
    if lowered in ELSEWHERE:
        ours, remark = ELSEWHERE[lowered]
        return f"unknown key; it is called {ours} here", f"use {ours}" + (f" ({remark})" if remark else "")
    if lowered in NOT_IN_A_RECIPE:
        return "there is no such key in a recipe", NOT_IN_A_RECIPE[lowered]
    near = nearest(key, siblings)
    if near:
        return f"unknown key; {did_you_mean(near)}", f"write {' or '.join(near)}"
    # A short word is near to everything, so that only its own section's keys are worth a guess.
    far = [place for name in nearest(key, known_keys()) for place in known_keys()[name]][:3] if len(key) >= 4 else []
    if far:
        return f"unknown key; {did_you_mean(far)}", f"write it as {' or '.join(far)}"
    foreign = nearest(key, ELSEWHERE, limit=1) if len(key) >= 4 else []
    if foreign:
        ours = ELSEWHERE[foreign[0]][0]
        return f"unknown key; if you mean {foreign[0]!r}, it is called {ours} here", f"use {ours}"
    return (
        f"unknown key {quoted(key)}" if not key.isidentifier() else "unknown key",
        f"known {'in ' + section if section else 'at the top level'}: {', '.join(siblings)}",
    )
