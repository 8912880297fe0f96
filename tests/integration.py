"""Which tests are integration tests, and the rule that says so.

A test is an integration test when what it tests is not one function or one callback of the package but the whole at
work, in one of the ways of :data:`PLACES`. It is deselected by default, as ``slow`` and ``gpu`` are;
``make test-integration`` runs it, and continuous integration always does. Of each kind that a change may break without
any other test seeing it, :data:`STAYS` keeps one with the fast tests. A test of which a smaller one says the same is no
integration test: it is no test that is needed. What takes longer than ten seconds is ``slow``, and that alone.

Places are the beginnings of tests' ids; a single test elsewhere may be marked ``@pytest.mark.integration``.
"""

from __future__ import annotations

import pytest

PLACES: dict[str, tuple[str, ...]] = {
    "several processes, or others than this one": (
        "tests/distributed/",
        "tests/callbacks/test_soaked.py",
        "tests/core/test_files.py::test_killed_at_any_moment_the_file_is_whole",
        "tests/core/test_imports.py",
        "tests/report/test_browser.py",
        "tests/report/test_coupling.py::test_two_hundred_blocks_are_drawn",
        "tests/report/test_golden.py::test_heat_map_survives_any_number_of_blocks_and_long_names",
        "tests/report/test_rendering.py",
        "tests/test_cli.py::test_exit_codes_are_those_that_the_docs_tell",
        "tests/test_cli.py::test_light_commands_load_neither_torch_nor_lightning",
    ),
    "whole commands, each with its training": (
        "tests/commands/test_analyze.py",
        "tests/commands/test_basin.py",
        "tests/commands/test_demo.py",
        "tests/commands/test_fit.py",
        "tests/commands/test_graft.py",
        "tests/commands/test_plasticity_sweep.py",
        "tests/recipes/",
        "tests/test_cli.py::test_overlays_add_to_the_callbacks_of_a_recipe",
        "tests/test_cli.py::test_validate_takes_a_checkpoint",
        "tests/test_cli.py::test_without_a_logger_configurations_lie_side_by_side",
    ),
    "whole trainings that are compared with others": (
        "tests/callbacks/test_adapters.py::test_weights_that_move_below_adapters_are_part_of_the_change",
        "tests/callbacks/test_adapters.py::test_rows_are_of_merged_weights_and_say_so_while_nothing_is_disturbed",
        "tests/callbacks/test_attention_tracker.py::test_stacks_of_an_encoder_decoder_are_tracked_by_name",
        "tests/callbacks/test_attention_tracker.py::test_resumed_equals_uninterrupted",
        "tests/callbacks/test_basin_volume.py::test_a_bridge_is_walked_at_the_end_and_not_between",
        "tests/callbacks/test_basin_volume.py::test_resumed_equals_uninterrupted",
        "tests/callbacks/test_finetune_comparison.py",
        "tests/callbacks/test_head_plasticity.py",
        "tests/callbacks/test_interruptions.py",
        "tests/callbacks/test_isolation_of_callbacks.py",
        "tests/callbacks/test_knowledge_coupling.py::test_resumed_equals_uninterrupted",
        "tests/callbacks/test_resume.py",
        "tests/callbacks/test_resume_mid_epoch.py",
        "tests/callbacks/test_reverse_golden.py::test_resumed_equals_uninterrupted",
        "tests/callbacks/test_reverse_golden.py::test_the_training_is_not_disturbed",
        "tests/callbacks/test_store.py::test_rows_of_a_run_hold_no_history",
        "tests/callbacks/test_taylor_diff.py::test_resumed_equals_uninterrupted",
        "tests/callbacks/test_which_weights.py",
        "tests/training/test_export.py",
        "tests/training/test_masks.py::test_resumed_equals_uninterrupted",
    ),
    "models that are trained or edited until an analysis must see it": (
        "tests/analysis/attribution/test_graft.py::test_attribution_beats_magnitude_and_random_elements",
        "tests/analysis/attribution/test_learned.py",
        "tests/analysis/circuits/test_known.py",
        "tests/analysis/coupling/test_coupling_trained.py",
        "tests/analysis/heads/test_heads_trained.py",
        "tests/analysis/ripple/test_finetune_ripple.py",
        "tests/analysis/ripple/test_rank_one.py",
        "tests/analysis/ripple/test_ripple.py",
        "tests/analysis/ripple/test_ripple_use.py",
        "tests/training/test_variants.py",
    ),
    "whole searches and walks, as long as users' are": (
        "tests/analysis/basin/test_bridge.py::test_a_bridge_takes_no_more_gradients_than_it_says",
        "tests/analysis/basin/test_bridge.py::test_a_classifier_of_30_parameters_has_the_volume_that_splitting_finds",
        "tests/test_compat.py",
    ),
    "what the docs show": (
        "tests/test_doc_blocks.py::test_python_blocks_run",
        "tests/test_notebooks.py",
    ),
}

STAYS: dict[str, tuple[str, ...]] = {
    "several processes": ("tests/distributed/test_masked.py",),
    "a command": (
        "tests/commands/test_analyze.py::test_results_are_those_of_the_functions",
        "tests/recipes/test_recipes.py::test_the_first_line_runs[recipes/text_from_scratch]",
    ),
    "a figure": ("tests/report/test_rendering.py::test_a_specification_becomes_an_image_of_its_size",),
    "a training that cuts heads": (
        "tests/callbacks/test_head_plasticity.py::test_scoring_and_measuring_leave_no_trace",
    ),
    "an undisturbed training": ("tests/callbacks/test_isolation_of_callbacks.py::test_single_device[both]",),
    "a resumed training": ("tests/callbacks/test_resume.py::test_resumed_equals_uninterrupted[new folder]",),
    "an edited model": (
        "tests/analysis/ripple/test_ripple.py::test_every_number_is_that_of_copies_read_piece_by_piece[llama-answer]",
        "tests/analysis/ripple/test_ripple.py::test_the_model_comes_back_bit_for_bit",
        "tests/analysis/ripple/test_ripple.py::test_the_prediction_is_first_order[llama]",
    ),
    "a former name": ("tests/test_compat.py::test_arguments_keep_their_names_order_and_defaults",),
    "a page of the docs": ("tests/test_doc_blocks.py::test_python_blocks_run[README.md]",),
}


def is_listed(identity: str) -> bool:
    """Whether a test is an integration test by its place.

    >>> is_listed("tests/distributed/test_core.py::test_x"), is_listed("tests/distributed/test_masked.py::test_x")
    (True, False)
    """
    stays, listed = (tuple(place for places in kinds.values() for place in places) for kinds in (STAYS, PLACES))
    return identity.startswith(listed) and not identity.startswith(stays)


def mark(item: pytest.Item) -> None:
    """Marks an integration test by its place, unless it is slow.

    Raises:
        pytest.UsageError: It is marked as both.
    """
    slow = item.get_closest_marker("slow") is not None
    if slow and item.get_closest_marker("integration") is not None:
        raise pytest.UsageError(f"{item.nodeid} is marked slow and integration; it is one of them")
    if is_listed(item.nodeid) and not slow:
        item.add_marker(pytest.mark.integration)
