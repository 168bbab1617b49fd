"""Volumes and times of a step against figures that were worked out by hand, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

import gemma_tune
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.shape import count
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan import computed
from gemma_tune.plan.communication import H100_NODES, flops_of_pass, step_of
from gemma_tune.plan.computed import Case, column, recipe_of
from gemma_tune.plan.decide import decide
from gemma_tune.plan.gathered import layer_sizes, root_size
from gemma_tune.plan.machine import Launch, named_machine
from gemma_tune.plan.workload import Workload

MODEL = "google/gemma-3-27b-it"
SHAPE = PUBLISHED[MODEL]
TRAINED = 4 * 16 * count(SHAPE).lora_per_rank["all-linear"]


def work_of(strategy: str, machine: str = "2x8xh100", quantization: str = "none") -> Workload:
    target = named_machine(machine)
    recipe = recipe_of(Case(machine, MODEL, quantization, strategy))
    launch = Launch(world_size=target.world_size, nodes=target.nodes)
    return decide(recipe, target, SHAPE, FAMILIES[SHAPE.family], None, (), launch).batch.work


def test_ddp_sends_gradients_alone():
    step = step_of(SHAPE, work_of("ddp"), passes=4, nodes=2)
    assert step.gathered == 0
    assert step.reduced == pytest.approx(2 * TRAINED * 15 / 16)
    assert step.across == pytest.approx(2 * TRAINED / 2)
    alone = step_of(SHAPE, work_of("ddp", "8xh100"), passes=4, nodes=1)
    assert alone.across == 0 and alone.inside == pytest.approx(2 * TRAINED * 7 / 8)


def test_fsdp2_gathers_layers_twice_a_pass_and_the_rest_once():
    work = work_of("fsdp2")
    layers, root = sum(layer_sizes(SHAPE, work)), root_size(SHAPE, count(SHAPE), work)
    step = step_of(SHAPE, work, passes=3, nodes=2)
    whole = 3 * (2 * layers + root)
    assert step.gathered == pytest.approx(whole * 15 / 16)
    assert step.reduced == pytest.approx(TRAINED * 15 / 16), "an adapter's gradients are sent once a step"
    assert step.across == pytest.approx((whole + TRAINED) / 2), "each node has half already"


def test_layers_that_are_kept_are_gathered_once():
    from dataclasses import replace

    work = replace(work_of("fsdp2"), reshard=False)
    step = step_of(SHAPE, work, passes=1, nodes=1)
    whole = sum(layer_sizes(SHAPE, work)) + root_size(SHAPE, count(SHAPE), work)
    assert step.gathered == pytest.approx(whole * 15 / 16)


def test_hsdp_keeps_layers_inside_of_a_node():
    step = step_of(SHAPE, work_of("hsdp"), passes=3, nodes=2)
    inside = step_of(SHAPE, work_of("fsdp2", "8xh100"), passes=3, nodes=1)
    assert step.gathered == inside.gathered
    assert step.across == pytest.approx(2 * TRAINED / 2), "what ddp sends between nodes"
    assert step.network < step_of(SHAPE, work_of("fsdp2"), passes=3, nodes=2).network / 50


def test_packed_weights_are_a_quarter():
    plain, packed = (sum(layer_sizes(SHAPE, work_of("fsdp2", quantization=held))) for held in ("none", "nf4"))
    adapters = TRAINED
    assert (packed - adapters) / (plain - adapters) == pytest.approx(0.25, rel=1e-3)


def test_operations_of_a_pass():
    from dataclasses import replace

    work = replace(work_of("ddp"), checkpointing=False)
    parameters = count(SHAPE)
    multiplied = parameters.linear + parameters.embedding
    assert flops_of_pass(SHAPE, work) == 4 * multiplied * work.tokens
    again = replace(work, checkpointing=True)
    assert flops_of_pass(SHAPE, again) == (4 * multiplied + 2 * parameters.linear) * work.tokens
    assert flops_of_pass(SHAPE, replace(work, rank=0)) == 6 * multiplied * work.tokens
    step = step_of(SHAPE, work, passes=2, nodes=2)
    assert step.compute == pytest.approx(2 * 4 * multiplied * work.tokens / (0.4 * 989e12))
    assert step.bound == "compute"


def test_rates_are_those_of_the_data_sheets():
    assert (H100_NODES.flops, H100_NODES.nvlink, H100_NODES.network) == (989e12, 450e9, 400e9)


@pytest.mark.parametrize("case", [case for cases in computed.PAGES.values() for case in cases], ids=lambda c: c.label)
def test_every_term_is_in_one_row_of_the_table(case):
    for term in column(case).memory:
        assert sum(term.name.startswith(row) for row in computed.ROWS.values()) == 1, term.name


def test_the_page_shows_what_is_computed_now():
    # After a change of the estimate: python -m gemma_tune.plan.computed prints what stands between the marks.
    page = (Path(gemma_tune.__file__).parents[1] / "docs" / "clusters.md").read_text("utf-8")
    assert computed.section() in page
