"""Job files: the texts themselves (tests/golden/jobs), what shells and schedulers' schemas say of them, and refusals.

After a change of a template: GEMMA_TUNE_WRITE_GOLDEN=1 pytest tests/unit/launch/test_jobs.py, and read the difference.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from gemma_tune.cli import main
from gemma_tune.launch.jobs import FILES, TEMPLATES, job_name, seconds_of

GOLDEN = Path(__file__).parents[2] / "golden" / "jobs"

RECIPE = """\
# What: a recipe of the tests
stage: sft
model: {name: google/gemma-3-1b-it}
data: {sources: [{name: "my rows.jsonl"}]}
output: runs/My_First run
"""

ORDERS = {
    "slurm": ["--nodes", "2", "--gpus-per-node", "4", "--time", "12:00:00"],
    "kubeflow": ["--nodes", "2", "--image", "registry.example/gemma-tune:1", "--volume", "team-claim", "--time", "90"],
    "skypilot": ["--nodes", "2", "--gpu", "H100", "--volume", "s3://bucket/path"],
    "ray": ["--nodes", "2", "--gpus-per-node", "4", "output=/data/runs/first"],
}
OVERRIDES = ["optim.learning_rate=1e-4", 'samples.prompts.0=it\'s "so"']


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("my recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return "my recipe.yaml"


def rendered(template: str, recipe: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    order = ["launch", "--template", template, recipe, *OVERRIDES, *ORDERS[template], *more]
    assert main(order) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("template", FILES)
def test_job_files_are_the_golden_ones(template: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(template, recipe, capsys)
    golden = GOLDEN / FILES[template]
    if os.environ.get("GEMMA_TUNE_WRITE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
    assert "{{" not in text and text.endswith("\n")
    assert max(map(len, (TEMPLATES / FILES[template]).read_text("utf-8").splitlines())) <= 120


def command_in(text: str, start: str) -> list[str]:
    """The words of the shell command that follows `start` in a job file."""
    line = next(line for line in text.splitlines() if line.strip().startswith(start))
    return shlex.split(line.removesuffix(" &"))


def test_the_slurm_file_is_a_shell_script_whose_command_is_ours(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = rendered("slurm", recipe, capsys)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    ours = ["gemma-tune", "sft", recipe, *OVERRIDES, "--accelerate", "ddp", "--resume", "auto"]
    assert command_in(text, "gemma-tune") == ours
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH")
    )
    assert options["nodes"] == "2" and options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "4"
    assert options["time"] == "12:00:00" and options["signal"] == "B:USR1@180" and "requeue" in options
    first_command = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert text.index("#SBATCH --signal") < text.index(first_command), "sbatch reads no option after a command"


# `spec` of a TrainJob as the API server checks it: manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml of
# kubeflow/trainer at 8c0f5059b (2.3.0-rc.3), as far as our file goes. A dict is an object with no other keys; a list
# holds one form for all items; a type is a value's.
TRAINJOB: dict[str, Any] = {
    "activeDeadlineSeconds": int,
    "runtimeRef": {"apiGroup": str, "kind": str, "name": str},
    "trainer": {
        "image": str,
        "numNodes": int,
        "numProcPerNode": int,
        "command": [str],
        "args": [str],
        "env": [{"name": str, "value": str}],
        "resourcesPerNode": {"requests": {"nvidia.com/gpu": int}, "limits": {"nvidia.com/gpu": int}},
    },
    "runtimePatches": [
        {
            "manager": str,
            "trainingRuntimeSpec": {
                "template": {
                    "spec": {
                        "replicatedJobs": [
                            {
                                "name": str,
                                "template": {
                                    "spec": {
                                        "template": {
                                            "spec": {
                                                "terminationGracePeriodSeconds": int,
                                                "volumes": [
                                                    {
                                                        "name": str,
                                                        "configMap": {"name": str},
                                                        "persistentVolumeClaim": {"claimName": str},
                                                        "emptyDir": {"medium": str},
                                                    }
                                                ],
                                                "containers": [
                                                    {"name": str, "volumeMounts": [{"name": str, "mountPath": str}]}
                                                ],
                                            }
                                        }
                                    }
                                },
                            }
                        ]
                    }
                }
            },
        }
    ],
}

# A SkyPilot task: sky/utils/schemas.py at 00052dfe (get_task_schema, _get_single_resources_schema, storage modes).
TASK: dict[str, Any] = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {"accelerators": str, "image_id": str, "job_recovery": {"recover_on_exit_codes": [int]}},
    "envs": {"HF_HOME": str},
    "file_mounts": {"/shared": {"source": str, "mode": str}},
    "setup": str,
    "run": str,
}


def misfits(value: Any, form: Any, where: str = "") -> list[str]:
    """Places of `value` that are not as `form` wants them."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{where} is no mapping"]
        unknown = [f"{where}.{key} is unknown" for key in value.keys() - form.keys()]
        return unknown + [
            one for key in value.keys() & form.keys() for one in misfits(value[key], form[key], f"{where}.{key}")
        ]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [one for number, item in enumerate(value) for one in misfits(item, form[0], f"{where}.{number}")]
    return [] if type(value) is form else [f"{where} is {type(value).__name__}, not {form.__name__}"]


def test_the_kubeflow_file_is_what_its_api_takes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    carried, job = yaml.safe_load_all(rendered("kubeflow", recipe, capsys))
    assert (carried["apiVersion"], carried["kind"]) == ("v1", "ConfigMap")
    assert carried["data"] == {"recipe.yaml": RECIPE}, "the recipe arrives as it was written"
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert misfits(job["spec"], TRAINJOB) == []
    trainer = job["spec"]["trainer"]
    shared = "output=/shared/runs/My_First run"
    ours = ["gemma-tune", "sft", "/recipe/recipe.yaml", *OVERRIDES, shared, "--accelerate", "ddp", "--resume", "auto"]
    assert trainer["command"] == ours
    assert trainer["numNodes"] == 2 and job["spec"]["activeDeadlineSeconds"] == 90 * 60
    reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    assert not reserved & {variable["name"] for variable in trainer["env"]}, "the webhook refuses them"
    pod = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = pod["template"]["spec"]["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["configMap"]["name"] == carried["metadata"]["name"]


def test_the_skypilot_file_is_what_its_schema_takes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = yaml.safe_load(rendered("skypilot", recipe, capsys))
    assert misfits(task, TASK) == []
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert task["file_mounts"]["/shared"] == {"source": "s3://bucket/path", "mode": "MOUNT_CACHED"}
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    shared = "output=/shared/runs/My_First run"
    assert command_in(task["run"], "gemma-tune")[2:] == [
        recipe, *OVERRIDES, shared, "--accelerate", "ddp", "--resume", "auto"
    ]  # fmt: skip
    own = rendered("skypilot", recipe, capsys, "--image", "registry.example/gemma-tune:1")
    own_task = yaml.safe_load(own)
    assert misfits(own_task, TASK) == [] and "setup" not in own_task
    assert own_task["resources"]["image_id"] == "docker:registry.example/gemma-tune:1"


def test_the_structure_tests_can_fail() -> None:
    assert misfits({"runtimeRef": {"nam": "x"}}, TRAINJOB) == [".runtimeRef.nam is unknown"]
    assert misfits({"num_nodes": "2"}, TASK) == [".num_nodes is str, not int"]
    assert misfits({"trainer": {"command": "x"}}, TRAINJOB) == [".trainer.command is no list"]


def test_the_ray_script_trains_in_workers_that_ray_has_started(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run with stand-ins for Ray's classes: what they are given, and what a worker does."""
    text = rendered("ray", recipe, capsys)
    given: dict[str, Any] = {}

    class TorchTrainer:
        def __init__(self, train: Any, **settings: Any) -> None:
            given.update(settings, train=train)

        def fit(self) -> None:
            given["train"]()

    ours: list[list[str]] = []
    modules = {name: ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch")}
    for name in ("FailureConfig", "RunConfig", "ScalingConfig"):
        setattr(modules["ray.train"], name, SimpleNamespace)
    modules["ray.train.torch"].TorchTrainer = TorchTrainer  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("gemma_tune.cli.main", lambda words: ours.append(words) or 0)
    exec(compile(text, "job.py", "exec"), {"__name__": "__main__"})
    assert ours == [["sft", recipe, *OVERRIDES, "output=/data/runs/first", "--resume", "auto"]]
    assert (given["scaling_config"].num_workers, given["scaling_config"].use_gpu) == (8, True)
    monkeypatch.setattr("gemma_tune.cli.main", lambda words: 4)
    with pytest.raises(RuntimeError, match="exit code 4"):
        given["train"]()


@pytest.mark.parametrize(
    ("order", "what"),
    [
        (["slurm", "--image", "x"], "--image: slurm has no place for it"),
        (["slurm", "--time", "soon"], "'soon' is no time limit"),
        (["kubeflow", "--image", "x"], "--volume: is needed"),
        (["kubeflow", "--volume", "x"], "--image: is needed"),
        (["skypilot", "--time", "90"], "--time: skypilot has no place for it"),
        (["skypilot"], "--gpu: is needed"),
        (["skypilot", "--gpu", "L4:1\nrun: |"], "names no kind of GPU"),
        (["skypilot", "--gpu", "L4", "--nodes", "2"], "--volume: is needed: all nodes read the run folder"),
        (["slurm", "--accelerate", "dpp"], "there is no accelerate file 'dpp'"),
        (["slurm", "--accelerate", "single"], "1 process, and the job has 8 GPUs"),
        (["slurm", "--accelerate", "hsdp_2node", "--nodes", "4"], "2 groups of 8 processes, and the job has 32"),
        (["slurm", "--accelerate", "hsdp_2node", "--nodes", "2", "--gpus-per-node", "9"], "16 processes, and the job"),
        (["kubeflow", "--image", "x", "--volume", "x", "--accelerate", "own.yaml"], "a file of this machine"),
        (["ray", "output=/x", "--accelerate", "ddp"], "Ray starts the processes, without an accelerate file"),
        (["ray", "--volume", "x"], "--volume: ray has no place for it"),
        (["ray"], "output: runs/My_First run would lie in a folder that Ray makes"),
    ],
)
def test_options_without_a_place_or_missing_are_refused(
    order: list[str], what: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.yaml").write_text("distributed_type: MULTI_GPU\n", encoding="utf-8")
    assert main(["launch", recipe, "--template", *order]) == 2
    assert what in capsys.readouterr().err


def test_a_file_is_written_once(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    order = ["launch", "--template", "slurm", recipe, "--out", "job.sh"]
    assert main(order) == 0 and "wrote job.sh" in capsys.readouterr().out
    assert Path("job.sh").read_text("utf-8").startswith("#!/bin/bash\n")
    assert main(order) == 2
    assert "job.sh: exists already" in capsys.readouterr().err
    assert main([*order[:-1], "none/job.sh"]) == 3


def test_a_recipe_arrives_in_kubernetes_whatever_its_first_line(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "  # indented\n\n" + RECIPE + "# last: \"'{{name}}"
    Path(recipe).write_text(text, encoding="utf-8")
    carried, _ = yaml.safe_load_all(rendered("kubeflow", recipe, capsys))
    assert carried["data"]["recipe.yaml"] == text + "\n"


def test_a_name_ends_no_comment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = 'a"""\nrm x.yaml'
    Path(name).write_text(RECIPE, encoding="utf-8")
    assert "# sft of a????rm x.yaml, written" in rendered("slurm", name, capsys)
    compile(rendered("ray", name, capsys), "job.py", "exec")


HARD = "samples.prompts.0=\N{GRINNING FACE} $(HOME) $HOME `id`\nrun: |\n\n  \"two'"


@pytest.mark.parametrize("template", FILES)
def test_a_word_arrives_whatever_is_in_it(template: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The signs that end a block of YAML, those that a shell or Kubernetes replaces, and those beyond 16 bits."""
    text = rendered(template, recipe, capsys, HARD)
    if template == "kubeflow":
        _, job = yaml.safe_load_all(text)
        arrived = [word.replace("$$", "$") for word in job["spec"]["trainer"]["command"]]
        assert any("$$(HOME)" in word for word in job["spec"]["trainer"]["command"])
    elif template == "ray":
        call = next(line for line in text.splitlines() if "code = main(" in line).strip()
        arrived = ast.literal_eval(call.removeprefix("code = main(").removesuffix(")"))
    else:
        if template == "skypilot":
            task = yaml.safe_load(text)
            assert misfits(task, TASK) == []
            text = task["run"]
        command = text[text.index("gemma-tune sft ") :].partition(" &\nstep=")[0]
        printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
        arrived = printed.stdout.decode().split("\0")
    assert HARD in arrived


def test_a_recipe_that_cannot_be_read_gets_no_job(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--template", "slurm", recipe, "optim.learning_rat=1"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("12:00:00", 43_200),
        ("2-00", 172_800),
        ("1-12:30", 131_400),
        ("1-00:00:05", 86_405),
    ],
)
def test_time_limits_are_slurms(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("runs/My_First run", "gemma-my-first-run"),
        ("/x/y/", "gemma-y"),
        ("runs/" + "long-" * 20, "gemma-" + "long-" * 8 + "long"),
    ],
)
def test_names_are_what_every_scheduler_takes(output: str, name: str) -> None:
    assert job_name(output) == name and len(name) <= 50
