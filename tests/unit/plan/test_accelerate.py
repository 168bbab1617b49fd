"""Files of accelerate: the shipped ones, found by name; and what `check --accelerate` finds in broken ones."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gemma_tune
from gemma_tune.cli import app, main
from gemma_tune.commands import check
from gemma_tune.errors import UserError
from gemma_tune.plan.accelerate_check import FSDP_KEYS, MESH_KEYS
from gemma_tune.plan.accelerate_files import accelerate_file, launch_in, read_accelerate_file, shipped_files
from gemma_tune.plan.machine import Launch

ROOT = Path(gemma_tune.__file__).parents[1]
RECIPE = """\
model: {name: google/gemma-3-4b-it%s}
data: {sources: [{name: ultrachat}], max_length: 1024}
batch: {size: 32}
output: runs/x
"""
SOUND = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 8
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: FULL_STATE_DICT
"""


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., list[str]]:
    """What is wrong with a file, as printed: `found(text, recipe=..., machine=...)`."""

    def findings(text: str, *overrides: str, machine: str = "8xh100", recipe: str = RECIPE % "") -> list[str]:
        (tmp_path / "a.yaml").write_text(text)
        (tmp_path / "r.yaml").write_text(recipe)
        try:
            check.run(str(tmp_path / "r.yaml"), overrides, machine, True, str(tmp_path / "a.yaml"))
        except UserError as error:
            return [f"{problem.where.removeprefix(f'{tmp_path}/')}: {problem.what}" for problem in error.problems]
        return []

    return findings


# --- the shipped files


def test_there_are_these():
    names = {"single", "ddp", "fsdp2", "fsdp2_qlora", "fsdp2_offload", "fsdp2_sharded", "hsdp_2node"}
    assert set(shipped_files()) == names | {"cpu_ddp", "cpu_fsdp2", "cpu_hsdp"}


@pytest.mark.parametrize("path", shipped_files().values(), ids=lambda path: path.stem)
def test_the_header_says_when_how_and_what_is_checked(path):
    lines = path.read_text("utf-8").splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["# When", "# Run", "# Check"]
    assert not lines[3].startswith("#") and max(map(len, lines)) <= 120
    run, checked = (line.partition(":")[2].partition(", on each")[0].strip() for line in lines[1:3])
    checked = checked.partition(" verifies")[0]
    for command in (run, checked):
        words = shlex.split(command)
        assert words[0] == "gemma-tune" and words[words.index("--accelerate") + 1] == path.stem
        shown = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, [words[1], "--help"], terminal_width=200).output)
        assert all(option in shown for option in words if option.startswith("--")), command


@pytest.mark.parametrize("path", shipped_files().values(), ids=lambda path: path.stem)
def test_nothing_is_wrong_with_a_shipped_file(path, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE % "")
    name = path.stem
    machine = "cpu" if name.startswith("cpu") else "2x8xh100" if name == "hsdp_2node" else "8xh100"
    extra = ["model.name=google/gemma-3-270m-it"] if machine == "cpu" else []
    assert check.run(str(tmp_path / "r.yaml"), extra, machine, True, name) == 0
    plan = json.loads(capsys.readouterr().out)
    strategy = plan["session"]["distributed"]["value"]["strategy"]
    first = name.removeprefix("cpu_").partition("_")[0]
    assert strategy == first


def test_found_by_any_form_of_its_name(tmp_path):
    for name in ("ddp", "ddp.yaml", "accelerate_configs/ddp.yaml", str(ROOT / "accelerate_configs/ddp.yaml")):
        assert accelerate_file(name).samefile(ROOT / "accelerate_configs/ddp.yaml")
    mine = tmp_path / "mine.yaml"
    mine.write_text(SOUND)
    assert accelerate_file(str(mine)) == mine


@pytest.mark.parametrize(
    ("name", "hint"), [("fdsp2", "did you mean 'fsdp2'"), ("zero", "there are: "), ("a/b.yaml", "shipped are")]
)
def test_a_file_that_there_is_not(name, hint):
    with pytest.raises(UserError, match="there is no") as caught:
        accelerate_file(name)
    assert hint in caught.value.problems[0].fix


# --- reading


def test_prefixes_are_added_as_accelerate_does(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("distributed_type: FSDP\nfsdp_config:\n  version: 2\n  offload_params: true\n")
    read = read_accelerate_file(file)
    assert launch_in(read, 4) == Launch(world_size=4, fsdp=2, offload=True, reshard_after_forward=True)
    assert read.where("fsdp_config.fsdp_version") == f"{file}:3"


def test_no_unquoted_is_one_process(tmp_path):
    file = tmp_path / "a.yaml"
    for text in ("distributed_type: NO\n", "distributed_type: 'NO'\nnum_processes: 4\n"):
        file.write_text(text)
        assert launch_in(read_accelerate_file(file), 8) == Launch()


@pytest.mark.parametrize(
    "text", ["", "- a\n", "a: [\n", "a: 1\na: 2\n", "distributed_type: FSDP\nnum_processes: two\n"]
)
def test_what_is_no_accelerate_file(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(file))):
        launch_in(read_accelerate_file(file), 1)


# --- findings


def test_a_sound_file(found):
    assert found(SOUND) == []


BROKEN = [
    (("distributed_type: FSDP", "distributed_type: MULTI_CPU"), "a.yaml:2: accelerate 1.15 starts one single process"),
    (("distributed_type: FSDP", "distributed_type: DEEPSPEED"), "a.yaml:2: DeepSpeed is not supported"),
    (("distributed_type: FSDP", "distributed_type: TPU"), "a.yaml:2: TPU is nothing that gemma-tune runs under"),
    (("distributed_type: FSDP\n", ""), "a.yaml: names no distributed_type"),
    (("LOCAL_MACHINE", "AMAZON_SAGEMAKER"), "a.yaml:1: AMAZON_SAGEMAKER is started by services"),
    (("num_machines", "num_machine"), "a.yaml:4: accelerate knows no key 'num_machine'"),
    (("fsdp_version: 2", "fsdp_version: 1"), "a.yaml:7: fsdp_version: 1 is the first FSDP"),
    (("  fsdp_version: 2\n", ""), "a.yaml: no fsdp_version, which is 1, is the first FSDP"),
    (("'no'", "fp16"), "a.yaml:3: mixed_precision: fp16, but fp16 cannot be sharded"),
    (("'no'", "fp8"), "a.yaml:3: gemma-tune does not train in fp8"),
    (("TRANSFORMER_BASED_WRAP", "NO_WRAP"), "a.yaml:8: fsdp_auto_wrap_policy: NO_WRAP would gather the whole"),
    (("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP"), "a.yaml:8: groups by size would put the embedding, which is the"),
    (("FULL_STATE_DICT", "LOCAL_STATE_DICT"), "a.yaml:9: FSDP2 has no LOCAL_STATE_DICT"),
    (("'no'", "nonsense"), "a.yaml:3: mixed_precision: nonsense is nothing that accelerate knows"),
    (("'no'", "no"), "a.yaml:3: no without quotes is false for accelerate"),
    (("num_machines: 1", "num_machines: 2"), "a.yaml:4: is for 2 machines, and 8xh100 is 1"),
    (("num_processes: 8", "num_processes: 0"), "a.yaml:5: 0 processes train nothing"),
    (("num_processes: 8", "use_cpu: true"), "a.yaml:5: says not how many processes share the CPU"),
    (("num_machines: 1", "num_machines: 3"), "a.yaml:5: 8 processes cannot be the same number on each of 3"),
    (("num_machines: 1", "num_machines: 2\nmachine_rank: 2"), "a.yaml:5: machine_rank 2 of 2 machines"),
    (("num_machines: 1", "num_machines: 1\ngpu_ids: 0,1"), "a.yaml:5: gpu_ids names 2, for 8 processes"),
    (("num_machines: 1", "num_machines: 1\ngpu_ids: [0, 1]"), "a.yaml:5: gpu_ids is no text"),
    (("distributed_type: FSDP", "distributed_type: [FSDP]"), "a.yaml:2: distributed_type is no single value"),
    (("distributed_type: FSDP", "distributed_type: {a: 1}"), "a.yaml:2: distributed_type is no single value"),
    (("distributed_type: FSDP", "distributed_type: 3"), "a.yaml:2: 3 is nothing that gemma-tune runs under"),
    (("num_machines: 1", "parallelism_config: 4"), "a.yaml:4: parallelism_config is no section"),
    (("num_machines: 1", "dynamo_config: [a]"), "a.yaml:4: dynamo_config is no section"),
    (("fsdp_version: 2", "fsdp_version: 3"), "a.yaml:7: there is no FSDP of version 3"),
    (("fsdp_version: 2", "fsdp_version: {a: 1}"), "a.yaml:7: fsdp_config.fsdp_version is no single value"),
    (("num_processes: 8", "num_processes: 5"), "batch.size: batch.size 32 cannot be split|: batch.size 32 cannot be"),
    (("num_processes: 8", "num_processes: 16"), "num_processes: 16 processes a node, and 8xh100 has 8 GPUs"),
]


@pytest.mark.parametrize(("change", "said"), BROKEN, ids=[said[:40] for _, said in BROKEN])
def test_what_is_found(found, change, said):
    old, new = change
    assert SOUND.count(old) == 1
    findings = found(SOUND.replace(old, new))
    assert any(part in finding for finding in findings for part in said.split("|")), findings


ADDED = [
    ("fsdp_activation_checkpointing: true", "a.yaml:10: fsdp_activation_checkpointing renames modules"),
    ("fsdp_transformer_layer_cls_to_wrap: Gemma2DecoderLayer", "a.yaml:10: this Gemma 3 has no layers of class Gemma2"),
    ("fsdp_transformer_layer_cls_to_wrap: SiglipTextEmbeddings,Gemma3DecoderLayer", "of class SiglipTextEmbeddings:"),
    (
        "fsdp_activation_checkpointing_offload: true",
        "a.yaml:10: fsdp_activation_checkpointing_offload stops accelerate",
    ),
    ("fsdp_ignored_modules: lm_head", "a.yaml:10: modules that FSDP ignores (lm_head)"),
    ("fsdp_ofload_params: true", "a.yaml:10: accelerate knows no key 'fsdp_ofload_params' in fsdp_config"),
    ("fsdp_offload_params: perhaps", "a.yaml:10: fsdp_offload_params: perhaps is neither true nor false"),
    ("fsdp_reshard_after_forward: -3", "a.yaml:10: fsdp_reshard_after_forward: -3 is neither"),
    ("fsdp_cpu_ram_efficient_loading: true\n  fsdp_sync_module_states: false", "a.yaml:11: accelerate launch stops"),
]


@pytest.mark.parametrize(("line", "said"), ADDED, ids=[line[:40] for line, _ in ADDED])
def test_what_is_found_in_a_further_line(found, line, said):
    assert any(said in finding for finding in found(f"{SOUND}  {line}\n"))


@pytest.mark.parametrize("short", ["tp", "cp", "sp"])
def test_parallelism_that_there_is_not(found, short):
    mesh = f"parallelism_config:\n  parallelism_config_{short}_size: 2\n"
    (finding,) = found(SOUND + mesh)
    assert finding.startswith("a.yaml:11: ") and f"({short}_size: 2) is not supported" in finding
    assert (
        "knows no key 'dp_shard_size' in parallelism_config"
        in found(SOUND + "parallelism_config: {dp_shard_size: 8}\n")[0]
    )


def test_the_keys_of_the_sections_are_accelerates():
    source = Path(find_spec("accelerate").origin).parent / "commands/launch.py"
    options = set(re.findall(r'"--((?:fsdp|parallelism_config)_\w+)"', source.read_text("utf-8")))
    assert options | {"fsdp_ignored_modules"} == FSDP_KEYS | MESH_KEYS


def test_the_right_classes_are_no_finding(found):
    line = "  fsdp_transformer_layer_cls_to_wrap: Gemma3DecoderLayer,SiglipEncoderLayer\n"
    assert found(SOUND + line) == []
    assert found(SOUND + line, "model.text_only=true"), "the text-only class has no tower"


def test_layers_that_share_keys_and_values_are_named(found):
    line = "  fsdp_activation_checkpointing: true\n"
    assert "share keys and values" in found(SOUND + line, "model.name=google/gemma-4-E2B-it")[0]
    assert "share keys" not in found(SOUND + line)[0]


def test_storage_and_gathered_type(found):
    text = SOUND.replace("'no'", "bf16")
    assert found(text) == []
    assert "stored as float32 and would be gathered as bfloat16" in found(text, "model.precision=fp32")[0]
    assert found(text, "model.precision=fp32", "model.quantization=none") == []


def test_groups_that_are_not_the_processes(found):
    mesh = "parallelism_config:\n  parallelism_config_dp_replicate_size: 2\n  parallelism_config_dp_shard_size: %d\n"
    assert found(SOUND + mesh % 4) == []
    assert "a.yaml:11: groups of 2 x 3 processes are not the 8" in found(SOUND + mesh % 3)[0]


def test_machines_of_the_file_and_those_that_were_named(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE % "")
    for machine, said in (("8xh100", "2 machines, and 8xh100 is 1"), ("3x8xh100", "2 machines, and 3x8xh100 is 3")):
        with pytest.raises(UserError, match=said):
            check.run(str(tmp_path / "r.yaml"), [], machine, True, "hsdp_2node")


def test_memory_of_a_part_against_the_machine(found):
    large = ["model.name=google/gemma-3-27b-it", "model.quantization=none", "data.max_length=8192"]
    assert found(SOUND, *large) == []
    whole = SOUND.replace("FSDP", "MULTI_GPU")
    assert "each process: the run needs" in found(whole, *large, "memory.gradient_checkpointing=false")[0]


def test_stages_and_optimizers_that_are_not_sharded(found):
    kto = RECIPE % "" + "stage: kto\n"
    assert "kto is not sharded" in found(SOUND, recipe=kto)[0]
    assert "adamw_8bit cannot take a step" in found(SOUND, "optim.optimizer=adamw_8bit")[0]


def test_a_file_for_cpus_and_a_machine_with_gpus(found):
    assert "keeps to the CPU, and 8xh100 has GPUs" in found(f"{SOUND}use_cpu: true\n")[0]
    offload = f"{SOUND}  fsdp_offload_params: true\nuse_cpu: true\n"
    assert any("nothing to offload from" in one for one in found(offload, machine="cpu"))


def test_everything_at_once_and_the_exit_code(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE % "")
    text = SOUND.replace("num_processes: 8", "num_processes: 5") + "  fsdp_activation_checkpointing: true\n"
    (tmp_path / "a.yaml").write_text(text)
    words = ["check", str(tmp_path / "r.yaml"), "--machine", "8xh100", "--accelerate", str(tmp_path / "a.yaml")]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert printed.count("error: ") == 2 and printed.count("fix: ") == 2
    (tmp_path / "a.yaml").write_text(SOUND)
    assert main(words) == 0
    assert "fsdp2" in capsys.readouterr().out
