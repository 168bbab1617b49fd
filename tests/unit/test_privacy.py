"""Telemetry: what is set, and that the user's own setting wins."""

from __future__ import annotations

import pytest

from gemma_tune.privacy import SWITCHES, keep_private

QUIET = {switch.variable: switch.value for switch in SWITCHES}


def test_everything_is_off_by_default() -> None:
    environment: dict[str, str] = {"PATH": "/bin"}
    keep_private(environment)
    assert environment == {"PATH": "/bin", **QUIET}


def test_twice_is_once() -> None:
    environment: dict[str, str] = {}
    keep_private(environment)
    keep_private(environment)
    assert environment == QUIET


@pytest.mark.parametrize("variable", QUIET)
def test_what_the_user_set_stays(variable: str) -> None:
    environment = {variable: "mine"}
    keep_private(environment)
    assert environment[variable] == "mine"
    assert len(environment) > 1


@pytest.mark.parametrize("variable", ["HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"])
def test_a_user_who_asks_for_hub_telemetry_gets_it(variable: str) -> None:
    # The hub client takes the three as one switch: if we set another of them, the user's `0` would not count.
    environment = {variable: "0"}
    keep_private(environment)
    assert {
        name for name in environment if name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    } == {variable}
