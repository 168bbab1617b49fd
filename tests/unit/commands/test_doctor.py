"""The doctor's findings, and that he falls over nothing."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.commands import doctor

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_floors_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pattern = re.compile(r"(?P<name>[\w.-]+)>=(?P<floor>[\d.]+)(?:,<[\d.]+)?")
    found = [match for line in project["dependencies"] if (match := pattern.fullmatch(line))]
    declared = {match["name"]: match["floor"] for match in found}
    assert {name: floor for name, (floor, _) in doctor.FLOORS.items()}.items() <= declared.items()
    assert f"trl>={declared['trl']},<{doctor._TRL_BELOW}" in project["dependencies"]


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    text = capsys.readouterr().out
    assert "nothing is broken" in text
    assert "gradient passes" in text


def test_json_is_one_object_without_the_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_CanaryCanaryCanary")
    assert doctor.run(as_json=True) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["ok"] is True
    names = {(finding["group"], finding["name"]): finding for finding in report["findings"]}
    assert names["hub", "token"]["value"] == "set (not shown)"
    assert names["hub", "licence gate"]["value"] == "not asked"
    assert "Canary" not in captured.out + captured.err


def old_version(name: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def fake(asked: str) -> str:
        if asked != name:
            return real(asked)
        if version is None:
            raise metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(metadata, "version", fake)


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("transformers", "5.4.0", "transformers#45242"),
        ("trl", "1.17.0", "below 1.17"),
        ("bitsandbytes", None, 'pip install "bitsandbytes>=0.50.2"'),
        ("accelerate", "1.9", "accelerate#4171"),
    ],
)
def test_an_unfit_library_is_broken_and_its_defect_named(
    name: str, version: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old_version(name, version, monkeypatch)
    assert doctor.run(as_json=True) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    (finding,) = [finding for finding in report["findings"] if finding["status"] == "broken"]
    assert finding["name"] == name
    assert said in finding["meaning"]


def test_versions_are_compared_as_numbers() -> None:
    assert doctor._number("2.13.0+cpu") > doctor._number("2.6")
    assert doctor._number("5.16") == doctor._number("5.16.0")
    assert doctor._number("0.50.2.dev1") >= doctor._number("0.50.2")


def test_an_examination_that_fails_is_a_finding() -> None:
    def falls() -> Any:
        raise RuntimeError("libcuda is broken\nmore")
        yield

    (finding,) = doctor._guarded("device", falls)
    assert (finding.status, finding.name, finding.value) == ("broken", "RuntimeError", "libcuda is broken")


def test_cpu_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert doctor.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "avx512_bf16"}
    assert doctor.cpu_flags(tmp_path / "none") == frozenset()


def test_little_disk_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**9))
    finding = doctor._space("here", tmp_path / "not" / "yet")
    assert (finding.status, finding.value.split(" free")[0]) == ("note", "1.0 GB")


def test_the_licence_gate_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.plan.test_hub import gated

    def closed(url: str, timeout: float) -> None:
        assert timeout <= 10
        raise gated()

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", closed)
    finding = doctor._gate()
    assert (finding.status, finding.value) == ("note", "closed")
    assert "https://huggingface.co/google/gemma-3-270m" in finding.meaning
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    assert doctor._gate().value == "open"
