"""Checkpoints: whole or absent, verified, ordered by step."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from gemma_tune.errors import AccessError, TrainingError
from gemma_tune.train import checkpoint

IDENTITY = {"trainer.learning_rate": 1e-4}


def save(run: Path, step: int, content: bytes = b"weights") -> Path:
    def fill(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(content)
        (folder / "parts").mkdir()
        (folder / "parts" / "rng").write_bytes(bytes([step]))

    return checkpoint.save(run, step, fill, identity=IDENTITY, progress={"tokens_seen": step * 10})


def test_a_saved_checkpoint_reads_back(tmp_path: Path) -> None:
    found = checkpoint.read(save(tmp_path, 7))
    assert (found.step, found.identity, found.progress) == (7, IDENTITY, {"tokens_seen": 70})
    assert found.folder == tmp_path / "checkpoint-7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7"]


def test_order_is_by_step_number_not_by_name_or_date(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    os.utime(tmp_path / "checkpoint-9", (4e9, 4e9))  # somebody wrote into the oldest: the newest date of all
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [100, 10, 9]
    assert checkpoint.rotate(tmp_path, 2) == [tmp_path / "checkpoint-9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_rotation_always_keeps_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert checkpoint.rotate(tmp_path, 0) == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "parts/rng", checkpoint.MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_damage_of_any_file_is_found_and_the_next_older_one_taken(tmp_path: Path, name: str, harm: str) -> None:
    save(tmp_path, 10)
    victim = save(tmp_path, 20) / name
    data = bytearray(victim.read_bytes())
    if harm == "remove":
        victim.unlink()
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes({"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b""}[harm])
    search = checkpoint.newest(tmp_path)
    assert search.found is not None and search.found.step == 10
    [(folder, reason)] = search.skipped
    assert folder == tmp_path / "checkpoint-20" and reason


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 3) / checkpoint.MANIFEST
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 2
        path.write_bytes(bytes(bad))
        try:
            found = checkpoint.read(path.parent)
        except checkpoint.Damaged:
            continue
        # A flip in white space between tokens changes nothing that the file says.
        assert json.loads(bad) == json.loads(good) and found.step == 3


def test_foreign_files_in_a_checkpoint_do_no_harm(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / "eval_results.json").write_text("{}")
    assert checkpoint.read(folder).step == 5


def test_a_failure_while_filling_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise ValueError("boom")

    save(tmp_path, 1)
    with pytest.raises(ValueError, match="boom"):
        checkpoint.save(tmp_path, 2, fill, identity={}, progress={})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4, b"old")
    folder = save(tmp_path, 4, b"new")
    assert (folder / "adapter_model.safetensors").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        path = folder / "w"
        path.write_bytes(b"x")
        path.chmod(0o600)  # as safetensors leaves it

    old = os.umask(0o022)
    try:
        folder = checkpoint.save(tmp_path, 1, fill, identity={}, progress={})
    finally:
        os.umask(old)
    assert stat.S_IMODE((folder / "w").stat().st_mode) == 0o644


def test_a_disk_without_modes_takes_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        def chmod(path: Path, mode: int) -> None:
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(Path, "chmod", chmod)

    refuse(errno.EPERM)  # a mounted bucket
    assert checkpoint.read(save(tmp_path, 1)).step == 1
    refuse(errno.EIO)
    with pytest.raises((OSError, TrainingError), match=r"(?i)input/output error"):
        save(tmp_path, 2)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [1]


def test_every_file_is_flushed_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, replace = checkpoint.flush, os.replace
    monkeypatch.setattr(checkpoint, "flush", lambda path: (events.append(Path(path).name), flush(path))[1])
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (events.append("RENAME"), replace(a, b))[1])
    save(tmp_path, 8)
    before, after = events[: events.index("RENAME")], events[events.index("RENAME") + 1 :]
    assert set(before) == {"adapter_model.safetensors", "rng", checkpoint.MANIFEST, "parts", ".staging-8"}
    assert after == [tmp_path.name]


def test_leftovers_of_a_crash_are_swept_and_never_taken_for_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".staging-2", ".trash-checkpoint-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"x")
    assert checkpoint.newest(tmp_path).found.step == 1  # type: ignore[union-attr]
    checkpoint.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_damaged_checkpoints_above_the_resumed_one_are_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.set_aside_after(tmp_path, 1) == [tmp_path / "damaged-checkpoint-2"]
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("exc", "error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), TrainingError, "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), TrainingError, "the disk is full"),
        (RuntimeError("basic_ios::clear: iostream error"), TrainingError, "the disk is full"),
        (OSError(errno.EIO, "Input/output error"), TrainingError, "the disk failed"),
        (PermissionError(errno.EACCES, "Permission denied"), AccessError, "cannot write"),
        (OSError(errno.EROFS, "Read-only file system"), AccessError, "cannot write"),
    ],
)
def test_disk_failures_name_the_disk_and_the_place(
    tmp_path: Path, exc: Exception, error: type[Exception], says: str
) -> None:
    def fill(folder: Path) -> None:
        raise exc

    with pytest.raises(error) as caught:
        checkpoint.save(tmp_path, 6, fill, identity={}, progress={})
    assert says in str(caught.value) and str(tmp_path / "checkpoint-6") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "exc",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
    ],
)
def test_errors_that_are_not_the_disks_pass_through_unchanged(tmp_path: Path, exc: Exception) -> None:
    with pytest.raises(type(exc)) as caught, checkpoint.disk_errors(tmp_path):
        raise exc
    assert caught.value is exc
